"""docs/own-loop.md says what is so: its diffs are those of the files, and its list has each name that the loop uses."""

from __future__ import annotations

import ast
import difflib
import importlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from distloop import __version__
from distloop.config import Config
from distloop.run.attempt import Attempt
from distloop.run.best import Best
from distloop.tracking import Trackers

REPOSITORY = Path(__file__).resolve().parent.parent.parent
PAGE = (REPOSITORY / "docs" / "own-loop.md").read_text()
LOOP = REPOSITORY / "distloop" / "train.py"
OWN_LOOPS = REPOSITORY / "tests" / "lab" / "loops"

# What train() gets from PyTorch and Accelerate, whose attributes are described there.
NOT_OURS = {"accelerator", "bare_model", "optimizer"}


def section(title: str) -> str:
    """The text below a heading of the page, up to the next of its level."""
    level = title.split(" ")[0]
    found = re.search(rf"^{re.escape(title)}\n(.*?)(?=^{level} |\Z)", PAGE, re.MULTILINE | re.DOTALL)
    assert found, title
    return found[1]


# ---- the list of names -----------------------------------------------------------------------------------------------


def names_in(tree: ast.Module) -> set[str]:
    """The names that the loop has from the package: those that it imports, and attributes of objects that the package
    has given it, such as run.clock.read."""
    imported = {alias.name for node in imports_in(tree) for alias in node.names}
    train = next(node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "train")
    objects = {argument.arg for argument in train.args.args}
    given = [pair for node in ast.walk(train) for pair in assignments(node) if isinstance(pair[1], ast.Call)]
    for _ in given:  # at least one more object is known after each round, until all are
        for target, call in given:
            if set(chain(call.func)[:1]) & ((imported | objects) - NOT_OURS):
                objects |= {inner.id for inner in ast.walk(target) if isinstance(inner, ast.Name)}
    inner_parts = {id(node.value) for node in ast.walk(train) if isinstance(node, ast.Attribute)}
    found = set(imported)
    for node in ast.walk(train):
        if isinstance(node, ast.Attribute) and id(node) not in inner_parts:
            parts = chain(node)
            if parts and parts[0] in (objects | imported) - NOT_OURS:
                found.add(".".join(parts))
    return found


def imports_in(tree: ast.Module) -> list[ast.ImportFrom]:
    nodes = (node for node in tree.body if isinstance(node, ast.ImportFrom))
    return [node for node in nodes if (node.module or "").split(".")[0] == "distloop"]


def assignments(node: ast.AST) -> Iterator[tuple[ast.AST, Any]]:
    """(target, value) of `a = f()`, `with f() as a` and `for a in f()`."""
    if isinstance(node, ast.Assign):
        yield from ((target, node.value) for target in node.targets)
    elif isinstance(node, ast.For):
        yield node.target, node.iter
    elif isinstance(node, ast.withitem) and node.optional_vars is not None:
        yield node.optional_vars, node.context_expr


def chain(node: ast.AST) -> list[str]:
    """`a.b.c` -> ["a", "b", "c"]; [] for what does not begin with a name."""
    if isinstance(node, ast.Attribute):
        before = chain(node.value)
        return [*before, node.attr] if before else []
    return [node.id] if isinstance(node, ast.Name) else []


def listed(title: str = "## The names") -> list[tuple[str, str]]:
    """(name, the module below which it stands) of each line of the list; a name without its arguments."""
    found, module = [], ""
    for line in section(title).splitlines():
        if heading := re.fullmatch(r"### `(.+)`", line):
            module = heading[1]
        elif item := re.match(r"- `([\w.]+)(?:\([^`]*\))?`(?: or `[^`]*`)?: \S", line):
            found.append((item[1], module))
        else:
            assert not line.startswith("-"), f"without a name or without words: {line}"
    return found


LOOP_TREE = ast.parse(LOOP.read_text())


def test_the_list_has_each_name_that_the_loop_uses_once_and_no_other() -> None:
    names = [name for name, _ in listed()]
    assert sorted(names) == sorted(names_in(LOOP_TREE))


def test_each_name_stands_below_the_module_that_it_is_imported_from() -> None:
    modules = dict(listed())
    for node in imports_in(LOOP_TREE):
        for alias in node.names:
            assert modules[alias.name] == node.module, alias.name


def test_the_names_that_the_loop_does_not_use_are_there() -> None:
    owners = {"config": Config(), "run": Attempt, "trackers": Trackers, "best": Best}
    names = listed("## More names")
    assert len(names) == 8
    for name, module in names:
        owner, _, attribute = name.rpartition(".")
        assert hasattr(owners[owner] if owner else importlib.import_module(module), attribute), name
    assert not {name for name, _ in names} & names_in(LOOP_TREE)


@pytest.mark.parametrize(
    ("line", "name"),
    [
        ("ranks.is_main", "ranks.is_main"),
        ("run.clock.read(run.status.step)", "run.status.step"),
        ("with open_run() as other: other.lock", "other.lock"),
        ("for part in batches.of_step(1): part.start", "part.start"),
        ("settings = load_data(1); settings.classes", "settings.classes"),
        ("Plan.order", "Plan.order"),
    ],
)
def test_a_new_name_in_the_loop_is_noticed(line: str, name: str) -> None:
    text = LOOP.read_text().replace("    accelerator = ", f"    {line}\n    accelerator = ")
    assert names_in(ast.parse(text)) - names_in(LOOP_TREE) >= {name}


@pytest.mark.parametrize("line", ["accelerator.gather(1)", "model.eval()", "optimizer.defaults", "device.index"])
def test_what_is_not_the_packages_is_none_of_its_names(line: str) -> None:
    text = LOOP.read_text().replace(
        "            finite.begin_step()\n", f"            {line}\n            finite.begin_step()\n"
    )
    assert text != LOOP.read_text()
    assert names_in(ast.parse(text)) == names_in(LOOP_TREE)


# ---- the diffs -------------------------------------------------------------------------------------------------------


def difference(name: str) -> list[str]:
    """The lines of the unified diff from train.py to a loop in tests/lab/loops, without its head."""
    loop, own = (path.read_text().splitlines() for path in (LOOP, OWN_LOOPS / name))
    return list(difflib.unified_diff(loop, own, lineterm=""))[2:]


def shown(title: str) -> list[list[str]]:
    """The lines of each diff below a heading."""
    return [block.splitlines() for block in re.findall(r"```diff\n(.*?)```", section(title), re.DOTALL)]


DIFFS = [("## Mixup, as a diff of train.py", "mixup.py"), ("## A GAN, as a diff of train.py", "gan.py")]


@pytest.mark.parametrize(("title", "name"), DIFFS)
def test_each_diff_is_a_part_of_the_real_one(title: str, name: str) -> None:
    real = difference(name)
    assert shown(title)
    for block in shown(title):
        places = range(len(real) - len(block) + 1)
        assert any(real[i : i + len(block)] == block for i in places), "\n".join(
            ["not in the diff of the files:", *block]
        )
        assert any(line[0] in "+-" for line in block)


def test_all_that_mixup_changes_is_shown_beside_what_distloop_copy_changes() -> None:
    real = difference("mixup.py")
    start = real.index('+    prepare_process(copied_from="0.1.0")') + 1
    changes = [line for line in real[start:] if line[0] in "+-" and line[1:].strip()]
    told = [line for block in shown(DIFFS[0][0]) for line in block if line[0] in "+-"]
    assert sorted(told) == sorted(changes)
    assert len(changes) < 20, "a handful"


# ---- the rest --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", [REPOSITORY / "docs" / "own-loop.md", REPOSITORY / "CHANGELOG.md"])
def test_what_a_page_links_to_is_there(page: Path) -> None:
    links = re.findall(r"\]\(([^)#]+)", page.read_text())
    assert links
    for link in links:
        assert (page.parent / link).exists(), link


def test_the_version_of_the_package_is_the_one_that_all_speak_of() -> None:
    changes = (REPOSITORY / "CHANGELOG.md").read_text()
    assert re.search(r"^## (\S+)", changes, re.MULTILINE)[1] == __version__  # type: ignore[index]
    stamp = f'prepare_process(copied_from="{__version__}")'
    for text in (PAGE, *(path.read_text() for path in OWN_LOOPS.glob("[a-z]*.py"))):
        assert stamp in text
