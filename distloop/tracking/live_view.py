"""The live view: a few lines at the bottom of a terminal, drawn twice a second.

The terminal scrolls only the lines above the view, as package managers have it. So nothing else that writes to it
(libraries, other ranks, loader workers, launchers, a debugger, the echo of ^C) tears the view. rich.Live draws at the
cursor instead, and catches only what goes through this process's sys.stdout.
"""

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

from distloop.run.metrics import own_values
from distloop.tracking.progress import Progress, metrics_of
from distloop.tracking.wording import UNKNOWN, duration, encodable, number_with_zeros

REDRAW_SECONDS = 0.5
LINES_ABOVE = 4  # left for the lines that scroll, however low the terminal is
# Widths. A text that changes between two drawings has a fixed width, so that its neighbours do not move.
LABEL, VALUE, PERCENT, LEFT, SHORTEST_BAR, LONGEST_BAR, GAP = 8, 9, 5, 13, 8, 80, 3

# Commands of the VT100, which all terminals understand.
KEEP_CURSOR, BACK_TO_CURSOR, DOWN = "\x1b7", "\x1b8", "\x1bD"  # DOWN scrolls at the bottom, and keeps the column
ERASE_BELOW, ERASE_REST_OF_LINE, PLAIN = "\x1b[J", "\x1b[K", "\x1b[0m"
CUT_LONG_LINES, WRAP_LONG_LINES = "\x1b[?7l", "\x1b[?7h"
SCROLL_ALL = f"{KEEP_CURSOR}\x1b[r{BACK_TO_CURSOR}"
GIVE_BACK = SCROLL_ALL + ERASE_BELOW  # the view is below the cursor

Pieces = list[tuple[str, str]]  # a line of the view: texts, each with its style in rich's words
Fields = list[tuple[str, str]]  # names, each with its value


def layout(progress: Progress, columns: int) -> list[Pieces]:
    """The lines of the view, the most important first, each at most `columns` wide."""
    memory, train = progress.memory(), progress.train
    training = [
        ("running loss", _value(train.get("running_loss"))),
        ("lr", _value(train.get("lr"))),
        ("gradient norm", _value(train.get("gradient_norm"))),
        ("samples/s", _value(train.get("samples_per_second"))),
        ("data wait", (progress.data_wait() or UNKNOWN).ljust(PERCENT)),
        ("memory", (UNKNOWN if memory is None else f"{memory:.3g} GiB").ljust(VALUE)),
    ]
    own = [(name, _value(value)) for name, value in own_values(train).items()]
    skipped, saved_step = train.get("skipped_steps"), progress.saved_step()
    attempt = [
        ("", str(progress.attempt)),
        ("saved", _step(saved_step or None, progress)),
        *([("", progress.url)] if progress.url else []),
        *([("skipped steps", str(skipped))] if skipped else []),
        ("", progress.name),
    ]
    first_line, rest = _line_of_fields("train", training, columns)
    return [
        *_bars(progress, columns),
        first_line,
        *(_line_of_fields("", fields, columns)[0] for fields in (rest, own) if fields),
        *_validations(progress, columns),
        _line_of_fields("attempt", attempt, columns)[0],
    ]


def _bars(progress: Progress, columns: int) -> list[Pieces]:
    """The progress of the run, and of the current epoch."""
    step, total, left = progress.step, progress.total_steps, progress.seconds_left()
    epochs, epoch = progress.epochs, max(0, step - 1) // progress.steps_per_epoch
    step_of_epoch = step - epoch * progress.steps_per_epoch
    steps_of_epoch = max(1, min(progress.steps_per_epoch, total - epoch * progress.steps_per_epoch))
    count_width = max(len(f"step {total}/{total}"), len(f"epoch {epochs}/{epochs}"))
    room = columns - LABEL - PERCENT - GAP - LEFT
    if has_counts := room >= GAP + count_width:
        room -= GAP + count_width
    width = min(room - 1, LONGEST_BAR) if room > SHORTEST_BAR else 0
    lines: list[Pieces] = []
    for label, share, count, time_left in (
        ("run", step / total, f"step {step}/{total}", UNKNOWN if left is None else f"{duration(left)} left"),
        ("epoch", step_of_epoch / steps_of_epoch, f"epoch {epoch + 1}/{epochs}", ""),
    ):
        full = int(share * width)
        bar = [("━" * full, "cyan"), ("─" * (width - full) + " " * bool(width), "dim")]
        counts = [(" " * GAP + count.ljust(count_width), "")] if has_counts else []
        percent = (f"{int(100 * share)} %".rjust(PERCENT), "bold")
        lines.append([(label.ljust(LABEL), "dim"), *bar, percent, *counts, (" " * GAP + time_left, "")])
    return lines


def _validations(progress: Progress, columns: int) -> list[Pieces]:
    """The latest validation and, below it, the best one, with the same metrics in the same order."""
    rows = {"latest": progress.latest or {}, "best": progress.best or {}}
    metrics = {label: metrics_of(row) for label, row in rows.items()}
    best_metric = progress.best_rule[0]
    names = [best_metric, *(name for name in metrics["latest"] or metrics["best"] if name != best_metric)]
    lines = []
    for label, row in rows.items():
        values = [(name, _value(metrics[label].get(name))) for name in names] if row else []
        fields = [("", _step(row.get("step"), progress)), *values]
        lines.append(_line_of_fields(label, fields, columns, best_metric if label == "best" else "")[0])
    return lines


def _line_of_fields(label: str, fields: Fields, columns: int, highlight: str = "") -> tuple[Pieces, Fields]:
    """A line of the fields for which it has room, and the other fields. `highlight`: the field to show in colour."""
    line, width, others = [(label.ljust(LABEL), "dim")], LABEL, []
    for name, value in fields:
        gap = GAP if width > LABEL else 0
        width_of_field = gap + cell_len(f"{name} {value}" if name else value)
        if width + width_of_field > columns:
            others.append((name, value))
        else:
            line.append((" " * gap + (f"{name} " if name else ""), "dim"))
            line.append((value, "bold green" if name and name == highlight else ""))
            width += width_of_field
    return line, others


def _value(value: Any) -> str:
    return number_with_zeros(value).ljust(VALUE)


def _step(step: int | None, progress: Progress) -> str:
    """The step, as wide as the last step will be."""
    return (UNKNOWN if step is None else f"step {step}").ljust(len(f"step {progress.total_steps}"))


class LiveView:
    """Draws the progress at the bottom of standard output, which must be a terminal, until close()."""

    def __init__(self, progress: Progress) -> None:
        self.progress = progress
        self.terminal, self.encoding = sys.stdout.fileno(), sys.stdout.encoding
        console = Console(file=sys.stdout)
        self.colors = ColorSystem.STANDARD if console.color_system and not console.no_color else None
        self.place: tuple[int, int, int] | None = None  # columns and lines of the terminal, lines of the view
        self.lock = threading.Lock()
        self.closing = threading.Event()
        self.terminal_guard: subprocess.Popen[bytes] | None = None
        # A process that gives the terminal back if this one is killed or crashes: its standard input ends then.
        command = ["sh", "-c", 'read -r _; printf %s "$1"', "sh", GIVE_BACK]
        with contextlib.suppress(OSError):
            self.terminal_guard = subprocess.Popen(
                command, stdin=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True
            )
        threading.Thread(target=self._run, name="distloop-live-view", daemon=True).start()

    def close(self) -> None:
        """Remove the view. The cursor stays where it is."""
        self.closing.set()
        with self.lock:
            self._give_back()
            if self.terminal_guard:
                self.terminal_guard.kill()
                self.terminal_guard.communicate()
                self.terminal_guard = None

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
        with contextlib.suppress(OSError):  # not the terminal of this session, as under an elastic launcher
            if os.tcgetpgrp(self.terminal) != os.getpgrp():  # the shell has put this process into the background
                self._give_back()
                return
        columns, height = 80, 24
        with contextlib.suppress(OSError):
            size = os.get_terminal_size(self.terminal)
            columns, height = size.columns or columns, size.lines or height
        # The last column stays empty: some terminals wrap to the next line after a character in it.
        lines = layout(self.progress, columns - 1)[: max(0, height - LINES_ABOVE)]
        place, first_row = (columns, height, len(lines)), height - len(lines) + 1
        # A terminal that changes its size moves its cursor with its text: the view is still below the cursor.
        text = GIVE_BACK if self.place and self.place != place else SCROLL_ALL
        self.place = place
        text += DOWN * len(lines) + f"\x1b[{len(lines)}A" * bool(lines)  # make room if the cursor is near the bottom
        text += f"{KEEP_CURSOR}\x1b[1;{first_row - 1}r{BACK_TO_CURSOR}{KEEP_CURSOR}{PLAIN}{CUT_LONG_LINES}"
        for row, line in enumerate(lines, start=first_row):
            text += f"\x1b[{row}H{self._render(line, columns - 1)}{ERASE_REST_OF_LINE}"
        self._write(text + WRAP_LONG_LINES + BACK_TO_CURSOR)

    def _give_back(self) -> None:
        if self.place:
            self._write(GIVE_BACK)
            self.place = None

    def _render(self, line: Pieces, columns: int) -> str:
        """The line with its colours, cut to so many columns."""
        rendered = []
        for text, style in line:
            text = encodable(text, self.encoding)
            text = set_cell_size(text, min(columns, cell_len(text)))
            columns -= cell_len(text)
            rendered.append(Style.parse(style).render(text, color_system=self.colors) if style else text)
        return "".join(rendered)

    def _write(self, text: str) -> None:
        # In one call, so that no other output comes in between. Not to sys.stdout, which others may replace.
        data = text.encode(self.encoding, "replace")
        with contextlib.suppress(OSError):  # the terminal is gone
            while data:
                data = data[os.write(self.terminal, data) :]
