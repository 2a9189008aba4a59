"""Stopping in order: signals, a deadline, a STOP file and a launcher that is gone become one decision of all ranks.

A thread in each process (Watch) collects what asks for a stop, from the first lines of the program on. The loop
asks after each step whether the ranks have agreed (Agreement): they all stop after the same step, and save it.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from distloop.ranks.attempt import Attempt
from distloop.ranks.talking import speaks

if TYPE_CHECKING:  # the config's libraries are imported once signals are listened to
    from distloop.config.settings import Stop

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)
STOP = "STOP"
STOP_FILE, AFTER_MINUTES, SLURM_LIMIT, LAUNCHER_GONE, SAVE_FAILED = 101, 102, 103, 104, 105
REASONS = {
    **{int(number): number.name for number in SIGNALS},
    STOP_FILE: "the file STOP",
    AFTER_MINUTES: "stop.after_minutes",
    SLURM_LIMIT: "Slurm's time limit",
    LAUNCHER_GONE: "its launcher is gone",
    SAVE_FAILED: "a checkpoint could not be written",
}
POLL_SECONDS = 0.5
SECOND_INTERRUPT_SECONDS = 2.0  # an elastic launcher passes Ctrl-C on, so that it arrives twice at once
LAST_SECONDS = 3.0  # of a command that has nothing to save
ORPHAN_SECONDS = 8.0  # what is left to save in when the launcher is gone

_watch: Watch | None = None


def listen() -> Watch:
    """The process's Watch, started by the first call. Call it before the long imports, in the main thread."""
    global _watch  # signals belong to the process, and arrive before anything could be handed on
    if _watch is None or _watch.process != os.getpid():
        _watch = Watch()
    return _watch


class Watch:
    """Collects what asks for a stop, as a number in REASONS (a signal's own, or one of the above); 0: nothing.

    It is a thread, so that a signal is answered at once, however long the main thread computes or waits.
    """

    def __init__(self) -> None:
        self.process = os.getpid()
        self.wish = 0
        self.started = time.time()
        self.stop_file: Path | None = None
        self.deadlines: dict[int, float] = {}
        self.attempt: Attempt | None = None  # the one that is going on, once its run directory is open
        self.reserve_seconds = 0.0
        self.each_poll: list[Callable[[], None]] = []
        # Told how (stopped | failed) and why, when this thread ends the process.
        self.before_leaving: list[Callable[[str, str], None]] = []
        self.between_steps = 0.0  # seconds
        self._longest: dict[str, float] = {}
        self._first_interrupt: float | None = None
        self.failing = False
        self._interrupted = False  # by a second Ctrl-C
        self._leave: tuple[float, int, str | None] | None = None  # when to end the process, exit code, why it failed
        self._launcher = launcher(os.environ)
        self._wakeup, write = os.pipe()
        os.set_blocking(write, False)
        signal.set_wakeup_fd(write, warn_on_full_buffer=False)
        for number in SIGNALS:
            if number != signal.SIGINT or signal.getsignal(number) != signal.SIG_IGN:  # `command &` in a script
                signal.signal(number, self._in_main_thread)
        threading.Thread(target=self._run, name="distloop-watch", daemon=True).start()

    def look_for(self, run: Path, settings: Stop, environ: Mapping[str, str]) -> None:
        """Watch for the file STOP in the run's directory and for deadlines. For rank 0: one clock, one disk."""
        self.stop_file = run / STOP
        self.reserve_seconds = settings.reserve_seconds
        after = self.started + 60 * settings.after_minutes if settings.after_minutes else None
        deadlines = {AFTER_MINUTES: after, SLURM_LIMIT: slurm_end_time(environ)}
        self.deadlines = {wish: deadline for wish, deadline in deadlines.items() if deadline is not None}

    def ask(self, wish: int) -> None:
        """Ask for a stop; the first reason counts."""
        if not self.wish:
            self.wish = wish
            if self.failing:  # a launcher that ends what is left
                return
            more = " (Ctrl-C again: end at once)" if wish == signal.SIGINT else ""
            if wish == signal.SIGINT and speaks(os.environ) and sys.stderr.isatty():
                print(file=sys.stderr)  # after the ^C of the terminal
            self.say(f"{REASONS[wish]}: finishing what is going on, then saving and stopping{more}")

    def leave_within(self, seconds: float | None, code: int = 1, failure: str | None = None) -> None:
        """End the process in so many seconds, if it has not ended by then: it has failed. None: do not."""
        self.failing = seconds is not None
        self._leave = None if seconds is None else (time.monotonic() + seconds, code, failure)

    def say(self, text: str) -> None:
        """A line on standard error, from one process of the machine."""
        if speaks(os.environ):
            with contextlib.suppress(OSError, ValueError):  # the terminal is gone
                print(f"distloop: {text}", file=sys.stderr, flush=True)

    @contextlib.contextmanager
    def timed(self, what: str) -> Iterator[None]:
        """For what is no step: the longest that it took is kept free before a deadline."""
        begun = time.monotonic()
        yield
        seconds = time.monotonic() - begun
        self.between_steps += seconds
        self.took(what, seconds)

    def took(self, what: str, seconds: float) -> None:
        # Steps vary little: the latest says it best (the first ones compile, or start workers).
        self._longest[what] = seconds if what == "steps" else max(seconds, self._longest.get(what, 0.0))

    def reserve(self) -> float:
        """Seconds to keep free before a deadline: for steps, a validation and a save as long as the longest yet."""
        return self.reserve_seconds + 1.5 * sum(list(self._longest.values()))

    def _in_main_thread(self, number: int, frame: object) -> None:
        """Python's own handler, which may run long after the signal came: the thread has been told by then."""
        if number == signal.SIGINT and self._interrupted:
            raise KeyboardInterrupt

    def _interrupt(self) -> None:
        """Ctrl-C: the first asks for a stop; a second, which is not the first one passed on, ends at once."""
        now = time.monotonic()
        if self._first_interrupt is None:
            self._first_interrupt = now
        elif now - self._first_interrupt >= SECOND_INTERRUPT_SECONDS and not self._interrupted:
            self._interrupted = True
            self._leave = self._leave or (now + 3, 130, None)  # without the main thread, if it cannot hear
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)  # wakes it where it sleeps, too

    def _run(self) -> None:
        complained = False
        while True:
            try:
                self._poll()
            except Exception as error:  # whatever it is, signals and heartbeats must go on
                if not complained:
                    self.say(f"WARNING: looking for a reason to stop failed ({type(error).__name__}: {error})")
                complained = True

    def _last_words(self) -> None:
        state, why = "stopped", "interrupted from the keyboard" if self._interrupted else REASONS.get(self.wish, "")
        if self._leave and self._leave[2]:
            state, why = "failed", self._leave[2]
        for record in self.before_leaving:
            with contextlib.suppress(Exception):
                record(state, why)

    def _poll(self) -> None:
        if select.select([self._wakeup], [], [], POLL_SECONDS)[0]:
            for number in os.read(self._wakeup, 4096):
                if number == signal.SIGINT:
                    self._interrupt()
                if number in REASONS:
                    self.ask(number)
        if self._leave and time.monotonic() > self._leave[0]:
            if self._leave[2] is None:
                self.say("ended without saving; the same command continues from the last checkpoint")
            last = threading.Thread(target=self._last_words, daemon=True)
            last.start()
            last.join(0.5)  # a disk that hangs does not hold up the end
            os._exit(self._leave[1])
        if self._launcher is not None and os.getppid() != self._launcher:
            self.ask(LAUNCHER_GONE)
            self._leave = self._leave or (time.monotonic() + ORPHAN_SECONDS, 1, None)
        if self.stop_file and os.path.exists(self.stop_file):
            self.ask(STOP_FILE)
        for wish, deadline in self.deadlines.items():
            if time.time() + self.reserve() >= deadline:
                self.ask(wish)
        for function in self.each_poll:
            function()


class WatchWithoutSaving(Watch):
    """For commands that have nothing to save: a wish to stop ends the process."""

    def ask(self, wish: int) -> None:
        if not self.wish and not self.failing:  # else there is a verdict already
            self.wish = wish
            # Some moments, in which a rank that failed before can still be named.
            self.leave_within(LAST_SECONDS, 128 + wish if wish in SIGNALS else 1, f"ended by {REASONS[wish]}")


def launcher(environ: Mapping[str, str]) -> int | None:
    """The parent process, if it is a launcher, without which this one has no purpose; a shell is none.

    -1 where a launcher has died before it could be looked at.
    """
    parent = os.getppid()
    try:
        words = Path(f"/proc/{parent}/cmdline").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return None  # another operating system
    names = {os.path.basename(word) for word in words[:4]} | set(words[:4])
    launchers = {
        "accelerate",
        "accelerate-launch",
        "accelerate.commands.launch",
        "torchrun",
        "torch.distributed.run",
        "torch.distributed.launch",
    }
    if names & launchers or any(word.endswith("accelerate/commands/launch.py") for word in words[:4]):
        return parent
    adopted = parent == 1 and bool({"TORCHELASTIC_RUN_ID", "ACCELERATE_MIXED_PRECISION"} & set(environ))
    return -1 if adopted else None


def end_launcher(reason: str | None, environ: Mapping[str, str]) -> None:
    """On several machines, after a stop by a signal: end the elastic launcher, as it is ended where the signal went.

    Those of the other machines would wait for that one, deaf to signals, for five minutes after their ranks have left.
    """
    by_signal = reason in [number.name for number in SIGNALS]
    if by_signal and "TORCHELASTIC_RUN_ID" in environ and int(environ["GROUP_WORLD_SIZE"]) > 1 and speaks(environ):
        os.kill(os.getppid(), signal.SIGTERM)


def slurm_end_time(environ: Mapping[str, str]) -> float | None:
    """When Slurm will end this job, in seconds since 1970; None outside of a job or without a limit."""
    if "SLURM_JOB_ID" not in environ:
        return None
    if environ.get("SLURM_JOB_END_TIME", "").isdecimal():
        return float(environ["SLURM_JOB_END_TIME"])
    command = ("squeue", "--noheader", "--job", environ["SLURM_JOB_ID"], "--format", "%e")
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout
        return datetime.datetime.fromisoformat(answer.strip()).timestamp()
    except (OSError, subprocess.SubprocessError, ValueError):  # no squeue here, or no limit
        return None
