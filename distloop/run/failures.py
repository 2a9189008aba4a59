"""failures/: where the ranks are, and what is known of how an attempt failed."""

from __future__ import annotations

import contextlib
import faulthandler
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

from distloop.run.files import now, write_text

RECORD_SECONDS = 5.0
RECORD = "ranks.json"


class FailureRecords:
    """Keeps the folder failures/ of this attempt. A crash in native code leaves its stack there."""

    def __init__(self, folder: Path, attempt: int, rank: int, world_size: int) -> None:
        self.folder, self.attempt, self.rank = folder, attempt, rank
        self.next_record = 0.0
        self.crash_file: IO[str] | None = None
        if world_size > 1:
            with contextlib.suppress(OSError):
                self.crash_file = open(self.crash_path(rank), "w")  # noqa: SIM115 - lives as long as the process
                faulthandler.enable(self.crash_file, all_threads=False)

    def crash_path(self, rank: int) -> Path:
        return self.folder / f"crash_{self.attempt:04d}_rank_{rank:05d}.txt"

    def write_ranks(self, table: Callable[[], list[dict[str, Any]]]) -> None:
        """On rank 0, now and then: where all ranks are."""
        if self.rank or time.monotonic() < self.next_record:
            return
        self.next_record = time.monotonic() + RECORD_SECONDS
        with contextlib.suppress(OSError):
            write_text(self.folder / RECORD, json.dumps({"written": now(), "ranks": table()}) + "\n", synced=False)

    def keep(self, record: dict[str, Any]) -> None:
        """Beside what is shown, for later: where all ranks were."""
        with contextlib.suppress(OSError):
            path = self.folder / f"attempt_{self.attempt:04d}.json"
            path.write_text(json.dumps({"attempt": self.attempt, **record}, indent=1) + "\n")

    def crash_report(self, rank: int) -> str:
        try:
            return self.crash_path(rank).read_text().partition("\n\nExtension modules:")[0]
        except OSError:
            return ""

    def close(self) -> None:
        if self.crash_file is not None:
            faulthandler.disable()
            self.crash_file.close()
            with contextlib.suppress(OSError):
                self.crash_path(self.rank).unlink()
        if self.rank == 0 and self.folder.exists():
            for path in (self.folder / RECORD, *self.folder.glob(f"crash_{self.attempt:04d}_rank_*.txt")):
                with contextlib.suppress(FileNotFoundError):  # its rank, which leaves now, was faster
                    if path.name == RECORD or not path.stat().st_size:  # of ranks that were killed
                        path.unlink()
