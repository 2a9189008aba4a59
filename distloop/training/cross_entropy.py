"""The cross-entropy of the built-in tasks as two sums: torch's mean over a whole global batch, however it is split."""

import functools
import math
from numbers import Real
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from distloop.errors import UsageError


def summed_loss(
    outputs: Tensor, targets: Tensor, class_weights: tuple[float, ...] | None = None, **options: Any
) -> Tensor:
    """Σ loss over the targets. Divided by their summed_weight(), over one batch or several, it is what
    torch.nn.functional.cross_entropy gives for all of them in one batch.

    `outputs`: [batch, classes, …]. `targets`: integers [batch, …], or probabilities [batch, classes, …]. `options`:
    ignore_index and label_smoothing, as torch has them.
    """
    outputs = outputs.to(_exact(outputs.dtype))
    weights = None if class_weights is None else _on(class_weights, outputs.dtype, outputs.device)
    targets = targets.to(outputs.dtype) if targets.is_floating_point() else targets.long()
    return functional.cross_entropy(outputs, targets, weights, reduction="sum", **options)


def summed_weight(
    outputs: Tensor, targets: Tensor, class_weights: tuple[float, ...] | None = None, ignore_index: int = -100
) -> Tensor | int:
    """Σ weight over the targets of summed_loss(): each weighs 1, or as much as its class, or 0 if it is ignored. With
    probabilities each place weighs 1 whatever the classes weigh, as in torch."""
    if targets.is_floating_point():
        return targets.numel() // max(1, targets.shape[1])
    targets = targets.long()
    counted = targets != ignore_index
    if class_weights is None:
        return counted.sum()
    weights = _on(class_weights, _exact(outputs.dtype), outputs.device)
    return torch.where(counted, weights[torch.where(counted, targets, 0)], 0).sum()


def _exact(dtype: torch.dtype) -> torch.dtype:
    """float32 for outputs of 16 bits, in which a sum would have 3 digits. (Accelerate makes them float32, but for those
    in objects that it does not know, such as a dataclass.)"""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


@functools.cache  # by value: a copy to the device in each step would cost time
def _on(class_weights: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.tensor(class_weights, dtype=dtype, device=device)


def read_class_weights(value: Any) -> tuple[float, ...] | None:
    """The argument class_weights of a task: one number for each class, 0 or more. Raises UsageError."""
    if value is None:
        return None
    weights = list(value) if isinstance(value, (list, tuple)) else []
    if not weights or not all(is_number(weight, 0) for weight in weights) or not any(weights):
        raise UsageError(
            f"task.args.class_weights = {value!r}: give a list of one number for each class, 0 or more and not all 0, "
            "such as [2, 1, 1]."
        )
    return tuple(float(weight) for weight in weights)


def refuse_other_count(class_weights: tuple[float, ...] | None, classes: int) -> None:
    """Raise UsageError unless there are as many weights as classes."""
    if class_weights is not None and len(class_weights) != classes:
        raise UsageError(
            f"task.args.class_weights has {len(class_weights)} numbers, but the model has {classes} classes. Give one "
            "for each class, in the order of the labels."
        )


def is_number(value: Any, least: float, most: float = math.inf) -> bool:
    """Whether it is a finite number from `least` to `most`."""
    is_real = isinstance(value, Real) and not isinstance(value, bool)
    return is_real and math.isfinite(float(value)) and least <= value <= most
