"""User code for the parts: tasks that look at a step from within, and a small GPT.

A task counts its training forward passes, from 1; with one rank they are the micro-batches of the attempt.
"""

from __future__ import annotations

import itertools
import json
import os
import time
import traceback
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from distloop.data.datasets import DataSource
from distloop.data.whole_batches import InMemory
from distloop.tasks import Classification, Task
from tests.lab.resuming import StoppedClassification
from tests.lab.user_code import NextLetter

# ---- a small GPT ---------------------------------------------------------------------------------------------

VOCABULARY = 512


def tokens(samples: int = 512, length: int = 256) -> DataSource:
    """Random tokens: inputs and targets [samples, length], the targets one place further on."""
    generator = torch.Generator().manual_seed(1)
    both = torch.randint(VOCABULARY, (samples, length + 1), generator=generator)
    data = InMemory(both[:, :-1].contiguous(), both[:, 1:].contiguous())
    return DataSource(data, InMemory(data.inputs[:8], data.targets[:8]))


class Gpt(nn.Module):
    """A transformer with a causal mask; the weight of its output is that of its embedding."""

    def __init__(self, width: int = 384, layers: int = 6, heads: int = 6, length: int = 256) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, width)
        self.place = nn.Parameter(torch.zeros(length, width))
        layer = nn.TransformerEncoderLayer(
            width, heads, 4 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.layers = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.norm = nn.LayerNorm(width)
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(length), persistent=False)

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = self.layers(self.embedding(inputs) + self.place, mask=self.mask, is_causal=True)
        return functional.linear(self.norm(hidden), self.embedding.weight)


class NextToken(Task):
    """Cross-entropy of all tokens."""

    weight = "tokens"

    def loss(self, outputs: Tensor, batch: Any) -> tuple[Tensor, int]:
        targets = batch[1].flatten()
        return functional.cross_entropy(outputs.flatten(0, 1), targets, reduction="sum"), len(targets)


# ---- tasks that look at a step -------------------------------------------------------------------------------


class Deterministic:
    """Before a task: PyTorch uses deterministic algorithms. $CUBLAS_WORKSPACE_CONFIG belongs to it."""

    def __init__(self) -> None:
        super().__init__()
        torch.use_deterministic_algorithms(True)


class DeterministicClassification(Deterministic, StoppedClassification):
    pass


class OverflowingClassification(StoppedClassification):
    """The gradient of some training passes is too large for fp16, though not their loss."""

    def __init__(self, at: tuple[int, ...] | list[int] = ()) -> None:
        super().__init__()
        self.at, self.passes = tuple(at), 0

    def loss(self, outputs: Any, batch: Any) -> Any:
        loss, weight = super().loss(outputs, batch)
        if torch.is_grad_enabled():
            self.passes += 1
            if self.passes in self.at:
                loss = loss * 1e6
        return loss, weight


class Stepwise:
    """Before a task: calls at_pass(n) as the nth training forward pass begins."""

    passes = 0

    def at_pass(self, number: int, device: torch.device) -> None:
        raise NotImplementedError

    def forward(self, model: nn.Module, batch: Any) -> Any:
        if model.training:
            self.passes += 1
            self.at_pass(self.passes, next(model.parameters()).device)
        return super().forward(model, batch)  # type: ignore[misc]


class CountItems(TorchDispatchMode):
    """Counts where the host reads a number of a tensor, for which it would wait on a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.places: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.ops.aten._local_scalar_dense.default:
            self.places[own_line()] += 1
        return function(*args, **(kwargs or {}))


def own_line() -> str:
    """The innermost line of distloop or of a part on the stack, else the innermost of all."""
    stack = [frame for frame in traceback.extract_stack() if frame.filename != __file__]
    own = [frame for frame in stack if f"{os.sep}distloop{os.sep}" in frame.filename]
    frame = (own or stack)[-1]
    return f"{Path(frame.filename).name}:{frame.lineno} {frame.line}"


class HostSyncs(Stepwise):
    """Before a task: notes all places at which the host waits for the device, from one training pass to another, in
    the file "syncs"; on the CPU the places at which it would."""

    def __init__(self, first: int = 5, last: int = 15) -> None:
        super().__init__()
        self.first, self.last = first, last
        self.places: Counter[str] = Counter()
        self.counting = CountItems()

    def at_pass(self, number: int, device: torch.device) -> None:
        if number == self.first:
            if device.type == "cuda":
                # A warning for each: an error would end with the first.
                torch.cuda.set_sync_debug_mode("warn")
                warnings.simplefilter("always")
                warnings.showwarning = self.note
                # It does not tell of these.
                self.untold = torch.cuda.synchronize, torch.cuda.Event.synchronize
                torch.cuda.synchronize = self.counted(torch.cuda.synchronize)
                torch.cuda.Event.synchronize = self.counted(torch.cuda.Event.synchronize)  # type: ignore[method-assign]
            else:
                self.counting.__enter__()
        elif number == self.last:
            if device.type == "cuda":
                torch.cuda.set_sync_debug_mode("default")
                torch.cuda.synchronize, torch.cuda.Event.synchronize = self.untold  # type: ignore[method-assign]
            else:
                self.counting.__exit__(None, None, None)
                self.places = self.counting.places
            Path("syncs").write_text(json.dumps(self.places))

    def counted(self, wait: Any) -> Any:
        def wait_and_count(*arguments: Any) -> Any:
            self.places[own_line()] += 1
            return wait(*arguments)

        return wait_and_count

    def note(self, message: Any, *more: Any, **others: Any) -> None:
        if "synchroniz" in str(message):
            self.places[own_line()] += 1


class WatchedClassification(HostSyncs, Classification):
    pass


class ReadingClassification(HostSyncs, Classification):
    """It reads its loss in each step, as no task should."""

    def loss(self, outputs: Tensor, batch: Any) -> tuple[Tensor, Tensor | int]:
        loss, weight = super().loss(outputs, batch)
        loss.item()
        return loss, weight


class WatchedNextLetter(HostSyncs, NextLetter):
    pass


class Timed(Stepwise):
    """Before a task: notes when each training pass begins, on the device, in `self.marks`."""

    marks: list[Any]

    def at_pass(self, number: int, device: torch.device) -> None:
        if number == 1:
            type(self).marks = []
        self.marks.append(mark(device))


class TimedClassification(Timed, Classification):
    pass


class TimedNextToken(Timed, NextToken):
    pass


class Profiled(Stepwise):
    """Before a task: profiles 20 training passes and leaves the trace in the file trace.json.gz, and in the file
    "profile" the seconds on the device's own clock: of all, and of those in which it computed or copied."""

    def __init__(self, first: int = 10, steps: int = 20) -> None:
        super().__init__()
        self.first, self.steps = first, steps

    def at_pass(self, number: int, device: torch.device) -> None:
        if number == self.first:
            activities = [torch.profiler.ProfilerActivity.CPU]
            if device.type == "cuda":
                activities.append(torch.profiler.ProfilerActivity.CUDA)
                torch.cuda.synchronize()
            self.profiler = torch.profiler.profile(activities=activities)
            self.profiler.start()
        elif number == self.first + self.steps:
            if device.type == "cuda":
                torch.cuda.synchronize()
            self.profiler.stop()
            self.profiler.export_chrome_trace("trace.json.gz")
            Path("profile").write_text(json.dumps(busy(self.profiler.events())))


class ProfiledClassification(Profiled, Classification):
    pass


def busy(events: Any) -> dict[str, float]:
    """Seconds from the first to the last kernel or copy of a profile, and of those in which at least one ran."""
    spans = sorted(
        (event.time_range.start, event.time_range.end)
        for event in events
        if event.device_type == torch.autograd.DeviceType.CUDA  # type: ignore[attr-defined]
        and not getattr(event, "is_user_annotation", False)  # the span of a whole optimizer step
    )
    total, until = 0.0, spans[0][0] if spans else 0.0
    for start, end in spans:
        total += max(0.0, end - max(start, until))
        until = max(until, end)
    return {"seconds": (until - spans[0][0]) / 1e6 if spans else 0.0, "busy_seconds": total / 1e6, "events": len(spans)}


def mark(device: torch.device) -> Any:
    """A moment: on a GPU the one at which it gets here in its queue."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def intervals(marks: list[Any]) -> list[float]:
    """Milliseconds between neighbouring marks. Waits for the device."""
    if marks and not isinstance(marks[0], float):
        torch.cuda.synchronize()
        return [one.elapsed_time(other) for one, other in itertools.pairwise(marks)]
    return [1000 * (other - one) for one, other in itertools.pairwise(marks)]
