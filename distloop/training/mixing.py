"""Mixup and CutMix: the samples of a micro-batch mixed with each other, by torchvision's transforms."""

import functools
from collections.abc import Callable
from typing import Any

from torch import Tensor

from distloop.data.batches import inputs_of, targets_of, with_inputs, with_targets
from distloop.errors import UsageError
from distloop.training.cross_entropy import is_number


def mixed(batch: Any, mixup: float, cutmix: float, classes: int) -> Any:
    """The batch with mixed inputs, and targets [batch, classes] in floats: the shares of the classes in each sample.

    Mixup (Zhang et al. 2018) adds each image to the one before it, CutMix (Yun et al. 2019) pastes a box of that one
    into it. `mixup`, `cutmix`: the alpha of the Beta distribution from which the shares come; 0: not used. With both,
    one of them is chosen for the batch, with probability 1/2 each. Draws from torch's global generator on the CPU.
    Raises UsageError for batches without images and labels.
    """
    images, labels = inputs_of(batch), targets_of(batch)
    needs = "mixup and cutmix of task classification need"
    if not isinstance(images, Tensor) or images.ndim != 4 or not images.is_floating_point():
        given = f"{images.dtype} {list(images.shape)}" if isinstance(images, Tensor) else f"a {type(images).__name__}"
        raise UsageError(
            f"{needs} images [batch, channels, height, width] in floats, as inputs; the data gave {given}. Give "
            "mean and std in the DataSource for images of uint8, or turn both off: task.args.mixup: 0."
        )
    if not classes:
        raise UsageError(f"{needs} the number of classes: a task with a probe() of its own sets self.classes.")
    labels = labels if labels.is_floating_point() else labels.long()
    images, targets = _transform(mixup, cutmix, classes)(images, labels)
    return with_targets(with_inputs(batch, images), targets)


@functools.cache
def _transform(mixup: float, cutmix: float, classes: int) -> Callable[..., Any]:
    from torchvision.transforms import v2

    asked_for = [(v2.MixUp, mixup), (v2.CutMix, cutmix)]
    kinds = [kind(alpha=alpha, num_classes=classes) for kind, alpha in asked_for if alpha]
    return kinds[0] if len(kinds) == 1 else v2.RandomChoice(kinds)


def read_alpha(name: str, value: Any) -> float:
    """The argument mixup or cutmix of a task; 0: not used. Raises UsageError."""
    if value is not None and not is_number(value, 0):
        raise UsageError(
            f"task.args.{name} = {value!r}: give the alpha of the Beta distribution, a number such as 0.2 or 1.0; 0 "
            "turns it off."
        )
    return float(value or 0)
