""".github/workflows/ci.yml: a file for GitHub that this repository's own commands do the work of."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.tools.ranks import REPOSITORY, command

WORKFLOW: dict[str, Any] = yaml.safe_load((REPOSITORY / ".github" / "workflows" / "ci.yml").read_text())
[JOB] = WORKFLOW["jobs"].values()
COMMANDS = [line for step in JOB["steps"] for line in step.get("run", "").splitlines()]


def test_it_runs_for_what_is_pushed_and_proposed() -> None:
    assert set(WORKFLOW["on"]) == {"push", "pull_request"}
    assert JOB["steps"][0]["uses"].startswith("actions/checkout@")


def test_each_command_can_be_started() -> None:
    for line in COMMANDS:
        program = shlex.split(line)[0]
        if "/" in program:
            assert os.access(REPOSITORY / program, os.X_OK), line
        else:
            assert shutil.which(program), line
    assert {".ci/run", ".ci/wheel"} <= set(COMMANDS)


def test_ci_lints_and_tests_by_targets_that_make_knows() -> None:
    targets = re.findall(r"^make (\S+)", (REPOSITORY / ".ci" / "run").read_text(), re.MULTILINE)
    assert targets == ["lint", "test"]
    done = command(["make", "--dry-run", *targets], REPOSITORY)
    assert done.returncode == 0, done.stdout
    assert "ruff check" in done.stdout
    assert "pytest" in done.stdout


def test_the_versions_of_python_are_those_that_the_package_names() -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    versions = JOB["strategy"]["matrix"]["python"]
    prefix = "Programming Language :: Python :: 3."
    named = [line.removeprefix(prefix) for line in project["classifiers"] if line.startswith(prefix)]
    assert versions == [f"3.{minor}" for minor in named]
    assert project["requires-python"] == f">={versions[0]}"
    assert "${{ matrix.python }}" in JOB["container"]["image"]


@pytest.mark.parametrize(
    ("unit", "rest", "fails"),
    [(0, 0, False), (1, 0, True), (0, 1, True), (0, 5, False), (5, 0, False), (5, 5, True), (2, 5, True)],
)
def test_make_test_runs_both_parts_and_fails_if_one_does(tmp_path: Path, unit: int, rest: int, fails: bool) -> None:
    """5 is pytest's code for no test: PYTEST_ADDOPTS="-k usage" may select tests of one part alone."""
    shutil.copy(REPOSITORY / "Makefile", tmp_path)
    python = tmp_path / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/bin/sh\necho "$@" >>parts\ncase "$*" in *--ignore*) exit {rest} ;; *) exit {unit} ;; esac\n')
    python.chmod(0o755)
    for name in ("pyproject.toml", ".venv/installed", ".venv/installed-dev"):  # in the order in which they are made
        (tmp_path / name).touch()
    done = command(["make", "test"], tmp_path)
    assert (done.returncode != 0) == fails, done.stdout
    first, second = (tmp_path / "parts").read_text().splitlines()
    assert first.endswith("tests/unit")
    assert second.endswith("--ignore tests/unit")


@pytest.mark.parametrize("processes", [1, 2])
def test_make_train_asks_torch_for_gpus_only_where_the_launcher_has_to_know(tmp_path: Path, processes: int) -> None:
    """To import torch for the answer takes seconds; one process finds its GPU by itself."""
    shutil.copy(REPOSITORY / "Makefile", tmp_path)
    programs = tmp_path / ".venv" / "bin"
    programs.mkdir(parents=True)
    note = '#!/bin/sh\necho "$(basename $0) $1 ${ACCELERATE_USE_CPU:-unset}" >>notes\n[ "$1" != -c ] || echo true\n'
    for name in ("python", "accelerate"):
        (programs / name).write_text(note)
        (programs / name).chmod(0o755)
    command(["make", "-o", ".venv/installed", "train", f"PROCS={processes}"], tmp_path)
    alone, several = "python distloop/train.py unset\n", "python -c unset\naccelerate launch true\n"
    assert (tmp_path / "notes").read_text() == (alone if processes == 1 else several)
