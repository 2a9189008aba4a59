"""Saving beside training: the loop waits for a copy in host memory; a thread writes it."""

import contextlib
import copy
import io
import json
import shutil
import threading
import time
from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save
from torch import Tensor
from torch.optim import Optimizer

from distloop.config.secrets import clean_message
from distloop.config.settings import Checkpoint
from distloop.errors import RunFailed, UsageError
from distloop.ranks.stopping import StopReason, Watch
from distloop.run.checkpoint import STATE, LoopState, Snapshot, Weights, as_stored, newest_published, prune, publish
from distloop.run.parts import Parts, check_parts, contents_of, existing

SILENT_SECONDS = 5.0  # then it is said that the last checkpoint is what the end waits for


class HostBuffers:
    """Copies tensors into host memory that is used again for the next save. A GPU copies in the queue of its own work,
    between the computations before and after; ready() waits for that."""

    def __init__(self) -> None:
        self.buffers: dict[Hashable, Tensor] = {}
        self.event: torch.cuda.Event | None = None

    def copy(
        self, key: Hashable, tensor: Tensor, memory_format: torch.memory_format = torch.contiguous_format
    ) -> Tensor:
        """A copy of `tensor` in the buffer of this key."""
        buffer = self.buffer(key, tensor, memory_format)
        buffer.copy_(tensor.detach(), non_blocking=tensor.is_cuda)
        if tensor.is_cuda and self.event is None:
            self.event = torch.cuda.Event()
        return buffer

    def buffer(self, key: Hashable, tensor: Tensor, memory_format: torch.memory_format) -> Tensor:
        """The buffer of this key, of the shape and type of `tensor`. A new one holds zeros: so it has its memory, for
        which a copy would wait longer than for the copying."""
        buffer = self.buffers.get(key)
        if buffer is None or buffer.shape != tensor.shape or buffer.dtype != tensor.dtype:
            buffer = torch.empty_like(tensor, device="cpu", memory_format=memory_format, pin_memory=tensor.is_cuda)
            self.buffers[key] = buffer.zero_()
        return buffer

    def copy_tree(self, key: Hashable, value: Any, copy_one: Callable[..., Tensor] | None = None) -> Any:
        """A copy of nested dicts and lists, with their tensors in buffers. `copy_one`: copy() or buffer()."""
        copy_one = copy_one or self.copy
        if isinstance(value, Tensor):
            return copy_one(key, value, torch.preserve_format)
        if isinstance(value, dict):
            return {name: self.copy_tree((key, name), inner, copy_one) for name, inner in value.items()}
        if isinstance(value, (list, tuple)):
            return type(value)(self.copy_tree((key, place), inner, copy_one) for place, inner in enumerate(value))
        return copy.deepcopy(value)

    def record(self) -> None:
        """Call it after the last copy."""
        if self.event is not None:
            self.event.record()

    def ready(self) -> None:
        """Wait until the copies are complete; any thread may."""
        if self.event is not None:
            torch.cuda.set_device(self.event.device)  # a thread begins on GPU 0, and would take memory of it
            self.event.synchronize()


def reason_of(error: BaseException) -> str:
    """Why a file could not be written: the operating system's words, if a library's error has them as a cause."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.strerror:
            return cause.strerror
        cause = cause.__cause__ or cause.__context__
    return str(error).split("\n")[0] or type(error).__name__


def read_back(weights: Mapping[str, Weights], others: Mapping[str, Any], state: Mapping[str, Any]) -> None:
    """Make each file of a checkpoint in memory, and read it as a later start would. Raises UsageError if that fails, or
    gives something else."""
    for name, held in weights.items():
        with _naming(f"{name}.safetensors"):
            for key, tensor in as_stored(held)[0].items():  # one by one: a copy of all might not fit into memory
                found = load(save({key: tensor}))[key]
                if found.dtype != tensor.dtype or found.shape != tensor.shape:
                    raise ValueError(f"{key} comes back as {found.dtype} {list(found.shape)}")
    for name, content in others.items():
        with _naming(f"{name}.pt"):
            file = io.BytesIO()
            torch.save(content, file)
            file.seek(0)
            torch.load(file, map_location="cpu", weights_only=True)
    with _naming(STATE):
        json.dumps(state)


@contextlib.contextmanager
def _naming(file: str) -> Iterator[None]:
    try:
        yield
    except UsageError:
        raise
    except Exception as error:  # each library has its own
        raise UsageError(
            f"A checkpoint of this run could not be saved and loaded again: {file}: {type(error).__name__}: {error}. "
            "Keep tensors, numbers and text in the state, and nothing else."
        ) from None


class Saver:
    """Writes rank 0's checkpoints, one at a time; on the other ranks it does nothing."""

    def __init__(
        self,
        folder: Path,
        settings: Checkpoint,
        identity: dict[str, Any],
        watch: Watch,
        published: Callable[[int, dict[str, Any] | None], None],
        enabled: bool,
        check_ownership: Callable[[], None] = lambda: None,
    ) -> None:
        self.folder, self.settings, self.identity = folder, settings, identity
        self.watch, self.published, self.enabled = watch, published, enabled
        self.check_ownership = check_ownership
        self.buffers = HostBuffers()
        self.thread: threading.Thread | None = None
        self.making: list[threading.Thread] = []  # buffers
        self.failure: str | None = None

    def save(self, parts: Parts, state: LoopState, more: Mapping[str, Any]) -> None:
        """Copy all, and start to write it. `more`: plain JSON for state.json, beside the loop's state."""
        if not self.enabled:
            return
        self.wait()
        begun = time.monotonic()
        weights, others, of_parts = contents_of(parts, self.buffers)
        own = {name: value for name, value in asdict(state).items() if name != "unvalidated" or value}
        snapshot = Snapshot(weights, others, {**own, **more, **of_parts}, self.identity)
        self.buffers.record()
        self.thread = threading.Thread(
            target=self._write, args=(state.step, state.best, snapshot, begun), name="distloop-save", daemon=True
        )
        self.thread.start()

    def rehearse(self, parts: Parts, state: LoopState) -> None:
        """Build the files of a checkpoint in memory and read them back; nothing is written. Raises UsageError for a
        state that could not be saved or loaded."""
        if not self.enabled:
            return
        check_parts(parts)  # with what the forward passes of the rehearsal have made
        with _naming("state_dict()"):
            weights, others, of_parts = contents_of(parts, self.buffers)
            self.buffers.record()
            self.buffers.ready()
        read_back(weights, others, {**asdict(state), **of_parts})
        for name, part in existing(parts):
            if isinstance(part, Optimizer):
                self._make_buffers_later(name, part)

    def _make_buffers_later(self, name: str, optimizer: Optimizer) -> None:
        """Make the buffers of an optimizer's state in a thread, after its first step, which makes the state: else the
        first save would hold the training up for several times as long as the others."""
        inner = getattr(optimizer, "optimizer", optimizer)  # also inside Accelerate's wrapper
        last = getattr(inner, "optimizers", [inner])[-1]

        def make(state: dict[str, Any], gpu: int | None) -> None:
            with contextlib.suppress(Exception):  # the save meets the same, and says so
                if gpu is not None:
                    torch.cuda.set_device(gpu)  # a thread begins on GPU 0, and would take memory of it
                self.buffers.copy_tree(name, state, self.buffers.buffer)

        def after_first_step(*_: Any) -> None:
            hook.remove()
            gpu = torch.cuda.current_device() if torch.cuda.is_initialized() else None
            self.making.append(threading.Thread(target=make, args=(optimizer.state_dict(), gpu), daemon=True))
            self.making[-1].start()

        with contextlib.suppress(AttributeError):  # of a class of the user's that does not begin as torch's does
            hook = last.register_step_post_hook(after_first_step)

    def wait(self) -> None:
        """Wait for the checkpoint that is being written, and for buffers that are being made."""
        for thread in (*self.making, self.thread):
            if thread is not None:
                thread.join()
        self.making, self.thread = [], None

    def finish(self) -> None:
        """Wait for the last checkpoint, and say so if that takes long. Raises RunFailed if it could not be written."""
        if self.thread is not None:
            self.thread.join(SILENT_SECONDS)
            if self.thread.is_alive():
                self.watch.say("the last checkpoint is being written; the run ends when it is whole")
        self.wait()
        if self.failure:
            raise RunFailed(f"The run's last checkpoint is missing. {self.failure}")

    def _write(self, step: int, best: dict[str, Any] | None, snapshot: Snapshot, begun: float) -> None:
        try:
            self.buffers.ready()
            final = publish(self.folder, step, snapshot, self.check_ownership)
            every, best_step = self.settings.keep_every_steps, (best or {}).get("step")
            prune(
                self.folder,
                final,
                self.settings.keep_last,
                lambda s: s == best_step or bool(every and s and s % every == 0),
            )
            self.published(step, best)
            self.failure = None
            if snapshot.state.get("unvalidated"):
                self.watch.say(f"saved step {step}, which is not validated yet: the next start does that first")
        except Exception as error:  # each library has its own for a full disk
            shutil.rmtree(self.folder / f".writing_step_{step:08d}", ignore_errors=True)
            newest = newest_published(self.folder)
            reason = reason_of(error)
            last = f"The last one, {newest.name}, is whole." if newest else "There is none yet."
            self.failure = f"The checkpoint of step {step} could not be written to {self.folder}: {reason}. {last}"
            stop = self.settings.on_failure == "stop" and not snapshot.state.get("unvalidated")
            then = " Stopping (checkpoint.on_failure)." if stop else " The next save tries again."
            self.watch.say(f"WARNING: {clean_message(self.failure)}{'' if snapshot.state.get('unvalidated') else then}")
            if stop:
                self.watch.ask(StopReason.SAVE_FAILED)
        finally:
            self.watch.took("save", time.monotonic() - begun)
