"""The cases of generated user code: the same ones each time, and of all kinds that they are meant to have."""

from __future__ import annotations

from collections import Counter
from typing import get_args

import pytest

from tests.multiprocess.test_random_code import ALL, FEW
from tests.tools.habits import case_of
from tests.tools.habits.draft import COMBINATIONS, WRONG, Outcome

CASES = [case_of(number) for number in range(ALL)]


def test_a_case_is_a_function_of_its_number() -> None:
    assert [str(case_of(case.number)) for case in CASES[:FEW]] == [str(case) for case in CASES[:FEW]]
    assert len({case.source for case in CASES}) == ALL


@pytest.mark.parametrize("cases", [CASES[:FEW], CASES], ids=["few", "all"])
def test_the_cases_have_all_numbers_of_ranks_and_workers_stopped_or_not(cases: list) -> None:
    found = {(case.world_size, case.workers, bool(case.stop), case.accumulation) for case in cases}
    assert len(found) == len(COMBINATIONS)


def test_most_cases_have_to_train() -> None:
    outcomes = Counter(case.outcome for case in CASES)
    assert set(outcomes) == set(get_args(Outcome))
    assert outcomes["equal"] > ALL / 2
    assert outcomes["refused"] > ALL / 5


def test_each_habit_that_is_not_right_is_met_on_one_rank_and_on_two() -> None:
    met, of_tasks = set(), set()
    for case in CASES[2::3]:
        habit = WRONG[case.number // 3 % len(WRONG)]
        met.add((habit, case.world_size))
        if habit == "task parameters":  # those of a task that is a module are trained
            of_tasks.add(case.outcome)
            continue
        # One rank trains although a parameter is not used.
        assert case.outcome != "equal" or (habit, case.world_size) == ("unused", 1), case
    assert of_tasks == {"equal", "refused"}
    assert len(met) == 2 * len(WRONG)
