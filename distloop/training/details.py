"""Details of a validation for validation.json: confusion matrix, accuracy of each class, most confident mistakes.

They are collected on the device in integers, batch by batch: the result is exact, and the same on any number of ranks.
The metrics of validation do not depend on them.
"""

import base64
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from distloop.config.settings import Data
from distloop.data.batches import inputs_of
from distloop.data.datasets import DataSource, class_names
from distloop.data.halves import validation_sets
from distloop.data.order import FixedBatchSampler, MicroBatch
from distloop.data.seeded import SeededDataset, collate_of, no_check
from distloop.data.seeding import generators_restored
from distloop.ranks.talking import say
from distloop.run.files import VALIDATION, write_text
from distloop.training.tasks import Guesses, Task
from distloop.training.trying import check_guesses

MISTAKES = 16  # in validation.json
LARGEST_CONFUSION = 1000  # classes; with more of them only right and wrong predictions are counted for each class
LARGEST_PICTURE = 128  # pixels of a side
_LAST_INDEX = 2**32 - 1


class Details:
    """Collects the details of each validation; rank 0 writes those of the last one into a file.

    Without guesses of the task there is no file.
    """

    def __init__(self, task: Task, source: DataSource, config: Data, seed: int) -> None:
        """`seed`: the run's, so that the samples in the pictures are the ones that were validated. `source`: of its
        validation sets the details are those of the first."""
        self.counts_samples = task.weight == "samples"
        names = class_names(source)
        self.classes = task.classes if isinstance(task.classes, int) and task.classes else len(names)
        self.names = list(names)
        # Columns of the table: predictions, or wrong and right.
        self.width = self.classes if self.classes <= LARGEST_CONFUSION else 2
        first = next(iter(validation_sets(source.validation).values()))
        self.dataset = SeededDataset(first, seed, collate_of(config), no_check)
        self.mean, self.std = source.mean, source.std
        self.details: dict[str, Any] | None = None
        self.pictures: dict[int, str | None] = {}

    def begin(self, device: torch.device) -> None:
        """Start a validation on this device: forget the one before."""
        self.details, self.has_guesses = None, False
        self.cells = torch.zeros(self.classes * self.width + 1, dtype=torch.int64, device=device)
        # Rows: key, label, prediction; a column for each mistake. Keys are larger for more confident mistakes and, if
        # these are equal, for lower indices; -1: no mistake.
        self.mistakes = torch.full((3, MISTAKES), -1, dtype=torch.int64, device=device)

    def add(self, guesses: Guesses | None, start: int, stop: int) -> None:
        """Add the guesses for the samples start ≤ i < stop of the data set, without waiting for the device. Where the
        task counts something else than samples, a batch may hold more or fewer: it is left out."""
        if guesses is None or (not self.counts_samples and len(guesses[0]) != stop - start):
            return
        check_guesses(guesses, stop - start)
        self.has_guesses = True
        labels, predictions, confidences = guesses[0].long(), guesses[1].long(), guesses[2].float()
        valid = labels >= 0
        if self.classes:
            valid &= (labels < self.classes) & (predictions >= 0) & (predictions < self.classes)
            columns = predictions if self.width == self.classes else (labels == predictions).long()
            # The last cell counts the samples that belong to no class.
            cells = torch.where(valid, labels * self.width + columns, len(self.cells) - 1)
            self.cells.index_add_(0, cells, torch.ones_like(cells))
        # The bits of floats that are not negative have the same order as the floats. The index is below them.
        bits = confidences.clamp(0, 1).view(torch.int32).long()
        keys = (bits << 32) + (_LAST_INDEX - torch.arange(start, stop, device=labels.device))
        is_mistake = valid & (labels != predictions) & ~confidences.isnan()
        columns = torch.stack([torch.where(is_mistake, keys, -1), labels, predictions])
        self.mistakes = _largest(torch.cat([self.mistakes, columns], 1))

    def gather(self, sampler: FixedBatchSampler) -> None:
        """Add up the details of all ranks on rank 0. Collective."""
        mistakes = [self.mistakes]
        if sampler.world_size > 1:
            dist.all_reduce(self.cells)
            mistakes = [torch.empty_like(self.mistakes) for _ in range(sampler.world_size)]
            dist.all_gather(mistakes, self.mistakes)
        if sampler.rank == 0 and self.has_guesses:  # rank 0 always has a batch
            self.details = self._read(_largest(torch.cat(mistakes, 1)).T.tolist(), sampler.samples)
            if not self.counts_samples and self.classes and int(self.cells.sum()) != sampler.samples:
                self.details = None  # a batch was left out

    def _read(self, mistakes: list[list[int]], samples: int) -> dict[str, Any]:
        table = self.cells[:-1].cpu().reshape(self.classes, self.width)
        has_confusion = self.width == self.classes
        correct = (table.diagonal() if has_confusion else table[:, -1]).tolist()
        names = [*self.names[: self.classes], *map(str, range(len(self.names), self.classes))]
        return {
            "samples": samples,
            "classes": names if self.names else None,
            "confusion": table.tolist() if has_confusion and self.classes else None,
            "per_class": [
                {"name": name, "samples": total, "correct": right}
                for name, total, right in zip(names, table.sum(1).tolist(), correct, strict=True)
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
        """On rank 0, write the last validation's details into the run directory `path`; on other ranks do nothing.

        A picture that cannot be loaded becomes null. If the file cannot be written, print a warning and go on.
        """
        if self.details is None:
            return
        mistakes = self.details["mistakes"]
        with generators_restored():
            self.pictures = {mistake["index"]: self._picture(mistake["index"]) for mistake in mistakes}
        mistakes = [{**mistake, "picture": self.pictures[mistake["index"]]} for mistake in mistakes]
        details = {"step": step, "attempt": attempt, **self.details, "mistakes": mistakes}
        try:
            write_text(path / VALIDATION, json.dumps(details, separators=(",", ":")) + "\n")
        except OSError as error:  # a full disk is no reason to end the run
            say(f"distloop: WARNING: {VALIDATION} cannot be written ({error.strerror}): step {step}")

    def _picture(self, index: int) -> str | None:
        """The sample's picture. It is loaded in this process, when all loader processes are running: none is a copy."""
        if index in self.pictures:  # of the last validation: many mistakes are the same
            return self.pictures[index]
        try:
            batch = self.dataset.__getitems__(MicroBatch(0, np.array([index])))
            return png_uri(inputs_of(batch)[0], self.mean, self.std)
        except Exception:  # of the user's data set; training does not need the picture
            return None


def _largest(columns: Tensor) -> Tensor:
    """The columns with the largest keys, in descending order: [3, many] to [3, MISTAKES]."""
    return columns.index_select(1, columns[0].topk(MISTAKES).indices)


def png_uri(image: Any, mean: Sequence[float] | None = None, std: Sequence[float] | None = None) -> str | None:
    """The image as a PNG of at most 128 × 128 pixels in a data: URI; None if it is no image.

    `image`: [1 or 3 channels, height, width], uint8 or floating. Floats outside of 0 … 1 are normalised values: `mean`
    and `std`, with one value per channel, undo this; without them the least value becomes 0 and the greatest 1.
    """
    if not isinstance(image, Tensor) or image.ndim != 3 or image.shape[0] not in (1, 3) or not image.numel():
        return None
    image = image.detach().cpu()
    if image.is_floating_point():
        image = _to_uint8(image.float(), mean, std)
    elif image.dtype != torch.uint8:
        return None
    from PIL import Image

    pixels = image.permute(1, 2, 0).contiguous().numpy()
    picture = Image.fromarray(pixels[:, :, 0] if image.shape[0] == 1 else pixels)
    picture.thumbnail((LARGEST_PICTURE, LARGEST_PICTURE))
    file = io.BytesIO()
    picture.save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def _to_uint8(image: Tensor, mean: Sequence[float] | None, std: Sequence[float] | None) -> Tensor:
    image = image.nan_to_num(0.0, 0.0, 0.0)
    if image.min() < 0 or image.max() > 1:
        if mean and std and len(mean) == len(std) == len(image):
            image = image * torch.tensor(std)[:, None, None] + torch.tensor(mean)[:, None, None]
        else:
            image = (image - image.min()) / (image.max() - image.min()).clamp(min=1e-12)
    return (image.clamp(0, 1) * 255).round().to(torch.uint8)
