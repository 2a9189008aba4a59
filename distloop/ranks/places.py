"""Where each rank is: what it says of itself, and what others know of it."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any


class Position:
    """Where this rank is. The loop writes it, which costs two assignments; a thread reads it."""

    def __init__(self) -> None:
        self.step = 0  # the one that is being done, from 1; 0: none yet
        self.phase = "starting"
        self.code: Any = None
        self.marks = 0  # phases entered since the step began: the same number on all ranks

    def enter(self, phase: str) -> None:
        """The rank begins with `phase`, such as "forward pass"."""
        self.phase = phase
        self.marks += 1

    def start_step(self, step: int) -> None:
        """The rank begins with this step, counted from 1."""
        self.step, self.marks = step, 0


@dataclass
class Place:
    """What is known of a rank."""

    rank: int
    node: str = "an unknown machine"
    pid: int = 0
    step: int = 0
    phase: str = "starting"
    marks: int = 0
    stack: str = ""  # where its main thread is, once it has not moved for long
    heard: float = field(default_factory=time.monotonic)
    moved: float = field(default_factory=time.monotonic)
    left: str | None = None  # in order, and why

    def update(self, message: dict[str, Any]) -> None:
        self.heard = time.monotonic()
        if (message["step"], message["marks"]) != (self.step, self.marks):
            self.moved = self.heard
        self.step, self.marks, self.phase = message["step"], message["marks"], message["phase"]
        self.stack = message.get("stack", "")

    def __str__(self) -> str:
        return f"rank {self.rank} on {self.node}"

    @property
    def where(self) -> str:
        return f"in step {self.step}, {self.phase}" if self.step else f"before the first step, {self.phase}"
