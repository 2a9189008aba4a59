"""The built-in task `segmentation`: one class for each pixel."""

from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

from distloop.data.batches import targets_of
from distloop.errors import UsageError
from distloop.training.cross_entropy import (
    is_number,
    read_class_weights,
    refuse_other_count,
    summed_loss,
    summed_weight,
)
from distloop.training.labels import refuse_small
from distloop.training.tasks import Sums, Task

MOST_NAMED = 32  # classes; with more of them a row has the mean alone
AT_ONCE = 256  # masks of a data set in memory that are checked at once


class Segmentation(Task):
    """One class for each pixel: cross-entropy, mean intersection over union, pixel accuracy.

    Outputs [batch, classes, height, width], or a dict of them as torchvision's models give: "out", and "aux" of an
    auxiliary head. Targets: integers [batch, height, width].
    """

    weight = "pixels"
    best = ("mean_iou", "max")

    def __init__(
        self, ignore_index: int = 255, class_weights: Sequence[float] | None = None, aux_weight: float = 0.4
    ) -> None:
        """`ignore_index`: the label of pixels that do not count; 255 in torchvision's recipes. `class_weights`: one
        number for each class, as in torch's CrossEntropyLoss. `aux_weight`: of the auxiliary head's loss, beside 1; 0.4
        in "Pyramid scene parsing network" (Zhao et al. 2017), 0.5 in torchvision's recipes. Raises UsageError."""
        super().__init__()  # of a subclass that is an nn.Module as well
        if type(ignore_index) is not int:
            raise UsageError(f"task.args.ignore_index = {ignore_index!r}: give a whole number, such as 255 or -100.")
        if not is_number(aux_weight, 0):
            raise UsageError(f"task.args.aux_weight = {aux_weight!r}: give a number, 0 or more, such as 0.4.")
        self.ignore_index, self._aux_weight = ignore_index, aux_weight
        self._class_weights = read_class_weights(class_weights)

    def loss(self, outputs: Any, batch: Any) -> tuple[Tensor, Tensor | int]:
        targets, heads = targets_of(batch), _heads(outputs)
        for head in heads:
            if head.shape[:1] + head.shape[2:] != targets.shape:  # also where broadcasting would take it
                raise UsageError(
                    f"task segmentation needs a mask of the outputs' size; the model gave {list(head.shape)}, the data "
                    f"{list(targets.shape)}. Let the model return torch.nn.functional.interpolate(outputs, "
                    'size=inputs.shape[2:], mode="bilinear"), or give masks of the size of its outputs.'
                )
        losses = [summed_loss(head, targets, self._class_weights, ignore_index=self.ignore_index) for head in heads]
        loss = losses[0] if len(losses) == 1 else losses[0] + self._aux_weight * losses[1]
        return loss, summed_weight(heads[0], targets, self._class_weights, self.ignore_index)

    def metrics(self, outputs: Any, batch: Any) -> Sums:
        """confusion: [classes, classes], how many pixels of each label (row) are taken for each class (column)."""
        logits, targets = _heads(outputs)[0], targets_of(batch).long()
        classes = logits.shape[1]
        cells = torch.where(targets == self.ignore_index, classes**2, targets * classes + logits.argmax(1))
        counts = torch.bincount(cells.flatten(), minlength=classes**2 + 1)
        return {"confusion": counts[: classes**2].reshape(classes, classes)}

    def summary(self, sums: dict[str, Tensor]) -> dict[str, float]:
        """mean_iou is over the classes that are in a label or a prediction of a pixel that counts."""
        confusion = sums["confusion"].double()
        overlap = confusion.diagonal()
        union = confusion.sum(0) + confusion.sum(1) - overlap
        if 0 <= self.ignore_index < len(union):
            union[self.ignore_index] = 0  # none of its pixels counts
        iou = torch.where(union > 0, overlap / union, torch.nan)
        values = {"mean_iou": float(iou.nanmean()), "pixel_accuracy": float(overlap.sum() / confusion.sum())}
        if len(iou) <= MOST_NAMED:
            values |= {f"iou/{label}": value for label, value in enumerate(iou.tolist())}
        return {**super().summary(sums), **values}

    def probe(self, outputs: Any) -> None:
        for head in _heads(outputs):
            if head.ndim != 4:
                _refuse(str(list(head.shape)))
        self.classes = _heads(outputs)[0].shape[1]
        refuse_other_count(self._class_weights, self.classes)

    @property
    def checks_targets_only(self) -> bool:
        return type(self).check in (Task.check, Segmentation.check)

    def check(self, batch: Any, indices: Sequence[int]) -> None:
        self.check_targets(targets_of(batch), indices)

    def check_targets(self, targets: Any, indices: Sequence[int] | None = None) -> None:
        masks = torch.as_tensor(targets)
        if masks.is_floating_point() or masks.is_complex() or masks.ndim != 3:
            raise UsageError(
                "task segmentation needs masks [batch, height, width] of integers, one class for each pixel; the data "
                f"gave {masks.dtype} {list(masks.shape)}.{_as_mask(masks)}"
            )
        refuse_small(masks, self.classes)
        for start in range(0, len(masks), AT_ONCE):
            some = masks[start : start + AT_ONCE]
            labels = some.to(torch.int32) if some.dtype.itemsize < 4 else some.long()  # uint16 knows no comparison
            wrong = ((labels < 0) | (labels >= self.classes)) & (labels != self.ignore_index)
            if wrong.any():
                place = int(wrong.flatten(1).any(1).int().argmax())
                label, place = int(labels[place][wrong[place]][0]), start + place
                raise UsageError(
                    f"The mask of sample {place if indices is None else int(indices[place])} has label {label}, but "
                    f"the model has {self.classes} classes (0 to {self.classes - 1}), and {self.ignore_index} is "
                    "ignored. Let labels count from 0, give the model more outputs (model.args.num_classes, if it "
                    f"takes that), or leave these pixels out: task.args.ignore_index: {label}."
                )


def _heads(outputs: Any) -> tuple[Tensor, ...]:
    """(outputs,), or with those of an auxiliary head. Raises UsageError for outputs of another form."""
    if isinstance(outputs, Tensor):
        return (outputs,)
    names = list(outputs) if isinstance(outputs, Mapping) else []
    if set(names) not in ({"out"}, {"out", "aux"}) or not all(isinstance(outputs[name], Tensor) for name in names):
        kind = type(outputs).__name__
        _refuse(f"a {kind} of {', '.join(map(str, names))}" if names else f"a {kind}")
    return tuple(outputs[name] for name in ("out", "aux") if name in names)


def _refuse(given: str) -> NoReturn:
    """Raise UsageError for outputs that segmentation has no loss for."""
    raise UsageError(
        "task segmentation needs outputs of shape [batch, classes, height, width], or a dict of them, 'out' and "
        f"perhaps 'aux', as torchvision's models give; the model gave {given}. Let it return these alone, or write a "
        "task with a loss() of your own (docs/own-code.md)."
    )


def _as_mask(masks: Tensor) -> str:
    """How __getitem__ makes a mask of integers of these; "" if that is not known."""
    if masks.ndim == 4:
        how = "mask.squeeze(0)" if masks.shape[1] == 1 else "mask.argmax(0), if it is one-hot"
        return f" Give a number for each pixel: {how}."
    if masks.ndim == 3 and masks.is_floating_point():
        return (
            " Give mask.long(); but not of a mask that ToTensor or ToDtype(scale=True) has scaled to 0 … 1: load that "
            "as torch.from_numpy(numpy.array(picture)).long()."
        )
    return ""
