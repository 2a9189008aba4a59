"""Checkpoints: a directory is written aside, checksummed, synced and renamed; what is published is whole.

    step_00001200/
        model.safetensors   weights; tensors that share memory are stored once, their other names as metadata
        averaged.safetensors   their moving average, with optim.ema_decay
        optimizer.pt        the optimizer's state, loadable with weights_only
        state.json          the loop's own state: step, sums of the epoch so far, best metric, …
        …                   NAME.safetensors or NAME.pt for each other part that a loop saves (parts.py);
                            NAME.extra.pt for what a module's get_extra_state() gives
        manifest.json       schema version, what is trained (hash of the config, fingerprint of the data), and
                            size and SHA-256 of each file above

All of it is read without running any code from the files.
"""

import dataclasses
import hashlib
import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from distloop.errors import UsageError
from distloop.run.files import sync
from distloop.run.module_state import is_extra, tensors_and_extra

SCHEMA = 2
MODEL, AVERAGED = "model.safetensors", "averaged.safetensors"
OPTIMIZER, STATE, MANIFEST = "optimizer.pt", "state.json", "manifest.json"
EXTRA = ".extra.pt"  # beside NAME.safetensors: NAME.extra.pt


class DamagedCheckpoint(Exception):
    """A checkpoint directory whose files are not those of its manifest; the message says why."""


class Weights(NamedTuple):
    """Contiguous tensors on the host by name, and further names of some of them (tied weights)."""

    tensors: dict[str, Tensor]
    aliases: dict[str, str]


@dataclasses.dataclass(frozen=True)
class LoopState:
    """The loop's own state between two steps, for state.json."""

    step: int = 0  # how many steps are done
    epoch_sums: tuple[float, float] = (0.0, 0.0)  # Σ loss and Σ weight of the epoch so far, over all ranks
    best: dict[str, Any] | None = None  # the best validation row so far, with its step
    skipped_steps: int = 0  # steps that were left out, by a GradScaler or by train.on_nonfinite
    unvalidated: bool = False  # its validation comes first: it failed in an attempt before, or is that at the start


class Snapshot(NamedTuple):
    """A copy, on the host, of all that a checkpoint holds."""

    weights: dict[str, Weights]  # of modules, by the names of the parts
    others: dict[str, dict[str, Any]]  # of optimizers and other objects
    state: dict[str, Any]  # of the loop, as plain JSON
    identity: dict[str, Any]  # what the run trains, for the manifest


def digest(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def publish(folder: Path, step: int, snapshot: Snapshot, check_ownership: Callable[[], None] = lambda: None) -> Path:
    """Write a checkpoint of `step` in `folder`; returns its path. Raises OSError, RuntimeError or SafetensorError,
    and publishes nothing, if it cannot be written. `check_ownership` is called before: it does not return if the folder
    has another owner by now."""
    final = folder / f"step_{step:08d}"
    writing = folder / f".writing_{final.name}"
    shutil.rmtree(writing, ignore_errors=True)
    writing.mkdir(parents=True)
    for name, weights in snapshot.weights.items():
        write_weights(weights, writing / f"{name}.safetensors")
    for name, content in snapshot.others.items():
        with open(writing / f"{name}.pt", "wb") as file:  # given a path, torch.save holds up the other threads
            torch.save(content, file)
    (writing / STATE).write_text(json.dumps(snapshot.state, indent=1) + "\n", encoding="utf-8")
    files = {path.name: {"size": path.stat().st_size, "sha256": digest(path)} for path in sorted(writing.iterdir())}
    manifest = {"schema": SCHEMA, "step": step, **snapshot.identity, "files": files}
    manifest["sha256"] = digest_of(manifest)
    (writing / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    for path in (*writing.iterdir(), writing):
        sync(path)
    check_ownership()
    if final.exists():  # damaged, so that this attempt did not start from it; or not validated, and now it is
        replaced = folder / f".replaced_{final.name}"
        shutil.rmtree(replaced, ignore_errors=True)
        final.rename(replaced)
    writing.rename(final)
    sync(folder)
    return final


def prune(folder: Path, final: Path, keep_last: int, keep: Callable[[int], bool]) -> None:
    """Once `final` is published: remove older ones but the last `keep_last` and those for whose step `keep` is true.
    Later ones are removed as well: they are damaged, and this attempt passed over them."""
    published = published_in(folder)
    place = published.index(final) + 1
    old = [path for path in published[: max(0, place - keep_last)] if not keep(step_of(path))]
    for path in (*old, *published[place:]):
        shutil.rmtree(path, ignore_errors=True)
    clean(folder)


def clean(folder: Path) -> None:
    """Remove the leftovers of killed or failed saves. A whole checkpoint that was to be replaced comes back."""
    for replaced in folder.glob(".replaced_*"):
        final = folder / replaced.name.removeprefix(".replaced_")
        if not final.exists():
            replaced.rename(final)
            try:
                verify(final)
            except DamagedCheckpoint:
                final.rename(replaced)
    for leftover in (*folder.glob(".writing_*"), *folder.glob(".replaced_*")):
        shutil.rmtree(leftover, ignore_errors=True)


def newest_good(folder: Path, sha256: Callable[[Path], str] = digest) -> tuple[Path | None, list[str]]:
    """The latest checkpoint in `folder` that verifies, and a line for each later one that does not."""
    passed_over: list[str] = []
    for path in reversed(published_in(folder)):
        try:
            verify(path, sha256)
            return path, passed_over
        except DamagedCheckpoint as damage:
            passed_over.append(f"{path}: {damage}")
    return None, passed_over


def published_in(folder: Path) -> list[Path]:
    """The checkpoint directories in `folder`, by step."""
    return sorted((p for p in folder.glob("step_*") if p.name.removeprefix("step_").isdecimal()), key=step_of)


def newest_published(folder: Path) -> Path | None:
    """The latest checkpoint in `folder`, verified or not."""
    return next(reversed(published_in(folder)), None)


def step_of(path: Path) -> int:
    """The step of a checkpoint directory, from its name."""
    return int(path.name.removeprefix("step_"))


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of a checkpoint directory."""
    return json.loads((path / MANIFEST).read_text(encoding="utf-8"))


def verify(path: Path, sha256: Callable[[Path], str] = digest) -> None:
    """Compare each file with the manifest. Raises DamagedCheckpoint with the reason. `sha256`: gives that of a file."""
    try:
        manifest = read_manifest(path)
        files = {name: (entry["size"], entry["sha256"]) for name, entry in manifest["files"].items()}
        schema, step, checksum = manifest["schema"], manifest["step"], manifest.pop("sha256", None)
    except FileNotFoundError:
        raise DamagedCheckpoint(f"{MANIFEST} is missing") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedCheckpoint(f"{MANIFEST} cannot be read ({type(error).__name__})") from None
    if schema != SCHEMA:
        raise DamagedCheckpoint(f"its format is version {schema}; this program reads version {SCHEMA}")
    if checksum != digest_of(manifest) or step != step_of(path):
        raise DamagedCheckpoint(f"{MANIFEST} does not have the contents that were written")
    present = (name for name in (MODEL, AVERAGED, OPTIMIZER) if (path / name).exists())
    for name in dict.fromkeys((STATE, *files, *present)):
        if name not in files or not (path / name).is_file():
            raise DamagedCheckpoint(f"{name} is missing")
        size, checksum = files[name]
        try:
            found = (path / name).stat().st_size
            if found != size:
                raise DamagedCheckpoint(f"{name} has {found} bytes instead of {size}")
            if sha256(path / name) != checksum:
                raise DamagedCheckpoint(f"{name} does not have the contents that were written")
        except OSError as error:
            raise DamagedCheckpoint(f"{name} cannot be read ({error.strerror})") from None


def weights_of(model: nn.Module, copy: Callable[[str, Tensor], Tensor], prefix: str = "") -> Weights:
    """Copies of the model's parameters and buffers; of tied tensors one, with several names. `copy` gets each tensor
    with its name behind `prefix`."""
    tensors: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    owners: dict[tuple, str] = {}
    for name, tensor in tensors_and_extra(model)[0].items():
        view = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype, tensor.is_conj(), tensor.is_neg())
        place = (tensor.device, *view)
        owner = owners.setdefault(place, name)
        if owner != name and tensor.numel():
            aliases[name] = owner
        else:
            tensors[name] = copy(prefix + name, tensor)
    return Weights(tensors, aliases)


def as_stored(weights: Weights) -> tuple[dict[str, Tensor], dict[str, str]]:
    """(the tensors, the metadata) of a safetensors file. It has no dtype for complex128: such a tensor, [...], is real
    there, [..., 2], and named in the metadata."""
    metadata = {"format": "pt", "aliases": json.dumps(weights.aliases)}
    no_dtype = [name for name, tensor in weights.tensors.items() if tensor.dtype in (torch.complex128, torch.complex32)]
    if not no_dtype:
        return weights.tensors, metadata
    real = {name: torch.view_as_real(weights.tensors[name]) for name in no_dtype}
    return {**weights.tensors, **real}, {**metadata, "as_real": json.dumps(no_dtype)}


def write_weights(weights: Weights, path: Path) -> None:
    """Write a safetensors file. Equal weights give equal files."""
    tensors, metadata = as_stored(weights)
    save_file(tensors, path, metadata=metadata)
    # safetensors writes the metadata in another order each time: here in one, in place, since the length is the same.
    with open(path, "r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        file.seek(8)
        file.write(json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode().ljust(size))


def read_weights(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(the tensors of a safetensors file under all their names, the extra state that lies beside it). Raises
    UsageError for another file."""
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
            metadata = file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise UsageError(f"{path} cannot be read as safetensors: {error}") from None
    for name in json.loads(metadata.get("as_real", "[]")):
        tensors[name] = torch.view_as_complex(tensors[name].clone())  # a view of the file may crash: 8-byte addresses
    aliases = json.loads(metadata.get("aliases", "{}"))
    tensors.update({alias: tensors[name] for alias, name in aliases.items() if name in tensors})
    extra: dict[str, Any] = {name: tensors.pop(name) for name in list(tensors) if is_extra(name)}  # of an older version
    if (beside := path.with_suffix(EXTRA)).exists():
        extra |= read_plain(beside)
    return tensors, extra


def load_weights(path: Path, model: nn.Module) -> None:
    """Copy a safetensors file into the model's tensors, and the extra state that lies beside it. Raises UsageError with
    the shapes that differ, if any do. A file of weights alone leaves the model's extra state as it is."""
    put_weights(path, *read_weights(path), model)


def put_weights(
    path: Path, tensors: dict[str, Tensor], extra: dict[str, Any], model: nn.Module, hint: str = ""
) -> None:
    """Copy what was read from `path` into the model. Raises UsageError, with the `hint`, for what differs."""
    own_tensors, own_extra = tensors_and_extra(model)
    expected = {name: tuple(tensor.shape) for name, tensor in own_tensors.items()}
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if expected != found:
        raise UsageError(f"{path} belongs to another model:\n{differing_shapes(found, expected)}{hint}")
    for name, tensor in own_tensors.items():
        if tensors[name].is_complex() and not tensor.is_complex():
            raise UsageError(f"{path} belongs to another model: {name} is complex there, and real here.{hint}")
    if unknown := [name for name in extra if name not in own_extra]:
        raise UsageError(
            f"{path} belongs to another model: {unknown[0]} is there only, and the model has no such state.{hint}"
        )
    missing = {name: value for name, value in own_extra.items() if name not in extra}
    model.load_state_dict({**tensors, **missing, **extra})


def read_plain(path: Path) -> dict[str, Any]:
    """The contents of a file of torch.save(). Raises UsageError for one that holds more than data."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, ValueError, EOFError) as error:
        reason = str(error).splitlines()[0]
        raise UsageError(f"{path} cannot be read as plain data, and is not run: {reason}") from None


def digest_of(manifest: dict[str, Any]) -> str:
    """The SHA-256 of a manifest without its own."""
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def differing_shapes(found: dict[str, tuple], expected: dict[str, tuple], most: int = 6) -> str:
    """Lines on the shapes that differ, or are in the file only or in the model only."""
    lines = [f"  {name}: only in the file, {list(found[name])}" for name in found if name not in expected]
    lines += [f"  {name}: only in the model, {list(expected[name])}" for name in expected if name not in found]
    both = [name for name in expected if name in found and found[name] != expected[name]]
    lines += [f"  {name}: {list(found[name])} in the file, {list(expected[name])} in the model" for name in both]
    return "\n".join(lines[:most] + ([f"  and {len(lines) - most} more"] if len(lines) > most else []))
