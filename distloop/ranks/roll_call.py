"""Who failed first: each rank tells rank 0 where it is, and learns from it why the run ends.

A thread in each rank keeps a connection to rank 0, apart from what trains: where the rank is, once a second, and
what went wrong, as it happens. A process that ends, in whatever way, closes its connection, so that rank 0 knows
within a moment who was first; what the others then meet ("connection closed by peer") is a consequence. Messages
are JSON, one a line.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import socket
import sys
import threading
import time
import traceback
from dataclasses import asdict
from multiprocessing.connection import wait
from typing import Any

from distloop.config.secrets import clean_text
from distloop.errors import Unanswered, UsageError
from distloop.ranks.connection import JsonLines
from distloop.ranks.environment import node_name
from distloop.ranks.places import Place, Position
from distloop.ranks.stopping import Watch
from distloop.ranks.talking import let_others_speak, say, speaks
from distloop.ranks.verdicts import Verdict, describe_error, verdict

BEAT_SECONDS = 0.25
MOST_BEATS = 1000  # a second, that rank 0 is to read
RECORD_SECONDS = 5.0
SEARCH_SECONDS = 4.0  # how long rank 0, when it hears of consequences only, looks for who was first
ABSENT_SECONDS = 60.0  # how long rank 0, once it listens, waits for the others to connect
LONGEST_GREETING = 4096  # bytes, of one who has not said yet who it is
ANSWER_SECONDS = 10.0  # how long a rank waits for rank 0's verdict
STUCK_SECONDS = 5.0  # after the verdict, for a main thread that hangs in a collective
LEAVE_SECONDS = 20.0  # after the verdict, for a main thread that is on its way out: a save may be under way
SUSPENDED_SECONDS = 2.0  # between two turns of the thread: more than a busy machine keeps it from running
RECORD = "ranks.json"
IN_ORDER, INTERRUPTED = "in order", "interrupted from the keyboard"
BY_KEYBOARD = Verdict(130, f"{INTERRUPTED}, without saving", "")


class _Line(JsonLines):
    """A connection to another rank."""

    place: Place | None = None  # what is known of that rank, once it has said who it is


class RollCall:
    """What the ranks know of each other. Before gather(), and with one process, of this one only."""

    def __init__(self, watch: Watch) -> None:
        self.watch = watch
        self.position = Position()
        self.verdict: Verdict | None = None
        self.rank, self.world_size, self.limit = 0, 1, 600.0
        self.limit_name = "ddp.timeout_seconds"
        self.places: list[Place] = [Place(0, node_name(), os.getpid())]
        self._lines: list[_Line] = []
        self._listener: socket.socket | None = None
        self._token = ""
        self._wake_read, self._wake_write = socket.socketpair()
        self._decided = threading.Event()
        self._deciding = threading.Lock()
        self._ends: list[tuple[Place, str, str, str]] = []  # (who, kind, what, traceback), in the order they were heard
        self._first_end = 0.0
        self._gathered = 0.0  # when rank 0 began to listen
        self._on_way_out = False
        self._closed = False
        self._speaks_for_rank_0 = False
        self._thread: threading.Thread | None = None

    # ---- set up ----------------------------------------------------------------------------------------------

    def gather(self, store: Any, rank: int, world_size: int, host: str, limit_seconds: float) -> None:
        """Connect all ranks to rank 0, which is on `host`, through a torch store that they share."""
        self.rank, self.world_size, self.limit = rank, world_size, limit_seconds
        self.places = [Place(number) for number in range(world_size)]
        own = self.places[rank]
        own.node, own.pid = node_name(), os.getpid()
        if rank == 0:
            self._listener = socket.create_server(("", 0), backlog=world_size)
            self._token, self._gathered = secrets.token_hex(16), time.monotonic()
            store.set("roll_call", f"{self._listener.getsockname()[1]} {self._token} {own.node}")
        else:
            port, token, self.places[0].node = store.get("roll_call").decode().split()
            try:
                line = _Line(socket.create_connection((host, int(port)), timeout=30))
            except OSError as error:
                raise UsageError(
                    f"Rank {rank} on {own.node} reaches rank 0 at {host}, but not on its port {port}: "
                    f"{error.strerror or error}. The machines of a run must reach each other on all ports."
                ) from None
            line.place = self.places[0]
            line.send(token=token, rank=rank, node=own.node, pid=own.pid)
            self._lines = [line]
        self._thread = threading.Thread(target=self._run, name="distloop-roll-call", daemon=True)
        self._thread.start()

    def table(self) -> list[dict[str, Any]]:
        """Where all ranks are, as plain JSON."""
        self._note_own_position()
        return self._table()

    def _table(self) -> list[dict[str, Any]]:
        kept = ("rank", "node", "pid", "step", "phase")
        return [{name: value for name, value in asdict(place).items() if name in kept} for place in self.places]

    # ---- the end of a run ------------------------------------------------------------------------------------

    def report_failure(self, error: BaseException) -> Verdict:
        """Why the run ends, when this rank has met `error`: what all ranks agree on, said once.

        Waits a few seconds at most for rank 0, which finds out who was first.
        """
        by_keyboard = isinstance(error, KeyboardInterrupt) and self.verdict != BY_KEYBOARD
        if by_keyboard and (self.verdict is None or self.verdict.code == 130):  # another rank's was heard of first
            self.leave(INTERRUPTED)
            self.verdict = BY_KEYBOARD
            if speaks(os.environ):
                say("\ndistloop: ended at once; the same command continues from the last checkpoint", sys.stderr)
        if self.verdict is None:
            self._note_own_position()
            own, end = self.places[self.rank], describe_error(error)
            # The first rank of each machine speaks then, and on that of rank 0 it is the second.
            self._speaks_for_rank_0 = isinstance(error, Unanswered) and os.environ.get("RANK") == "1"
            if self.world_size > 1:
                self._tell(own, *end)
            self._decide(own, *end)  # there is nobody to ask, or no answer
            if self.world_size == 1 and end[0] == "mistake":
                let_others_speak(self.watch)
        assert self.verdict is not None
        with self._deciding:  # what another thread is saying of it is said to its end
            if self.world_size > 1:
                self._on_way_out = True
                self.watch.leave_within(LEAVE_SECONDS, self.verdict.code, self.verdict.reason)
        return self.verdict

    def __enter__(self) -> RollCall:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if error is not None:
            self.report_failure(error)

    def _tell(self, own: Place, kind: str, what: str, trace: str) -> None:
        """Tell rank 0 of the end of this one, and wait for its verdict."""
        if self.rank == 0:
            self._heard_end(own, kind, what, trace)
            self._wake_write.send(b"!")
        else:
            for line in list(self._lines):
                line.send(end=kind, what=what, trace=trace, **self._own_position())
        until = time.monotonic() + ANSWER_SECONDS
        while not self._decided.wait(0.1) and time.monotonic() < until and not self.places[0].left:
            pass

    def leave(self, why: str) -> None:
        """This rank ends its part, for a reason that is no failure: its going is nobody's business."""
        for line in list(self._lines):  # the thread takes away those that are gone
            line.send(left=why)

    def cut_off(self, state: str, reason: str) -> None:
        """The process ends at once, without its main thread."""
        if state != "failed":
            self.leave(reason)

    def close(self) -> None:
        """The end of the process's part in the run."""
        if self.verdict is None:
            self.leave(IN_ORDER)
        self._closed = True
        with contextlib.suppress(OSError):
            self._wake_write.send(b"!")
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(3)
        self.watch.leave_within(None)
        # A connection that is closed before all was read is reset, and with it what was said last.
        for line in self._lines:
            with contextlib.suppress(OSError):
                line.socket.settimeout(0.5)
                line.socket.shutdown(socket.SHUT_WR)
        until = time.monotonic() + 1
        for line in self._lines:
            while time.monotonic() < until and line.receive():
                pass
            line.socket.close()
        for other in (self._listener, self._wake_read, self._wake_write):
            if other is not None:
                other.close()

    def _decide(self, place: Place, kind: str, what: str, trace: str) -> None:
        """Rank 0 has found who was first, or this rank has nobody to ask: say it, tell the others, and end."""
        with self._deciding:
            if self.verdict is not None:
                return
            left = place if place.left else self.places[0]  # for a reason that is no failure
            if left.left and left.left != IN_ORDER and kind in ("gone", "consequence"):
                self.verdict = Verdict(130 if left.left == INTERRUPTED else 1, f"{left} left: {left.left}", "")
            else:
                self._note_own_position()
                self.verdict = verdict(place, kind, what, trace, self.places[self.rank], self.world_size)
            if self.world_size == 1 and int(os.environ.get("RANK", 0)):  # another machine's may be a second message
                who = f" (rank {os.environ['RANK']} on {self.places[0].node})"
                self.verdict = self.verdict._replace(text=self.verdict.text + who)
            # Before the ranks are gathered, or when rank 0 is gone, one of each machine speaks.
            own = place is self.places[self.rank] and kind == "failed"
            gathered = (self.world_size > 1 and self.rank <= 1) or self._speaks_for_rank_0
            if self.verdict.text and (own or gathered or speaks(os.environ)):
                say(self.verdict.text, sys.stderr)
                self._keep(place, kind, what, trace)
                if self.rank and place is self.places[0]:
                    self.watch.attempt.rank_0_is_lost(self.verdict.reason)
            self._tell_verdict()

    def _tell_verdict(self) -> None:
        """The ranks that are here end with this verdict; rank 0, if it was suspended, when it wakes up."""
        assert self.verdict is not None
        for line in list(self._lines):
            if line.place is not None:
                line.send(verdict=self.verdict)
        if self.world_size > 1 and not self._on_way_out:
            self.watch.leave_within(STUCK_SECONDS, self.verdict.code, self.verdict.reason)
        self._decided.set()

    def _keep(self, place: Place, kind: str, what: str, trace: str) -> None:
        """Beside what is shown, for later: where all ranks were."""
        record = {"written": _now(), "kind": kind, "what": what, "traceback": trace}
        record |= {"rank": place.rank, "node": place.node, "step": place.step, "phase": place.phase}
        said = [{"rank": end[0].rank, "kind": end[1], "what": end[2]} for end in self._ends]
        self.watch.attempt.keep_failure(record | {"ranks": self._table(), "said": said})

    # ---- the thread ------------------------------------------------------------------------------------------

    def _run(self) -> None:
        next_beat, turn = 0.0, time.monotonic()
        while not self._closed:
            waiting: list[Any] = [self._wake_read, *self._lines]
            if self._listener is not None:
                waiting.append(self._listener)
            ready: list[Any] = wait(waiting, max(0.0, next_beat - time.monotonic()))
            for one in ready:
                try:
                    if one is self._wake_read:
                        self._wake_read.recv(4096)
                    elif one is self._listener:
                        self._lines.append(_Line(self._listener.accept()[0]))
                    else:
                        self._read(one)
                except Exception:  # whatever a port scanner sends, this thread goes on
                    if one in self._lines and one.place is None:
                        self._lines.remove(one)
                        one.socket.close()
            if time.monotonic() >= next_beat:
                next_beat = time.monotonic() + max(BEAT_SECONDS, self.world_size / MOST_BEATS)
                self._note_own_position()
                for line in list(self._lines):
                    if line.place is not None:
                        line.send(**self._own_position())
            slept, turn = time.monotonic() - turn, time.monotonic()
            if slept > SUSPENDED_SECONDS:  # it was this process that hung: what the others said is yet to be read
                for place in self.places:
                    place.heard, place.moved = place.heard + slept, place.moved + slept
            if self.verdict is None and not self._closed:
                self._look_for_the_first()

    def _read(self, line: _Line) -> None:
        messages = line.receive()
        if messages is None:
            self._lines.remove(line)
            line.socket.close()
            if line.place is not None and not self._closed and line.place.left != IN_ORDER:
                self._heard_end(line.place, "gone", "", self.watch.attempt.crash_report(line.place.rank))
            return
        if line.place is None and len(line.rest) > LONGEST_GREETING:
            raise ValueError("not one of ours")
        for message in messages:
            if line.place is None:
                if not secrets.compare_digest(message["token"], self._token):
                    raise ValueError("not one of ours")
                line.place = self.places[message["rank"]]
                line.place.node, line.place.pid = message["node"], message["pid"]
                if (
                    self._listener is not None
                    and sum(one.place is not None for one in self._lines) == self.world_size - 1
                ):
                    self._listener.close()  # all have come
                    self._listener = None
            elif "verdict" in message:
                with self._deciding:
                    if self.verdict is None:
                        self.verdict = Verdict(*message["verdict"])
                        self._tell_verdict()
            elif "left" in message:
                line.place.left = message["left"]
            else:
                line.place.update(message)
                if "end" in message:
                    self._heard_end(line.place, message["end"], message["what"], message["trace"])

    def _heard_end(self, place: Place, kind: str, what: str, trace: str) -> None:
        self._first_end = self._first_end or time.monotonic()
        self._ends.append((place, kind, what, trace))

    def _look_for_the_first(self) -> None:
        """Decide, as soon as it can be known. Rank 0 judges all ranks, the others rank 0 alone."""
        for place, kind, what, trace in self._ends:
            if kind != "consequence":
                return self._decide(place, kind, what, trace)
        standing = self._standing()
        if standing is not None:
            return self._decide(*standing)
        if self._ends and self.rank == 0 and time.monotonic() - self._first_end > SEARCH_SECONDS:
            here = [place for place in self.places if not place.left]
            behind = min(here, key=lambda place: (place.step, place.marks))
            equal = all((place.step, place.marks) == (behind.step, behind.marks) for place in here)
            _, _, what, trace = self._ends[0]
            if equal:
                self._decide(self._ends[0][0], "consequence", what, trace)
            else:
                self._decide(behind, "behind", what, behind.stack)
        return None

    def _standing(self) -> tuple[Place, str, str, str] | None:
        """The rank for which the others have waited longer than they may."""
        now = time.monotonic()
        if self._listener is not None and now - self._gathered > ABSENT_SECONDS:
            return next(place for place in self.places[1:] if not place.pid), "absent", "", ""
        others = [line.place for line in self._lines if line.place is not None and not line.place.left]
        for place in others:
            if now - place.heard > self.limit:
                return place, "silent", f"{self.limit:.0f} s ({self.limit_name})", ""
        if self.rank:
            return None
        here = [self.places[0], *others]
        behind = min(here, key=lambda place: (place.step, place.marks))
        ahead = max(here, key=lambda place: (place.step, place.marks))
        # Ranks that are all at the same place are at work: they may compile, or validate, as long as they like.
        same = (behind.step, behind.marks) == (ahead.step, ahead.marks)
        if same or min(now - behind.moved, now - ahead.moved) <= self.limit:
            return None
        return behind, "standing", f"{self.limit:.0f} s ({self.limit_name})", behind.stack

    def _note_own_position(self) -> None:
        own = self.places[self.rank]
        own.update({"step": self.position.step, "marks": self.position.marks, "phase": self.position.phase})
        if time.monotonic() - own.moved > self.limit / 2:
            frame = sys._current_frames().get(threading.main_thread().ident or 0)
            own.stack = clean_text("".join(traceback.format_stack(frame))) if frame is not None else ""

    def _own_position(self) -> dict[str, Any]:
        own = self.places[self.rank]
        position = {"step": own.step, "marks": own.marks, "phase": own.phase}
        return {**position, "stack": own.stack} if own.stack else position


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S+00:00", time.gmtime())
