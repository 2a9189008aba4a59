"""The tasks: a task passes a batch to the model and computes loss and metrics. Your own: module:class.

The gradient of a step is that of Σ loss / Σ weight over its whole global batch. A task returns the *sums* over one
micro-batch and divides by no batch size. Metrics are sums, too, so that validation adds them over batches and ranks
and counts every sample once.
"""

import inspect
import sys
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Literal, NoReturn

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from distloop.config.registry import call, resolve
from distloop.config.settings import Task as TaskConfig
from distloop.data.batches import inputs_of, targets_of
from distloop.data.seeding import Place, building
from distloop.errors import UsageError

# In torch's errors about tensors of dtypes that do not go together.
SMALL = {torch.uint8: 256, torch.int8: 128, torch.bool: 2}  # how many classes a label of so few bits can name
Sums = dict[str, Tensor]
Guesses = tuple[Tensor, Tensor, Tensor]

# What torchvision's models give in training: their module, class, and the weight of each auxiliary loss (Szegedy et al.
# 2015, "Going deeper with convolutions"; torchvision's own recipe for Inception).
LABELLED = "samples with a label"  # a sum of Classification, under a name that no task of a user's has
AUXILIARY = (("googlenet", "GoogLeNetOutputs", 0.3), ("inception", "InceptionOutputs", 0.4))


class Task:
    """Base class. A task of your own overrides loss() and, if needed, other methods."""

    weight: ClassVar[str] = "samples"
    """What the weight that loss() returns counts. How many samples a batch has is known beforehand: another weight is
    refused. Any other word, such as "tokens" or "pixels": the weights are added over the ranks before the update."""
    best: ClassVar[tuple[str, Literal["min", "max"]]] = ("loss", "min")
    """The validation metric that decides which step is the best, and whether more or less of it is better."""
    classes: int = 0
    """The number of classes in guesses(); 0: the number of the data set's class names."""

    def forward(self, model: nn.Module, batch: Any) -> Any:
        """The model's outputs for a batch. Default: model(inputs)."""
        return model(inputs_of(batch))

    def loss(self, outputs: Any, batch: Any) -> tuple[Tensor, Tensor | int]:
        """(sum of the losses, sum of the weights) over the samples of a micro-batch."""
        raise NotImplementedError(f"{type(self).__name__} must define loss(outputs, batch).")

    def metrics(self, outputs: Any, batch: Any) -> Sums:
        """Sums over a validation batch, by name: counts as integer tensors, other sums as float tensors."""
        return {}

    def guesses(self, outputs: Any, batch: Any) -> Guesses | None:
        """(labels, predictions, confidences) of a validation batch, if each sample has one class; else None.

        Each has the shape [batch] and is on the outputs' device. Labels and predictions are integers; a confidence is
        the probability, 0 to 1, that the model gives its prediction. A label outside of the classes, such as -1, leaves
        its sample out. validation.json gets the confusion matrix, the accuracy of each class and the most confident
        mistakes from them; the metrics of validation come from metrics() and summary() alone.
        """
        return None

    def collect(self, outputs: Any, batch: Any) -> dict[str, Any]:
        """What metrics that are no sums (AUC, mAP, BLEU) need of each sample of a validation batch, by name: a tensor
        or an array [batch, …], or a list of length batch of texts, or of tensors of different shapes. Where a task
        defines it, summary(sums, collected) gets the whole: tensors [samples, …] on the CPU, and lists, of each sample
        once and in the data's order. Each rank holds all of it in the CPU's memory."""
        return {}

    def summary(self, sums: dict[str, Tensor]) -> dict[str, float]:
        """The metrics of a validation, from sums over the whole set: those of metrics(), and loss, weight, samples.
        With a collect() it is summary(sums, collected). Called on all ranks alike, at the end of a validation."""
        return {"loss": float(sums["loss"] / sums["weight"])}

    def probe(self, outputs: Any) -> None:
        """Check the outputs for one sample, before training. Raises UsageError if they do not fit the task."""

    def check(self, batch: Any, indices: Sequence[int]) -> None:
        """Check a batch, on the CPU in the loader. Raises UsageError if it does not fit the task.

        `indices`: the positions of its samples in the data set.
        """

    @property
    def checks_targets_only(self) -> bool:
        """Whether check() uses nothing but the targets, as in the built-in tasks."""
        return type(self).check in (Task.check, Classification.check)

    def check_targets(self, targets: Any) -> None:
        """Check all targets of a data set in memory, before training. Raises UsageError if they do not fit."""


class Classification(Task):
    """One class per sample: cross-entropy and accuracy. Outputs [batch, classes], targets: integers [batch]."""

    best = ("accuracy", "max")

    def __init__(self, label_smoothing: float = 0.0) -> None:
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


class Regression(Task):
    """Numbers: mean squared error and R². Outputs and targets of one shape, [batch, …]."""

    def loss(self, outputs: Tensor, batch: Any) -> tuple[Tensor, int]:
        targets = targets_of(batch)
        if outputs.shape != targets.shape:  # broadcasting would silently compute another loss
            raise UsageError(
                f"task regression needs outputs and targets of one shape; the model gave {list(outputs.shape)}, the "
                f"data {list(targets.shape)}."
            )
        return functional.mse_loss(outputs, targets, reduction="sum") / max(1, outputs[0].numel()), len(targets)

    def metrics(self, outputs: Tensor, batch: Any) -> Sums:
        pair = (outputs, targets_of(batch))
        outputs, targets = ((values.cpu() if values.is_mps else values).double() for values in pair)  # MPS: no float64
        return {
            "squared_error": (outputs - targets).square().sum(),
            "targets": targets.sum(),
            "squared_targets": targets.square().sum(),
            "elements": torch.tensor(targets.numel()),
        }

    def summary(self, sums: dict[str, Tensor]) -> dict[str, float]:
        spread = sums["squared_targets"] - sums["targets"].square() / sums["elements"]
        return {**super().summary(sums), "r2": float(1 - sums["squared_error"] / spread)}


TASKS: dict[str, Callable[..., Task]] = {"classification": Classification, "regression": Regression}


def build_task(config: TaskConfig, seed: int | None = None) -> Task:
    """The task that the config names. `seed`: the run's, for what building it draws. Raises UsageError."""
    with building(Place.TASK, seed):
        task = call("task.args", resolve("task.name", config.name, TASKS), config.args, {})
    if not isinstance(task, Task):
        raise UsageError(
            f"task.name = {config.name!r} gave a {type(task).__name__}; derive its class from distloop.tasks.Task."
        )
    check_attributes(task)
    return task


METHODS = ("forward", "loss", "metrics", "guesses", "collect", "summary", "probe", "check", "check_targets")


def collects(task: Task) -> bool:
    """Whether the task defines collect()."""
    return getattr(task.collect, "__func__", None) is not Task.collect


def check_attributes(task: Task) -> None:
    """Raise UsageError if the task keeps a value of its own under a name that means something to distloop."""
    kind, best = type(task).__name__, task.best
    for name in METHODS:
        if not callable(value := getattr(task, name)) or isinstance(value, nn.modules.loss._Loss):
            raise UsageError(
                f"{kind}.{name} is a {type(value).__name__}, and distloop calls {name}() of a task. Give the value "
                f"another name, such as self.own_{name}, and use it in the method {name}()."
            )
    if collects(task) and not _takes_two(task.summary):
        raise UsageError(
            f"{kind} defines collect(), and its summary() takes no second value, in which it would get what was "
            "collected. Write: def summary(self, sums, collected):"
        )
    if not (isinstance(task.weight, str) and task.weight.isidentifier()):
        raise UsageError(
            f"{kind}.weight = {_shown(task.weight)}: distloop reads there what the weight of loss() counts, in a word: "
            '"samples", or another one such as "tokens". Give a value of your own, such as weights of classes, another '
            "name: self.class_weights."
        )
    is_pair = isinstance(best, (tuple, list)) and len(best) == 2
    if not is_pair or not isinstance(best[0], str) or best[1] not in ("min", "max"):
        raise UsageError(
            f"{kind}.best = {_shown(best)}: give the name of a metric, and whether less or more of it is better, such "
            'as ("accuracy", "max").'
        )
    if isinstance(task.classes, bool) or not isinstance(task.classes, (int, np.integer)) or task.classes < 0:
        raise UsageError(
            f"{kind}.classes = {_shown(task.classes)}: distloop keeps the number of classes there. Give names of "
            "classes another name, such as self.class_names; DataSource(…, classes=…) shows them in the report."
        )


def _takes_two(method: Callable[..., Any]) -> bool:
    try:
        return bool(inspect.signature(method).bind(None, None))
    except TypeError:
        return False


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"a {type(value).__name__}"
