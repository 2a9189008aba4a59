"""A row of metrics.jsonl has the keys that are defined, and what shows rows reads no other."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

import distloop
from distloop.commands.report import rows as report_rows
from distloop.run.metrics import KEYS_OF_EVERY_ROW, KEYS_OF_KIND, LOGGED
from tests.tools.ranks import train, write_config

TASK_METRICS: dict[str, set[str]] = {"train": set(), "epoch": set(), "validate": {"loss", "r2"}}
DEFINED = {*KEYS_OF_EVERY_ROW, *(key for keys in KEYS_OF_KIND.values() for key in keys)}


@pytest.mark.parametrize("world_size", [1, 2])
def test_the_rows_of_a_run_have_the_keys_that_are_defined_and_the_tasks_metrics(
    tmp_path: Path, world_size: int
) -> None:
    settings = {"data": "tests.lab.points:points", "model": "linear", "task": "regression", "train": {"epochs": 2}}
    settings |= {"batch": {"global_size": 4}, "log": {"every_steps": 1}}
    train(tmp_path, ["--config", str(write_config(tmp_path, settings))], world_size).check()
    rows = [json.loads(line) for line in (tmp_path / "runs" / "run" / "metrics.jsonl").read_text().splitlines()]
    assert {row["kind"] for row in rows} == set(LOGGED) == set(KEYS_OF_KIND) - {"figure"}
    for row in rows:
        assert set(row) == {*KEYS_OF_EVERY_ROW, *KEYS_OF_KIND[row["kind"]], *TASK_METRICS[row["kind"]]}


def test_what_shows_rows_reads_only_keys_that_are_defined() -> None:
    package = Path(distloop.__file__).parent
    files = [*(package / "tracking").rglob("*.py"), *(package / "commands" / "report").glob("*.py")]
    pattern = r'(?:\brow|\btrain|\.last_train|last_validation)(?:\.get\(|\.pop\(|\[)"(\w+)"|number_in\(row, "(\w+)"'
    keys = {key for file in files for found in re.findall(pattern, file.read_text()) for key in found if key}
    assert {"running_loss", "data_seconds", "memory_gib", "step", "kind"} <= keys  # the pattern finds them
    assert keys | {*report_rows.KEYS, report_rows.MEMORY} <= DEFINED
