"""Files that were open when loader processes were forked: all of them read on from one position, and mix up rows."""

import contextlib
import fcntl
import os
import stat
from collections.abc import Iterator
from typing import Any, NamedTuple

from torch.utils.data import Dataset

from distloop.errors import UsageError


class Place(NamedTuple):
    """Where a process reads next in a file that it has open."""

    path: str
    position: int


def places(process: int) -> dict[str, Place]:
    """Those of the regular files that a process reads, by descriptor; none where there is no /proc. Left out are files
    that are written only or appended to, such as logs, and those of the standard streams."""
    found: dict[str, Place] = {}
    streams = {identity for number in ("0", "1", "2") if (identity := _regular(process, number))}
    numbers: list[str] = []
    with contextlib.suppress(OSError):
        numbers = os.listdir(f"/proc/{process}/fd")
    for number in numbers:
        identity = _regular(process, number)
        if identity is None or identity in streams:
            continue
        with contextlib.suppress(OSError), open(f"/proc/{process}/fdinfo/{number}", encoding="utf-8") as file:
            facts = dict(line.split(":", 1) for line in file if ":" in line)
            flags = int(facts["flags"], 8)
            if flags & os.O_ACCMODE != os.O_WRONLY and not flags & os.O_APPEND:
                found[number] = Place(os.readlink(f"/proc/{process}/fd/{number}"), int(facts["pos"]))
    return found


def _regular(process: int, number: str) -> tuple[int, int] | None:
    """What tells a file from all others; None for what is none (a pipe, a socket), or closed meanwhile."""
    with contextlib.suppress(OSError):
        facts = os.stat(f"/proc/{process}/fd/{number}")
        if stat.S_ISREG(facts.st_mode):
            return facts.st_dev, facts.st_ino
    return None


class Watched(Dataset):
    """A data set in a loader process that is a copy of this one: loading an item may not move a position in a file that
    this process has open, since all its copies would share it. Raises UsageError.

    The position shows it whatever holds the file (an archive, a library), and a file that is mapped into memory, or
    opened anew in each process, is let be."""

    def __init__(self, dataset: Any) -> None:
        self.dataset, self.process = dataset, os.getpid()
        self.shared = places(self.process)

    def __getitem__(self, item: Any) -> Any:
        with self._ends_moved():
            before = places(self.process)
            loaded = self.dataset[item]
            after = places(self.process)
        moved = [
            path
            for number, (path, _) in self.shared.items()
            if number in before and number in after and before[number].path == after[number].path == path
            if before[number].position != after[number].position
        ]
        if moved:
            raise UsageError(
                f"{moved[0]} was opened before loader processes started, and loading a sample reads from "
                "it: they share one position in the file, and would get each other's rows. Open it when a process "
                "loads its first sample (in __getitem__: if self.file is None: self.file = open(…)), or train with "
                "--data.workers 0."
            )
        return loaded

    @contextlib.contextmanager
    def _ends_moved(self) -> Iterator[None]:
        """A file that was read to its end stands one byte behind it meanwhile: nothing is to be read at either place,
        and a load that reads the whole file again leaves another position than it found."""
        moved = []
        for number, (path, position) in self.shared.items():
            with contextlib.suppress(OSError):
                own = int(number)
                is_read_only = fcntl.fcntl(own, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY  # nobody writes there
                is_same = os.readlink(f"/proc/self/fd/{number}") == path
                if is_read_only and is_same and os.fstat(own).st_size == position:
                    os.lseek(own, position + 1, os.SEEK_SET)
                    moved.append((own, position))
        try:
            yield
        finally:
            for own, position in moved:
                with contextlib.suppress(OSError):
                    if os.lseek(own, 0, os.SEEK_CUR) == position + 1:
                        os.lseek(own, position, os.SEEK_SET)
