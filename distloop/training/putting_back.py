"""Code of the user's is tried out, and afterwards modules and task hold what they held before, to the bit."""

import collections
import contextlib
import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

CONTAINERS = (dict, collections.OrderedDict, collections.defaultdict, collections.Counter, list, set, collections.deque)


@contextlib.contextmanager
def put_back(*holders: Any, keep_created: bool = False) -> Iterator[None]:
    """After the block, the holders (modules, tasks) have the tensors, gradients and attributes of before, with their
    values; so have modules, lists, dicts, sets and arrays of NumPy in their attributes. Objects of other classes keep
    what the block has made of them. A module that gets its first shapes in the block (LazyLinear) keeps them.

    `keep_created`: a module that has created buffers for its state_dict() keeps them, and its other attributes, since a
    checkpoint that has them is loaded next.
    """
    before = _Before(holders)
    yield
    before.put_back(keep_created)


class _Before:
    """The contents of all that the holders hold."""

    def __init__(self, holders: tuple[Any, ...]) -> None:
        self.seen: dict[int, Any] = {}  # by id; with the objects themselves, so that no other one gets their ids
        self.tensors: list[tuple[Tensor, Tensor, Tensor | None]] = []  # with their values and gradients
        self.trained: list[tuple[Tensor, bool]] = []  # leaves, and whether they require a gradient
        self.arrays: list[tuple[np.ndarray, np.ndarray]] = []
        self.containers: dict[int, tuple[Any, list]] = {}  # by id
        self.modules: list[nn.Module] = []
        for holder in holders:
            self._take(vars(holder) if not isinstance(holder, nn.Module) else holder)

    def _take(self, value: Any) -> None:
        if id(value) in self.seen or isinstance(value, (str, bytes, int, float)):
            return
        self.seen[id(value)] = value
        if isinstance(value, Tensor):
            if value.layout == torch.strided and not (nn.parameter.is_lazy(value) or value.is_meta):
                self.tensors.append((value, value.detach().clone(), value.grad if value.is_leaf else None))
                if value.is_leaf:
                    self.trained.append((value, value.requires_grad))
        elif isinstance(value, np.ndarray):
            if value.flags.writeable and not isinstance(value, np.memmap):
                self.arrays.append((value, value.copy()))
        elif isinstance(value, nn.Module):
            if isinstance(value, nn.modules.lazy.LazyModuleMixin) and value.has_uninitialized_params():
                return
            self.modules.append(value)
            self._take(vars(value))
            for tensor in (*value.children(), *value.parameters(recurse=False), *value.buffers(recurse=False)):
                self._take(tensor)  # of a ScriptModule, whose attributes do not hold them
        elif type(value) in CONTAINERS:
            self.containers[id(value)] = (value, _contents_of(value))
            for inner in value.values() if isinstance(value, dict) else value:
                self._take(inner)
        elif isinstance(value, tuple):
            for inner in value:
                self._take(inner)

    @torch.no_grad()
    def put_back(self, keep_created: bool) -> None:
        left = self._of_creators() if keep_created else {}
        for container, contents in self.containers.values():
            if id(container) not in left:
                _fill(container, contents)
        for module in left.values():
            module.training = dict(self._contents(vars(module)))["training"]
        for tensor, value, gradient in self.tensors:
            if keep_created and tensor.shape != value.shape:
                continue  # a checkpoint with this shape is loaded next
            if tensor.shape != value.shape or tensor.dtype != value.dtype or tensor.device != value.device:
                tensor.data = value
            else:
                with contextlib.suppress(RuntimeError):  # an expanded tensor, which nothing changes in place either
                    tensor.detach().copy_(value)
            if tensor.is_leaf:
                tensor.grad = gradient
        for tensor, requires_grad in self.trained:
            tensor.requires_grad_(requires_grad)
        for array, values in self.arrays:
            array[...] = values

    def _of_creators(self) -> dict[int, nn.Module]:
        """The dicts of modules that have created buffers for their state_dict(), by the ids of these dicts."""
        left: dict[int, nn.Module] = {}
        for module in self.modules:
            if id(module._buffers) not in self.containers:  # a ScriptModule's, which creates none
                continue
            before = {name for name, buffer in self._contents(module._buffers) if buffer is not None}
            now = {name for name, buffer in module._buffers.items() if buffer is not None}
            resized = {id(tensor) for tensor, value, _ in self.tensors if tensor.shape != value.shape}
            grown = {name for name in now if id(module._buffers[name]) in resized}
            if ((now - before) | grown) - module._non_persistent_buffers_set:
                for each in (vars(module), module._buffers, module._non_persistent_buffers_set):
                    left[id(each)] = module
        return left

    def _contents(self, container: Any) -> list:
        return self.containers[id(container)][1] if id(container) in self.containers else []


def _contents_of(container: Any) -> list:
    return list(container.items() if isinstance(container, dict) else container)


def _fill(container: Any, contents: list) -> None:
    """Give the container these contents, if it has others."""
    flat, flat_now = contents, _contents_of(container)
    if isinstance(container, dict):  # of (key, value)
        flat, flat_now = (list(itertools.chain.from_iterable(pairs)) for pairs in (flat, flat_now))
    if len(flat) == len(flat_now) and all(a is b for a, b in zip(flat, flat_now, strict=True)):
        return
    container.clear()
    if isinstance(container, (list, collections.deque)):
        container.extend(contents)
    else:
        container.update(dict(contents) if isinstance(container, dict) else contents)
