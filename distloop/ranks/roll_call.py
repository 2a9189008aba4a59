"""The roll call: each rank tells rank 0 where it is, and learns from rank 0 which rank failed first.

A thread in each rank keeps a connection to rank 0. It sends where the rank is, four times a second, and an error at
once. The kernel closes the connection of a process that ends, however it ends, so that rank 0 learns within a moment
who was first; the errors that the others then meet ("connection closed by peer") are consequences. Messages are JSON:

    rank to rank 0, first      {"token", "rank", "node", "pid"}
    any to any, four a second  {"step", "marks", "phase", "line", "line_number", "stack"}: see places.py
    rank to rank 0             the same with {"end", "what", "trace"}: it has failed; see verdicts.End
    any to any                 {"left"}: why it leaves on purpose
    any to any                 {"verdict"}: see verdicts.Verdict
"""

import contextlib
import os
import sys
import threading
import time
from typing import Any

from distloop.errors import Unanswered
from distloop.ranks.connection import Connections
from distloop.ranks.environment import node_name
from distloop.ranks.judge import Judge, table_of
from distloop.ranks.places import Place, Position, main_thread_stack
from distloop.ranks.stopping import Watch
from distloop.ranks.talking import let_others_speak, say, speaks
from distloop.ranks.verdicts import IN_ORDER, INTERRUPTED, End, Verdict, describe_error

BEAT_SECONDS = 0.25
MOST_BEATS = 1000  # that rank 0 reads in a second
ANSWER_SECONDS = 10.0  # a rank waits so long for rank 0's verdict
SUSPENDED_SECONDS = 2.0  # between two turns of the thread: more than a busy machine keeps it from running


class RollCall:
    """What this rank knows of all ranks. Before gather(), and with one process, it knows of itself only."""

    def __init__(self, watch: Watch) -> None:
        self.watch = watch
        self.position = Position()
        self.places = [Place(0, node_name(), os.getpid())]
        self.rank, self.world_size, self.limit = 0, 1, 600.0
        self.limit_name = "ddp.timeout_seconds"
        self._connections = Connections()
        self._judge = Judge(watch, self._connections)
        self._is_closed = False
        self._thread: threading.Thread | None = None

    @property
    def verdict(self) -> Verdict | None:
        """Why the run ends; None as long as nothing has failed."""
        return self._judge.verdict

    def gather(self, store: Any, rank: int, world_size: int, host: str, limit_seconds: float) -> None:
        """Connect to rank 0 on `host`; `store`: a torch store of all ranks. Raises UsageError if that fails."""
        self.rank, self.world_size, self.limit = rank, world_size, limit_seconds
        self.places = [Place(number) for number in range(world_size)]
        own = self.places[rank]
        own.node, own.pid = node_name(), os.getpid()
        if rank == 0:
            port, token = self._connections.listen(self.places)
            store.set("roll_call", f"{port} {token} {own.node}")
        else:
            port, token, self.places[0].node = store.get("roll_call").decode().split()
            self._connections.connect(host, int(port), token, self.places[0], own)
        self._thread = threading.Thread(target=self._run, name="distloop-roll-call", daemon=True)
        self._thread.start()

    def table(self) -> list[dict[str, Any]]:
        """Where all ranks are, as far as this one knows: rank, node, pid, step, phase, line."""
        self._note_own_place()
        return table_of(self.places)

    def report_failure(self, error: BaseException) -> Verdict:
        """Tell rank 0 of `error`; returns why the run ends, the same on all ranks. One rank prints it. Waits
        ANSWER_SECONDS at most for rank 0's verdict. If the main thread does not end the process within some seconds
        after it, the watch does."""
        if isinstance(error, KeyboardInterrupt) and self._judge.interrupt():
            self.leave(INTERRUPTED)
            if speaks(os.environ):
                say("\ndistloop: ended at once; the same command continues from the last checkpoint", sys.stderr)
        if self.verdict is None:
            self.position.fail(error)
            self._note_own_place()
            end = End(self.places[self.rank], *describe_error(error))
            # The first rank of each machine speaks, and on the machine of rank 0 that is rank 1 now.
            self._judge.speaks_for_rank_0 = isinstance(error, Unanswered) and os.environ.get("RANK") == "1"
            if self.world_size > 1:
                self._ask_rank_0(end)
            self._judge.decide(end, self.places, self.rank)  # without an answer, this rank decides by itself
            if self.world_size == 1 and end.kind == "mistake":
                let_others_speak(self.watch)
        return self._judge.final_verdict(self.world_size > 1)

    def _ask_rank_0(self, end: End) -> None:
        if self.rank == 0:
            self._judge.hear(end)
            self._connections.wake()
        else:
            self._connections.send(end=end.kind, what=end.what, trace=end.trace, **self.places[self.rank].message())
        until = time.monotonic() + ANSWER_SECONDS
        while not self._judge.has_decided.wait(0.1) and time.monotonic() < until and not self.places[0].left:
            pass

    def leave(self, why: str) -> None:
        """Tell rank 0 that this rank leaves on purpose, so that it is not taken for a failure."""
        self._connections.send(left=why)

    def cut_off(self, state: str, reason: str) -> None:
        """Tell rank 0, if this rank has not failed, that its process ends without the main thread."""
        if state != "failed":
            self.leave(reason)

    def close(self) -> None:
        """End the thread and the connections; the watch does not end the process any more."""
        if self.verdict is None:
            self.leave(IN_ORDER)
        self._is_closed = True
        self._connections.wake()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(3)
        self.watch.leave_within(None)
        self._connections.close()

    def _run(self) -> None:
        next_beat, turn = 0.0, time.monotonic()
        while not self._is_closed:
            for place, message in self._connections.read(next_beat - time.monotonic()):
                with contextlib.suppress(Exception):  # one bad message must not end this thread
                    self._hear(place, message)
            if time.monotonic() >= next_beat:
                next_beat = time.monotonic() + max(BEAT_SECONDS, self.world_size / MOST_BEATS)
                self._note_own_place()
                self._connections.send(**self.places[self.rank].message())
            slept, turn = time.monotonic() - turn, time.monotonic()
            if slept > SUSPENDED_SECONDS:  # this process was suspended: it has yet to read what the others sent
                for place in self.places:
                    place.heard, place.moved = place.heard + slept, place.moved + slept
            if self.verdict is None and not self._is_closed:
                self._judge.look_for_failure(self.places, self.rank, self.limit, self.limit_name)

    def _hear(self, place: Place, message: dict[str, Any] | None) -> None:
        """Note a message of the rank at `place`; None: its connection is closed."""
        if message is None:
            if not self._is_closed and place.left != IN_ORDER:
                self._judge.hear(End(place, "gone", "", self.watch.attempt.crash_report(place.rank)))
        elif "verdict" in message:
            self._judge.accept(Verdict(*message["verdict"]))
        elif "left" in message:
            place.left = message["left"]
        else:
            place.update(message)
            if "end" in message:
                self._judge.hear(End(place, message["end"], message["what"], message["trace"]))

    def _note_own_place(self) -> None:
        own = self.places[self.rank]
        own.update(self.position.message())
        if time.monotonic() - own.moved > self.limit / 2:
            own.stack = main_thread_stack()
