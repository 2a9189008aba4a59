"""The weights that a task's loss() returns: numbers that count all the samples that were asked for, or are refused."""

import math
from typing import Any

from torch import Tensor

from distloop.errors import UsageError
from distloop.ranks.sums import describe, plain_number

MOST_UNREAD = 1000  # micro-batches: a bound on what is kept where nobody reads


class Weights:
    """Checks weights. Tensors are kept until read(), so that the host does not wait for a device."""

    def __init__(self) -> None:
        self.unread: list[tuple[Tensor, int | None]] = []

    def check(self, weight: Any, samples: int | None) -> Any:
        """Check the weight of a micro-batch, and return it. `samples`: what it must be; None: any finite number that is
        not negative. Raises UsageError."""
        if type(weight) is int and weight == samples:  # as of most tasks
            return weight
        if isinstance(weight, Tensor):
            if weight.ndim == 0:
                self.unread.append((weight.detach().clone(), samples))  # a view would keep the whole batch
                if len(self.unread) >= MOST_UNREAD:
                    self.read()
            else:
                _refuse_wrong(weight, samples)
            return weight
        return _refuse_wrong(weight, samples)

    def read(self) -> None:
        """Check the weights that are tensors since the last call; waits for the device. Raises UsageError."""
        unread, self.unread = self.unread, []
        for weight, samples in unread:
            _refuse_wrong(weight, samples)


def _refuse_wrong(weight: Any, samples: int | None) -> bool | int | float:
    """The weight as a number of Python's own."""
    number = plain_number(weight)
    if number is None:
        raise UsageError(
            f"task.loss() returned a {describe(weight)} as its weight. Let it return two sums over the batch, of the "
            "losses and of the weights: the second one is a number, or a tensor of no dimension."
        )
    if samples is None and not 0 <= number < math.inf:
        raise UsageError(
            f"task.loss() returned the weight {number}. It divides the gradient: let it be the sum of what the losses "
            "are counted for, such as the number of tokens, which is at least 0."
        )
    if samples is not None and number != samples:
        asked_for = "1 sample" if samples == 1 else f"{samples} samples"
        returned = f"task.loss() returned the weight {number} for {asked_for}"
        sums = 'Return sums: `cross_entropy(outputs, targets, reduction="sum"), len(targets)`, or the like.'
        if number == 1:  # another word for what it counts would leave it a mean
            raise UsageError(f"{returned}, as if its loss were a mean over them. {sums}")
        raise UsageError(
            f"{returned}. {sums} If batch() or data.collate leaves samples out or adds some, let it keep all; else say "
            'in the task what the weight counts: weight = "views", or any word but "samples". The gradient is then '
            "divided by the sum of the weights."
        )
    return number
