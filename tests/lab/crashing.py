"""Tasks that do something to their own run: are held, or take away the room to save in, at a certain step.

It happens in the rank's own process after the update of a step and before that is logged or saved, so that no test
depends on how fast the run is.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch.optim.optimizer import register_optimizer_step_post_hook

from distloop.run import lock
from distloop.tasks import Classification
from tests.lab import stage


class Hooked(Classification):
    """Calls after_update(n) after the n-th update of this attempt."""

    def __init__(self) -> None:
        super().__init__()
        self.updates = 0
        register_optimizer_step_post_hook(self._count)

    def _count(self, *_: Any) -> None:
        self.updates += 1
        self.after_update(self.updates)

    def after_update(self, number: int) -> None:
        raise NotImplementedError


class Held(Hooked):
    """Comes to the place "update" after each update."""

    def after_update(self, number: int) -> None:
        stage.at("update", number)


class OftenSeen(Held):
    """The same, of a run whose lock says five times a second that its owner lives. A task is built before the lock."""

    def __init__(self) -> None:
        super().__init__()
        lock.BEAT_SECONDS = 0.2


class NoRoom(Hooked):
    """From one update to another of the attempt, rank 0 cannot write: $TROUBLE is [kind, what, first, last] as JSON.

    Kinds are the pairs of functions in KINDS. Not arguments of the task: a run is continued with those it had.
    """

    def __init__(self) -> None:
        super().__init__()
        self.kind, self.what, self.begin, self.end = json.loads(os.environ.get("TROUBLE", '["", null, 0, 0]'))

    def after_update(self, number: int) -> None:
        if int(os.environ.get("RANK", 0)) == 0 and number in (self.begin, self.end):
            for thread in threading.enumerate():
                if thread.name == "distloop-save":  # which save meets the trouble is not left to chance
                    thread.join()
            take, give = KINDS[self.kind]
            (take if number == self.begin else give)(self.what)


def limit_files(size: Any) -> None:
    """No file of this process may become larger than this: like a disk that is full, without a disk."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(size), resource.RLIM_INFINITY))


def no_limit(_: Any = None) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


def fill(folder: Any) -> None:
    """Fill the file system that this folder is on, to the last byte."""
    with open(Path(folder) / "ballast", "ab", buffering=0) as file:
        for size in (1 << 16, 1):
            try:
                while True:
                    file.write(bytes(size))
            except OSError:
                pass


def empty(folder: Any) -> None:
    (Path(folder) / "ballast").unlink()


def make_read_only(folder: Any) -> None:
    """For root, whom permissions do not stop, the folder is mounted over itself."""
    if os.geteuid():
        os.chmod(folder, 0o555)
    else:
        mount("--bind", str(folder), str(folder))
        mount("-o", "remount,bind,ro", str(folder))


def make_writable(folder: Any) -> None:
    if os.geteuid():
        os.chmod(folder, 0o755)
    else:
        subprocess.run(["umount", "--lazy", str(folder)], check=True, capture_output=True)


def mount(*words: str) -> None:
    subprocess.run(["mount", *words], check=True, capture_output=True)


def mount_is_allowed(folder: Path) -> bool:
    """Whether this process may mount, tried on a folder."""
    if sys.platform != "linux" or os.geteuid():
        return False
    try:
        mount("-t", "tmpfs", "-o", "size=1m", "distloop-test", str(folder))
    except (OSError, subprocess.CalledProcessError):
        return False
    subprocess.run(["umount", str(folder)], check=True)
    return True


KINDS: dict[str, tuple[Callable[[Any], None], Callable[[Any], None]]] = {
    "limit": (limit_files, no_limit),
    "full": (fill, empty),
    "read-only": (make_read_only, make_writable),
}
