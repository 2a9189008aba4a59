"""The base class of tasks: a task passes a batch to the model and computes loss and metrics.

The gradient of a step is that of Σ loss / Σ weight over its whole global batch. A task returns the *sums* over one
micro-batch and divides by no batch size. Metrics are sums, too, so that validation adds them over batches and ranks
and counts every sample once.
"""

import inspect
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Literal

import numpy as np
from torch import Tensor, nn

from distloop.data.batches import inputs_of
from distloop.data.now import Now
from distloop.errors import UsageError

Sums = dict[str, Tensor]
Guesses = tuple[Tensor, Tensor, Tensor]


NO_MODULE = nn.Module()  # empty, and nothing is added to it


class Task:
    """Base class. A task of your own overrides loss() and, if needed, other methods.

    One with state_dict() and load_state_dict() is saved with each checkpoint and continued. One that is an nn.Module as
    well has parameters that are trained, averaged and saved as the model's.
    """

    weight: ClassVar[str] = "samples"
    """What the weight that loss() returns counts. How many samples a batch has is known beforehand: another weight is
    refused. Any other word, such as "tokens" or "pixels": the weights are added over the ranks before the update."""
    best: ClassVar[tuple[str, Literal["min", "max"]]] = ("loss", "min")
    """The validation metric that decides which step is the best, and whether more or less of it is better."""
    classes: int = 0
    """The number of classes in guesses(); 0: the number of the data set's class names."""
    now: Now = Now()
    """Where the run is: step, epoch, total_steps, training. distloop sets it for each step and each validation."""

    @property
    def as_module(self) -> nn.Module:
        """The task, if it is an nn.Module; else a module that is empty."""
        return self if isinstance(self, nn.Module) else NO_MODULE

    @property
    def as_part(self) -> Any:
        """The task as a part of checkpoints, if it has a state; else None."""
        if isinstance(self, nn.Module):
            return self if self.state_dict() else None
        return self if hasattr(self, "state_dict") else None

    def forward(self, model: nn.Module, batch: Any) -> Any:
        """The model's outputs for a batch. Default: model(inputs)."""
        return model(inputs_of(batch))

    def augment_batch(self, batch: Any) -> Any:
        """The batch that a step of training is done with, such as a mixed one: on the device, before the forward pass.
        It draws from the global generators. Not called in validation."""
        return batch

    def loss(self, outputs: Any, batch: Any) -> tuple[Any, ...]:
        """(sum of the losses, sum of the weights) over the samples of a micro-batch; perhaps more sums, by name.

        Those are divided by the sum of the weights over the step or the validation, and stand in its row.
        """
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
        """Whether check() uses nothing but the targets: those in memory are then checked once, and not in batches."""
        return type(self).check is Task.check

    def check_targets(self, targets: Any) -> None:
        """Check all targets of a data set in memory, before training. Raises UsageError if they do not fit."""


METHODS = (
    *("forward", "augment_batch", "loss", "metrics", "guesses", "collect", "summary"),
    *("probe", "check", "check_targets"),
)


def collects(task: Task) -> bool:
    """Whether the task defines collect()."""
    return getattr(task.collect, "__func__", None) is not Task.collect


def check_attributes(task: Task) -> None:
    """Raise UsageError if the task keeps a value of its own under a name that means something to distloop."""
    kind, best = type(task).__name__, task.best
    if isinstance(task, nn.Module):
        _check_module(task, kind)
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
    has = [name for name in ("state_dict", "load_state_dict") if callable(getattr(task, name, None))]
    if len(has) == 1 or hasattr(task, "state_dict") != bool(has):
        raise UsageError(
            f"{kind} has a state_dict, and not both methods state_dict() and load_state_dict(state): distloop saves "
            "the task's state with the first and continues it with the second."
        )
    if not isinstance(task.now, Now):
        raise UsageError(
            f"{kind}.now = {_shown(task.now)}: distloop keeps there where the run is (self.now.step, epoch, "
            "total_steps, training). Give a value or a method of your own another name."
        )
    if isinstance(task.classes, bool) or not isinstance(task.classes, (int, np.integer)) or task.classes < 0:
        raise UsageError(
            f"{kind}.classes = {_shown(task.classes)}: distloop keeps the number of classes there. Give names of "
            "classes another name, such as self.class_names; DataSource(…, classes=…) shows them in the report."
        )


def _check_module(task: nn.Module, kind: str) -> None:
    """The same for what torch keeps apart from other attributes: the task's own ones would be used in its place."""
    if "_modules" not in vars(task):
        raise UsageError(f"{kind} is a torch.nn.Module: let its __init__() begin with super().__init__().")
    if type(task).forward is nn.Module.forward:
        raise UsageError(
            f"{kind} takes the forward() of torch.nn.Module in the place of a task's: name the task first, "
            f"class {kind}(distloop.tasks.Task, torch.nn.Module)."
        )
    for name, value in {**task._modules, **task._buffers}.items():
        if hasattr(Task, name) and not hasattr(nn.Module, name):
            raise taken_by_task(kind, name, type(value).__name__)


def taken_by_task(kind: str, name: str, value: str) -> UsageError:
    """The error for a module, parameter or buffer of a task under a name that a task has."""
    return UsageError(
        f"{kind}.{name} is a {value}; each task has a {name} that distloop uses, and self.{name} would be that one. "
        f"Give the value another name, such as self.own_{name}."
    )


def _takes_two(method: Callable[..., Any]) -> bool:
    try:
        return bool(inspect.signature(method).bind(None, None))
    except TypeError:
        return False


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"a {type(value).__name__}"
