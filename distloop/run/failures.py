"""The files of failures/: who failed first, where the ranks are, and the stacks of ranks that crashed."""

import contextlib
import faulthandler
import json
import threading
import time
from pathlib import Path
from typing import IO, Any

from distloop.run.files import RANKS, now, write_json, write_text

RANKS_SECONDS = 5.0  # between two writings of ranks.json


class FailureRecords:
    """The records of one attempt on this rank. Any thread may use it; it ignores errors of the disk."""

    def __init__(self, folder: Path, attempt: int, rank: int) -> None:
        """`folder`: the run's failures/."""
        self.folder, self.attempt, self.rank = folder, attempt, rank
        self._ranks = folder / Path(RANKS).name
        self._next_ranks = 0.0
        self._writing = threading.Lock()
        self._is_closed = False
        self._crash_file: IO[str] | None = None

    def open(self) -> None:
        """Let a crash of this process in native code write its stack to failures/."""
        with contextlib.suppress(OSError):
            self._crash_file = open(self._crash_path(self.rank), "w", encoding="utf-8")  # noqa: SIM115 - lives as long as the process
            faulthandler.enable(self._crash_file, all_threads=False)

    def keep(self, record: dict[str, Any]) -> None:
        """Write the failure of this attempt; `record` has all keys but "attempt" and "written"."""
        with contextlib.suppress(OSError):
            path = self.folder / f"attempt_{self.attempt:04d}.json"
            write_json(path, {"attempt": self.attempt, "written": now(), **record}, synced=False)

    def write_ranks(self, table: list[dict[str, Any]]) -> None:
        """Write where all ranks are, every RANKS_SECONDS at most. For rank 0."""
        with self._writing:
            if self._is_closed or time.monotonic() < self._next_ranks:
                return
            self._next_ranks = time.monotonic() + RANKS_SECONDS
            with contextlib.suppress(OSError):
                write_text(self._ranks, json.dumps({"written": now(), "ranks": table}) + "\n", synced=False)

    def crash_report(self, rank: int) -> str:
        """The stack that a crash of this rank in native code has written; "" if there is none."""
        try:
            return (
                self._crash_path(rank)
                .read_text(encoding="utf-8", errors="replace")
                .partition("\n\nExtension modules:")[0]
            )
        except OSError:
            return ""

    def close(self) -> None:
        """Remove the files that only serve while the ranks live; rank 0 also removes those of killed ranks."""
        with self._writing:
            self._is_closed = True
        if self._crash_file is not None:
            faulthandler.disable()
            self._crash_file.close()
            with contextlib.suppress(OSError):  # rank 0 may have been faster
                self._crash_path(self.rank).unlink()
        if self.rank == 0:
            for path in (self._ranks, *self.folder.glob(f"crash_{self.attempt:04d}_rank_*.txt")):
                with contextlib.suppress(OSError):  # its rank may have been faster
                    if path == self._ranks or not path.stat().st_size:
                        path.unlink()

    def _crash_path(self, rank: int) -> Path:
        return self.folder / f"crash_{self.attempt:04d}_rank_{rank:05d}.txt"
