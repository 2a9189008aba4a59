"""torchvision's downloadable data sets: taken from the disk, else fetched once per machine, else explained."""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from distloop.errors import UsageError

WAIT_SECONDS = 1800
# What torchvision raises for files that are missing, damaged or cut short.
UNREADABLE = (RuntimeError, OSError, ValueError, EOFError)


def fetched(dataset: Callable[..., Any], root: str, download: bool, folder: Path) -> tuple[Any, Any]:
    """(train, validation) of a torchvision data set under `root`.

    Whatever is on the disk is used as it is. When something is missing and `download` is set, the first
    process of the machine fetches it while the others wait. `folder` is where its files belong. Raises
    UsageError, saying where it looked and how to provide the files, when they cannot be had.
    """
    name = getattr(dataset, "__name__", str(dataset))
    try:
        return dataset(root, train=True), dataset(root, train=False)
    except UNREADABLE as error:
        reason = _in_one_line(error)
        if isinstance(error, (ValueError, EOFError)):  # the file is there, so that it would not be fetched again
            raise UsageError(
                f"{name}: a file in {folder.resolve()} is damaged ({reason}). Delete that folder to have it "
                "downloaded again, or copy it from a machine that has it."
            ) from None
    if download:
        try:
            with only_one(Path(root)):
                return dataset(root, train=True, download=True), dataset(root, train=False, download=True)
        except UNREADABLE as error:
            reason = f"downloading failed: {_in_one_line(error)}"
    else:
        reason = "data.args.download is false"
    raise UsageError(
        f"{name} is not complete in {folder.resolve()} ({reason}).\n"
        f"Copy its files there from a machine that has them, or point --data.root to the folder that has "
        f"{folder.name if folder.parent == Path(root) else folder.parent.name}/, or run once where there is internet:\n"
        f'  python -c "from torchvision.datasets import {name} as D; '
        f"[D('{root}', train=half, download=True) for half in (True, False)]\""
    ) from None


def _in_one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


@contextmanager
def only_one(root: Path) -> Iterator[None]:
    """Hold the download lock of `root`; wait for whoever holds it, with a limit and a name."""
    root.mkdir(parents=True, exist_ok=True)
    with open(root / ".download.lock", "a+") as lock:
        deadline = time.monotonic() + WAIT_SECONDS
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    lock.seek(0)
                    holder = lock.read().strip()
                    raise UsageError(
                        f"Waited {WAIT_SECONDS} s for {holder} to download data to {root}; look what it does, or "
                        "download beforehand."
                    ) from None
                time.sleep(0.2)
        lock.truncate(0)
        lock.write(f"process {os.getpid()} on {os.uname().nodename}\n")
        lock.flush()
        yield
