"""The reasons to stop: signals, deadlines, the file STOP, a launcher that is gone. A thread in each process, the
Watch, collects them. The loop asks after each step whether the ranks have agreed (agreement.py): all stop after the
same step, and save it."""

from __future__ import annotations

import contextlib
import datetime
import enum
import math
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from distloop.ranks.attempt_base import AttemptBase
from distloop.ranks.leaving import SIGNALS, end_at_once
from distloop.ranks.signals import Signals
from distloop.ranks.talking import say, speaks

if TYPE_CHECKING:  # the config's libraries are imported once this process listens to signals
    from distloop.config.settings import Stop

STOP = "STOP"
LAUNCHERS = re.compile(
    r"(^|/)(accelerate|accelerate-launch|torchrun|accelerate\.commands\.launch|torch\.distributed\.(run|launch))$"
    r"|accelerate/commands/launch\.py$"
)
POLL_SECONDS = 0.5
SECOND_INTERRUPT_SECONDS = 2.0  # an elastic launcher passes Ctrl-C on, so that it arrives twice at once
LAST_SECONDS = 3.0  # of a command that has nothing to save
ORPHAN_SECONDS = 8.0  # for the last save when the launcher is gone
START_SECONDS = 25.0  # from a wish to the loop's first step; who asked (Slurm, Kubernetes, torchrun) kills after 30


class StopReason(enum.IntEnum):
    """Why a run stops. If ranks have different reasons, the greatest number is the reason of all. A failed save is the
    greatest, since the run then fails; next comes what leaves little time; signals are last."""

    SIGHUP = signal.SIGHUP
    SIGINT = signal.SIGINT
    SIGUSR1 = signal.SIGUSR1
    SIGUSR2 = signal.SIGUSR2
    SIGTERM = signal.SIGTERM
    STOP_FILE = 101
    AFTER_MINUTES = 102
    SLURM_LIMIT = 103
    LAUNCHER_GONE = 104
    SAVE_FAILED = 105
    FINISHED = 106  # no wish, but run.finish()

    @property
    def is_signal(self) -> bool:
        return self in SIGNALS

    @property
    def text(self) -> str:
        """The reason in words, for status.json."""
        return TEXTS.get(self, self.name)

    @classmethod
    def of(cls, text: str) -> StopReason | None:
        """The reason with this text."""
        return next((reason for reason in cls if reason.text == text), None)


TEXTS = {
    StopReason.STOP_FILE: "the file STOP",
    StopReason.AFTER_MINUTES: "stop.after_minutes",
    StopReason.SLURM_LIMIT: "Slurm's time limit",
    StopReason.LAUNCHER_GONE: "its launcher is gone",
    StopReason.SAVE_FAILED: "a checkpoint could not be written",
    StopReason.FINISHED: "the loop has finished early",
}

_watch: Watch | None = None  # global, since a process has one handler for each signal


def listen() -> Watch:
    """The process's Watch. The first call starts it: in the main thread, before the long imports."""
    global _watch
    if _watch is None or _watch.process != os.getpid():
        _watch = Watch()
    return _watch


class Watch:
    """A thread that collects the reasons to stop. It answers a signal at once, also while the main thread computes. It
    also calls the attempt's tick() twice a second, and its cut_off() before it ends the process."""

    def __init__(self) -> None:
        self.process = os.getpid()
        self.wish: StopReason | None = None  # the first reason on this rank
        self.attempt = AttemptBase()
        self.started = time.time()
        self.stop_file: Path | None = None
        self.deadlines: dict[StopReason, float] = {}
        self.reserve_seconds = 0.0
        self.between_steps = 0.0  # seconds
        self._longest: dict[str, float] = {}
        self._first_interrupt: float | None = None
        self.failing = False  # leave_within() has set a time limit
        self.grace_seconds = 0.0  # more than other ranks have to end after a failure: this one has something to save
        self._interrupted = False  # by a second Ctrl-C
        self._raised = False  # KeyboardInterrupt, in the main thread
        self._leave: tuple[float, int, str | None] | None = None  # when the process ends, exit code, why it failed
        self.signals = Signals(self._in_main_thread)
        self._begin_loop_by: float | None = None  # None until a wish; infinite once the loop begins
        self._launcher = launcher(os.environ)  # now that signals are received: it takes some time
        threading.Thread(target=self._run, name="distloop-watch", daemon=True).start()

    def look_for(self, run: Path, settings: Stop, environ: Mapping[str, str]) -> None:
        """Watch for the file STOP in the run's directory and for deadlines. Rank 0 does so for all."""
        self.stop_file = run / STOP
        self.reserve_seconds = settings.reserve_seconds
        after = self.started + 60 * settings.after_minutes if settings.after_minutes else None
        deadlines = {StopReason.AFTER_MINUTES: after, StopReason.SLURM_LIMIT: slurm_end_time(environ)}
        self.deadlines = {wish: deadline for wish, deadline in deadlines.items() if deadline is not None}

    def ask(self, reason: StopReason) -> None:
        """Ask for a stop; the first reason counts."""
        if self.wish is None:
            self.wish = reason
            if self.failing:  # the launcher has sent SIGTERM to the ranks that are left
                return
            if reason in (StopReason.SIGTERM, StopReason.SIGINT, StopReason.SIGHUP):  # the others come long before
                self._begin_loop_by = self._begin_loop_by or time.monotonic() + START_SECONDS
            more = " (Ctrl-C again: end at once)" if reason is StopReason.SIGINT else ""
            if reason is StopReason.SIGINT and speaks(os.environ) and sys.stderr.isatty():
                print(file=sys.stderr)  # after the ^C of the terminal
            self.say(f"{reason.text}: finishing what is going on, then saving and stopping{more}")

    def leave_within(self, seconds: float | None, code: int = 1, failure: str | None = None) -> None:
        """End the process with `code` after so many seconds, if it still runs then. None: call that off."""
        self.failing = seconds is not None
        self._leave = None if seconds is None else (time.monotonic() + seconds, code, failure)

    def say(self, text: str) -> None:
        """Print a line on standard error, on the first rank of each machine."""
        if speaks(os.environ):
            say(f"distloop: {text}", sys.stderr)

    @contextlib.contextmanager
    def timed(self, what: str) -> Iterator[None]:
        """Measure a phase between two steps: as much time as its longest took is kept free before a deadline."""
        begun = time.monotonic()
        yield
        seconds = time.monotonic() - begun
        self.between_steps += seconds
        self.took(what, seconds)

    def took(self, what: str, seconds: float) -> None:
        """Note that `what` took so many seconds. Of steps the latest counts: the first ones compile, start workers."""
        self._longest[what] = seconds if what == "steps" else max(seconds, self._longest.get(what, 0.0))

    def reserve(self) -> float:
        """Seconds to keep free before a deadline: for steps, a validation and a save as long as the longest so far."""
        return self.reserve_seconds + 1.5 * sum(list(self._longest.values()))

    def arm(self) -> None:
        """Take signals back that other code has taken, and say so. Call it in the main thread."""
        if said := self.signals.arm():
            self.say(said)

    def begin_loop(self) -> None:
        """From now on a stop saves, however long it takes. Call it in the main thread."""
        self.arm()
        self._begin_loop_by = math.inf
        self._look_for_stop_file()  # not only in half a second, in which a short run may be over

    def _look_for_stop_file(self) -> None:
        if self.stop_file and os.path.exists(self.stop_file):
            self.ask(StopReason.STOP_FILE)

    def _in_main_thread(self, number: int) -> None:
        if number == signal.SIGINT and self._interrupted and not self._raised:
            self._raised = True  # once: further ones would interrupt what closes the run
            raise KeyboardInterrupt

    def _interrupt(self) -> None:
        """The first Ctrl-C asks for a stop. A second one ends the process at once, unless a launcher passed it on."""
        now = time.monotonic()
        if self._first_interrupt is None:
            self._first_interrupt = now
        elif now - self._first_interrupt >= SECOND_INTERRUPT_SECONDS and not self._interrupted:
            self._interrupted = True
            self._leave = self._leave or (now + 3, 130, None)  # in case the main thread hangs
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)  # wakes it if it sleeps

    def _run(self) -> None:
        complained = False
        while True:
            try:
                self._poll()
            except Exception as error:  # the thread must go on
                if not complained:
                    self.say(f"WARNING: looking for a reason to stop failed ({type(error).__name__}: {error})")
                complained = True

    def _poll(self) -> None:
        for number in self.signals.read(POLL_SECONDS):
            if number == signal.SIGINT:
                self._interrupt()
            if number in SIGNALS:
                self.ask(StopReason(number))
        if self._leave and time.monotonic() > self._leave[0]:
            self._end_process(self._leave[1], self._leave[2])
        if self._begin_loop_by is not None and time.monotonic() > self._begin_loop_by:
            self._end_process(0, None)
        if self._launcher is not None and os.getppid() != self._launcher:
            self.ask(StopReason.LAUNCHER_GONE)
            self._leave = self._leave or (time.monotonic() + ORPHAN_SECONDS, 1, None)
        self._look_for_stop_file()
        for reason, deadline in self.deadlines.items():
            if time.time() + self.reserve() >= deadline:
                self.ask(reason)
        self.attempt.tick()

    def _end_process(self, code: int, failure: str | None) -> None:
        """End the process without its main thread. `failure`: why it has failed; None: it is stopped."""
        if failure is None:
            at_start = self._begin_loop_by != math.inf
            how = "before the loop began, with nothing to save" if at_start else "without saving"
            self.say(f"ended {how}; the same command continues from the last checkpoint")
        reason = "interrupted from the keyboard" if self._interrupted else self.wish.text if self.wish else ""
        state = ("stopped", reason) if failure is None else ("failed", failure)
        thread = threading.Thread(target=self.attempt.cut_off, args=state, daemon=True)
        thread.start()
        thread.join(0.5)  # its disk may hang
        end_at_once(code)


class WatchWithoutSaving(Watch):
    """For commands that have nothing to save: a reason to stop ends the process."""

    def ask(self, reason: StopReason) -> None:
        if self.wish is None and not self.failing:  # else there is a verdict already
            self.wish = reason
            # Not at once: a rank that failed before can then still be named.
            self.leave_within(LAST_SECONDS, 128 + reason if reason.is_signal else 1, f"ended by {reason.text}")


def launcher(environ: Mapping[str, str]) -> int | None:
    """The parent's process id if it is a launcher, -1 if a launcher was the parent and has died, else None."""
    import psutil

    parent = os.getppid()
    try:
        words = psutil.Process(parent).cmdline()
    except (OSError, psutil.Error):  # another user's, or outside of this container
        return None
    if any(LAUNCHERS.search(word) for word in words[:4]):
        return parent
    return -1 if parent == 1 and {"TORCHELASTIC_RUN_ID", "ACCELERATE_MIXED_PRECISION"} & set(environ) else None


def end_launcher(reason: StopReason, environ: Mapping[str, str]) -> None:
    """After a stop by a signal, on several machines: send SIGTERM to this machine's elastic launcher (torchrun). The
    launcher that got the signal ends by itself; those of the other machines would wait five minutes for it."""
    several_machines = "TORCHELASTIC_RUN_ID" in environ and int(environ["GROUP_WORLD_SIZE"]) > 1
    if reason.is_signal and several_machines and speaks(environ):
        os.kill(os.getppid(), signal.SIGTERM)


def slurm_end_time(environ: Mapping[str, str]) -> float | None:
    """When Slurm will end this job, in seconds since 1970; None outside of a job and for a job without a limit."""
    if "SLURM_JOB_ID" not in environ:
        return None
    if environ.get("SLURM_JOB_END_TIME", "").isdecimal():
        return float(environ["SLURM_JOB_END_TIME"])
    command = ("squeue", "--noheader", "--job", environ["SLURM_JOB_ID"], "--format", "%e")
    try:
        answer = subprocess.run(
            command, capture_output=True, encoding="utf-8", errors="replace", timeout=10, check=True
        ).stdout
        return datetime.datetime.fromisoformat(answer.strip()).timestamp()
    except (OSError, subprocess.SubprocessError, ValueError):  # no squeue here, or no limit
        return None
