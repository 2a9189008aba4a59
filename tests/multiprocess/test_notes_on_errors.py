"""An error of the user's code names the method, the samples and the setting, on the console and in failures/."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from distloop.ranks.user_code import notes_in
from tests.lab.bad_data import SAMPLES
from tests.tools.ranks import Outcome, train, write_config
from tests.tools.records import run_of, status

LAB = "tests.lab.bad_data"


def failed(folder: Path, world_size: int = 1, **changes: Any) -> tuple[Outcome, list[str], dict[str, Any]]:
    """The outcome of a run that fails, the notes, and its record."""
    data = {"name": f"{LAB}:points", "args": {"bad": []}, "workers": 0, **changes.pop("data", {})}
    settings = {
        "data": data,
        "model": "linear",
        "task": "regression",
        "device": "cpu",
        "batch": {"global_size": 16},
        "train": {"steps": 3},
        "validate": {"batch_size": 4},
        **changes,
    }
    outcome = train(folder, ["--config", str(write_config(folder, settings))], world_size)
    assert outcome.codes == [1] * world_size, outcome.output
    record = json.loads((run_of(folder) / "failures" / "attempt_0001.json").read_text())
    notes = notes_in(outcome.output)
    assert record["notes"] == [note for note in notes if note in record["notes"]]
    assert "Traceback (most recent call last)" in record["traceback"]
    assert not [note for note in record["notes"] if note in status(run_of(folder))["reason"]], "one line says why"
    return outcome, record["notes"], record


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_method_of_the_task_with_step_samples_and_setting(tmp_path: Path, world_size: int) -> None:
    task = {"name": f"{LAB}:Mistaken", "args": {"method": "summary"}}
    _, notes, record = failed(tmp_path, world_size, task=task)
    assert notes[0] == f"in step 3, task.summary() of Mistaken (task.name = '{LAB}:Mistaken')"
    assert record["what"] == "KeyError: 'nothing'"


def test_a_loss_names_the_samples_of_its_batch(tmp_path: Path) -> None:
    _, notes, record = failed(tmp_path, task={"name": f"{LAB}:Mistaken", "args": {"method": "loss"}})
    assert f"task.loss() of Mistaken (task.name = '{LAB}:Mistaken')" in notes[0]
    assert "of the training data (data.name = " in notes[1] or len(notes) == 1  # before the first step there are none
    assert record["what"] == "ZeroDivisionError: a loss of nothing"


def test_a_metric_names_the_batch_of_validation(tmp_path: Path) -> None:
    _, notes, _ = failed(tmp_path, task={"name": f"{LAB}:Mistaken", "args": {"method": "metrics"}})
    assert "task.metrics() of Mistaken" in notes[0]
    assert "the batch has samples 0, 1, 2, 3 of the validation data" in notes


@pytest.mark.parametrize("world_size", [1, 2])
def test_the_model_is_named_with_its_inner_module(tmp_path: Path, world_size: int) -> None:
    _, notes, _ = failed(tmp_path, world_size, model=f"{LAB}:failing_model")
    expected = f"forward() of the model: Sequential > Inner (model.name = '{LAB}:failing_model')"
    assert [note for note in notes if note.endswith(expected)], notes


@pytest.mark.parametrize(("error", "workers"), [("ValueError", 0), ("KeyError", 1), ("OfTwo", 1), ("TypeError", 1)])
@pytest.mark.parametrize("world_size", [1, 2])
def test_a_sample_is_named_also_from_a_worker(tmp_path: Path, error: str, workers: int, world_size: int) -> None:
    bad = list(range(1, SAMPLES, 2))  # not the first one, with which the model is tried out
    data = {"args": {"bad": bad, "error": error}, "workers": workers}
    _, notes, record = failed(tmp_path, world_size, data=data)
    [note] = [note for note in notes if note.startswith("loading sample ")]
    index = int(note.split()[2])
    assert index in bad
    assert f"sample {index} of the training data (data.name = '{LAB}:points')" in note
    assert (error == "TypeError") != ("--data.on-bad-sample skip" in note)
    assert f"{error}: " in record["what"]
    assert f"nothing there at {index}" in record["what"]
    assert "__getitem__" in record["traceback"]


@pytest.mark.parametrize("workers", [0, 1])
def test_a_collate_function_is_named_with_its_samples(tmp_path: Path, workers: int) -> None:
    collates = {"collate": f"{LAB}:collate_late", "workers": workers}
    _, notes, record = failed(tmp_path, data=collates)
    [note] = [note for note in notes if note.startswith("data.collate, with samples ")]
    assert note.endswith(f"and 8 more of the training data (data.name = '{LAB}:points')")
    assert "no such column" in record["what"]


def test_building_the_data_names_the_setting(tmp_path: Path) -> None:
    settings = {"data": f"{LAB}:failing_data", "device": "cpu"}
    outcome = train(tmp_path, ["--config", str(write_config(tmp_path, settings))])
    assert outcome.codes == [1]
    assert notes_in(outcome.output) == [
        f"calling {LAB}:failing_data, which data.name names, with data.args = {{}}",
        *[note for note in notes_in(outcome.output) if note.startswith("failed ")],
    ]
