"""What tells one data set from another: its length, and a digest of its contents or of some of its samples."""

import dataclasses
import hashlib
import os
import sys
import time
from collections.abc import Mapping
from pathlib import PurePath
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset

from distloop.config.places import root_for_code
from distloop.config.settings import Data
from distloop.data.datasets import DataSource
from distloop.data.halves import halves, word_of
from distloop.data.lengths import in_words, short
from distloop.data.loader import worker_count
from distloop.data.look import look
from distloop.data.packed import Packed
from distloop.data.seeded import SeedFirst
from distloop.data.seeding import generators_restored, seed_sample, uniforms
from distloop.data.whole_batches import InMemory, gives_batches

SAMPLES = 8  # of a data set, at equal distances from the first to the last
SECONDS = 2.0  # after so long no further sample is loaded, of a data set that is slow
# What stands in the place of a digest that says nothing of the data.
OWN_DRAWS, RAISES = "differs under the same seed: ", "raises "
LONGEST_ERROR = 300  # letters


def fingerprint_of(source: DataSource, half: str, config: Data, device: torch.device, seed: int = 0) -> dict[str, Any]:
    """The fingerprint of a half of the data (halves.py), which is found once. Loads samples as training does: in a
    loader process if there are any, or from a copy: what others are copies of opens no file of the user's. `seed`: the
    run's, for what a loader process draws as it imports the user's module."""
    if half not in source.fingerprints:
        source.fingerprints[half] = fingerprint(halves(source)[half], config, device, seed)
    return source.fingerprints[half]


def fingerprint(
    dataset: Any, config: Data | None = None, device: torch.device | None = None, seed: int = 0
) -> dict[str, Any]:
    """What changes with the data: "samples"; and "sha256" of tensors in memory or of names of a folder, or "contents":
    digests of some samples by index. Without a config the samples are loaded in this process."""
    digest = hashlib.sha256()
    if isinstance(dataset, InMemory):
        for tensor in (dataset.inputs, dataset.targets):
            add(digest, tensor)
    elif isinstance(dataset, Packed):
        digest.update(dataset.digest.encode())
    elif (samples := _names_in_folder(dataset)) is not None:
        for path, label in samples:
            digest.update(f"{os.path.relpath(path, dataset.root)} {label}\n".encode())
    else:
        return {"samples": len(dataset), "contents": _contents(dataset, config, device, seed)}
    return {"samples": len(dataset), "sha256": digest.hexdigest()}


def _names_in_folder(dataset: Any) -> list[tuple[str, int]] | None:
    """The (path, label) of each sample of a folder of torchvision; None for other data, also of a class derived from it
    that keeps something else there."""
    datasets = sys.modules.get("torchvision.datasets")
    if not (datasets and isinstance(dataset, datasets.DatasetFolder)):
        return None
    samples = getattr(dataset, "samples", None)
    has_pairs = isinstance(samples, list) and all(isinstance(each, tuple) and len(each) == 2 for each in samples)
    return samples if has_pairs else None


def without_errors(found: dict[str, Any]) -> dict[str, Any]:
    """A fingerprint that may be written to a file: an error's words may hold a secret."""
    contents = {index: digest.split(":")[0] for index, digest in found.get("contents", {}).items()}
    return {**found, "contents": contents} if "contents" in found else found


def refuse_short(source: DataSource, config: Data, device: torch.device) -> None:
    """Raise UsageError if one of the samples that the fingerprints look at, the last one among them, is not there."""
    for half, dataset in halves(source).items():
        if not isinstance(dataset, InMemory):
            found = fingerprint_of(source, half, config, device)
            for index, digest in found.get("contents", {}).items():
                if digest.startswith((f"{RAISES}IndexError", f"{RAISES}StopIteration")):
                    raise short(f"The {word_of(half)} data", found["samples"], int(index), digest.removeprefix(RAISES))


def is_other(old: Mapping[str, Any], new: Mapping[str, Any]) -> bool:
    """True if fingerprints are those of different data. One of an earlier version, without contents, fits any; samples
    that could not be loaded or read, or that draw from a generator of their own, do not count."""
    if old["samples"] != new["samples"] or (old.get("sha256") != new.get("sha256")):
        return True
    before, now = old.get("contents", {}), new.get("contents", {})
    pairs = [(before[index], now[index]) for index in before if index in now]
    return any(old_digest != digest for old_digest, digest in pairs if old_digest.isalnum() and digest.isalnum())


class Likeness(NamedTuple):
    """What the digests of some samples have in common with others."""

    compared: int
    same: int
    in_other_order: bool  # none stands at its place, and one at another's


def likeness(before: Mapping[str, str], now: Mapping[str, str]) -> Likeness:
    """Why samples differ, by their digests: some are changed where others are the same; or their order is another. Left
    out are those without a digest."""
    pairs = [(before[key], now[key]) for key in before if key in now and before[key].isalnum() and now[key].isalnum()]
    same = sum(one == other for one, other in pairs)
    moved = {one for one, _ in pairs} & {other for _, other in pairs}
    return Likeness(len(pairs), same, not same and bool(moved))


class SampleDigests(Dataset):
    """Digests of samples, in hexadecimal, or what stands in their place; None for those that come after SECONDS."""

    def __init__(self, dataset: Any, seed: int, root: str = "") -> None:
        """`seed`: the run's. `root`: the data's folder, which may be another one on each machine and in each start."""
        self.seed = SeedFirst(seed)  # unpickled before the data set
        self.dataset, self.root = dataset, root
        self.seconds = 0.0  # of all items so far

    def __getitem__(self, index: int) -> str | None:
        if self.seconds > SECONDS:
            return None
        threads, begun = torch.get_num_threads(), time.monotonic()
        torch.set_num_threads(1)  # as in loader processes: another number rounds sums otherwise
        try:
            return self._look_twice(index)
        finally:
            torch.set_num_threads(threads)
            self.seconds += time.monotonic() - begun

    def _look_twice(self, index: int) -> str:
        first, again = self._digest(index), self._digest(index)
        if again == first or first.startswith(RAISES):
            return first
        return again if again.startswith(RAISES) else OWN_DRAWS + first

    def _digest(self, index: int) -> str:
        seed_sample(0, 0, index)  # a function of the data alone: the samples' augmentation is the same each time
        try:
            if gives_batches(self.dataset):
                indices = np.array([index])
                sample = self.dataset.batch(indices, uniforms(0, 0, indices, self.dataset.draws))
            else:
                sample = self.dataset[index]
        except (IndexError, StopIteration) as error:
            return f"{RAISES}{in_words(error)}"[:LONGEST_ERROR]
        except Exception as error:  # training says more about it, when it meets the sample
            return f"{RAISES}{type(error).__name__}: {error}"[:LONGEST_ERROR]
        digest = hashlib.sha256()
        try:
            add(digest, sample, self.root)
        except Exception:  # values of any kind: a pass over what has no bytes
            return ""
        return digest.hexdigest()[:16]


def _contents(dataset: Any, config: Data | None, device: torch.device | None, seed: int) -> dict[str, str]:
    last = len(dataset) - 1
    # The last one first: a data set that is slow may end before its length, too.
    indices = sorted(
        {place * last // (SAMPLES - 1) for place in range(SAMPLES)}, key=lambda index: (index < last, index)
    )
    digests = SampleDigests(dataset, seed, root_for_code(config.root) if config else "")
    with generators_restored():
        if config is None:
            found = [digests[index] for index in indices]
        else:
            found = list(look(digests, indices, worker_count(config, dataset), config, device))
    return {str(index): digest for index, digest in sorted(zip(indices, found, strict=True)) if digest is not None}


def add(digest: Any, value: Any, root: str = "") -> None:
    """Add a sample, or a part of one, to a digest of hashlib; of a value without bytes, its type. `root`: left out of
    texts and paths."""
    if isinstance(value, torch.Tensor):
        if value.layout != torch.strided or value.is_quantized:
            digest.update(f"{value.layout} {value.dtype} {tuple(value.shape)}".encode())
            return
        plain = value.detach().cpu().resolve_conj().resolve_neg().contiguous()
        digest.update(f"{plain.dtype} {tuple(plain.shape)}".encode())
        digest.update(plain.reshape(-1).view(torch.uint8).numpy().data)
    elif isinstance(value, (np.ndarray, np.generic)):
        array = np.asarray(value)
        digest.update(f"{array.dtype} {array.shape}".encode())
        if array.dtype.hasobject:
            add(digest, array.ravel().tolist(), root)
        else:
            digest.update(array.tobytes())
    elif isinstance(value, Mapping):
        add(digest, [(key, inner) for key, inner in value.items()], root)
    elif isinstance(value, (list, tuple)):
        digest.update(f"{len(value)} values".encode())
        for inner in value:
            add(digest, inner, root)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        add(digest, [getattr(value, field.name, None) for field in dataclasses.fields(value)], root)
    elif isinstance(value, (str, PurePath)):
        text = str(value).replace(root, "") if root else str(value)
        digest.update(f"{type(value).__name__} {text!r} ".encode(errors="surrogatepass"))
    elif isinstance(value, (bytes, bool, int, float, complex, type(None))):
        digest.update(f"{type(value).__name__} {value!r} ".encode(errors="surrogatepass"))
    elif (pillow := sys.modules.get("PIL.Image")) and isinstance(value, pillow.Image):
        digest.update(f"{value.mode} {value.size}".encode())
        digest.update(value.tobytes())
    else:
        digest.update(f"a {type(value).__qualname__} ".encode())
