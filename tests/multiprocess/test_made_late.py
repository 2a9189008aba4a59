"""States that a forward pass makes or shapes, with other names, or shared: they train, continue and are evaluated."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from distloop.run.checkpoint import load_weights, weights_of, write_weights
from tests.lab.made_late import Conjugated, OwnLoading
from tests.tools.ranks import Outcome, command, train, write_config
from tests.tools.records import found, largest_difference, rows, weights

LAB = "tests.lab.made_late"
EVALUATE = ["-m", "distloop.commands.cli", "evaluate", "runs/run"]


def start(folder: Path, model: str, *words: str, world_size: int = 1, **more: Any) -> Outcome:
    settings = {
        "data": f"{LAB}:make_data",
        "model": f"{LAB}:{model}",
        "task": "classification",
        "device": "cpu",
        "batch": {"global_size": 16},
        "train": {"steps": 6},
        **more,
    }
    return train(folder, ["--config", str(write_config(folder, settings)), *words], world_size)


@pytest.mark.parametrize(
    "model", ["Cached", "CachedInTraining", "Resized", "WeightNorm", "ExpandedLate", "ExpandedAnew"]
)
@pytest.mark.parametrize("decay", [pytest.param(None, marks=pytest.mark.long), 0.9])
def test_what_a_forward_pass_makes_comes_back(tmp_path: Path, model: str, decay: float | None) -> None:
    optim = {"lr": 0.1, "ema_decay": decay}
    start(tmp_path, model, "--name", "whole", optim=optim, schedule="constant").check()
    start(tmp_path, model, "--name", "run", "--train.steps", "3", optim=optim, schedule="constant").check()
    start(tmp_path, model, "--name", "run", "--resume", "extend", optim=optim, schedule="constant").check()
    whole, run = weights(tmp_path / "runs" / "whole"), weights(tmp_path / "runs" / "run")
    assert largest_difference(whole, run) == 0
    if model in ("Cached", "WeightNorm"):
        evaluated = command([sys.executable, *EVALUATE], tmp_path)
        assert evaluated.returncode == 0, evaluated.stdout


@pytest.mark.parametrize(
    ("habit", "dtype", "world_size"),
    [
        ("one", "float32", 1),
        ("one", "float32", 2),
        ("gaps", "float64", 1),
        ("windows", "float32", 1),
        ("rows", "float32", 1),
        ("rows", "float32", 2),
    ],
)
def test_fewer_numbers_than_elements_are_refused_by_name(
    tmp_path: Path, habit: str, dtype: str, world_size: int
) -> None:
    outcome = start(tmp_path, "Spread", "--model.args.habit", habit, world_size=world_size, dtype=dtype)
    assert set(outcome.codes) == {2}
    assert outcome.output.count("scale shows fewer numbers as ") == 1
    assert ".clone() before nn.Parameter()." in outcome.output
    assert "Traceback" not in outcome.output
    assert "step 1/" not in outcome.output


def test_weights_of_a_model_with_a_cached_buffer_start_another_run(tmp_path: Path) -> None:
    start(tmp_path, "Cached", "--name", "first").check()
    start(tmp_path, "Cached", "--name", "second", "--init-from", "runs/first").check()


def test_names_from_which_no_way_leads_back_do_not_resume_in_silence(tmp_path: Path) -> None:
    start(tmp_path, "Renamed", "--train.steps", "3").check()
    outcome = start(tmp_path, "Renamed", "--resume", "extend")
    assert outcome.codes != [0]
    assert "net.0.weight" in outcome.output


def test_a_load_state_dict_of_the_models_own_gets_one_argument(tmp_path: Path) -> None:
    model = OwnLoading()
    write_weights(weights_of(model, lambda _, tensor: tensor), tmp_path / "model.safetensors")
    other = OwnLoading()
    load_weights(tmp_path / "model.safetensors", other)
    assert torch.equal(other.layer.weight, model.layer.weight)


def test_a_conjugated_view_is_no_second_name(tmp_path: Path) -> None:
    write_weights(weights_of(Conjugated(), lambda _, tensor: tensor.clone()), tmp_path / "model.safetensors")
    other = Conjugated()
    load_weights(tmp_path / "model.safetensors", other)
    assert other.state_dict()["values"].tolist() == [1 + 2j, 3 - 1j]
    assert other.state_dict()["conjugated"].tolist() == [1 - 2j, 3 + 1j]


def test_a_sparse_buffer_that_no_checkpoint_holds_trains_on_two_ranks(tmp_path: Path) -> None:
    start(tmp_path, "SparseScratch", world_size=2).check()


def test_the_rehearsal_leaves_no_trace_in_a_scripted_module(tmp_path: Path) -> None:
    """One rank trains each step in one forward pass, and BatchNorm counts them."""
    start(tmp_path, "scripted").check()
    assert int(weights(tmp_path / "runs" / "run")["1.num_batches_tracked"]) == 6


def test_a_sum_of_a_users_own_does_not_change_the_accuracy(tmp_path: Path) -> None:
    run = tmp_path / "runs"
    for name, task in (("plain", "classification"), ("own", f"{LAB}:Positives")):
        start(tmp_path, "Cached", "--name", name, task=task).check()
    [plain], [own] = (rows(run / name, "validate")[-1:] for name in ("plain", "own"))
    assert found(own)["accuracy"] == found(plain)["accuracy"]


def test_tables_of_different_lengths_are_not_added(tmp_path: Path) -> None:
    data = {"name": f"{LAB}:make_data", "args": {"ordered": True}}
    outcome = start(tmp_path, "Cached", data=data, task=f"{LAB}:Bins", validate={"batch_size": 16})
    assert outcome.codes == [2]
    assert "per_class has the shape [2] in one batch and [1] in another" in outcome.output
