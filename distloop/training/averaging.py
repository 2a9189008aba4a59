"""An exponential moving average of the weights."""

import itertools
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel


class Average:
    """An exponential moving average of a model's parameters and buffers, and of those of a task that is a module with
    parameters that are trained; without a decay there is none."""

    def __init__(self, model: nn.Module, decay: float | None, task: Any = None) -> None:
        self.decay, self.own_task = decay, task
        self.averaged = self.averaged_task = None
        if decay is not None:
            _detach_made_weights(model)
            self.averaged = AveragedModel(model, use_buffers=True)
            if isinstance(task, nn.Module) and any(parameter.requires_grad for parameter in task.parameters()):
                _detach_made_weights(task)
                self.averaged_task = AveragedModel(task, use_buffers=True)

    @property
    def module(self) -> nn.Module | None:
        """A model with the averaged weights."""
        return None if self.averaged is None else self.averaged.module

    @property
    def task(self) -> Any:
        """A task with the averaged weights; the task itself where it is not averaged."""
        return self.own_task if self.averaged_task is None else self.averaged_task.module

    def prepared(self, accelerator: Accelerator, model: nn.Module) -> nn.Module:
        """The model to validate: that with the averaged weights, in mixed precision; without an average, `model`."""
        return model if self.module is None else accelerator.prepare_model(self.module, evaluation_mode=True)

    def update(self, model: nn.Module) -> None:
        """Add the weights of the model, and of the task, after a step."""
        if self.averaged is not None and self.decay is not None:
            update_average(self.averaged, model, self.decay)
            if self.averaged_task is not None:
                update_average(self.averaged_task, self.own_task, self.decay)


def _detach_made_weights(model: nn.Module) -> None:
    """Attributes with a history of gradients cannot be copied: weight_norm() keeps one, which each pass makes anew."""
    for module in model.modules():
        for name, value in vars(module).items():
            if isinstance(value, Tensor) and not value.is_leaf:
                vars(module)[name] = value.detach()


def adopt_buffers(averaged: nn.Module, model: nn.Module) -> None:
    """Give the average the buffers that the model has made in a forward pass, such as a cached mask."""
    for other, module in zip(averaged.modules(), model.modules(), strict=True):
        for name, buffer in module._buffers.items():
            if buffer is not None and other._buffers.get(name) is None:
                other.register_buffer(name, buffer.clone(), name not in module._non_persistent_buffers_set)


@torch.no_grad()
def update_average(averaged: AveragedModel, model: nn.Module, decay: float) -> None:
    """Update the average after a step. The first time it becomes a copy of the model.

    The decay rises to `decay` over the first steps, as (1 + n) / (10 + n), so that a short run's average does not stay
    near the initial weights (TensorFlow's ExponentialMovingAverage). The count stays on the host, so that the host
    does not wait for a GPU as in AveragedModel.update_parameters.
    """
    steps = int(averaged.n_averaged)
    keep = min(decay, (1 + steps) / (10 + steps)) if steps else 0.0
    targets: list[Tensor] = []
    values: list[Tensor] = []
    memory: set[int] = set()  # where targets lie
    aside: list[tuple[Tensor, Tensor]] = []  # a view of memory that is a target already, and its own copy to compute in
    buffers = list(model.buffers())
    if len(buffers) != len(list(averaged.module.buffers())):
        adopt_buffers(averaged.module, model)
    averages = itertools.chain(averaged.module.parameters(), averaged.module.buffers())
    for average, value in zip(averages, itertools.chain(model.parameters(), buffers), strict=True):
        if keep and (average.is_floating_point() or average.is_complex()):
            target = average
            if average.layout == torch.strided:
                place = average.untyped_storage().data_ptr()
                if place in memory:  # in place, what they share would be updated twice
                    target = average.clone()
                    aside.append((average, target))
                memory.add(place)
            targets.append(target)
            values.append(value)
        else:  # such as BatchNorm's counters
            average.copy_(value)
    if targets:
        torch._foreach_mul_(targets, keep)  # not lerp: an attention mask's -inf stays what it is
        torch._foreach_add_(targets, values, alpha=1 - keep)
    for average, updated in aside:
        average.copy_(updated)
    averaged.n_averaged += 1
