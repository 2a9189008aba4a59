"""The built-in task `classification`: one class per sample."""

import sys
from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

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
from distloop.training.mixing import mixed, read_alpha
from distloop.training.tasks import Guesses, Sums, Task

LABELLED = "samples with a label"  # a sum of Classification, under a name that no task of a user's has
# What torchvision's models give in training: their module, class, and the weight of each auxiliary loss (Szegedy et al.
# 2015, "Going deeper with convolutions"; torchvision's own recipe for Inception).
AUXILIARY = (("googlenet", "GoogLeNetOutputs", 0.3), ("inception", "InceptionOutputs", 0.4))


class Classification(Task):
    """One class per sample: cross-entropy and accuracy. Outputs [batch, classes], targets: integers [batch]."""

    best = ("accuracy", "max")
    # Of the class: a subclass need not call __init__(). Underlined: its own attributes may have the other names.
    _top_k: int | None = None
    _class_weights: tuple[float, ...] | None = None
    _mixup = _cutmix = 0.0

    def __init__(
        self,
        label_smoothing: float = 0.0,
        top_k: int | None = None,
        class_weights: Sequence[float] | None = None,
        mixup: float | None = 0.0,
        cutmix: float | None = 0.0,
    ) -> None:
        """`label_smoothing`: the share of each target that all classes get alike (Szegedy et al. 2016). `top_k`: the
        metrics have accuracy_topK, too. `class_weights`: one number for each class, as in torch's CrossEntropyLoss.
        `mixup`, `cutmix`: their alphas; 0: off. Raises UsageError."""
        if isinstance(self, nn.Module):  # a subclass; of another one, this calls no __init__() of its other bases
            super().__init__()
        if not is_number(label_smoothing, 0, 1):
            raise UsageError(
                f"task.args.label_smoothing = {label_smoothing!r}: give a number from 0 to 1, such as 0.1."
            )
        if top_k is not None and (type(top_k) is not int or top_k < 2):
            raise UsageError(f"task.args.top_k = {top_k!r}: give a whole number from 2, such as 5.")
        self.label_smoothing, self._top_k = label_smoothing, top_k
        self._class_weights = read_class_weights(class_weights)
        self._mixup, self._cutmix = read_alpha("mixup", mixup), read_alpha("cutmix", cutmix)
        if self._class_weights is not None:  # what divides the gradient is no number of samples
            self.weight = "class_weights"  # type: ignore[misc]

    def augment_batch(self, batch: Any) -> Any:
        """With mixup or cutmix, the batch with mixed images, and targets [batch, classes] in floats."""
        return mixed(batch, self._mixup, self._cutmix, self.classes) if self._mixup or self._cutmix else batch

    def loss(self, outputs: Any, batch: Any) -> tuple[Tensor, Tensor | int]:
        """Those of torchvision's googlenet and inception_v3 in training have auxiliary outputs, with their weights.

        The targets are integers [batch], or probabilities [batch, classes], as augment_batch() gives them.
        """
        targets = targets_of(batch)
        if not (targets.is_floating_point() and targets.ndim == 2):
            targets = targets.long()
        if isinstance(outputs, Tensor):
            return self._cross_entropy(outputs, targets), self._summed_weight(outputs, targets)
        if not (factor := auxiliary_weight(outputs)):
            _refuse(outputs)
        logits, *auxiliary = outputs
        others = sum(self._cross_entropy(each, targets) for each in auxiliary if each is not None)
        return self._cross_entropy(logits, targets) + factor * others, self._summed_weight(logits, targets)

    def _cross_entropy(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return summed_loss(outputs, targets, self._class_weights, label_smoothing=self.label_smoothing)

    def _summed_weight(self, outputs: Tensor, targets: Tensor) -> Tensor | int:
        return len(targets) if self._class_weights is None else summed_weight(outputs, targets, self._class_weights)

    def metrics(self, outputs: Tensor, batch: Any) -> Sums:
        targets = targets_of(batch).long()
        sums = {"correct": (outputs.argmax(1) == targets).sum(), LABELLED: torch.tensor(len(targets))}
        if self._top_k:
            sums[f"correct_top{self._top_k}"] = (outputs.topk(self._top_k, 1).indices == targets[:, None]).any(1).sum()
        return sums

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
        labelled = int(sums.get(LABELLED, sums["samples"]))
        values = {**super().summary(sums), "accuracy": int(sums["correct"]) / labelled}
        if (correct := sums.get(f"correct_top{self._top_k}")) is not None:
            values[f"accuracy_top{self._top_k}"] = int(correct) / labelled
        return values

    def probe(self, outputs: Any) -> None:
        if not isinstance(outputs, Tensor) or outputs.ndim != 2:
            _refuse(outputs)
        self.classes = outputs.shape[1]
        refuse_other_count(self._class_weights, self.classes)
        if self._top_k and self._top_k >= self.classes:
            raise UsageError(
                f"task.args.top_k = {self._top_k}: the model has {self.classes} classes, so that each label is "
                f"among the first {self.classes}. Give a smaller number, or leave it out."
            )

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
        refuse_small(labels, self.classes)
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
