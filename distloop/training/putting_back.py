"""Code of the user's is tried out, and afterwards modules and task hold what they held before, to the bit."""

import collections
import contextlib
import functools
import gc
import operator
import random
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

DICTS = (dict, collections.OrderedDict, collections.defaultdict, collections.Counter)
CONTAINERS = frozenset((*DICTS, list, set, collections.deque))
PLAIN = frozenset((str, bytes, int, float, complex, bool, type(None)))  # nothing can change them


@contextlib.contextmanager
def put_back(*holders: Any, keep_created: bool = False) -> Iterator[None]:
    """After the block, the holders (modules, tasks) have the tensors, gradients and attributes of before, with their
    values; so have modules, lists, dicts, sets, arrays of NumPy and random generators in their attributes. Objects of
    other classes keep what the block has made of them. A module that gets its first shapes in the block (LazyLinear)
    keeps them.

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
        self.containers: dict[int, tuple[Any, Any]] = {}  # by id, with their contents in a dict or a list
        self.generators: list[Callable[[], Any]] = []  # each call puts one back
        self.modules: list[nn.Module] = []
        is_collected = gc.isenabled()
        gc.disable()  # it would look at all objects again and again, as the number of copied lists grows
        try:
            for holder in holders:
                self._take(vars(holder) if not isinstance(holder, nn.Module) else holder)
        finally:
            if is_collected:
                gc.enable()

    def _take(self, holder: Any) -> None:
        waiting = [holder]  # not by recursion: what a task holds may be deep
        while waiting:
            value = waiting.pop()
            if id(value) not in self.seen:
                self.seen[id(value)] = value
                waiting.extend(inner for inner in self._take_one(value) if type(inner) not in PLAIN)

    def _take_one(self, value: Any) -> Iterable[Any]:
        """Note what this value is; returns what it holds."""
        if type(value) in CONTAINERS:
            contents = dict(value) if isinstance(value, dict) else list(value)
            self.containers[id(value)] = (value, contents)
            return value.values() if isinstance(value, dict) else contents
        if isinstance(value, tuple):
            return value
        if isinstance(value, Tensor):
            if value.layout == torch.strided and not (nn.parameter.is_lazy(value) or value.is_meta):
                self.tensors.append((value, value.detach().clone(), value.grad if value.is_leaf else None))
                if value.is_leaf:
                    self.trained.append((value, value.requires_grad))
        elif isinstance(value, np.ndarray):
            if value.flags.writeable and not isinstance(value, np.memmap):
                self.arrays.append((value, value.copy()))
        elif isinstance(value, nn.Module):
            if not (isinstance(value, nn.modules.lazy.LazyModuleMixin) and value.has_uninitialized_params()):
                self.modules.append(value)
                tensors = (*value.parameters(recurse=False), *value.buffers(recurse=False))
                return (vars(value), *value.children(), *tensors)  # a ScriptModule's attributes do not hold these
        elif restore := restore_of(value):
            self.generators.append(restore)
        return ()

    @torch.no_grad()
    def put_back(self, keep_created: bool) -> None:
        left = self._of_creators() if keep_created else {}
        for container, contents in self.containers.values():
            if id(container) not in left:
                _fill(container, contents)
        for module in left.values():
            module.training = self._contents(vars(module))["training"]
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
        for restore in self.generators:
            restore()

    def _of_creators(self) -> dict[int, nn.Module]:
        """The dicts of modules that have created buffers for their state_dict(), by the ids of these dicts."""
        left: dict[int, nn.Module] = {}
        for module in self.modules:
            if id(module._buffers) not in self.containers:  # a ScriptModule's, which creates none
                continue
            before = {name for name, buffer in self._contents(module._buffers).items() if buffer is not None}
            now = {name for name, buffer in module._buffers.items() if buffer is not None}
            resized = {id(tensor) for tensor, value, _ in self.tensors if tensor.shape != value.shape}
            grown = {name for name in now if id(module._buffers[name]) in resized}
            if ((now - before) | grown) - module._non_persistent_buffers_set:
                for each in (vars(module), module._buffers, module._non_persistent_buffers_set):
                    left[id(each)] = module
        return left

    def _contents(self, container: Any) -> dict[str, Any]:
        return self.containers[id(container)][1] if id(container) in self.containers else {}


def restore_of(value: Any) -> Callable[[], Any] | None:
    """A function that gives a random generator its present state again; None for other values, and for generators that
    have no state, such as random.SystemRandom."""
    with contextlib.suppress(NotImplementedError):
        if isinstance(value, torch.Generator):
            return functools.partial(value.set_state, value.get_state())
        if isinstance(value, np.random.Generator):
            return functools.partial(setattr, value.bit_generator, "state", value.bit_generator.state)
        if isinstance(value, np.random.RandomState):
            return functools.partial(value.set_state, value.get_state())
        if isinstance(value, random.Random):
            return functools.partial(value.setstate, value.getstate())
    return None


def _fill(container: Any, contents: Any) -> None:
    """Give the container these contents, if it has others."""
    pairs = [(container, contents)]
    if isinstance(container, dict):
        pairs.append((container.values(), contents.values()))
    if len(container) == len(contents) and all(all(map(operator.is_, now, before)) for now, before in pairs):
        return
    container.clear()
    if isinstance(container, (list, collections.deque)):
        container.extend(contents)
    else:
        container.update(contents)
