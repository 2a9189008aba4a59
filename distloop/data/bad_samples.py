"""Samples that cannot be loaded: they are named; with data.on_bad_sample: skip their places in a step stay empty."""

import bisect
import contextlib
import dataclasses
import sys
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch.utils.data import ConcatDataset, Subset, get_worker_info

from distloop.config.secrets import clean_message
from distloop.data.lengths import in_words, short
from distloop.data.order import Part, Plan
from distloop.data.seeding import seed_sample
from distloop.errors import RunFailed, UsageError, add_note
from distloop.ranks.talking import say

MOST_SHARE = 0.01  # of the training samples; the run ends if more of them cannot be loaded
MOST_LISTED, MOST_SAID = 100, 10  # in a checkpoint, and in the lines of a run
MOST_LETTERS = 300  # of an error
MOST_TRIES = 100  # to load a sample in the place of a micro-batch that has none
# These are mistakes in the code of a data set, or end the run, whatever the sample.
MISTAKES = (
    *(UsageError, RunFailed, MemoryError, torch.OutOfMemoryError, TypeError, NameError, AttributeError, ImportError),
    *(NotImplementedError, RecursionError, IndexError, StopIteration),
)
OF_FILES = (OSError, EOFError, SyntaxError)  # what reading a damaged file raises, PIL's "broken PNG file" among them


@dataclasses.dataclass(frozen=True, order=True)
class BadSample:
    """A sample that cannot be loaded."""

    index: int
    path: str  # "" if the data set does not tell
    error: str

    def __str__(self) -> str:
        return f"sample {self.index}{f' ({self.path})' if self.path else ''}: {self.error}"


def is_of_the_sample(error: Exception) -> bool:
    """Whether the error may come from this sample alone: any but MISTAKES. (PIL raises SyntaxError for a damaged file;
    that of Python's own names the file with the code.)"""
    return not isinstance(error, MISTAKES) and not (isinstance(error, SyntaxError) and error.filename)


def path_of(dataset: Any, index: int) -> str:
    """The file of a sample in a folder of torchvision, also inside a Subset or ConcatDataset; "" for other data."""
    with contextlib.suppress(Exception):  # of a class of the user's
        while isinstance(dataset, (Subset, ConcatDataset)):
            if isinstance(dataset, Subset):
                dataset, index = dataset.dataset, int(dataset.indices[index])
            else:
                place = bisect.bisect_right(dataset.cumulative_sizes, index)
                index -= dataset.cumulative_sizes[place - 1] if place else 0
                dataset = dataset.datasets[place]
        datasets = sys.modules.get("torchvision.datasets")
        if datasets and isinstance(dataset, datasets.DatasetFolder):
            return str(dataset.samples[index][0])
    return ""


def bad_sample(error: Exception, dataset: Any, index: int, data: str, skips: bool) -> BadSample:
    """The sample, if the error may be its own and samples may be missing (`skips`). Else raises UsageError for a file
    that cannot be read and whose path is known, and the error itself, with a note, for all others. `data`: which data
    set it is, in words."""
    path = path_of(dataset, index)
    if not is_of_the_sample(error):
        add_note(error, f"loading sample {index} of {data}{f', {path}' if path else ''}")
        raise _one_that_travels(error)
    bad = BadSample(index, path, clean_message(f"{type(error).__name__}: {error}")[:MOST_LETTERS])
    if skips:
        return bad
    if path and isinstance(error, OF_FILES):
        raise UsageError(
            f"{path} cannot be loaded: {bad.error}. It is sample {index} of {data}. Replace the file. "
            "--data.on-bad-sample skip trains without such samples; a validation needs all of its own."
        ) from None
    # A validation counts all of its samples.
    more = (
        "; --data.on-bad-sample skip trains without samples that cannot be loaded"
        if data.startswith("the training data")
        else ""
    )
    add_note(error, f"loading sample {index} of {data}{f', {path}' if path else ''}{more}")
    raise _one_that_travels(error)


def _one_that_travels(error: Exception) -> Exception:
    """The error; in a loader process one with its message and notes, if torch, which raises it again in the main
    process from a text alone, could not do that with its class."""
    if get_worker_info() is None or isinstance(error, KeyError):  # torch has a text of its own for a KeyError
        return error
    with contextlib.suppress(Exception):
        if str(type(error)("a text")) == "a text":
            return error
    other = RuntimeError(f"{type(error).__name__}: {error}")
    other.__cause__ = error
    other.__notes__ = error.__notes__
    return other


def load_samples(
    dataset: Any, seed: int, epoch: int, indices: list[int], data: str, skips: bool
) -> tuple[list[tuple[int, Any]], list[BadSample]]:
    """(index, sample) of those that can be loaded, each under its own random numbers, and the bad ones. If there are
    none, the nearest later sample that can be loaded: something that a model can be passed with, and does not count.
    `data` and `skips`: as for bad_sample()."""
    samples, bad = [], []
    for index in indices:
        seed_sample(seed, epoch, index)
        try:
            samples.append((index, dataset[index]))
        except (IndexError, StopIteration) as error:
            raise short(data[:1].upper() + data[1:], len(dataset), index, in_words(error)) from None
        except Exception as error:
            bad.append(bad_sample(error, dataset, index, data, skips))
    following = indices[-1]
    for _ in range(MOST_TRIES):
        if samples:
            return samples, bad
        following = (following + 1) % len(dataset)
        with contextlib.suppress(Exception):
            seed_sample(seed, epoch, following)
            samples.append((following, dataset[following]))
    raise RunFailed(f"{MOST_TRIES} samples in a row of {data} cannot be loaded, the first of them {bad[0]}")


def listed(indices: Iterable[Any], most: int = 8) -> str:
    """The first of some indices, in words."""
    numbers = [int(index) for index in indices]
    return ", ".join(map(str, numbers[:most])) + (f" and {len(numbers) - most} more" if len(numbers) > most else "")


class BadSamples:
    """The training samples that a run has left out: the same on all ranks."""

    def __init__(self) -> None:
        self.indices: set[int] = set()
        self.listed: list[BadSample] = []

    def add(self, bad: Iterable[BadSample], samples: int) -> list[BadSample]:
        """Add those of a step; returns the new ones, by index. Raises RunFailed if they are more than MOST_SHARE of the
        training data, which has so many `samples`."""
        new = [each for each in sorted(set(bad)) if each.index not in self.indices]
        self.indices.update(each.index for each in new)
        self.listed += new[: MOST_LISTED - len(self.listed)]
        if len(self.indices) > MOST_SHARE * samples:
            raise RunFailed(
                f"{len(self.indices)} of {samples:,} training samples cannot be loaded, more than {MOST_SHARE:.0%} "
                f"(data.on_bad_sample: skip). Replace them:\n{self._list()}"
            )
        return new

    def state(self) -> dict[str, Any]:
        """For state.json, without a key if no sample was left out."""
        if not self.indices:
            return {}
        listed = [dataclasses.asdict(each) for each in self.listed]
        return {"bad_samples": {"indices": sorted(self.indices), "listed": listed}}

    def load(self, stored: dict[str, Any]) -> None:
        """Take up those of the attempts before, from the contents of state.json."""
        found = stored.get("bad_samples", {})
        self.indices = set(found.get("indices", ()))
        self.listed = [BadSample(**each) for each in found.get("listed", ())]

    def lines(self) -> list[str]:
        """The last lines of a run: what was left out."""
        if not self.indices:
            return []
        return [f"  left out, since they cannot be loaded: {len(self.indices)} training samples", self._list()]

    def _list(self) -> str:
        more = len(self.indices) - MOST_SAID
        lines = [f"    {each}" for each in self.listed[:MOST_SAID]]
        return "\n".join([*lines, *([f"    and {more} more"] if more > 0 else [])])


def without_bad(loaded: list[Any], left_out: BadSamples, plan: Plan) -> tuple[list[tuple[Any, Part, int]], int]:
    """The micro-batches of a step on this rank, each with the number of samples that are there, and the number of those
    of all ranks. `loaded`: ((batch, its bad samples), part, samples that were asked for) of each. Adds the bad ones of
    all ranks to `left_out`, and says them. Collective."""
    found = [(batch, part, max(0, samples - len(bad))) for (batch, bad), part, samples in loaded]
    # The batch in the place of an empty part has another rank's sample.
    bad: list[BadSample] = [each for (_, bad), _, samples in loaded if samples for each in bad]
    present = sum(samples for _, _, samples in found)
    if plan.world_size > 1:
        counts = torch.tensor([present, len(bad)])  # on the CPU: no step waits for a GPU
        dist.all_reduce(counts)
        present, number = counts.tolist()
        lists: list[list[BadSample]] = [[] for _ in range(plan.world_size)]
        if number:
            dist.all_gather_object(lists, bad)
        bad = [each for one in lists for each in one]
    for each in left_out.add(bad, plan.samples):
        if plan.rank == 0 and len(left_out.indices) <= MOST_SAID:
            say(f"distloop: WARNING: left out: {each}")
    return found, present
