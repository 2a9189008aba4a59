"""User code of many habits, generated: data sets, collates, models and tasks, with what has to become of each.

    python -m tests.tools.habits 17    # prints case 17: its code, its config, and what is expected of it

A case is a function of its number. It combines habits that are right, with which a run has to equal the same training
by hand (tests/tools/by_hand.py), with at most one that is not, which has to be refused before the first step.
"""

from __future__ import annotations

from tests.tools.habits.draft import Case
from tests.tools.habits.texts import IMPORTS
from tests.tools.habits.training import TrainingHabits


def case_of(number: int) -> Case:
    """The case of this number: always the same."""
    draft = TrainingHabits(number)
    parts = [IMPORTS, draft.data(), draft.model(), draft.task()]
    draft.settings()
    draft.case.source = "\n\n\n".join(part.rstrip() for part in parts if part) + "\n"
    return draft.case
