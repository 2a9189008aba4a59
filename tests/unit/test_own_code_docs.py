"""The table of docs/own-code.md names what a task and a data source have, as the code has it: no more, and no less."""

from __future__ import annotations

import dataclasses
import inspect
import re
from typing import Any

from distloop.data import DataSource
from distloop.tasks import Task
from tests.tools.ranks import REPOSITORY

PAGE = REPOSITORY / "docs" / "own-code.md"
# Methods that the base class does not have: a task that defines them has a state.
ADDED_BY_USERS = {"state_dict": "()", "load_state_dict": "(state)"}
COLUMNS = ["name", "given", "what it returns or is", "default", "when", "on which ranks"]


def table() -> list[list[str]]:
    """The cells of the rows of the page's table, the first of which is `Task.…` or `DataSource.…`."""
    lines = PAGE.read_text().splitlines()
    [start] = [number for number, line in enumerate(lines) if line.startswith("| name | given |")]
    assert cells(lines[start]) == COLUMNS
    found: list[list[str]] = []
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            return found
        found.append(cells(line))
    raise AssertionError("the table does not end")


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


def names_of_the_code() -> list[str]:
    """As a user writes them: Task.loss(outputs, batch), DataSource.train."""
    public = {name: value for name, value in vars(Task).items() if not name.startswith("_")}
    names = [f"Task.{name}{parameters(value)}" for name, value in public.items()]
    names += [f"Task.{name}{given}" for name, given in ADDED_BY_USERS.items()]
    return names + [f"DataSource.{field.name}" for field in dataclasses.fields(DataSource) if field.init]


def parameters(value: Any) -> str:
    if not inspect.isfunction(value):
        return ""
    return f"({', '.join(list(inspect.signature(value).parameters)[1:])})"


def test_the_table_has_one_row_for_each_method_of_a_task_and_each_field_of_a_data_source() -> None:
    rows = [row[0].strip("`") for row in table()]
    assert sorted(rows) == sorted(names_of_the_code())
    assert not set(ADDED_BY_USERS) & set(vars(Task))


def test_each_row_says_all_and_attributes_have_the_defaults_of_the_code() -> None:
    for name, *others in table():
        assert len(list(filter(None, others))) == len(COLUMNS) - 1, name
        if name in ("`Task.weight`", "`Task.best`", "`Task.classes`", "`Task.now`"):
            default = eval(others[2].strip("`"), {"Now": type(Task.now)})
            assert default == getattr(Task, name.strip("`").removeprefix("Task.")), name


def test_the_page_has_six_numbered_examples_at_least_one_of_which_shows_each_part() -> None:
    text = PAGE.read_text()
    assert [int(number) for number in re.findall(r"^### Example (\d):", text, re.MULTILINE)] == [2, 3, 4, 5, 6]
    first = text.index("## An example: a language model")
    assert first < text.index("| name | given |") < text.index("### Example 2:") < text.index("\n## Data\n")
