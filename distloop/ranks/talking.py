"""What ranks say: who says it, once, and what rank 0 alone finds out for all."""

from __future__ import annotations

import contextlib
import io
import os
import sys
import time
import warnings
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

from distloop.errors import RunFailed, UsageError

if TYPE_CHECKING:
    from distloop.ranks.places import Position
    from distloop.ranks.stopping import Watch


Result = TypeVar("Result")


SPEAKING_SECONDS = 20  # enough to import torch on a busy machine; the launcher cuts it short


def from_main(function: Callable[[], Result], here: Position | None = None) -> Result:
    """The result of `function`, called on rank 0 alone; a UsageError or RunFailed of it is raised on all ranks.

    `here`: this rank's position, by which it is known who waits for whom.
    """
    import torch.distributed as dist

    if not (dist.is_initialized() and dist.get_world_size() > 1):
        return function()
    answer: list[Any] = [None]
    if dist.get_rank() == 0:
        try:
            answer = [function()]
        except (UsageError, RunFailed) as error:
            answer = [error]
    if here is not None:
        here.enter(here.phase if dist.get_rank() == 0 else "waiting for rank 0")
    dist.broadcast_object_list(answer)
    if isinstance(answer[0], (UsageError, RunFailed)):
        raise answer[0]
    return answer[0]


def say(text: str, file: Any = None) -> None:
    """Print a line. Where it cannot be written (a full disk, a terminal that is gone) it is lost, and no more."""
    with contextlib.suppress(OSError, ValueError):
        print(text, file=file or sys.stdout, flush=True)


def speak_clearly() -> None:
    """Show each warning once, on rank 0 and its first loader worker, and a ? for what the output's encoding lacks.

    Each rank and each worker meets the same warnings, and Python's own "once for each place" forgets at every
    warnings.catch_warnings, which libraries use in each step.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    seen: set[tuple[str, str]] = set()
    show = warnings.showwarning

    def show_once(message: Warning | str, category: type[Warning], *where: Any, **more: Any) -> None:
        torch = sys.modules.get("torch")
        worker = torch.utils.data.get_worker_info() if torch else None
        if int(os.environ.get("RANK", 0)) or (worker and worker.id) or (category.__name__, str(message)) in seen:
            return
        seen.add((category.__name__, str(message)))
        show(message, category, *where, **more)

    warnings.showwarning = show_once


def let_others_speak(watch: Watch | None = None) -> None:
    """Before leaving in silence: an elastic launcher ends all ranks when the first one leaves, said or not.

    Its signal, once one that did speak has left, ends the waiting; `watch` hears it, where there is one.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ and not speaks(os.environ):
        until = time.monotonic() + SPEAKING_SECONDS
        while not (watch and watch.wish) and time.monotonic() < until:
            time.sleep(0.1)


def speaks(environ: Mapping[str, str]) -> bool:
    """Whether this process says what it meets before ranks can talk: one on each machine, which may differ."""
    return int(environ.get("LOCAL_RANK", 0)) == 0
