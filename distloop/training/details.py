"""validation.json: what a validation of classes shows beside its numbers. Confusion, classes, worst mistakes.

They are collected on the device while the batches go by, in integers: exact in any order, the same on any number of
ranks. Nothing of it is part of the validation's numbers.
"""

from __future__ import annotations

import contextlib
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from distloop.config.settings import Data
from distloop.data.batches import inputs_of
from distloop.data.datasets import DataSource
from distloop.data.loader import SeededDataset, collate_of, no_check
from distloop.data.order import FixedBatchSampler, MicroBatch
from distloop.ranks.talking import say
from distloop.run.files import VALIDATION, write_text
from distloop.training.pictures import png_uri
from distloop.training.tasks import Guesses, Task, check_guesses

MISTAKES = 16
CONFUSION_LIMIT = 1000
"""Up to so many classes the whole confusion matrix is kept; above, how many samples of each class were right."""
_LAST_INDEX = 2**32 - 1


class Details:
    """Collects the details of one validation after the other; rank 0 writes the last one's down.

    A task that has no guesses() leaves no file.
    """

    def __init__(self, task: Task, source: DataSource, config: Data, seed: int) -> None:
        """`seed`: the run's, with which the pictures are loaded as validation loads its samples."""
        names = source.classes or getattr(source.train, "classes", None) or ()
        self.classes = task.classes if isinstance(task.classes, int) and task.classes else len(names)
        self.names = [str(name) for name in names]
        self.width = self.classes if self.classes <= CONFUSION_LIMIT else 2  # columns: predictions, or wrong and right
        self.dataset = SeededDataset(source.validation, seed, collate_of(config), no_check)
        self.mean, self.std = source.mean, source.std
        self.found: dict[str, Any] | None = None
        self.pictures: dict[int, str | None] = {}

    def begin(self, device: torch.device) -> None:
        """A validation begins on this device."""
        self.found, self.given = None, False
        self.cells = torch.zeros(self.classes * self.width + 1, dtype=torch.int64, device=device)
        # Rows: key, label, prediction; a column for each mistake. The largest key is the most confident mistake, and
        # among equally confident ones that with the lowest index; -1: none.
        self.kept = torch.full((3, MISTAKES), -1, dtype=torch.int64, device=device)

    def add(self, guesses: Guesses | None, start: int, stop: int) -> None:
        """The guesses for the samples start ≤ i < stop of the data set. Nothing here waits for the device."""
        if guesses is None:
            return
        check_guesses(guesses, stop - start)
        self.given = True
        labels, predictions, confidences = guesses[0].long(), guesses[1].long(), guesses[2].float()
        known = labels >= 0
        if self.classes:
            known &= (labels < self.classes) & (predictions >= 0) & (predictions < self.classes)
            columns = predictions if self.width == self.classes else (labels == predictions).long()
            cells = torch.where(known, labels * self.width + columns, len(self.cells) - 1)  # a last cell for no class
            self.cells.index_add_(0, cells, torch.ones_like(cells))
        # Of floats that are not negative the bits are ordered as the numbers are; below them, the index.
        bits = confidences.clamp(0, 1).view(torch.int32).long()
        keys = (bits << 32) + (_LAST_INDEX - torch.arange(start, stop, device=labels.device))
        shown = known & (labels != predictions) & ~confidences.isnan()
        columns = torch.stack([torch.where(shown, keys, -1), labels, predictions])
        self.kept = _largest(torch.cat([self.kept, columns], 1))

    def gather(self, sampler: FixedBatchSampler) -> None:
        """Bring all ranks' details together on rank 0. Collective."""
        kept = [self.kept]
        if sampler.world_size > 1:
            dist.all_reduce(self.cells)
            kept = [torch.empty_like(self.kept) for _ in range(sampler.world_size)]
            dist.all_gather(kept, self.kept)
        if sampler.rank == 0 and self.given:  # it has the first batch
            self.found = self._read(_largest(torch.cat(kept, 1)).T.tolist(), sampler.samples)

    def _read(self, mistakes: list[list[int]], samples: int) -> dict[str, Any]:
        table = self.cells[:-1].cpu().reshape(self.classes, self.width)
        whole = self.width == self.classes
        correct, totals = (table.diagonal() if whole else table[:, -1]).tolist(), table.sum(1).tolist()
        names = [*self.names[: self.classes], *map(str, range(len(self.names), self.classes))]
        return {
            "samples": samples,
            "classes": names if self.names else None,
            "confusion": table.tolist() if whole and self.classes else None,
            "per_class": [
                {"name": name, "samples": total, "correct": right}
                for name, total, right in zip(names, totals, correct, strict=True)
            ],
            "mistakes": [
                {
                    "index": _LAST_INDEX - (key & _LAST_INDEX),
                    "label": label,
                    "predicted": predicted,
                    "confidence": round(float(np.uint32(key >> 32).view(np.float32)), 6),
                }
                for key, label, predicted in mistakes
                if key >= 0
            ],
        }

    def write(self, path: Path, step: int, attempt: int) -> None:
        """On rank 0, write the last validation's details into the run directory `path`; elsewhere nothing.

        A picture that cannot be loaded is null, and a file that cannot be written is said: the run goes on.
        """
        if self.found is None:
            return
        with _generators_kept():
            indices = [mistake["index"] for mistake in self.found["mistakes"]]
            self.pictures = {index: self._picture(index) for index in indices}
        mistakes = [{**mistake, "picture": self.pictures[mistake["index"]]} for mistake in self.found["mistakes"]]
        details = {"step": step, "attempt": attempt, **self.found, "mistakes": mistakes}
        try:
            write_text(path / VALIDATION, json.dumps(details, separators=(",", ":")) + "\n")
        except OSError as error:  # the disk is full: no reason to end
            say(f"distloop: WARNING: {VALIDATION} cannot be written ({error.strerror}): step {step}")

    def _picture(self, index: int) -> str | None:
        if index in self.pictures:  # of the validation before: the same mistakes come again
            return self.pictures[index]
        try:
            batch = self.dataset.__getitems__(MicroBatch(0, np.array([index])))
            return png_uri(inputs_of(batch)[0], self.mean, self.std)
        except Exception:  # whatever a data set raises: it is a picture only
            return None


@contextlib.contextmanager
def _generators_kept() -> Iterator[None]:
    """Leave the global generators, which loading a sample seeds, as they were."""
    states = torch.default_generator.get_state(), np.random.get_state(), random.getstate()
    try:
        yield
    finally:
        torch.default_generator.set_state(states[0])
        np.random.set_state(states[1])
        random.setstate(states[2])


def _largest(columns: Tensor) -> Tensor:
    """The columns with the largest keys, in order: [3, many] to [3, MISTAKES]."""
    return columns.index_select(1, columns[0].topk(MISTAKES).indices)
