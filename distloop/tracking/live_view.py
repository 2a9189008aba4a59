"""The live view: some lines at the bottom of a terminal, drawn anew twice a second.

The terminal is told to scroll only what is above them, as package managers do. So whoever else writes to it (libraries,
other ranks, loader workers, launchers, a debugger, the terminal its ^C) needs to know nothing of the view, and no line
of theirs is torn. rich.Live, which draws where the cursor is, takes over this process's sys.stdout and no other.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading
from typing import Any

from rich.cells import cell_len, set_cell_size
from rich.color import ColorSystem
from rich.console import Console
from rich.style import Style

from distloop.tracking.progress import Known, metrics_of
from distloop.tracking.wording import UNKNOWN, duration, encodable, number_with_zeros

REDRAW_SECONDS = 0.5
LINES_ABOVE = 4  # are left for what scrolls, however low the terminal
# Columns. What changes from one drawing to the next has a width of its own, so that nothing beside it moves.
LABEL, VALUE, PERCENT, LEFT, SHORTEST_BAR, LONGEST_BAR, GAP = 8, 9, 5, 13, 8, 80, 3

# Words of the VT100, which all terminals understand.
KEEP_CURSOR, BACK_TO_CURSOR, DOWN = "\x1b7", "\x1b8", "\x1bD"  # DOWN scrolls at the bottom, and keeps the column
ERASE_BELOW, ERASE_REST_OF_LINE, PLAIN = "\x1b[J", "\x1b[K", "\x1b[0m"
CUT_LONG_LINES, WRAP_LONG_LINES = "\x1b[?7l", "\x1b[?7h"
SCROLL_ALL = f"{KEEP_CURSOR}\x1b[r{BACK_TO_CURSOR}"
GIVE_BACK = SCROLL_ALL + ERASE_BELOW  # the view is below the cursor

Piece = tuple[str, str]  # text, rich's style
Line = list[Piece]


# ---- what is shown -------------------------------------------------------------------------------------------


def layout(known: Known, columns: int) -> list[Line]:
    """What is known, in lines that are not longer than so many columns, the most important ones first."""
    memory = known.memory()
    training = [
        ("running loss", _steady(known.train.get("running_loss"))),
        ("lr", _steady(known.train.get("lr"))),
        ("gradient norm", _steady(known.train.get("gradient_norm"))),
        ("samples/s", _steady(known.train.get("samples_per_second"))),
        ("data wait", (known.data_wait() or UNKNOWN).ljust(PERCENT)),
        ("memory", (UNKNOWN if memory is None else f"{memory:.3g} GiB").ljust(VALUE)),
    ]
    skipped = known.train.get("skipped_steps")
    saved = known.saved()
    about = [
        ("", str(known.attempt)),
        ("saved", (f"step {saved}" if saved else UNKNOWN).ljust(len(f"step {known.total_steps}"))),
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
    ]


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
            *((n, _steady(values[label].get(n))) for n in names),
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
        line += [
            (" " * gap + (f"{name} " if name else ""), "dim"),
            (value, "bold green" if name and name == marked else ""),
        ]
        used += width
    return line, others


def _steady(value: Any) -> str:
    return number_with_zeros(value).ljust(VALUE)


# ---- how it is drawn -----------------------------------------------------------------------------------------


class LiveView:
    """Draws what is known at the bottom of standard output, which is a terminal, until it is closed."""

    def __init__(self, known: Known) -> None:
        self.known = known
        self.terminal, self.encoding = sys.stdout.fileno(), sys.stdout.encoding
        console = Console(file=sys.stdout)
        self.colors = ColorSystem.STANDARD if console.color_system and not console.no_color else None
        self.place: tuple[int, int, int] | None = None  # columns and lines of the terminal, lines of the view
        self.lock = threading.Lock()
        self.closing = threading.Event()
        self.heir = _heir()
        threading.Thread(target=self._run, name="distloop-live-view", daemon=True).start()

    def close(self) -> None:
        """Take the view away. The cursor stays where it is."""
        self.closing.set()
        with self.lock:
            self._give_back()
            if self.heir:
                self.heir.kill()
                self.heir.communicate()
                self.heir = None

    def _run(self) -> None:
        try:
            while not self.closing.is_set():
                with self.lock:
                    if not self.closing.is_set():
                        self._draw()
                self.closing.wait(REDRAW_SECONDS)
        except Exception:
            self.close()
            raise

    def _draw(self) -> None:
        if _in_background(self.terminal):
            self._give_back()
            return
        columns, height = 80, 24
        with contextlib.suppress(OSError):
            size = os.get_terminal_size(self.terminal)
            columns, height = size.columns or columns, size.lines or height
        # The last column stays empty: a terminal may go to the next line behind it.
        lines = layout(self.known, columns - 1)[: max(0, height - LINES_ABOVE)]
        place, first = (columns, height, len(lines)), height - len(lines) + 1
        # A terminal that changes its size moves what it shows, but the cursor with it: the view is still below that.
        text = GIVE_BACK if self.place and self.place != place else SCROLL_ALL
        self.place = place
        text += DOWN * len(lines) + f"\x1b[{len(lines)}A" * bool(lines)  # room, where the cursor is too far down
        text += f"{KEEP_CURSOR}\x1b[1;{first - 1}r{BACK_TO_CURSOR}"
        text += KEEP_CURSOR + PLAIN + CUT_LONG_LINES
        for number_of_line, line in enumerate(lines, start=first):
            text += f"\x1b[{number_of_line}H{self._line(line, columns - 1)}{ERASE_REST_OF_LINE}"
        self._send(text + WRAP_LONG_LINES + BACK_TO_CURSOR)

    def _give_back(self) -> None:
        if self.place:
            self._send(GIVE_BACK)
            self.place = None

    def _line(self, line: Line, columns: int) -> str:
        drawn = []
        for text, style in line:
            text = encodable(text, self.encoding)
            text = set_cell_size(text, min(columns, cell_len(text)))
            columns -= cell_len(text)
            drawn.append(Style.parse(style).render(text, color_system=self.colors) if style else text)
        return "".join(drawn)

    def _send(self, text: str) -> None:
        # At once, so that nothing of others gets in between, and not through sys.stdout, which others may record.
        data = text.encode(self.encoding, "replace")
        with contextlib.suppress(OSError):  # the terminal is gone
            while data:
                data = data[os.write(self.terminal, data) :]


def _heir() -> subprocess.Popen[bytes] | None:
    """A process that gives the terminal back when this one is killed, or crashes: its standard input ends then."""
    with contextlib.suppress(OSError):
        command = ["sh", "-c", 'read -r _; printf %s "$1"', "sh", GIVE_BACK]
        return subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True)
    return None


def _in_background(terminal: int) -> bool:
    """Whether the shell has the terminal, and this process runs beside it."""
    try:
        return os.tcgetpgrp(terminal) != os.getpgrp()
    except OSError:  # not the terminal of its session, as under an elastic launcher
        return False
