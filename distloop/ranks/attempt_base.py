"""The methods of an attempt that the ranks' threads call."""

from typing import Any


class AttemptBase:
    """An attempt without a run directory: it does nothing. The watch calls tick() and cut_off(), the judge the rest."""

    def tick(self) -> None:
        """Called about twice a second."""

    def cut_off(self, state: str, reason: str) -> None:
        """Called before the process ends without its main thread. `state`: stopped | failed."""

    def keep_failure(self, record: dict[str, Any]) -> None:
        """Write failures/attempt_NNNN.json. `record` has all its keys but "attempt" and "written"."""

    def rank_0_is_lost(self, reason: str) -> None:
        """On another rank: write that the attempt has failed, since rank 0 is gone."""

    def crash_report(self, rank: int) -> str:
        """The stack that a crash in native code left on `rank`; "" if there is none."""
        return ""
