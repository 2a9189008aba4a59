"""A case, and the draft of one: what all parts of the grammar share."""

from __future__ import annotations

import itertools
import random
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

import yaml

Choice = TypeVar("Choice")

# What has to become of a case. "either": refused, or equal to the training by hand. "not repeatable": one rank does not
# notice a generator that the user's code makes for itself without a seed (docs/own-code.md), and trains to the end.
Outcome = Literal["equal", "refused", "refused when continued", "not repeatable", "either"]

# Ranks, loader workers, how the first start is stopped, micro-batches of a rank in a step: one after the other.
COMBINATIONS = list(itertools.product((1, 2), (0, 2), (None, "SIGTERM"), (1, 2)))
DRAWS = {
    "torch": ["float(torch.rand(()))", "float(torch.randperm(100)[0]) / 100"],
    "numpy": ["np.random.rand()", "float(np.random.beta(0.4, 0.4))"],
    "random": ["random.random()", "random.betavariate(2, 3)"],
}
# Habits that are not right. Every third case has one, in this order; each meets all combinations in turn.
WRONG = (
    "mean",
    "split",
    "summary name",
    "collate",
    "mean with weight 1",
    "sample",
    "mean of tokens",
    "mean alone",
    "unused",
    "metric name",
    "init",
    "class weights",
    "dataclass",
    "task parameters",
    "half",
)
OWN_DRAWS = ["np.random.default_rng().random()", "random.Random().random()", "os.urandom(1)[0] / 255"]


@dataclass
class Case:
    """A case: its code, its config, how it is started, what has to become of it."""

    number: int
    world_size: int
    workers: int
    stop: str | None  # the signal that one rank gets in the first start
    accumulation: int
    stop_at: int = 1  # the update after which it gets the signal
    outcome: Outcome = "equal"
    says: str = ""  # a regular expression for what the message of a refusal has to name
    habits: list[str] = field(default_factory=list)
    source: str = ""
    settings: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        start = f"{self.world_size} ranks, {self.workers} workers, {self.accumulation} micro-batches a step and rank"
        stop = f", {self.stop} after update {self.stop_at}, continued" if self.stop else ""
        expected = f"{self.outcome}{f' (says {self.says!r})' if self.says else ''}"
        return (
            f"# case {self.number}: {start}{stop}\n# habits: {'; '.join(self.habits)}\n# expected: {expected}\n"
            f"# ---- mine.py\n{self.source}\n# ---- run.yaml\n{yaml.safe_dump(self.settings)}"
        )


class Draft:
    """A case that is being made. Its parts note which habits they have, and what these mean for the outcome."""

    def __init__(self, number: int) -> None:
        self.random = random.Random(number)
        self.case = Case(number, *COMBINATIONS[number % len(COMBINATIONS)], stop_at=1 + number % 3)
        if self.case.stop and self.case.world_size == 1 and self.maybe(0.3):
            self.case.stop, self.case.stop_at = "SIGKILL", 4
        self.wrong_habit = WRONG[number // 3 % len(WRONG)] if number % 3 == 2 else ""
        self.dtype = "float32" if self.maybe(0.25) else "float64"
        self.problem = self.one_of("value", "class", "class", "tokens", "image")
        if self.wrong_habit:  # where all of them are possible but one
            self.problem = "tokens" if self.wrong_habit == "mean of tokens" else self.one_of("value", "class")

    def one_of(self, *choices: Choice) -> Choice:
        return self.random.choice(choices)

    def maybe(self, chance: float) -> bool:
        return self.random.random() < chance

    def has(self, habit: str) -> None:
        self.case.habits.append(habit)

    def expect(self, outcome: Outcome, habit: str, says: str = "") -> None:
        """Note the one habit that decides what has to become of the case."""
        self.has(habit.upper())
        self.case.outcome, self.case.says = outcome, says

    def either(self, habit: str) -> bool:
        """Whether the case can have a habit that may be refused, and need not be; notes it."""
        if self.case.outcome != "equal" or self.wrong_habit:
            return False
        self.expect("either", habit)
        return True

    def unseeded(self, habit: str, says: str, differs_when_continued: bool) -> None:
        """Note a generator without a seed: ranks differ, and are refused; one rank is not, unless it is continued with
        data that differ."""
        if self.case.world_size > 1:
            self.expect("refused", habit, says)
        elif self.case.stop and differs_when_continued:
            self.case.stop, self.case.stop_at = "SIGTERM", 1
            self.expect("refused when continued", habit, "differ|other")
        else:
            self.expect("not repeatable", habit)

    def drawn(self, place: str) -> str:
        """An expression for a number from 0 to 1 that a global generator gives."""
        kind = self.one_of(*DRAWS)
        self.has(f"{place} draws from {kind}")
        return self.one_of(*DRAWS[kind])
