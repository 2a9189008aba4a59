"""Messages that one rank prints for all, and results that rank 0 finds for all."""

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

SPEAKING_SECONDS = 20  # the longest that another rank takes to import torch; the launcher's signal ends it earlier

Result = TypeVar("Result")


def from_main(function: Callable[[], Result], here: Position | None = None) -> Result:
    """Call `function` on rank 0 and return its result on all ranks, or raise its UsageError or RunFailed. Collective.
    `here`: this rank's position; the other ranks note there that they wait for rank 0."""
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
    """Print a line. If it cannot be written (the disk is full, the terminal is gone), it is lost without an error."""
    with contextlib.suppress(OSError, ValueError):
        print(text, file=file or sys.stdout, flush=True)


def speak_clearly() -> None:
    """Show each warning once, on rank 0 and its first loader worker; print ? for characters the output cannot encode.
    Python's own filter forgets which it has shown at each warnings.catch_warnings, which libraries use in each step."""
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
    """Wait, before this rank ends without a message, until the rank that prints it has ended. An elastic launcher
    ends all ranks when the first one ends, also one that has not printed yet. Its signal ends the wait, through `watch`
    if that receives signals."""
    if "TORCHELASTIC_RUN_ID" in os.environ and not speaks(os.environ):
        until = time.monotonic() + SPEAKING_SECONDS
        while not (watch and watch.wish) and time.monotonic() < until:
            time.sleep(0.1)


def speaks(environ: Mapping[str, str]) -> bool:
    """True on the first rank of each machine: it prints what all ranks meet before they are connected."""
    return int(environ.get("LOCAL_RANK", 0)) == 0
