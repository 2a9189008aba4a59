"""The live view: some lines at the bottom of a terminal, drawn twice a second, above which all others scroll.

The cursor waits on an empty line above the view, and each drawing begins where it finds it. So a drawing need not know
what has become of the one before: what other processes write (ranks, loader workers, C libraries, the terminal its ^C)
begins on the empty line and stays, and the terminal may change its size. rich.Live keeps the cursor below its view,
and writes over all that.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from collections.abc import Iterable
from typing import Any, TextIO, cast

from rich.cells import cell_len, set_cell_size
from rich.color import ColorSystem
from rich.console import Console
from rich.style import Style

from distloop.tracking.console import Known, duration, metrics_of, number, sayable

REDRAW_SECONDS = 0.5
ERASE_BELOW, ERASE_REST_OF_LINE, CUT_LONG_LINES, WRAP_LONG_LINES = "\x1b[J", "\x1b[K", "\x1b[?7l", "\x1b[?7h"
DEBUGGERS = ("pdb", "code")  # modules
UNKNOWN = "–"
# Columns. What changes from one drawing to the next has a width of its own, so that nothing beside it moves.
LABEL, VALUE, PERCENT, LEFT, SHORTEST_BAR, LONGEST_BAR, GAP = 8, 9, 5, 13, 8, 80, 3

Piece = tuple[str, str]  # text, rich's style
Line = list[Piece]


# ---- what is shown -------------------------------------------------------------------------------------------


def layout(known: Known, columns: int, lines: int) -> list[Line]:
    """What is known, in at most so many lines, of which none is longer than so many columns."""
    memory = known.memory()
    training = [
        ("running loss", steady(known.train.get("running_loss"))),
        ("lr", steady(known.train.get("lr"))),
        ("gradient norm", steady(known.train.get("gradient_norm"))),
        ("samples/s", steady(known.train.get("samples_per_second"))),
        ("data wait", (known.data_wait() or UNKNOWN).ljust(PERCENT)),
        ("memory", (UNKNOWN if memory is None else f"{memory:.3g} GiB").ljust(VALUE)),
    ]
    skipped = known.train.get("skipped_steps")
    saved = known.saved()
    about = [
        ("", str(known.attempt)),
        ("saved", (UNKNOWN if saved is None else f"step {saved}").ljust(len(f"step {known.total_steps}"))),
        *([("", known.url)] if known.url else []),
        *([("skipped steps", str(skipped))] if skipped else []),
        ("", known.name),
    ]
    first, rest = _fields("train", training, columns)
    return [
        *_bars(known, columns),
        first,
        *([_fields("", rest, columns)[0]] if rest else []),
        *_validations(known, columns),
        _fields("attempt", about, columns)[0],
    ][: max(0, lines)]


def _bars(known: Known, columns: int) -> list[Line]:
    """The progress of the run and of the epoch in hand."""
    step, total, left = known.step, known.total_steps, known.seconds_left()
    epoch = max(0, step - 1) // known.steps_per_epoch
    before = epoch * known.steps_per_epoch
    counts = f"step {step}/{total}", f"epoch {epoch + 1}/{known.epochs}"
    width = max(len(f"step {total}/{total}"), len(f"epoch {known.epochs}/{known.epochs}"))
    room = columns - LABEL - PERCENT - GAP - LEFT
    if with_counts := room >= GAP + width:
        room -= GAP + width
    bar = min(room - 1, LONGEST_BAR) if room > SHORTEST_BAR else 0
    found: list[Line] = []
    for label, share, count, time_left in (
        ("run", step / total, counts[0], UNKNOWN if left is None else f"{duration(left)} left"),
        ("epoch", (step - before) / max(1, min(known.steps_per_epoch, total - before)), counts[1], ""),
    ):
        done = int(share * bar)
        line = [(label.ljust(LABEL), "dim"), ("━" * done, "cyan"), ("─" * (bar - done), "dim"), (" " * bool(bar), "")]
        line.append((f"{int(100 * share)} %".rjust(PERCENT), "bold"))
        line += [(" " * GAP + count.ljust(width), "")] if with_counts else []
        found.append([*line, (" " * GAP + time_left, "")])
    return found


def _validations(known: Known, columns: int) -> list[Line]:
    """The latest validation and the best one, the same metric below the other."""
    rows = {"latest": known.latest or {}, "best": known.best or {}}
    values = {label: metrics_of(row) for label, row in rows.items()}
    best_metric = known.best_rule[0]
    names = [best_metric, *(name for name in values["latest"] or values["best"] if name != best_metric)]
    found = []
    for label, row in rows.items():
        step = f"step {row['step']}" if row else UNKNOWN
        fields = [
            ("", step.ljust(len(f"step {known.total_steps}"))),
            *((n, steady(values[label].get(n))) for n in names),
        ]
        found.append(_fields(label, fields if row else fields[:1], columns, best_metric if label == "best" else "")[0])
    return found


def _fields(
    label: str, fields: list[tuple[str, str]], columns: int, marked: str = ""
) -> tuple[Line, list[tuple[str, str]]]:
    """A line of those fields (name, value) for which there is room, and the others."""
    line, used, others = [(label.ljust(LABEL), "dim")], LABEL, []
    for name, value in fields:
        gap = GAP if used > LABEL else 0
        width = gap + cell_len(f"{name} {value}" if name else value)
        if used + width > columns:
            others.append((name, value))
            continue
        line += [(" " * gap + (f"{name} " if name else ""), "dim"), (value, "bold green" if name == marked else "")]
        used += width
    return line, others


def steady(value: Any) -> str:
    """A number with as many digits as others, however many of them are 0."""
    if value is None:
        text = UNKNOWN
    elif isinstance(value, float) and 1e-4 <= abs(value) < 1000:
        text = f"{value:#.4g}"
    else:
        text = number(value)
    return text.ljust(VALUE)


# ---- how it is drawn -----------------------------------------------------------------------------------------


class LiveView:
    """Draws what is known on standard output, which is a terminal, and takes over sys.stdout and sys.stderr."""

    def __init__(self, known: Known) -> None:
        self.known = known
        self.process = os.getpid()
        self.terminal, self.encoding = sys.stdout.fileno(), sys.stdout.encoding
        rich_console = Console(file=sys.stdout)
        self.colors = ColorSystem.STANDARD if rich_console.color_system and not rich_console.no_color else None
        self.lock = threading.RLock()  # a signal's handler may print, too
        self.closing = threading.Event()
        self.drawing = ""
        self.unfinished = False  # whether the last line written ended
        self.taken: dict[str, tuple[TextIO, TextIO]] = {}
        for name in ("stdout", "stderr"):
            stream = getattr(sys, name)
            if stream.isatty():
                stream.flush()
                self.taken[name] = stream, cast(TextIO, Above(self, stream))
                setattr(sys, name, self.taken[name][1])
        threading.Thread(target=self._run, name="distloop-live-view", daemon=True).start()

    def line(self, text: str) -> None:
        """A line of its own above the view."""
        with self.lock:
            self.write(("\n" if self.unfinished else "") + sayable(text, self.encoding) + "\n")

    def write(self, text: str) -> None:
        """Write above the view. It steps aside while a line is not ended: a question, the progress of a download."""
        if os.getpid() != self.process:  # a loader worker that was forked, perhaps while the lock was held
            self._send(ERASE_BELOW + text)
            return
        with self.lock:
            begin = ERASE_BELOW if self.unfinished else "\r" + ERASE_BELOW
            self.unfinished = not text.endswith("\n")
            self._send(begin + text + ("" if self.unfinished else self.drawing))

    def close(self) -> None:
        """Take the view away."""
        with self.lock:
            if self.closing.is_set():
                return
            self.closing.set()
            self.drawing = ""
            for name, (stream, ours) in self.taken.items():
                ours.flush()
                if getattr(sys, name) is ours:
                    setattr(sys, name, stream)
            self._send("\n" if self.unfinished else "\r" + ERASE_BELOW)
            self.unfinished = False

    def _run(self) -> None:
        try:
            while not self.closing.is_set():
                drawing = self._draw()  # outside of the lock, for which lines would have to wait
                with self.lock:
                    shown, self.drawing = self.drawing, "" if self.closing.is_set() else drawing
                    if not self.unfinished and (shown or self.drawing):
                        self._send(self.drawing or ERASE_BELOW)
                self.closing.wait(REDRAW_SECONDS)
        except Exception:
            self.close()
            raise

    def _draw(self) -> str:
        """What draws the view where the cursor is, and leaves it there; nothing where it would be in the way."""
        if _in_background(self.terminal) or _is_debugged():
            return ""
        columns, lines = 80, 24
        with contextlib.suppress(OSError):
            size = os.get_terminal_size(self.terminal)
            columns, lines = size.columns or columns, size.lines or lines
        # The last column stays empty: a terminal may go to the next line behind it.
        drawn = [self._line(line, columns - 1) for line in layout(self.known, columns - 1, lines - 2)]
        below = "".join(f"\r\n{line}{ERASE_REST_OF_LINE}" for line in drawn)
        back = f"\x1b[{len(drawn)}A" if drawn else ""
        return f"{CUT_LONG_LINES}\r{ERASE_REST_OF_LINE}{below}{ERASE_BELOW}\r{back}{WRAP_LONG_LINES}"

    def _line(self, line: Line, columns: int) -> str:
        drawn = []
        for text, style in line:
            text = set_cell_size(sayable(text, self.encoding), min(columns, cell_len(text)))
            columns -= cell_len(text)
            drawn.append(Style.parse(style).render(text, color_system=self.colors) if style else text)
        return "".join(drawn)

    def _send(self, text: str) -> None:
        # Not through sys.stdout, which others may record (W&B) or hold a lock of.
        data = text.encode(self.encoding, "replace")
        with contextlib.suppress(OSError):  # the terminal is gone
            while data:
                data = data[os.write(self.terminal, data) :]


class Above:
    """A sys.stdout or sys.stderr whose whole lines are written above the view."""

    def __init__(self, view: LiveView, stream: TextIO) -> None:
        self.view, self.stream = view, stream
        self.held = threading.local()  # the beginning of a line of each thread

    def write(self, text: str) -> int:
        lines, newline, self.held.text = (getattr(self.held, "text", "") + text).rpartition("\n")
        if newline:
            self.view.write(sayable(lines, self.view.encoding) + newline)
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        self.write("".join(lines))

    def flush(self) -> None:
        text, self.held.text = getattr(self.held, "text", ""), ""
        if text:
            self.view.write(sayable(text, self.view.encoding))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


def _in_background(terminal: int) -> bool:
    """Whether the shell has the terminal, and this process runs beside it."""
    try:
        return os.tcgetpgrp(terminal) != os.getpgrp()
    except OSError:  # not the terminal of its session, as under an elastic launcher
        return False


def _is_debugged() -> bool:
    """Whether the main thread waits for what someone types into a debugger."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    while frame is not None and frame.f_globals.get("__name__") not in DEBUGGERS:
        frame = frame.f_back
    return frame is not None
