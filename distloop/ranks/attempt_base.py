"""What the ranks tell the attempt that they are part of."""

from __future__ import annotations

from typing import Any


class AttemptBase:
    """The attempt before its run directory is open, and of a command that has none: it keeps nothing.

    The watch's thread calls tick() and cut_off(), the roll call's thread the others.
    """

    def tick(self) -> None:
        """Time passes: called about twice a second."""

    def cut_off(self, state: str, reason: str) -> None:
        """The process ends at once, without its main thread; `state`: stopped | failed."""

    def keep_failure(self, record: dict[str, Any]) -> None:
        """Write who failed first to failures/attempt_NNNN.json; `record` has all keys but "attempt" and "written"."""

    def rank_0_is_lost(self, reason: str) -> None:
        """On the rank that speaks for rank 0, which cannot: the attempt has failed."""

    def crash_report(self, rank: int) -> str:
        """The stack that a crash in native code left on this rank; "" where there is none."""
        return ""
