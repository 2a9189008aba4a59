"""Samples that cannot be loaded are named, or left out: the others train as if these had never been asked for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from distloop.config.settings import Optim
from distloop.data.order import Order
from distloop.training.optimizers import build_optimizer
from tests.lab.bad_data import SAMPLES, write_pictures
from tests.lab.points import line
from tests.tools.ranks import train, write_config
from tests.tools.records import losses, run_of, status, weights

BATCH, MICRO, STEPS, SEED = 24, 3, 40, 0
# All three of a micro-batch (of rank 1, if there are two), and one of another step: 1 % of the data.
ORDER = Order(SAMPLES, SEED)(0, 0, SAMPLES).tolist()
BAD = [*ORDER[3:6], ORDER[BATCH + 1]]


def arguments(folder: Path, bad: list[int] = BAD, validation: tuple[int, ...] = (), **changes: Any) -> list[str]:
    data = {"name": "tests.lab.bad_data:points", "args": {"bad": bad, "validation": list(validation)}}
    settings: dict[str, Any] = {
        "data": {**data, "on_bad_sample": "skip", "workers": 0, **changes.pop("data", {})},
        "model": "linear",
        "task": "regression",
        "device": "cpu",
        "dtype": "float64",
        "optim": {"lr": 0.05, "name": "sgd"},
        "schedule": "constant",
        "batch": {"global_size": BATCH, "micro_size": MICRO, "remainder": "train"},
        "train": {"steps": STEPS},
        "log": {"every_steps": 1},
        **changes,
    }
    folder.mkdir(exist_ok=True)
    return ["--config", str(write_config(folder, settings))]


def by_hand(initial: dict[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], list[float]]:
    """The same training in plain PyTorch: the mean over the samples of each step that are there."""
    model = nn.Linear(1, 1).double()
    model.load_state_dict(initial)
    optimizer = build_optimizer(model, Optim(lr=0.05, name="sgd"), torch.device("cpu"), "no")
    points, order, means = line(SAMPLES), Order(SAMPLES, SEED), []
    steps = -(-SAMPLES // BATCH)
    for step in range(STEPS):
        epoch, start = step // steps, step % steps * BATCH
        chosen = [i for i in order(epoch, start, min(start + BATCH, SAMPLES)).tolist() if i not in BAD]
        inputs, targets = (tensor[chosen].double() for tensor in points.tensors)
        optimizer.zero_grad()
        loss = (model(inputs) - targets).square().mean()
        loss.backward()
        optimizer.step()
        means.append(float(loss.detach()))
    return dict(model.state_dict()), means


def initial_weights(folder: Path) -> dict[str, torch.Tensor]:
    """Those with which the run begins: a rate of nearly nothing leaves them."""
    train(folder, arguments(folder, [], optim={"lr": 1e-300, "name": "sgd"}, train={"steps": 1})).check()
    return weights(run_of(folder))


def listed(run: Path) -> dict[str, Any]:
    newest = max((run / "checkpoints").glob("step_*"))
    return json.loads((newest / "state.json").read_text())["bad_samples"]


@pytest.mark.parametrize(
    ("world_size", "workers", "micro"), [(1, 0, MICRO), (2, 0, MICRO), (2, 2, 12), pytest.param(1, 2, None)]
)
def test_the_others_train_as_by_hand(tmp_path: Path, world_size: int, workers: int, micro: int | None) -> None:
    expected, means = by_hand(initial_weights(tmp_path / "initial"))
    folder = tmp_path / "skips"
    batch = {"global_size": BATCH, "micro_size": micro, "remainder": "train"}
    outcome = train(folder, arguments(folder, batch=batch, data={"workers": workers}), world_size).check()
    run = run_of(folder)
    assert losses(run) == pytest.approx(means, rel=1e-10)
    for name, tensor in weights(run).items():
        assert torch.allclose(tensor, expected[name], rtol=1e-10, atol=0)
    assert listed(run)["indices"] == sorted(BAD)
    first = [each["index"] for each in listed(run)["listed"]]
    assert first == [*sorted(BAD[:3]), BAD[3]]
    assert listed(run)["listed"][0]["error"] == f"OSError: nothing there at {first[0]}"
    assert outcome.output.count("distloop: WARNING: left out: sample ") == len(BAD)
    last = outcome.output.partition("finished: ")[2]
    assert "left out, since they cannot be loaded: 4 training samples" in last
    assert f"sample {BAD[3]}: OSError: nothing there at {BAD[3]}" in last


def test_the_list_goes_on_after_a_stop_and_on_other_ranks(tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train(whole, arguments(whole)).check()
    words = arguments(parts, checkpoint={"every_steps": 1})
    (parts / "runs" / "run").mkdir(parents=True)
    (parts / "runs" / "run" / "STOP").touch()  # after its first step
    train(parts, words, 2).check()
    assert status(run_of(parts))["state"] == "stopped"
    assert set(BAD[:3]) <= set(listed(run_of(parts))["indices"])
    outcome = train(parts, words, 1).check()
    assert listed(run_of(parts)) == listed(run_of(whole))
    assert "4 training samples" in outcome.output
    assert losses(run_of(parts)) == pytest.approx(losses(run_of(whole)), rel=1e-10)


@pytest.mark.parametrize(("world_size", "workers"), [(1, 0), (2, 1)])
def test_above_one_in_a_hundred_the_run_ends_on_all_ranks(tmp_path: Path, world_size: int, workers: int) -> None:
    bad = [*BAD, ORDER[5 * BATCH]]
    outcome = train(tmp_path, arguments(tmp_path, bad, data={"workers": workers}), world_size)
    assert outcome.codes == [1] * world_size, outcome.output
    assert outcome.output.count("5 of 400 training samples cannot be loaded, more than 1% (data.on_bad_sample") == 1
    assert "Traceback" not in outcome.output
    assert len(losses(run_of(tmp_path))) == 5


@pytest.mark.parametrize(("error", "workers"), [("ValueError", 0), ("KeyError", 2), ("OfTwo", 2)])
def test_errors_of_a_sample_are_left_out_whatever_their_class(tmp_path: Path, error: str, workers: int) -> None:
    data = {"args": {"bad": BAD, "error": error}, "workers": workers}
    train(tmp_path, arguments(tmp_path, data=data)).check()
    assert listed(run_of(tmp_path))["indices"] == sorted(BAD)


def test_a_mistake_in_the_code_of_the_data_stops_the_run(tmp_path: Path) -> None:
    outcome = train(tmp_path, arguments(tmp_path, data={"args": {"bad": BAD, "error": "TypeError"}}))
    assert outcome.codes == [1]
    assert "TypeError: nothing there at" in status(run_of(tmp_path))["reason"]
    assert "distloop: loading sample " in outcome.output


def test_a_validation_stops_at_a_bad_sample_and_its_step_is_saved(tmp_path: Path) -> None:
    words = arguments(tmp_path, [], (5,), validate={"every_steps": 7, "batch_size": 2})  # the rehearsal has the first
    outcome = train(tmp_path, words)
    assert outcome.codes == [1]
    assert "distloop: loading sample 5 of the validation data" in outcome.output
    assert status(run_of(tmp_path))["step"] == 7


def test_the_same_bits_without_bad_samples_whatever_the_setting(tmp_path: Path) -> None:
    found = []
    for setting in ("stop", "skip"):
        folder = tmp_path / setting
        train(folder, arguments(folder, [], data={"on_bad_sample": setting}), 2).check()
        found.append(
            (losses(run_of(folder)), {name: tensor.tolist() for name, tensor in weights(run_of(folder)).items()})
        )
    assert found[0] == found[1]


@pytest.mark.parametrize(("world_size", "workers"), [(1, 0), (2, 2)])
def test_a_damaged_picture_is_named_with_its_path_and_one_may_go_on_without_it(
    tmp_path: Path, world_size: int, workers: int
) -> None:
    [path] = write_pictures(tmp_path / "pictures", 120, [71])
    settings = {
        "data": {"name": "image_folder", "root": str(tmp_path / "pictures"), "args": {"crop": 32, "resize": 32}},
        "model": {"name": "mlp", "args": {"hidden": 8}},
        "device": "cpu",
        "batch": {"global_size": 20},
        "train": {"epochs": 1},
    }
    words = ["--config", str(write_config(tmp_path, settings)), "--data.workers", str(workers)]
    outcome = train(tmp_path, words, world_size)
    assert outcome.codes == [2] * world_size, outcome.output
    assert outcome.output.count(f"distloop: {path} cannot be loaded: OSError: image file is truncated") == 1
    assert "It is sample 71 of the training data (data.name = 'image_folder')" in outcome.output
    assert "--data.on-bad-sample skip" in outcome.output
    assert "Traceback" not in outcome.output
    outcome = train(tmp_path, [*words, "--data.on-bad-sample", "skip"], world_size).check()  # the same run goes on
    assert f"sample 71 ({path}): OSError: image file is truncated" in outcome.output.partition("finished: ")[2]
