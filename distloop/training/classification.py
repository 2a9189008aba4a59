"""The built-in task `classification`: one class per sample."""

import sys
from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.nn import functional

from distloop.data.batches import targets_of
from distloop.errors import UsageError
from distloop.training.tasks import Guesses, Sums, Task

SMALL = {torch.uint8: 256, torch.int8: 128, torch.bool: 2}  # how many classes a label of so few bits can name
# What torchvision's models give in training: their module, class, and the weight of each auxiliary loss (Szegedy et al.
# 2015, "Going deeper with convolutions"; torchvision's own recipe for Inception).
LABELLED = "samples with a label"  # a sum of Classification, under a name that no task of a user's has
AUXILIARY = (("googlenet", "GoogLeNetOutputs", 0.3), ("inception", "InceptionOutputs", 0.4))


class Classification(Task):
    """One class per sample: cross-entropy and accuracy. Outputs [batch, classes], targets: integers [batch]."""

    best = ("accuracy", "max")

    def __init__(self, label_smoothing: float = 0.0) -> None:
        super().__init__()  # of a subclass that is an nn.Module as well
        self.label_smoothing = label_smoothing

    def loss(self, outputs: Any, batch: Any) -> tuple[Tensor, int]:
        """Those of torchvision's googlenet and inception_v3 in training have auxiliary outputs, with their weights."""
        targets = targets_of(batch).long()  # labels may be of any integer type
        if isinstance(outputs, Tensor):
            return self._cross_entropy(outputs, targets), len(targets)
        if not (factor := auxiliary_weight(outputs)):
            _refuse(outputs)
        logits, *auxiliary = outputs
        others = sum(self._cross_entropy(each, targets) for each in auxiliary if each is not None)
        return self._cross_entropy(logits, targets) + factor * others, len(targets)

    def _cross_entropy(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return functional.cross_entropy(outputs, targets, reduction="sum", label_smoothing=self.label_smoothing)

    def metrics(self, outputs: Tensor, batch: Any) -> Sums:
        targets = targets_of(batch).long()
        return {"correct": (outputs.argmax(1) == targets).sum(), LABELLED: torch.tensor(len(targets))}

    def guesses(self, outputs: Any, batch: Any) -> Guesses | None:
        try:
            targets = targets_of(batch)
        except UsageError:
            return None
        if not isinstance(outputs, Tensor) or not isinstance(targets, Tensor):
            return None  # of a subclass whose outputs or batches have another form
        if (outputs.ndim, targets.ndim) != (2, 1) or targets.is_floating_point() or targets.is_complex():
            return None
        predictions = outputs.argmax(1)
        confidences = outputs.float().softmax(1).gather(1, predictions[:, None])[:, 0]
        return targets, predictions, confidences

    def summary(self, sums: dict[str, Tensor]) -> dict[str, float]:
        return {**super().summary(sums), "accuracy": int(sums["correct"]) / int(sums.get(LABELLED, sums["samples"]))}

    def probe(self, outputs: Any) -> None:
        if not isinstance(outputs, Tensor) or outputs.ndim != 2:
            _refuse(outputs)
        self.classes = outputs.shape[1]

    @property
    def checks_targets_only(self) -> bool:
        return type(self).check in (Task.check, Classification.check)

    def check(self, batch: Any, indices: Sequence[int]) -> None:
        self.check_targets(targets_of(batch), indices)

    def check_targets(self, targets: Any, indices: Sequence[int] | None = None) -> None:
        needs = "task classification needs one integer label per sample; the data gave"
        if isinstance(targets, (list, tuple)) and targets and isinstance(targets[0], str):
            raise UsageError(
                f"{needs} text ({targets[0]!r}). Number the names in a fixed order: names = sorted(set(all_names)), "
                "label = names.index(name)."
            )
        labels = torch.as_tensor(targets)
        if labels.is_floating_point() or labels.is_complex() or labels.ndim != 1:
            raise UsageError(f"{needs} {labels.dtype} of shape {list(labels.shape)}.{_as_label(labels)}")
        if labels.dtype in (torch.uint8, torch.int8, torch.bool) and self.classes > (most := SMALL[labels.dtype]):
            raise UsageError(
                f"Labels of {str(labels.dtype).removeprefix('torch.')} can name {most} classes only, and the model has "
                f"{self.classes}: larger labels have become other numbers. Make them int64 before they get their "
                "values: torch.tensor(labels, dtype=torch.int64)."
            )
        labels = labels.long()  # uint16 knows no comparison
        wrong = torch.nonzero((labels < 0) | (labels >= self.classes)).flatten()
        if len(wrong):
            place = int(wrong[0])
            raise UsageError(
                f"Sample {place if indices is None else int(indices[place])} has label {int(labels[place])}, but "
                f"the model has {self.classes} classes (0 to {self.classes - 1}). Let labels count from 0, "
                "or give the model more outputs (model.args.num_classes, if it takes that)."
            )


def _as_label(labels: Tensor) -> str:
    """How __getitem__ makes one integer of a label as these are; "" if that is not known."""
    if labels.ndim == 1 and labels.is_floating_point():
        return " Give int(label); for numbers that are no classes there is task: regression."
    if labels.ndim != 2:
        return ""
    how = "label.squeeze()" if labels.shape[1] == 1 else "label.argmax(), if it is one-hot"
    return f" Give one number a sample: {how}."


def auxiliary_weight(outputs: Any) -> float:
    """The weight of each auxiliary loss beside that of the first of these outputs; 0 for outputs of another kind."""
    for module, name, weight in AUXILIARY:
        if isinstance(outputs, getattr(sys.modules.get(f"torchvision.models.{module}"), name, ())):
            return weight
    return 0.0


def _refuse(outputs: Any) -> NoReturn:
    """Raise UsageError for outputs that classification has no loss for."""
    name = type(outputs).__name__
    given, more = f"{'an' if name[0] in 'AEIOU' else 'a'} {name}", ""
    if isinstance(outputs, Tensor):
        given = f"{list(outputs.shape)}"
    elif isinstance(outputs, (dict, tuple, list)):
        given += f" of {', '.join(map(str, outputs))}" if isinstance(outputs, dict) else f" of {len(outputs)}"
        more = " Let it return the logits alone, or write a task with a loss() of your own (docs/own-code.md)."
    raise UsageError(f"task classification needs outputs of shape [batch, classes]; the model gave {given}.{more}")
