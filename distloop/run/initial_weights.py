"""The weights of --init-from, with which a run begins: of a run or a checkpoint, or a file of another program."""

import argparse
import pathlib
import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from distloop.config.places import absolute
from distloop.errors import UsageError
from distloop.run.checkpoint import MODEL, differing_shapes, newest_good, put_weights, read_weights, weights_of
from distloop.run.module_state import is_extra, tensors_and_extra

PICKLED = (".pt", ".pth", ".ckpt", ".bin", ".tar")  # files of torch.save(), as people name them
PLACES = ("state_dict", "model_state_dict", "model")  # where Lightning, timm, torchvision and others keep the weights
PREFIXES = ("module.", "model.", "_orig_mod.")  # of DDP, of Lightning and others, of torch.compile()
# Command lines and paths, which torchvision and timm save beside the weights. They are only filled with data.
HARMLESS: list[Any] = [argparse.Namespace, pathlib.PosixPath]
PLAIN = 'torch.save(model.state_dict(), "plain.pth")'
FRESH = "as the model initialises it"


def weights_file(source: str) -> Path:
    """The file that --init-from names: itself, or that of a checkpoint, or of a run's newest. Raises UsageError."""
    path = absolute(source)
    for file in (path, path / MODEL):
        if file.is_file():
            return file
    newest, passed_over = newest_good(path / "checkpoints")
    if newest is None:
        reasons = "".join(f"\n  {line}" for line in passed_over)
        raise UsageError(
            f"init_from = {source!r}: no run, checkpoint or .safetensors, .pt or .pth file there.{reasons}"
        )
    return newest / MODEL


def load_initial_weights(path: Path, model: nn.Module, fit: bool) -> list[str]:
    """Copy a file's weights into the model's tensors. `fit`: those whose shape is another, and those that the file
    lacks, stay as they are; returns a line for each. Else raises UsageError for a file that does not fit in all."""
    tensors, extra = _read_pickled(path) if path.suffix in PICKLED else read_weights(path)
    own_tensors, own_extra = tensors_and_extra(model)
    prefix = _prefix([*tensors, *extra], [*own_tensors, *own_extra])
    tensors, extra = ({name.removeprefix(prefix): value for name, value in each.items()} for each in (tensors, extra))
    if not fit:
        hint = "\n--init-fit begins with the tensors that fit, and leaves the others as the model initialises them."
        put_weights(path, tensors, extra, model, hint)
        return []
    fitting = {name: tensor for name, tensor in tensors.items() if _fits(tensor, own_tensors.get(name))}
    if not fitting:
        found, expected = ({n: tuple(t.shape) for n, t in each.items()} for each in (tensors, own_tensors))
        raise UsageError(f"--init-fit: no tensor of {path} fits the model:\n{differing_shapes(found, expected)}")
    model.load_state_dict({**fitting, **{n: value for n, value in extra.items() if n in own_extra}}, strict=False)
    return _lines(path, tensors, own_tensors, fitting, weights_of(model, lambda _, tensor: tensor).aliases)


def _fits(tensor: Tensor, own: Tensor | None) -> bool:
    return own is not None and tensor.shape == own.shape and tensor.is_complex() <= own.is_complex()


def _lines(
    path: Path,
    found: Mapping[str, Tensor],
    own: Mapping[str, Tensor],
    fitting: Mapping[str, Tensor],
    tied: dict[str, str],
) -> list[str]:
    """What begins fresh, and what is not used. `tied`: names of tensors that have another name, too."""
    lines = [
        f"--init-fit: {name} starts fresh: {_form(found[name])} in {path}, {_form(tensor)} in the model"
        for name, tensor in own.items()
        if name in found and name not in fitting
    ]
    loaded = {tied.get(name, name) for name in fitting}
    missing = [name for name in own if name not in found and tied.get(name, name) not in loaded]
    lines += [f"--init-fit: {name} starts fresh: {path} lacks it" for name in missing]
    return lines + [
        f"--init-fit: {name} is not used: the model has no such tensor" for name in found if name not in own
    ]


def _form(tensor: Tensor) -> str:
    return f"{list(tensor.shape)}{' complex' if tensor.is_complex() else ''}"


def _prefix(names: list[str], own: list[str]) -> str:
    """The prefix that all of a file's names have, and that none of the model's own has: "module.model."."""
    prefix = ""
    while longer := [prefix + each for each in PREFIXES if all(name.startswith(prefix + each) for name in names)]:
        rest = longer[0].removeprefix(prefix)
        if not names or any(name.startswith(rest) for name in own):
            break
        prefix = longer[0]
    return prefix


def _read_pickled(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(the tensors, the extra state) of a file of torch.save(): a state dict, or one under one of PLACES. Raises
    UsageError for other contents, and for those that could not be read without running code of the file."""
    try:
        with torch.serialization.safe_globals(HARMLESS):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL ([\w.]+)", str(error))
        what = f"an object of {found[1]}" if found else "more than plain data"
        raise UsageError(
            f"init_from: {path} holds {what}, which cannot be read without running code of the file; that is not done. "
            f"Where you trust it, make a file of its weights alone, in the program that made it: {PLAIN}"
        ) from None
    except (RuntimeError, ValueError, EOFError, OSError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UsageError(f"init_from: {path} cannot be read as a file of torch.save(): {reason}") from None
    state = content
    for place in PLACES:
        if isinstance(content, Mapping) and isinstance(content.get(place), Mapping):
            state = content[place]
            break
    if not isinstance(state, Mapping) or not state or any(not _belongs(*item) for item in state.items()):
        holds = ", ".join(map(str, state)) if isinstance(state, Mapping) else f"a {type(state).__name__}"
        holds = holds if len(holds) <= 200 else f"{holds[:200]} …"
        raise UsageError(
            f"init_from: {path} is no state dict (names and tensors), and has none under {', '.join(PLACES)}. It "
            f"holds: {holds or 'nothing'}. Make one in the program that made it: {PLAIN}"
        )
    extra = {name: value for name, value in state.items() if is_extra(name)}
    return {name: value for name, value in state.items() if name not in extra}, extra


def _belongs(name: Any, value: Any) -> bool:
    """Whether this is an entry of a state dict."""
    return isinstance(name, str) and (isinstance(value, Tensor) or is_extra(name))
