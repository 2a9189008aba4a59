"""Checkpoints: a directory is written aside, checksummed, synced and renamed; what is published is whole.

    step_00001200/
        model.safetensors   weights; tensors that share memory are stored once, their other names as metadata
        optimizer.pt        the optimizer's state, loadable with weights_only
        state.json          the loop's own state: step, sums of the epoch so far, best metric, …
        manifest.json       schema version, and size and SHA-256 of each file above

All of it is read without running any code from the files.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from distloop.errors import UsageError

SCHEMA = 1
MODEL, OPTIMIZER, STATE, MANIFEST = "model.safetensors", "optimizer.pt", "state.json", "manifest.json"


class DamagedCheckpoint(Exception):
    """A checkpoint directory that does not hold what its manifest says; the message says why."""


def save(folder: Path, step: int, model: nn.Module, optimizer: Any, state: dict[str, Any], keep_last: int) -> Path:
    """Publish a checkpoint of `step` in `folder`, then remove all but the last `keep_last`. Returns its path.

    `model` is the bare module; `state` is plain JSON. Raises OSError or RuntimeError when it cannot be
    written; then nothing is published and nothing is removed.
    """
    final = folder / f"step_{step:08d}"
    writing = folder / f".writing_{final.name}"
    shutil.rmtree(writing, ignore_errors=True)
    writing.mkdir(parents=True)
    save_weights(model, writing / MODEL)
    torch.save(optimizer.state_dict(), writing / OPTIMIZER)
    (writing / STATE).write_text(json.dumps(state, indent=1) + "\n")
    files = {
        name: {"size": (writing / name).stat().st_size, "sha256": digest(writing / name)}
        for name in (MODEL, OPTIMIZER, STATE)
    }
    (writing / MANIFEST).write_text(json.dumps({"schema": SCHEMA, "step": step, "files": files}, indent=1) + "\n")
    for path in (*writing.iterdir(), writing):
        _sync(path)
    if final.exists():  # left by an earlier attempt that this one did not start from, since it is damaged
        replaced = folder / f".replaced_{final.name}"
        shutil.rmtree(replaced, ignore_errors=True)
        final.rename(replaced)
    writing.rename(final)
    _sync(folder)
    published = published_in(folder)
    for old in (*published[: max(0, published.index(final) + 1 - keep_last)], *folder.glob(".replaced_*")):
        shutil.rmtree(old, ignore_errors=True)
    return final


def newest_good(folder: Path) -> tuple[Path | None, list[str]]:
    """The latest checkpoint in `folder` that verifies, and a line for each later one that does not."""
    passed_over: list[str] = []
    for path in reversed(published_in(folder)):
        try:
            verify(path)
            return path, passed_over
        except DamagedCheckpoint as damage:
            passed_over.append(f"{path}: {damage}")
    return None, passed_over


def published_in(folder: Path) -> list[Path]:
    """The checkpoint directories in `folder`, by step."""
    found = [path for path in folder.glob("step_*") if path.name.removeprefix("step_").isdecimal()]
    return sorted(found, key=step_of)


def step_of(path: Path) -> int:
    """The step of a checkpoint directory, from its name."""
    return int(path.name.removeprefix("step_"))


def verify(path: Path) -> None:
    """Compare each file with the manifest. Raises DamagedCheckpoint with the reason."""
    try:
        manifest = json.loads((path / MANIFEST).read_text())
        files = {name: (entry["size"], entry["sha256"]) for name, entry in manifest["files"].items()}
        schema = manifest["schema"]
    except FileNotFoundError:
        raise DamagedCheckpoint(f"{MANIFEST} is missing") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedCheckpoint(f"{MANIFEST} cannot be read ({type(error).__name__})") from None
    if schema != SCHEMA:
        raise DamagedCheckpoint(f"its format is version {schema}; this program reads version {SCHEMA}")
    for name in (MODEL, OPTIMIZER, STATE):
        if name not in files or not (path / name).is_file():
            raise DamagedCheckpoint(f"{name} is missing")
        size, checksum = files[name]
        if (path / name).stat().st_size != size:
            raise DamagedCheckpoint(f"{name} has {(path / name).stat().st_size} bytes instead of {size}")
        if digest(path / name) != checksum:
            raise DamagedCheckpoint(f"{name} does not have the contents that were written")


def load(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Copy a verified checkpoint into `model` and `optimizer`, in place; returns the loop's state.

    The optimizer keeps the hyperparameters that the config gave it; only its moments are taken.
    """
    load_weights(path / MODEL, model)
    stored = torch.load(path / OPTIMIZER, map_location="cpu", weights_only=True)
    groups = optimizer.state_dict()["param_groups"]
    if [len(group["params"]) for group in stored["param_groups"]] != [len(group["params"]) for group in groups]:
        raise UsageError(f"{path / OPTIMIZER} belongs to other parameters than this model's.")
    optimizer.load_state_dict({"state": stored["state"], "param_groups": groups})
    return json.loads((path / STATE).read_text())


def save_weights(model: nn.Module, path: Path) -> None:
    """The model's parameters and buffers, contiguous, as safetensors."""
    tensors: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    owners: dict[tuple, str] = {}
    storages: set[int] = set()
    for name, tensor in model.state_dict().items():
        place = (tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
        if tensor.numel() and place in owners:
            aliases[name] = owners[place]
            continue
        owners[place] = name
        tensors[name] = tensor.detach().cpu().contiguous()
        storage = tensors[name].untyped_storage().data_ptr()
        if storage in storages:  # a view of another tensor, which safetensors refuses
            tensors[name] = tensors[name].clone()
        storages.add(storage)
    save_file(tensors, path, metadata={"format": "pt", "aliases": json.dumps(aliases)})


def load_weights(path: Path, model: nn.Module) -> None:
    """Copy weights from a safetensors file into the model's existing tensors.

    Raises UsageError with the keys and shapes that differ when they are another model's.
    """
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
            aliases = json.loads((file.metadata() or {}).get("aliases", "{}"))
    except (SafetensorError, OSError) as error:
        raise UsageError(f"{path} cannot be read as safetensors: {error}") from None
    tensors.update({alias: tensors[name] for alias, name in aliases.items() if name in tensors})
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if expected != found:
        raise UsageError(f"{path} belongs to another model:\n{_differing_shapes(found, expected)}")
    model.load_state_dict(tensors)


def weights_file(source: str) -> Path:
    """The .safetensors file that --init-from means: itself, or that of a checkpoint or of a run's newest."""
    path = Path(source)
    if path.is_file():
        return path
    if (path / MODEL).is_file():
        return path / MODEL
    newest, passed_over = newest_good(path / "checkpoints")
    if newest is None:
        reasons = "".join(f"\n  {line}" for line in passed_over)
        raise UsageError(f"init_from = {source!r}: no run, checkpoint or .safetensors file there.{reasons}")
    return newest / MODEL


def digest(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _differing_shapes(found: dict[str, tuple], expected: dict[str, tuple], most: int = 6) -> str:
    lines = [f"  {name}: only in the file, {list(found[name])}" for name in found if name not in expected]
    lines += [f"  {name}: only in the model, {list(expected[name])}" for name in expected if name not in found]
    lines += [
        f"  {name}: {list(found[name])} in the file, {list(expected[name])} in the model"
        for name in expected
        if name in found and found[name] != expected[name]
    ]
    return "\n".join(lines[:most] + ([f"  and {len(lines) - most} more"] if len(lines) > most else []))


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
