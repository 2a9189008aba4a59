"""Activation checkpointing: what a model's nn.Sequential parts compute is kept at a few places only, and computed again
in the backward pass (Chen et al. 2016, "Training deep nets with sublinear memory cost")."""

import contextlib
import itertools
import math
import random
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from distloop.errors import UsageError
from distloop.training.putting_back import restore_of

OF_ANY_MODULE = frozenset(vars(nn.Module()))  # attributes: of hooks, parameters and buffers


class Recomputed(nn.Sequential):
    """An nn.Sequential in segments, each of about the square root of its modules. Of a segment the input is kept; the
    rest is computed again when the backward pass comes to it, with the state and random numbers of the first time.
    Losses, gradients and buffers are those of nn.Sequential, to the bit."""

    def forward(self, input: Any) -> Any:
        if not torch.is_grad_enabled():
            return super().forward(input)
        for segment in segments_of(self):
            if isinstance(segment[0], Recomputed) or _is_in_place(segment[0]):
                input = _in_sequence(segment, input)
            else:
                input = _checkpointed(segment, input)
        return input


def segments_of(sequence: nn.Sequential) -> list[list[nn.Module]]:
    """The modules, in order: those that are Recomputed themselves alone, others in segments. One that changes its input
    in place begins none: it stands in the segment before it, or alone."""
    segments: list[list[nn.Module]] = []
    for is_inner, group in itertools.groupby(sequence, lambda module: isinstance(module, Recomputed)):
        modules = list(group)
        size, begins = math.isqrt(len(modules)), True
        for module in modules:
            if begins or (len(segments[-1]) >= size and not _is_in_place(module)):
                segments.append([])
            segments[-1].append(module)
            begins = is_inner or _is_in_place(segments[-1][0])
    return segments


def _is_in_place(module: nn.Module) -> bool:
    return bool(getattr(module, "inplace", False))


def _in_sequence(segment: Sequence[nn.Module], input: Any) -> Any:
    for module in segment:
        input = module(input)
    return input


def _checkpointed(segment: Sequence[nn.Module], input: Any) -> Any:
    contexts = contextlib.nullcontext(), _Again(segment)
    return checkpoint(_in_sequence, segment, input, use_reentrant=False, context_fn=lambda: contexts)


class _Again:
    """The context of the second pass of a segment, which begins with the state and numbers of the first: with buffers,
    attributes, and generators and tensors in attributes; not with what lists or objects hold. torch's own generators
    are set by checkpoint(), which also notes an input that was changed in place since. Entered once for each backward
    pass through the segment; several, as of a gradient penalty, do not overlap."""

    def __init__(self, segment: Sequence[nn.Module]) -> None:
        owners = {id(module): module for each in segment for module in each.modules()}.values()
        self.places: list[tuple[Any, str]] = []
        for owner in owners:
            self.places += [(owner._buffers, name) for name in owner._buffers]
            self.places += [(vars(owner), name) for name in vars(owner) if name not in OF_ANY_MODULE]
        self.begun = [_copy(holder[name]) for holder, name in self.places]
        self.drawn = self._generators()

    def _generators(self) -> list[Callable[[], Any]]:
        """Each sets a generator to its present state."""
        found = [restore_of(holder[name]) for holder, name in self.places]
        states = random.getstate(), np.random.get_state()
        own = [lambda: random.setstate(states[0]), lambda: np.random.set_state(states[1])]
        return [*own, *filter(None, found)]

    def __enter__(self) -> None:
        self.now = [holder[name] for holder, name in self.places]
        self.drawn_now = self._generators()
        self._set([_copy(value) for value in self.begun], self.drawn)  # statistics count on in copies, which are left

    def __exit__(self, *error: object) -> None:  # also by an exception, once checkpoint() has all that it needs
        self._set(self.now, self.drawn_now)

    def _set(self, values: Sequence[Any], drawn: Sequence[Callable[[], Any]]) -> None:
        for (holder, name), value in zip(self.places, values, strict=True):
            holder[name] = value
        for restore in drawn:
            restore()


def _copy(value: Any) -> Any:
    """A copy of a tensor; what else there is, and a tensor through which gradients flow, is replaced, not changed."""
    return value.detach().clone() if isinstance(value, Tensor) and not value.requires_grad else value


def recompute(model: nn.Module) -> None:
    """Let the outermost nn.Sequential parts of the model, and those directly in them, be Recomputed: names, parameters
    and buffers stay. Raises UsageError for a model without any, or with a ScriptModule in one."""
    if not _recompute(model):
        raise UsageError(
            f"model.checkpointing: {type(model).__name__} has no nn.Sequential, whose parts could be computed again. "
            "Put its layers into one, or call torch.utils.checkpoint.checkpoint(…, use_reentrant=False) in its "
            "forward(), and set model.checkpointing: false."
        )
    for name, module in model.named_modules():
        if isinstance(module, Recomputed) and any(
            isinstance(part, torch.jit.ScriptModule) for part in module.modules()
        ):
            raise UsageError(
                f"model.checkpointing: {name or 'the model'} has a ScriptModule (torch.jit.script), which cannot be "
                "computed again. Give the module itself, or set model.checkpointing: false."
            )


def _recompute(module: nn.Module) -> bool:
    if isinstance(module, Recomputed):  # two modules share it
        return True
    is_one = type(module) is nn.Sequential and len(module) > 0  # a class of its own may have another forward()
    if is_one:
        module.__class__ = Recomputed
    inner = [child for child in module.children() if not is_one or type(child) is nn.Sequential]
    return bool(sum(_recompute(child) for child in inner)) or is_one  # all of them, not the first alone


def in_words(model: nn.Module) -> str:
    """Such as "activation checkpointing on (9 segments)"."""
    found = [module for module in model.modules() if isinstance(module, Recomputed)]
    if not found:
        return "activation checkpointing off"
    segments = [one for module in found for one in segments_of(module) if not isinstance(one[0], Recomputed)]
    return f"activation checkpointing on ({len(segments)} segments)"
