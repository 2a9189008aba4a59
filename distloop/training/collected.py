"""What a task collects of each sample of a validation, for metrics that are no sums: whole, and in the data's order."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from distloop.data.order import FixedBatchSampler
from distloop.errors import UsageError
from distloop.ranks.sums import describe
from distloop.run.metrics import check_names

MOST_ON_DEVICE = 64 * 2**20  # bytes that wait there: few batches wait for the device, and its memory stays free
EXCHANGED = 64 * 2**20  # bytes in one exchange
PLAIN = (str, bytes, bool, int, float, complex, np.generic, type(None))

Form = tuple[str, tuple[int, ...]]  # the dtype, and the shape behind [batch]; of a list ("list", ())


class Collected:
    """What task.collect() gives, batch by batch. At the end each rank has the whole of it in the CPU's memory."""

    def __init__(self) -> None:
        self.parts: list[dict[str, Any]] = []  # of each of this rank's batches
        self.forms: dict[str, Form] | None = None
        self.moved = self.bytes_on_device = 0  # how many parts are on the CPU; of the others

    def add(self, values: Any, samples: int) -> None:
        """Keep a copy of what was collected of the next batch, which has so many samples. Raises UsageError for
        another number of values, for other names or forms than those of the batches before, and for other types."""
        check_names("collect", values)
        part = {name: _kept_of_batch(name, value, samples) for name, value in values.items()}
        forms = {name: _form(value) for name, value in part.items()}
        if self.forms is not None and forms != self.forms:
            raise UsageError(f"task.collect() gives {_words(self.forms)} in one batch, and {_words(forms)} in another.")
        self.forms = forms
        self.parts.append(part)
        for value in part.values():
            _map(value, self._count)
        if self.bytes_on_device > MOST_ON_DEVICE:
            self._move()

    def _count(self, leaf: Any) -> None:
        if isinstance(leaf, Tensor) and leaf.device.type != "cpu":
            self.bytes_on_device += leaf.nbytes

    def _move(self) -> None:
        """Bring all to the CPU. Waits for the device."""
        for part in self.parts[self.moved :]:
            part.update({name: _map(value, _to_cpu) for name, value in part.items()})
        self.moved, self.bytes_on_device = len(self.parts), 0

    def whole(self, sampler: FixedBatchSampler) -> dict[str, Any]:
        """What was collected of all samples, in the data's order: tensors [samples, …] on the CPU, and lists. The same
        on all ranks. Collective."""
        self._move()
        found = [self.forms]
        if sampler.world_size > 1:
            found *= sampler.world_size
            dist.all_gather_object(found, self.forms)
        forms = found[0] or {}  # rank 0 always has a batch
        for rank, there in enumerate(found):
            if there is not None and there != forms:
                raise UsageError(
                    f"task.collect() gives {_words(there)} on rank {rank}, but {_words(forms)} on rank 0. Its code "
                    "must not ask which rank it runs on."
                )
        return {
            name: self._list(name, sampler) if form[0] == "list" else self._tensor(name, form, sampler)
            for name, form in forms.items()
        }

    def _tensor(self, name: str, form: Form, sampler: FixedBatchSampler) -> Tensor:
        dtype, shape = form
        whole = torch.zeros((sampler.samples, *shape), dtype=getattr(torch, dtype))
        for position, part in enumerate(self.parts):
            start, stop = sampler.span(position)
            whole[start:stop] = part.pop(name)
        if sampler.world_size > 1:  # each byte is 0 on all ranks but one: their sum is exact, whatever they mean
            for some in whole.reshape(-1).view(torch.uint8).split(EXCHANGED):
                dist.all_reduce(some)
        return whole

    def _list(self, name: str, sampler: FixedBatchSampler) -> list[Any]:
        lists = [[part.pop(name) for part in self.parts]]
        if sampler.world_size > 1:
            own = lists[0]
            lists *= sampler.world_size
            dist.all_gather_object(lists, own)
        batches = (divmod(number, sampler.world_size) for number in range(sampler.batches))
        return [value for position, rank in batches for value in lists[rank][position]]


def _kept_of_batch(name: str, value: Any, samples: int) -> Any:
    """A copy of the value, which has to have one for each sample."""
    if isinstance(value, np.ndarray) and value.dtype.kind in "biufc":
        value = torch.from_numpy(value.copy())  # an array may have negative strides, which a tensor has not
    is_tensor = isinstance(value, Tensor) and value.ndim > 0 and value.layout == torch.strided
    if not is_tensor and not isinstance(value, (list, tuple)):
        raise UsageError(
            f"task.collect(): {name} is a {describe(value)}. Give a tensor or an array [batch, …], or a list with one "
            "value for each sample (texts, or tensors of different shapes)."
        )
    if len(value) != samples:
        raise UsageError(
            f"task.collect(): {name} has {len(value)} values for a batch of {samples} samples ({describe(value)}). "
            "Each sample is collected once: give one value for each, in the batch's order. What belongs to several "
            "positions of a sample stands behind its first dimension, or in a list."
        )
    return _map(value if is_tensor else list(value), lambda leaf: _kept(name, leaf))


def _kept(name: str, leaf: Any) -> Any:
    if isinstance(leaf, Tensor):
        return leaf.detach().clone(memory_format=torch.contiguous_format)  # a view would keep the whole batch
    if isinstance(leaf, np.ndarray) and not leaf.dtype.hasobject:
        return leaf.copy()
    if isinstance(leaf, PLAIN):
        return leaf
    raise UsageError(
        f"task.collect(): {name} holds a {describe(leaf)}. Its lists take tensors, arrays, texts and numbers, and "
        "lists, tuples and dicts of them."
    )


def _map(value: Any, function: Callable[[Any], Any]) -> Any:
    """`function` of all that is in lists, tuples and dicts."""
    if isinstance(value, Mapping):
        return {key: _map(inner, function) for key, inner in value.items()}
    if isinstance(value, list):
        return [_map(inner, function) for inner in value]
    if isinstance(value, tuple):
        return tuple(_map(inner, function) for inner in value)
    return function(value)


def _to_cpu(leaf: Any) -> Any:
    return leaf.cpu() if isinstance(leaf, Tensor) else leaf


def _form(value: Any) -> Form:
    if isinstance(value, list):
        return "list", ()
    return str(value.dtype).removeprefix("torch."), tuple(value.shape[1:])


def _words(forms: Mapping[str, Form]) -> str:
    """The forms in words: "scores (float32, [batch, 3])"."""
    texts = [
        f"{name} (a list)" if dtype == "list" else f"{name} ({dtype}, {['batch', *shape]})".replace("'", "")
        for name, (dtype, shape) in forms.items()
    ]
    return " and ".join(texts) or "nothing"
