"""The sums of a validation, over all batches of all ranks: added in the order of the batches, in float64."""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from distloop.data.order import FixedBatchSampler
from distloop.errors import UsageError
from distloop.ranks.sums import describe

Forms = dict[str, tuple[tuple[int, ...], bool]]  # name -> shape, whether it is floating


class ValidatedSums:
    """The sums of this rank's batches: of each batch if they are floats, whose order counts; of all if integers, which
    are exact in any order (a table of confusion matrices would not fit)."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Tensor]] = []
        self.counts: dict[str, Tensor] = {}

    def add(self, values: Mapping[str, Any]) -> None:
        """Add the sums over the next batch, without waiting for the device. Raises UsageError for what are no numbers,
        and for integers of another shape than those before."""
        self.rows.append({})
        for name, value in values.items():
            tensor = exact_tensor(name, value)
            if tensor.is_floating_point():
                self.rows[-1][name] = tensor
            else:
                if name in self.counts:  # to add shapes that differ may broadcast
                    merged([{name: (tuple(each.shape), False)} for each in (self.counts[name], tensor)])
                self.counts[name] = self.counts.get(name, 0) + tensor.to(torch.int64)

    def total(self, sampler: FixedBatchSampler, device: torch.device) -> dict[str, Tensor]:
        """The sums over all batches of all ranks, on the CPU. Collective."""
        own = [{name: (tuple(value.shape), True) for name, value in row.items()} for row in self.rows]
        found = [merged([*own, {name: (tuple(value.shape), False) for name, value in self.counts.items()}])]
        distributed = sampler.world_size > 1
        if distributed:  # a rank may have no batch at all, or none with a name that others have
            found *= sampler.world_size
            dist.all_gather_object(found, found[0])
            for rank, there in enumerate(found):
                refuse_other_shapes(there, found[0], rank)
        sums: dict[str, Tensor] = {}
        for name, (shape, floating) in merged(found).items():
            if floating:
                table = torch.zeros((sampler.batches, *shape), dtype=torch.float64)
                for position, row in enumerate(self.rows):
                    if name in row:
                        table[sampler.rank + position * sampler.world_size] = row[name].cpu()
                if name in self.counts:  # it was an integer in some batches, such as 0
                    table[sampler.rank] += self.counts[name].cpu()
            else:
                table = self.counts.get(name, torch.zeros(shape, dtype=torch.int64)).cpu()[None]
            if distributed:
                table = table.to(device)
                dist.all_reduce(table)
            sums[name] = table.cpu().sum(0)
        return sums


def exact_tensor(name: str, value: Any) -> Tensor:
    """A sum that a task gives as a tensor: Python's floats in float64, not in float32. Raises UsageError for what is
    not made of real numbers."""
    try:
        # An array may have negative strides, which a tensor has not.
        tensor = value if isinstance(value, Tensor) else torch.from_numpy(np.array(value))
    except (TypeError, ValueError):
        tensor = None
    if tensor is None or tensor.is_complex():
        kind = f"complex {describe(value)}" if tensor is not None else describe(value)
        raise UsageError(f"task.metrics(): {name} is a {kind}; give real numbers, as numbers, arrays or tensors.")
    return tensor


def refuse_other_shapes(there: Forms, forms: Forms, rank: int) -> None:
    """Raise UsageError if sums of this rank, `there`, have other shapes than those of rank 0."""
    for name, (shape, _) in there.items():
        if name in forms and forms[name][0] != shape:
            raise UsageError(
                f"In validation the sum {name!r} is of shape {list(shape)} on rank {rank}, but of shape "
                f"{list(forms[name][0])} on rank 0. The model's outputs and what task.metrics() makes of them must "
                "have one form on all ranks: their code must not ask which rank it runs on."
            )


def merged(found: Iterable[Forms]) -> Forms:
    """The form of each sum over all batches, in the order in which they are found. Raises UsageError for shapes that
    differ."""
    forms: Forms = {}
    for name, (shape, floating) in (item for each in found for item in each.items()):
        known, was_floating = forms.get(name, (shape, False))
        if known != shape:
            raise UsageError(
                f"task.metrics(): {name} has the shape {list(known)} in one batch and {list(shape)} in another. Give "
                "sums over the batch, of one shape."
            )
        forms[name] = (shape, floating or was_floating)
    return forms
