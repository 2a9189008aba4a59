"""Which rank failed first: a plain function of where the ranks are and what was heard of them."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distloop.ranks.places import Place
from distloop.ranks.verdicts import ABSENT_SECONDS, SEARCH_SECONDS, End, first_failure

NOW, LIMIT = 1000.0, 10.0
LONG_AGO = NOW - LIMIT - 1
CONSEQUENCE, CAUSE = ("consequence", "RuntimeError: gloo", "its trace"), ("failed", "KeyError: 'label'", "trace")


def place(rank: int, step: int = 5, marks: int = 1, line: int = 0, **more: Any) -> Place:
    times = {"heard": NOW, "moved": LONG_AGO} | more
    return Place(rank, f"n{rank}", 100 + rank, step, "forward pass", marks, line_number=line, **times)


def first(places: list[Place], ends: list[End] | None = None, **more: Any) -> End | None:
    arguments: dict[str, Any] = {"connected": range(len(places)), "first_heard": NOW} | more
    return first_failure(places, ends or [], NOW, LIMIT, **arguments)


# ---- an end that was heard -----------------------------------------------------------------------------------


@pytest.mark.parametrize("judge", [0, 1])
@pytest.mark.parametrize("kind", ["failed", "mistake", "known", "gone"])
def test_the_first_end_that_is_no_consequence_is_decided_on_at_once(kind: str, judge: int) -> None:
    places = [place(rank) for rank in range(3)]
    ends = [End(places[1], *CONSEQUENCE), End(places[2], kind, "", ""), End(places[0], *CAUSE)]
    assert first(places, ends, judge=judge) == ends[1]


def test_a_consequence_that_is_heard_before_its_cause_is_not_taken_for_it() -> None:
    places = [place(rank) for rank in range(4)]
    ends = [End(places[rank], *CONSEQUENCE) for rank in range(3)]
    assert first(places, ends, first_heard=NOW - SEARCH_SECONDS) is None
    ends.append(End(places[3], *CAUSE))
    assert first(places, ends, first_heard=NOW - SEARCH_SECONDS) == ends[3]


def test_where_all_have_met_consequences_the_one_that_is_behind_is_named() -> None:
    places = [place(rank, step=8 if rank == 1 else 9, moved=NOW, stack="its stack") for rank in range(3)]
    ends = [End(places[2], *CONSEQUENCE)]
    assert first(places, ends, first_heard=NOW - SEARCH_SECONDS) is None
    found = first(places, ends, first_heard=NOW - SEARCH_SECONDS - 0.1)
    assert found == End(places[1], "behind", "RuntimeError: gloo", "its stack")


def test_where_all_have_met_consequences_at_the_same_place_the_first_that_was_heard_is_named() -> None:
    places = [place(rank) for rank in range(3)]
    ends = [End(places[2], *CONSEQUENCE), End(places[0], *CONSEQUENCE)]
    assert first(places, ends, first_heard=LONG_AGO) == ends[0]


def test_only_rank_0_looks_for_who_is_behind() -> None:
    places = [place(0, 4), place(1)]
    assert first(places, [End(places[1], *CONSEQUENCE)], judge=1, connected=[0], first_heard=LONG_AGO) is None


# ---- ranks that are missing, or not heard of -----------------------------------------------------------------


def test_a_rank_that_never_connects_is_named() -> None:
    places = [place(0), place(1), Place(2), Place(3)]
    assert first(places, connected=[1], listening_since=NOW - ABSENT_SECONDS) is None
    found = first(places, connected=[1], listening_since=NOW - ABSENT_SECONDS - 0.1)
    assert found == End(places[2], "absent", "", "")


@pytest.mark.parametrize(("judge", "culprit"), [(0, 1), (0, 2), (1, 0)])
def test_a_rank_that_is_not_heard_of_for_longer_than_the_limit_is_named(judge: int, culprit: int) -> None:
    places = [place(rank, heard=LONG_AGO if rank == culprit else NOW) for rank in range(3)]
    connected = [1, 2] if judge == 0 else [0]
    found = first(places, judge=judge, connected=connected, limit_name="--check-seconds")
    assert found == End(places[culprit], "silent", "10 s (--check-seconds)", "")


@pytest.mark.parametrize(("silent", "is_stopping", "found"), [(50, True, False), (70, True, True), (70, False, False)])
def test_once_a_stop_is_asked_for_nobody_may_be_silent_for_long(silent: float, is_stopping: bool, found: bool) -> None:
    places = [place(0), place(1, heard=NOW - silent)]
    more: dict[str, Any] = {"connected": [1], "is_stopping": is_stopping}
    end = first_failure(places, [], NOW, 600.0, **more)
    assert end == (End(places[1], "silent", "60 s, while the run is asked to stop", "") if found else None)


def test_a_rank_that_left_on_purpose_is_not_missed() -> None:
    places = [place(0), place(1, step=3, heard=LONG_AGO, left="in order")]
    assert first(places) is None
    assert first(places, [End(places[0], *CONSEQUENCE)], first_heard=LONG_AGO) == End(places[0], *CONSEQUENCE)


# ---- ranks that stand still ----------------------------------------------------------------------------------


@pytest.mark.parametrize("culprit", [0, 2])
@pytest.mark.parametrize("behind", [{"step": 4}, {"marks": 0}, {"line": 7}])
def test_a_rank_that_keeps_the_others_waiting_for_longer_than_the_limit_is_named(
    culprit: int, behind: dict[str, int]
) -> None:
    ahead = {"step": 5, "marks": 1, "line": 8}
    places = [place(rank, **(ahead | behind if rank == culprit else ahead), stack="its stack") for rank in range(3)]
    assert first(places) == End(places[culprit], "standing", "10 s (ddp.timeout_seconds)", "its stack")


@pytest.mark.parametrize("mover", [0, 1])
def test_a_rank_that_moves_keeps_nobody_waiting_nor_waits(mover: int) -> None:
    places = [place(rank, step=4 + rank, moved=NOW - LIMIT if rank == mover else LONG_AGO) for rank in range(2)]
    assert first(places) is None


def test_lines_that_cannot_be_compared_are_the_same_place() -> None:
    assert first([place(0, line=3), place(1, line=0)]) is None
    assert first([place(0, line=0), place(1, line=3)]) is None


def test_another_rank_judges_nobody_but_rank_0() -> None:
    assert first([place(0, 4), place(1, 5)], judge=1, connected=[0]) is None


# ---- properties ----------------------------------------------------------------------------------------------

AGES = st.floats(0, 3 * LIMIT)


@st.composite
def several(draw: st.DrawFn, oldest: float = 3 * LIMIT) -> list[Place]:
    ages, small = st.floats(0, oldest), st.integers(0, 3)
    return [
        place(
            rank,
            *(draw(small), draw(small), draw(small)),
            heard=NOW - draw(ages),
            moved=NOW - draw(ages),
            left=draw(st.sampled_from([None, None, "in order"])),
        )
        for rank in range(draw(st.integers(2, 5)))
    ]


def consequences(places: list[Place]) -> list[End]:
    return [End(one, *CONSEQUENCE) for one in places if not one.left]


@given(several(), st.booleans(), AGES)
def test_the_one_that_is_judged_is_never_ahead_of_another(places: list[Place], broken: bool, age: float) -> None:
    found = first(places, consequences(places) if broken else [], first_heard=NOW - age)
    if found is not None and found.kind in ("standing", "behind"):
        others = [one for one in places if not one.left or one.rank == 0]
        assert not any(other.is_behind(found.place) for other in others if found.kind == "standing" or not other.left)
        assert any(found.place.is_behind(other) for other in others)


@given(several(), st.booleans())
def test_ranks_that_are_all_at_the_same_place_are_at_work(places: list[Place], broken: bool) -> None:
    for one in places:
        one.step, one.marks, one.line_number, one.heard = 4, 2, 7, NOW
    found = first(places, consequences(places) if broken else [], first_heard=LONG_AGO)
    assert found is None or found.kind == "consequence"


@given(several(oldest=LIMIT), st.booleans(), st.floats(0, SEARCH_SECONDS), st.floats(0, ABSENT_SECONDS))
def test_nothing_is_decided_before_a_limit(places: list[Place], broken: bool, search: float, absent: float) -> None:
    ends = consequences(places) if broken else []
    assert first(places, ends, first_heard=NOW - search, listening_since=NOW - absent) is None


@given(several())
def test_being_behind_is_an_order(places: list[Place]) -> None:
    for one in places:
        assert not one.is_behind(one)
        for other in places:
            assert not (one.is_behind(other) and other.is_behind(one))
            for third in places:
                assert one.is_behind(third) or not (one.is_behind(other) and other.is_behind(third))
