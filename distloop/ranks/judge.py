"""One verdict on the failure that ends the run: printed once, recorded, and sent to the other ranks."""

import os
import sys
import threading
import time
from collections.abc import Sequence
from typing import Any

from distloop.ranks.connection import Connections
from distloop.ranks.places import Place
from distloop.ranks.stopping import Watch
from distloop.ranks.talking import say, speaks
from distloop.ranks.user_code import notes_in
from distloop.ranks.verdicts import BY_KEYBOARD, End, Verdict, first_failure, left_on_purpose, verdict_on

STUCK_SECONDS = 5.0  # after the verdict, for a main thread that hangs in a collective
LEAVE_SECONDS = 20.0  # after the verdict, for a main thread that is on its way out: a save may be under way


class Judge:
    """Gives one verdict on the ends that this rank hears of. The main thread and the roll call's thread use it."""

    def __init__(self, watch: Watch, connections: Connections) -> None:
        self.watch, self.connections = watch, connections
        self.verdict: Verdict | None = None
        self.has_decided = threading.Event()
        self.ends: list[End] = []  # in the order in which they were heard
        self.first_heard = 0.0
        self.speaks_for_rank_0 = False  # which does not answer
        self._deciding = threading.Lock()
        self._is_leaving = False  # the main thread knows the verdict

    def hear(self, end: End) -> None:
        """Keep an end, for first_failure() to judge."""
        self.first_heard = self.first_heard or time.monotonic()
        self.ends.append(end)

    def look_for_failure(self, places: Sequence[Place], rank: int, limit: float, limit_name: str) -> None:
        """Give the verdict as soon as it is clear who failed first; see first_failure()."""
        connected, listening_since = self.connections.ranks(), self.connections.listening_since
        more: dict[str, Any] = {"connected": connected, "first_heard": self.first_heard, "limit_name": limit_name}
        more |= {"judge": rank, "listening_since": listening_since, "is_stopping": self.watch.wish is not None}
        first = first_failure(places, self.ends, time.monotonic(), limit, **more)
        if first is not None and not self.connections.someone_waits():  # who would not hear of it, and end by itself
            self.decide(first, places, rank)

    def interrupt(self) -> bool:
        """Ctrl-C came here: the run ends without saving, unless a failure has ended it before."""
        if self.verdict == BY_KEYBOARD or (self.verdict is not None and self.verdict.code != 130):
            return False  # else another rank's Ctrl-C was heard of first
        self.verdict = BY_KEYBOARD
        return True

    def accept(self, verdict: Verdict) -> None:
        """Make rank 0's verdict this rank's, unless it has one already."""
        with self._deciding:
            if self.verdict is None:
                self.verdict = verdict
                self._hand_on(verdict, several=True)

    def decide(self, end: End, places: Sequence[Place], rank: int) -> None:
        """Give the verdict on the first failure, unless there is one already; print and record it. Rank 0 decides;
        another rank does if rank 0 does not answer."""
        with self._deciding:
            if self.verdict is not None:
                return
            own, several = places[rank], len(places) > 1
            verdict = left_on_purpose(end, places[0]) or verdict_on(end, own, len(places), time.monotonic())
            if not several and int(os.environ.get("RANK", 0)):  # a rank on another machine may print the same
                verdict = verdict._replace(text=f"{verdict.text} (rank {os.environ['RANK']} on {own.node})")
            self.verdict = verdict
            # Before the ranks are gathered, or when rank 0 is gone, one rank of each machine speaks.
            is_own_failure = end.place is own and end.kind == "failed"
            speaks_for_all = (several and rank <= 1) or self.speaks_for_rank_0
            if verdict.text and (is_own_failure or speaks_for_all or speaks(os.environ)):
                say(verdict.text, sys.stderr)
                if verdict.code:
                    self._record(end, places, is_rank_0_lost=rank > 0 and end.place is places[0], reason=verdict.reason)
            self._hand_on(verdict, several)

    def _hand_on(self, verdict: Verdict, several: bool) -> None:
        """Send the verdict to the other ranks, also to rank 0, which may have been suspended; then end this rank."""
        self.connections.send(verdict=verdict)
        if several and not self._is_leaving:
            seconds = STUCK_SECONDS + self.watch.grace_seconds
            self.watch.leave_within(seconds, verdict.code, verdict.reason if verdict.code else None)
        self.has_decided.set()

    def _record(self, end: End, places: Sequence[Place], is_rank_0_lost: bool, reason: str) -> None:
        place, kind, what, trace = end
        record: dict[str, Any] = {"kind": kind, "what": what, "notes": notes_in(trace), "traceback": trace}
        record |= {"rank": place.rank, "node": place.node, "step": place.step, "phase": place.phase, "line": place.line}
        heard = [{"rank": one.place.rank, "kind": one.kind, "what": one.what} for one in self.ends]
        self.watch.attempt.keep_failure({**record, "ranks": table_of(places), "said": heard})
        if is_rank_0_lost:
            self.watch.attempt.rank_0_is_lost(reason)

    def final_verdict(self, several: bool) -> Verdict:
        """The verdict, for the main thread: from now on it has LEAVE_SECONDS to end the process."""
        with self._deciding:  # another thread may still be showing it
            assert self.verdict is not None
            if several:
                self._is_leaving = True
                failure = self.verdict.reason if self.verdict.code else None
                self.watch.leave_within(LEAVE_SECONDS + self.watch.grace_seconds, self.verdict.code, failure)
            return self.verdict


def table_of(places: Sequence[Place]) -> list[dict[str, Any]]:
    """Where the ranks are, for ranks.json and the record of a failure."""
    keys = ("rank", "node", "pid", "step", "phase", "line")
    return [{key: getattr(place, key) for key in keys} for place in places]
