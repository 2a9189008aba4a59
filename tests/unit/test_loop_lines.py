"""The line of the loop at which a rank is, and which lines may be compared between ranks."""

from __future__ import annotations

import contextlib
import textwrap
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from distloop.ranks import loop_lines
from distloop.ranks.loop_lines import LoopLine, LoopLines, comparable_lines
from distloop.ranks.places import Position


def comparable(source: str) -> dict[int, int]:
    return comparable_lines(textwrap.dedent(source).lstrip(), 1)


# ---- which lines may be compared -----------------------------------------------------------------------------


def test_straight_lines_are_compared() -> None:
    source = """
        def train():
            a = 1
            if a:
                b = 2
            else:
                b = 3
            c = 4
        """
    assert comparable(source) == {2: 2, 3: 3, 4: 4, 5: 3, 6: 6, 7: 7}


def test_a_statement_of_several_lines_is_one_place() -> None:
    # Python evaluates the arguments in lines 3 and 4, and makes the call itself in line 2 again.
    source = """
        def train():
            log(
                first(),
                second(),
            )
            after()
        """
    assert comparable(source) == {2: 2, 3: 2, 4: 2, 5: 2, 6: 6}


@pytest.mark.parametrize("head", ["for a in b:", "while a:", "for a in b.of_steps(1):", "for a in of_step(1):"])
def test_lines_of_an_inner_loop_are_not_compared(head: str) -> None:
    source = f"""
        def train():
            while step:
                for micro in batches.of_step(step):
                    a = 1
                {head}
                    b = 2
                    c = 3
                else:
                    d = 4
                e = 5
        """
    assert comparable(source) == {4: 4, 10: 10}


def test_the_outermost_loop_is_compared_from_its_first_of_step_on() -> None:
    # Before that, the step that is counted is still the one before: line 4 comes after line 9 then.
    source = """
        def train():
            before = 1
            while step:
                lr = 2
                start_step()
                for micro in batches.of_step(step):
                    loss = 3
                    backward = 4
                update = 5
            after = 6
        """
    assert comparable(source) == {2: 2, 7: 7, 8: 8, 9: 9, 10: 10}


def test_a_loop_that_makes_no_marks_is_not_compared() -> None:
    source = """
        def train():
            while step:
                loss = 1
                update = 2
            after = 3
        """
    assert comparable(source) == {5: 5}


def test_an_inner_loop_within_of_step_is_not_compared_nor_one_around_it() -> None:
    source = """
        def train():
            for setup in parts:
                a = 1
            while step:
                for micro in batches.of_step(step):
                    b = 2
                    for part in micro:
                        c = 3
                for model in models:
                    for micro in batches.of_step(step):
                        d = 4
                e = 5
        """
    assert comparable(source) == {6: 6, 12: 12}


def test_the_head_of_a_with_is_not_compared_since_the_block_is_left_there() -> None:
    source = """
        def train():
            with one, (
                two
            ):
                a = 1
            b = 2
        """
    assert comparable(source) == {5: 5, 6: 6}


def test_the_function_is_found_by_its_first_line_and_by_that_of_a_decorator() -> None:
    source = "import os\n\n\ndef other():\n    a = 1\n\n\n@wraps\n@twice\ndef train():\n    b = 2\n"
    assert comparable_lines(source, 4) == {5: 5}
    assert comparable_lines(source, 8) == {11: 11}
    assert comparable_lines(source, 10) == {}


@pytest.mark.parametrize("source", ["", "def train(:\n", "\0", "x = 1\n"])
def test_no_lines_are_compared_without_a_source(source: str) -> None:
    assert comparable_lines(source, 1) == {}


# ---- where the main thread is --------------------------------------------------------------------------------


def from_a_thread(lines: LoopLines | Position, password: str = "") -> LoopLine:
    """What another thread sees, while the main thread waits here."""
    seen: list[LoopLine] = []
    ask = lines.line if isinstance(lines, Position) else lines.of_main_thread
    thread = threading.Thread(target=lambda: seen.append(ask()))
    thread.start()
    thread.join()
    return seen[0]


def loop(position: Any, seen: list[LoopLine]) -> None:
    seen.append(from_a_thread(position, password="planted-code-77f0"))  # comments are left out
    for micro in of_step(position, seen):
        seen.append(micro)


def of_step(position: Any, seen: list[LoopLine]) -> Iterator[LoopLine]:
    yield from_a_thread(position)


FIRST = loop.__code__.co_firstlineno


@pytest.mark.parametrize("made", [LoopLines(loop.__code__), Position()])
def test_another_thread_sees_the_line_of_the_function_without_secrets(made: Any) -> None:
    if isinstance(made, Position):
        made.code = loop.__code__
    seen: list[LoopLine] = []
    loop(made, seen)
    text = 'seen.append(from_a_thread(position, password="***"))'
    assert seen[0] == LoopLine(f"test_loop_lines.py:{FIRST + 1} {text}", FIRST + 1)
    assert seen[1] == LoopLine(f"test_loop_lines.py:{FIRST + 2} for micro in of_step(position, seen):", 0)
    assert from_a_thread(made) == LoopLine()  # the function has ended


def test_without_a_function_there_is_no_line() -> None:
    position = Position()
    seen: list[LoopLine] = []
    loop(position, seen)
    position.fail(ValueError())
    assert {*seen, position.line()} == {LoopLine()}
    assert position.message() == {"step": 0, "marks": 0, "phase": "starting", "line": "", "line_number": 0}


def test_where_the_source_cannot_be_read_the_number_is_shown_and_not_compared(tmp_path: Path) -> None:
    code = compile("def train(seen, ask):\n    seen.append(ask())\n", str(tmp_path / "gone.py"), "exec")
    names: dict[str, Any] = {}
    exec(code, names)
    position = Position()
    seen: list[LoopLine] = []
    position.code = names["train"].__code__
    names["train"](seen, position.line)
    assert seen == [LoopLine("gone.py:2", 0)]


# ---- where an error was met ----------------------------------------------------------------------------------


def failing(depth: int) -> None:
    if depth:
        failing_inside(depth)
    raise ValueError


def failing_inside(depth: int) -> None:
    raise KeyError(depth)


@pytest.mark.parametrize(("depth", "line"), [(1, 2), (0, 3)])
def test_an_error_that_has_left_the_function_has_the_line_that_met_it(depth: int, line: int) -> None:
    position = Position()
    position.code = failing.__code__
    with pytest.raises((ValueError, KeyError)) as raised:
        failing(depth)
    position.fail(raised.value)
    number = failing.__code__.co_firstlineno + line
    assert position.line().number == number
    assert position.line().text.startswith(f"test_loop_lines.py:{number} ")
    position.fail(KeyError())  # the first counts
    assert from_a_thread(position).number == number


def test_an_error_from_elsewhere_changes_no_line() -> None:
    position = Position()
    position.code = loop.__code__
    with pytest.raises(KeyError) as raised:
        failing_inside(1)
    position.fail(raised.value)
    seen: list[LoopLine] = []
    loop(position, seen)
    assert seen[0].number == FIRST + 1


def test_one_thread_at_a_time_reads_the_source(monkeypatch: pytest.MonkeyPatch) -> None:
    """The roll call's thread and the main thread may ask first at the same moment; ast.parse is not made for that."""
    both = threading.Barrier(2)
    met = []

    def parsed(source: str, first_line: int) -> dict[int, int]:
        with contextlib.suppress(threading.BrokenBarrierError):
            both.wait(timeout=0.5)
            met.append(threading.current_thread())
        return {}

    monkeypatch.setattr(loop_lines, "comparable_lines", parsed)
    lines = LoopLines(test_one_thread_at_a_time_reads_the_source.__code__)
    threads = [threading.Thread(target=lines.of_main_thread) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not met
