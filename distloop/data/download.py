"""Load torchvision's data sets from the disk, or download them once per machine, or say how to get the files."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from distloop.config.places import shown
from distloop.errors import UsageError

WAIT_SECONDS = 1800
UNREADABLE = (RuntimeError, OSError, ValueError, EOFError)  # torchvision's errors for missing or damaged files


def load_or_download(dataset: Callable[..., Any], root: str, download: bool, folder: Path) -> tuple[Any, Any]:
    """(train, validation) of a torchvision data set under `root`; `folder`: where its files are.

    With `download`, one process of the machine downloads missing files while the others wait. Raises UsageError with
    ways to get the files if they are damaged or still missing.
    """
    name = getattr(dataset, "__name__", str(dataset))
    try:
        return dataset(root, train=True), dataset(root, train=False)
    except UNREADABLE as error:
        reason = _in_one_line(error)
        if isinstance(error, (ValueError, EOFError)):  # torchvision would not download a file that exists
            raise UsageError(
                f"{name}: a file in {folder.resolve()} is damaged ({reason}). Delete that folder to have it "
                "downloaded again, or copy it from a machine that has it."
            ) from None
    if download:
        try:
            with download_lock(Path(root)):
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
        f"[D('{shown(root)}', train=half, download=True) for half in (True, False)]\""
    ) from None


def _in_one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


@contextmanager
def download_lock(root: Path) -> Iterator[None]:
    """Hold the lock on downloads to `root`. Raises UsageError that names its holder after WAIT_SECONDS."""
    from filelock import FileLock, Timeout  # most runs find their data

    path = root / ".download.lock"
    try:
        lock = FileLock(path, timeout=WAIT_SECONDS, poll_interval=0.2, fallback_to_soft=False).acquire()
    except Timeout:
        holder = path.read_text(encoding="utf-8").strip()
        raise UsageError(
            f"Waited {WAIT_SECONDS} s for {holder} to download data to {root}; look what it does, or "
            "download beforehand."
        ) from None
    with lock:
        path.write_text(f"process {os.getpid()} on {os.uname().nodename}\n", encoding="utf-8")  # for those who wait
        yield
