"""Where each rank is: its own position, and what the others know of it."""

from __future__ import annotations

import sys
import threading
import time
import traceback
import types
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from distloop.config.secrets import clean_message
from distloop.ranks.loop_lines import LoopLine, LoopLines


class Position:
    """Where this rank is. The main thread writes it, which costs two assignments; the roll call's thread reads it."""

    def __init__(self) -> None:
        self.step = 0  # the one that is being done, from 1; 0: none yet
        self.phase = "starting"
        self.marks = 0  # phases entered since the step began: the same number on all ranks
        self.samples: Callable[[], str] | None = None  # those that this rank works on, in words, for notes on errors
        self.code: types.CodeType | None = None  # of the function that holds the loop
        self.compares = True  # its line with those of other ranks
        self._lines: LoopLines | None = None
        self._failed_at = LoopLine()

    def enter(self, phase: str) -> None:
        """Begin a phase, such as "forward pass"."""
        self.phase = phase
        self.marks += 1

    def start_step(self, step: int) -> None:
        """Begin a step, counted from 1."""
        self.step, self.marks = step, 0

    def fail(self, error: BaseException) -> None:
        """Keep the line that raised `error` as this rank's line: the error may have left the loop's function."""
        if (lines := self._lines_of_code()) is not None and not self._failed_at.text:
            self._failed_at = lines.of_error(error)

    def line(self) -> LoopLine:
        """The line of the loop's function at which this rank is, or has failed. Any thread may ask."""
        lines = self._lines_of_code()
        return lines.of_main_thread() if lines is not None and not self._failed_at.text else self._failed_at

    def message(self) -> dict[str, Any]:
        """What Place.update() takes."""
        text, number = self.line()
        return {"step": self.step, "marks": self.marks, "phase": self.phase, "line": text, "line_number": number}

    def _lines_of_code(self) -> LoopLines | None:
        if self.code is not None and (self._lines is None or self._lines.code is not self.code):
            self._lines = LoopLines(self.code, self.compares)
        return self._lines


@dataclass
class Place:
    """What is known of a rank."""

    rank: int
    node: str = "an unknown machine"
    pid: int = 0
    step: int = 0
    phase: str = "starting"
    marks: int = 0
    line: str = ""  # of the loop, such as "train.py:101 outputs = task.forward(task_model, micro.batch)"
    line_number: int = 0  # of its statement; 0: not to be compared (see loop_lines.py)
    stack: str = ""  # of its main thread, once it has not moved for long
    heard: float = field(default_factory=time.monotonic)
    moved: float = field(default_factory=time.monotonic)
    left: str | None = None  # why it left on purpose

    def update(self, message: dict[str, Any]) -> None:
        """Note a message of the rank: Position.message() or Place.message()."""
        self.heard = time.monotonic()
        before = self.step, self.marks, self.line
        self.step, self.marks, self.phase = message["step"], message["marks"], message["phase"]
        self.line, self.line_number = message.get("line", ""), message.get("line_number", 0)
        self.stack = message.get("stack", "")
        if before != (self.step, self.marks, self.line):
            self.moved = self.heard

    def message(self) -> dict[str, Any]:
        """What update() takes."""
        return {key: getattr(self, key) for key in ("step", "marks", "phase", "line", "line_number", "stack")}

    def __str__(self) -> str:
        return f"rank {self.rank} on {self.node}"

    @property
    def where(self) -> str:
        """Such as "in step 5, forward pass (train.py:101 outputs = task.forward(task_model, micro.batch))"."""
        where = f"in step {self.step}, {self.phase}" if self.step else f"before the first step, {self.phase}"
        return f"{where} ({self.line})" if self.line else where

    def is_behind(self, other: Place) -> bool:
        """True if `other` is further on: by step, then mark, then line if both lines may be compared."""
        if (self.step, self.marks) != (other.step, other.marks):
            return (self.step, self.marks) < (other.step, other.marks)
        return 0 < self.line_number < other.line_number


def main_thread_stack() -> str:
    """Where the main thread is, as in a traceback, without secrets. Any thread may ask."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    return clean_message("".join(traceback.format_stack(frame))) if frame is not None else ""
