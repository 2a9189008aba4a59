"""The tasks: what is fed to the model, which loss is taken, what is measured. Your own: module:class.

The gradient of a step is that of Σ loss / Σ weight over its whole global batch. A task returns the *sums* of
one micro-batch; nothing here divides by a batch size. Metrics are sums as well, so that validation can add
them over batches and ranks and count every sample once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from distloop.config.registry import call, resolve
from distloop.config.settings import Task as TaskConfig
from distloop.data.batches import inputs_of, targets_of
from distloop.errors import UsageError

Sums = dict[str, Tensor]
Guesses = tuple[Tensor, Tensor, Tensor]


class Task:
    """A task of your own overrides loss, and what else differs."""

    weight: ClassVar[Literal["samples", "tokens", "pixels"]] = "samples"
    """What the second number of loss() counts. Anything but samples varies from step to step, and is added
    up over the ranks before the update."""
    best: ClassVar[tuple[str, Literal["min", "max"]]] = ("loss", "min")
    """The validation metric by which the best step is chosen, and its direction."""
    classes: int = 0
    """The number of classes that guesses() tells apart; 0: as many as the data set has names for."""

    def forward(self, model: nn.Module, batch: Any) -> Any:
        """The model's outputs. Default: the model on the batch's inputs."""
        return model(inputs_of(batch))

    def loss(self, outputs: Any, batch: Any) -> tuple[Tensor, Tensor | int]:
        """(sum of the losses, sum of the weights) of the micro-batch."""
        raise NotImplementedError(f"{type(self).__name__} must define loss(outputs, batch).")

    def metrics(self, outputs: Any, batch: Any) -> Sums:
        """Sums over the validation batch, by name: counts as integer tensors, other sums as float tensors."""
        return {}

    def guesses(self, outputs: Any, batch: Any) -> Guesses | None:
        """What the samples of a validation batch are taken for, where each has one class: (labels, predictions,
        confidences), each of shape [batch], on the outputs' device, the first two integers, a confidence the
        probability from 0 to 1 that the prediction is given.

        From it come the confusion matrix, the accuracy of each class and the most confident mistakes in
        validation.json; None, the default: nothing of it. A sample whose label is none of the classes, such as -1,
        is left out. The validation's numbers come from metrics() and summary() alone.
        """
        return None

    def summary(self, sums: dict[str, Tensor]) -> dict[str, float]:
        """The validation row from the sums over the whole set: those of metrics(), and loss, weight, samples."""
        return {"loss": float(sums["loss"] / sums["weight"])}

    def probe(self, outputs: Any) -> None:
        """Told the outputs for one sample before training starts."""

    def check(self, batch: Any, indices: Sequence[int]) -> None:
        """Look at a batch on the CPU, in the loader; raise UsageError for one that cannot be trained on."""

    @property
    def checks_targets_only(self) -> bool:
        """check() looks at nothing but the targets, as those of the built-in tasks do."""
        return type(self).check in (Task.check, Classification.check)

    def check_targets(self, targets: Any) -> None:
        """Look at all targets of a data set in memory, before training starts."""


class Classification(Task):
    """One class per sample: cross-entropy and accuracy. Outputs [batch, classes], targets: integers [batch]."""

    best = ("accuracy", "max")

    def __init__(self, label_smoothing: float = 0.0) -> None:
        self.label_smoothing = label_smoothing

    def loss(self, outputs: Tensor, batch: Any) -> tuple[Tensor, int]:
        targets = targets_of(batch).long()  # labels may be of any integer type
        loss = functional.cross_entropy(outputs, targets, reduction="sum", label_smoothing=self.label_smoothing)
        return loss, len(targets)

    def metrics(self, outputs: Tensor, batch: Any) -> Sums:
        return {"correct": (outputs.argmax(1) == targets_of(batch)).sum()}

    def guesses(self, outputs: Any, batch: Any) -> Guesses | None:
        try:
            targets = targets_of(batch)
        except UsageError:
            targets = None
        if not isinstance(outputs, Tensor) or not isinstance(targets, Tensor):
            return None  # a task made of this one, with outputs or batches of another form
        if (outputs.ndim, targets.ndim) != (2, 1) or targets.is_floating_point():
            return None
        predictions = outputs.argmax(1)
        confidences = outputs.float().softmax(1).gather(1, predictions[:, None])[:, 0]
        return targets, predictions, confidences

    def summary(self, sums: dict[str, Tensor]) -> dict[str, float]:
        return {**super().summary(sums), "accuracy": int(sums["correct"]) / int(sums["samples"])}

    def probe(self, outputs: Any) -> None:
        if not isinstance(outputs, Tensor) or outputs.ndim != 2:
            shape = list(outputs.shape) if isinstance(outputs, Tensor) else type(outputs).__name__
            raise UsageError(f"task classification needs outputs of shape [batch, classes]; the model gave {shape}.")
        self.classes = outputs.shape[1]

    def check(self, batch: Any, indices: Sequence[int]) -> None:
        self.check_targets(targets_of(batch), indices)

    def check_targets(self, targets: Any, indices: Sequence[int] | None = None) -> None:
        labels = torch.as_tensor(targets)
        if labels.is_floating_point() or labels.ndim != 1:
            raise UsageError(
                f"task classification needs one integer label per sample; the data gave {labels.dtype} of shape "
                f"{list(labels.shape)}."
            )
        wrong = torch.nonzero((labels < 0) | (labels >= self.classes)).flatten()
        if len(wrong):
            place = int(wrong[0])
            raise UsageError(
                f"Sample {place if indices is None else int(indices[place])} has label {int(labels[place])}, but "
                f"the model has {self.classes} classes (0 to {self.classes - 1}). Correct the data, or set "
                "model.args.num_classes."
            )


class Regression(Task):
    """Numbers: mean squared error and R². Outputs and targets of one shape, [batch, …]."""

    def loss(self, outputs: Tensor, batch: Any) -> tuple[Tensor, int]:
        targets = targets_of(batch)
        if outputs.shape != targets.shape:  # broadcasting would train something else in silence
            raise UsageError(
                f"task regression needs outputs and targets of one shape; the model gave {list(outputs.shape)}, the "
                f"data {list(targets.shape)}."
            )
        return functional.mse_loss(outputs, targets, reduction="sum") / max(1, outputs[0].numel()), len(targets)

    def metrics(self, outputs: Tensor, batch: Any) -> Sums:
        outputs, targets = (values.cpu().double() for values in (outputs, targets_of(batch)))  # MPS has no float64
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


def build_task(config: TaskConfig) -> Task:
    """The task that the config names. Raises UsageError."""
    task = call("task.args", resolve("task.name", config.name, TASKS), config.args, {})
    if not isinstance(task, Task):
        raise UsageError(f"task.name = {config.name!r} gave a {type(task).__name__}; make it a distloop.tasks.Task.")
    return task


def introduce(task: Task, model: nn.Module, example: Any, source: Any) -> None:
    """Show the task what the model gives for one sample, and the targets of data sets that have them at hand.

    Mistakes that would otherwise come up somewhere in an epoch, on one rank, are found before training.
    """
    model.eval()
    with torch.no_grad():
        outputs = task.forward(model, example)
        task.probe(outputs)
        check_guesses(task.guesses(outputs, example), 1)
    model.train()
    for name, half in (("training", source.train), ("validation", source.validation)):
        # Of other data sets than those in memory only the loader knows what they make of their targets.
        if hasattr(half, "batch") and getattr(half, "targets", None) is not None:
            try:
                task.check_targets(half.targets)
            except UsageError as error:
                raise UsageError(f"In the {name} data: {error}") from None


def check_guesses(guesses: Guesses | None, samples: int) -> None:
    """Raises UsageError for guesses that are not one for each of a batch's `samples`."""
    if guesses is not None and any(values.shape != (samples,) for values in guesses):
        raise UsageError(
            f"task.guesses() must give labels, predictions and confidences of shape [{samples}], one for each sample "
            f"of the batch; it gave {', '.join(str(list(values.shape)) for values in guesses)}."
        )
