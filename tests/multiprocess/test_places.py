"""Code that changes the current folder does not take the run with it, on any number of ranks."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.tools.launching import own_loop
from tests.tools.ranks import command, train, write_config
from tests.tools.records import run_of, status

SETTINGS = {
    "data": {"name": "tests.lab.wandering:make_data", "root": "numbers"},
    "model": "tests.lab.wandering:make_model",
    "task": "tests.lab.wandering:Wandering",
    "batch": {"global_size": 4},
    "train": {"epochs": 2},
    "checkpoint": {"every_steps": 3},
    "device": "cpu",
}


@pytest.mark.parametrize(("ranks", "workers"), [(1, 0), (1, 2), (2, 0)])
def test_a_run_stays_where_it_was_started_whatever_folder_its_code_goes_to(
    tmp_path: Path, ranks: int, workers: int
) -> None:
    (tmp_path / "numbers").mkdir()
    (tmp_path / "numbers" / "numbers.txt").write_text(" ".join(map(str, range(16))))
    write_config(tmp_path, SETTINGS | {"data": {**SETTINGS["data"], "workers": workers}})  # type: ignore[dict-item]
    words, environment = ["--config", "run.yaml"], {"FROM": str(tmp_path)}
    first = train(tmp_path, [*words, "--tracking.report"], ranks, environment).check()
    assert "distloop 0.1.0 · runs/run · attempt 1" in first.output
    assert "finished: runs/run" in first.output
    assert "report: runs/run/report.html" in first.output
    longer = train(tmp_path, [*words, "--resume", "extend", "--train.epochs", "3"], ranks, environment).check()
    assert "continuing after step 8 of 12 (epoch 3), from runs/run/checkpoints/step_00000008" in longer.output
    other = train(tmp_path, [*words, "--name", "other", "--init-from", "runs/run"], ranks, environment).check()
    assert "starting from the weights in runs/run/checkpoints/step_00000012/model.safetensors" in other.output
    assert status(run_of(tmp_path))["step"] == 12
    again = command([sys.executable, "-m", "distloop.evaluate", "runs/run"], tmp_path, environment)
    assert (again.returncode, again.stdout.split(" · ")[:2]) == (0, ["runs/run", "step 12"]), again.stdout
    assert (run_of(tmp_path) / "report.html").exists()
    assert [path for path in (tmp_path / "elsewhere").rglob("*") if path.is_file()] == []


def test_a_loop_that_goes_elsewhere_before_it_starts_does_not_take_the_run_along(tmp_path: Path) -> None:
    file = own_loop(tmp_path / "loop.py")
    text = file.read_text()
    assert text.count("    start(train") == 1
    file.write_text(text.replace("    start(train", '    import os\n\n    os.chdir("/")\n    start(train'))
    settings = {"data": "digits", "model": "linear", "train": {"steps": 2}, "device": "cpu"}
    write_config(tmp_path, settings)
    done = command([sys.executable, "loop.py", "--config", "run.yaml", "--tracking.no-report"], tmp_path)
    assert done.returncode == 0, done.stdout
    assert status(run_of(tmp_path))["state"] == "finished"
