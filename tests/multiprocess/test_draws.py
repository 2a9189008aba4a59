"""User code may draw from the global generators of random, numpy and torch: what it draws follows from the config.

tests/lab/drawing.py draws in the places that a test names: as data or model are built, in a forward pass, a metric …
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.lab.drawing import VALIDATED
from tests.tools.ranks import REPOSITORY, TIMEOUT, accelerate_launch, clean_environment, command, train, write_config
from tests.tools.records import found, largest_difference, rows, weights

PLACES = [
    "import",
    "data",
    "task",
    "memory model",
    "batch",
    "collate",
    "forward",
    "loss",
    "metrics",
    "summary",
    "update",
]
STEPS, STOPPED_AFTER = 10, 4  # 6 an epoch


class Runs:
    """Runs of one config, whose user code draws in `places`."""

    def __init__(self, folder: Path, *places: str) -> None:
        args = {"draws": list(places)}
        settings: dict[str, Any] = {
            "data": {"name": "tests.lab.drawing:make_data", "args": args},
            "model": {"name": "tests.lab.drawing:Net", "args": args},
            "task": {"name": "tests.lab.drawing:Guess", "args": args},
            "optim": {"name": "sgd", "lr": 0.3},
            "schedule": "constant",
            "dtype": "float64",
            "batch": {"global_size": 16, "micro_size": 4},  # the same micro-batches on one rank and on two
            "train": {"steps": STEPS},
            "validate": {"every_steps": 5, "batch_size": 4},
            "log": {"every_steps": 1},
            "device": "cpu",
        }
        if "collate" in places:
            settings["data"]["collate"] = "tests.lab.drawing:collate"
        self.folder, self.config = folder, str(write_config(folder, settings))

    def train(self, name: str, world_size: int, workers: int, *more: str, **variables: str) -> Path:
        arguments = ["--config", self.config, "--name", name, "--data.workers", str(workers), *more]
        train(self.folder, arguments, world_size, variables).check()
        return self.folder / "runs" / name

    def stop_and_continue(self, name: str, world_size: int, workers: int) -> Path:
        self.train(name, world_size, workers, "--train.steps", str(STOPPED_AFTER))
        return self.train(name, world_size, workers, "--resume", "extend")


def numbers_of(run: Path) -> list[dict[str, float]]:
    """The numbers of all training and validation, but for the validation at a run's early end, and the epoch's running
    loss, which is a sum of two parts where a run was stopped."""
    logged = [*rows(run, "train"), *(row for row in rows(run, "validate") if row["step"] % 5 == 0)]
    left_out = ("kind", "running_loss")
    return [{name: value for name, value in found(row).items() if name not in left_out} for row in logged]


SOME = ("import", "data", "memory model", "forward", "summary", "update")


@pytest.mark.parametrize(
    "place", [place if place in SOME else pytest.param(place, marks=pytest.mark.long) for place in PLACES]
)
def test_one_rank_and_two_that_are_stopped_and_continued_with_workers_draw_the_same(tmp_path: Path, place: str) -> None:
    runs = Runs(tmp_path, *place.split())
    one, two = runs.train("one", 1, 0), runs.stop_and_continue("two", 2, 2)
    for row, other in zip(numbers_of(one), numbers_of(two), strict=True):
        assert row == pytest.approx(other, rel=1e-9)
    assert largest_difference(weights(one), weights(two)) < 1e-12
    assert numbers_of(runs.train("other", 1, 0, "--seed", "1")) != numbers_of(one)


@pytest.mark.long
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("place", PLACES)
def test_a_run_that_is_stopped_and_continued_has_the_same_bits(
    tmp_path: Path, place: str, world_size: int, workers: int
) -> None:
    runs = Runs(tmp_path, *place.split())
    whole, stopped = runs.train("whole", world_size, workers), runs.stop_and_continue("stopped", world_size, workers)
    assert numbers_of(stopped) == numbers_of(whole)
    assert largest_difference(weights(stopped), weights(whole)) == 0


@pytest.mark.parametrize("place", ["update", "summary"])
def test_what_each_rank_computes_for_itself_is_the_same_on_all(tmp_path: Path, place: str) -> None:
    (tmp_path / "notes").mkdir()
    Runs(tmp_path, place).train("two", 2, 0, NOTES=str(tmp_path / "notes"))
    notes = [(tmp_path / "notes" / f"{place}-{rank}").read_text().split() for rank in range(2)]
    assert len(notes[0]) == (3 if place == "summary" else 2 * STEPS)  # the rehearsal has a summary, too
    assert notes[0] == notes[1]


def test_what_building_the_data_draws_shifts_nothing_else(tmp_path: Path) -> None:
    runs = Runs(tmp_path, "task", "model", "forward")
    more, less = runs.train("more", 1, 0, DRAWN_BEFORE="7"), runs.train("less", 1, 0)
    assert numbers_of(more) == numbers_of(less)


def test_validations_a_report_and_wandb_shift_no_training(tmp_path: Path) -> None:
    runs = Runs(tmp_path, "batch", "forward", "metrics", "update")
    often = ["--validate.every-steps", "1", "--tracking.report", "--tracking.wandb", "offline"]
    assert largest_difference(weights(runs.train("often", 1, 0, *often)), weights(runs.train("once", 1, 0))) == 0


@pytest.mark.long
def test_evaluate_draws_what_the_runs_validation_drew(tmp_path: Path) -> None:
    run = Runs(tmp_path, "data", "task", "model", "forward", "metrics", "summary").train("run", 2, 0)
    row = found(rows(run, "validate")[-1])
    assert row["samples"] == VALIDATED
    script = str(REPOSITORY / "distloop" / "evaluate.py")
    for words in ([sys.executable, script], accelerate_launch(2, script)):
        done = command([*words, "runs/run", "--json"], tmp_path, {"ACCELERATE_USE_CPU": "true"})
        assert done.returncode == 0, done.stdout
        numbers = json.loads(done.stdout.splitlines()[-1])
        assert numbers == pytest.approx({name: row[name] for name in numbers}, rel=1e-12)


@pytest.mark.long
def test_a_set_of_texts_has_one_order_where_a_script_starts_the_run_and_else_is_refused(tmp_path: Path) -> None:
    """Python gives it another one in each process, unless PYTHONHASHSEED is set before it starts."""
    Runs(tmp_path)
    environment = {name: value for name, value in clean_environment().items() if name != "PYTHONHASHSEED"}
    environment |= {"NOTES": str(tmp_path), "ACCELERATE_USE_CPU": "true"}
    more = ["--config", "run.yaml", "--data", "tests.lab.drawing:data_of_a_set", "--data.args", "{}"]
    more += ["--tracking.no-report"]
    script = ["env", "PROCESSES=2", "bash", str(REPOSITORY / "launch" / "single_node.sh")]

    def run(words: list[str]) -> tuple[int, str]:
        done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=TIMEOUT)
        return done.returncode, done.stdout + done.stderr

    for _ in range(2):
        code, output = run([*script, *more, "--train.steps", "4", "--resume", "extend"])
        assert code == 0, output
    notes = [line for rank in range(2) for line in (tmp_path / f"names-{rank}").read_text().split()]
    assert len(notes) == 4
    assert len(set(notes)) == 1
    code, output = run([*accelerate_launch(2), *more, "--name", "other"])
    assert code != 0
    assert output.count("is another one on rank 1") == 1, output
    assert "a set gave (sorted(" in output
    (tmp_path / "runs" / "run" / "status.json").unlink()  # as if it had been killed
    code, output = run([sys.executable, "-m", "distloop.train", *more, "--train.steps", "4"])
    assert code == 2, output
    assert "was trained on other data" in output
