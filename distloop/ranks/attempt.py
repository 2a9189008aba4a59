"""What ranks/ asks of the attempt that is going on; run/ has it, and ranks/ imports nothing from there."""

from __future__ import annotations

from typing import Any, Protocol


class Attempt(Protocol):
    """One start of a run. `Watch.attempt` is None before the run directory is open, and for doctor and evaluate."""

    def keep_failure(self, record: dict[str, Any]) -> None:
        """Write who failed first to failures/attempt_NNNN.json; `record` has all keys but "attempt"."""

    def rank_0_is_lost(self, reason: str) -> None:
        """Write for rank 0, which cannot do it any more, that the attempt has failed."""

    def crash_report(self, rank: int) -> str:
        """The stack of a rank that crashed in native code; "" if it did not."""
