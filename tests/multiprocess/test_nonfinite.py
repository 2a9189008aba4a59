"""A step that is not a number: all ranks decide alike, the message says where it was, no checkpoint holds it."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional

from distloop.data.order import Order
from distloop.run.checkpoint import published_in, verify
from distloop.training.groups import parameter_groups
from tests.lab.nonfinite import SAMPLES, network, points
from tests.tools import stage
from tests.tools.ranks import Outcome, train, write_config
from tests.tools.records import largest_difference, losses, rows, status, steps_saved, weights

GLOBAL_BATCH, STEPS_PER_EPOCH = 12, SAMPLES // 12
SETTINGS: dict[str, Any] = {
    "data": {"name": "tests.lab.nonfinite:points"},
    "model": "tests.lab.nonfinite:network",
    "task": {"name": "tests.lab.nonfinite:Watched"},
    "optim": {"name": "adamw", "lr": 0.01, "clip_norm": 0.5},
    "schedule": {"name": "constant"},
    "dtype": "float64",
    "batch": {"global_size": GLOBAL_BATCH, "micro_size": 3},
    "train": {"steps": 16},
    "log": {"every_steps": 100},
    "validate": {"every_steps": 100},
    "checkpoint": {"every_steps": 4, "keep_last": 10},
}


def micro_batch(step: int, part: int, size: int = 3) -> list[int]:
    """The samples of the `part`th micro-batch of the `step`th step (both from 1), over all ranks."""
    epoch, place = divmod(step - 1, STEPS_PER_EPOCH)
    start = place * GLOBAL_BATCH + (part - 1) * size
    return Order(SAMPLES, 0)(epoch, start, start + size).tolist()


def start(folder: Path, settings: dict[str, Any], world_size: int, *more: str, **environment: str) -> Outcome:
    return train(folder, ["--config", str(write_config(folder, settings)), *more], world_size, environment)


def with_bad_data(sample: int, value: str = "nan", **changes: Any) -> dict[str, Any]:
    data = {"name": "tests.lab.nonfinite:points", "args": {"bad": [sample], "value": value}}
    return {**SETTINGS, "data": data, **changes}


def with_bad_loss(sample: int, how: str, **changes: Any) -> dict[str, Any]:
    task = {"name": "tests.lab.nonfinite:Watched", "args": {"loss_of": [sample], "how": how}}
    return {**SETTINGS, "task": task, **changes}


def check_finite(run: Path) -> None:
    """No checkpoint holds a number that is none."""
    for path in published_in(run / "checkpoints"):
        verify(path)
        for name, tensor in load_file(path / "model.safetensors").items():
            assert torch.isfinite(tensor).all(), f"{name} in {path}"
        for moments in torch.load(path / "optimizer.pt", weights_only=True)["state"].values():
            assert all(torch.isfinite(tensor).all() for tensor in moments.values() if tensor is not None), path
        assert all(math.isfinite(number) for number in json.loads((path / "state.json").read_text())["epoch_sums"])


def listed(samples: list[int]) -> str:
    return ", ".join(map(str, samples))


# ---- stop ----------------------------------------------------------------------------------------------------

# Micro-batch m of rank r is part m · W + r of the global batch: the third part of four is the third micro-batch of
# one rank, and the second of rank 0 of two; the fourth is the second of rank 1.


@pytest.mark.parametrize(
    ("world_size", "part", "where"),
    [
        (1, 3, "rank 0 is not either (micro-batch 3 of 4,"),
        (2, 4, "rank 1 is not either (micro-batch 2 of 2,"),
        pytest.param(2, 3, "rank 0 is not either (micro-batch 2 of 2,", marks=pytest.mark.long),
        pytest.param(4, 3, "rank 2 is not either (", marks=pytest.mark.long),
    ],
)
def test_a_bad_sample_stops_the_run_and_is_named_and_no_checkpoint_holds_its_step(
    tmp_path: Path, world_size: int, part: int, where: str
) -> None:
    samples = micro_batch(7, part)
    settings = with_bad_data(samples[1])
    message = f"The gradient of step 7 is not finite (nan): the loss of {where}"
    for attempt in (1, 2):  # the same command does the same again
        outcome = start(tmp_path, settings, world_size)
        assert outcome.codes == [1] * world_size, outcome.output
        assert outcome.output.count("The gradient of step") == 1
        assert message in outcome.output
        assert f"3 samples: {listed(samples)}; epoch 1)." in outcome.output
        assert outcome.output.count("--train.on-nonfinite skip") == 1
        assert "Traceback" not in outcome.output
        run = tmp_path / "runs" / "run"
        assert status(run)["first_step"] == (4 if attempt == 2 else 0)
        # Nothing is logged between: it is the save of step 8 that looks.
        assert steps_saved(run) == [4]
        check_finite(run)
        assert status(run)["state"] == "failed"
        assert message in status(run)["reason"]
        assert (status(run)["step"], status(run)["attempt"]) == (4, attempt)
    outcome = start(tmp_path, settings, world_size, "--train.on-nonfinite", "skip").check()
    assert status(run)["first_step"] == 4
    assert outcome.output.count(message) == 1
    # The second epoch meets the same sample in another step.
    assert outcome.output.count("It was left out.") == 2
    assert rows(run, "train")[-1]["skipped_steps"] == 2
    assert status(run)["state"] == "finished"
    check_finite(run)


@pytest.mark.parametrize(
    ("how", "world_size", "said"),
    [
        ("inf", 1, "the loss of rank 0 is not either"),
        ("backward", 2, "while the losses of all ranks are (12 samples: "),
        pytest.param("-inf", 2, "the loss of rank 1 is not either", marks=pytest.mark.long),
        pytest.param("backward", 1, "while the losses of all ranks are (12 samples: ", marks=pytest.mark.long),
    ],
)
def test_an_infinite_loss_and_a_bad_gradient_of_a_good_loss_stop_the_run(
    tmp_path: Path, how: str, world_size: int, said: str
) -> None:
    part = 2 * world_size  # of rank 0, or 1
    settings = with_bad_loss(micro_batch(10, part)[0], how, log={"every_steps": 1})
    # Each sample comes once an epoch: in the first epoch earlier than step 10.
    first = next(
        step
        for step in range(1, 11)
        if micro_batch(10, part)[0] in [sample for part in (1, 2, 3, 4) for sample in micro_batch(step, part)]
    )
    outcome = start(tmp_path, settings, world_size)
    assert outcome.codes == [1] * world_size, outcome.output
    assert outcome.output.count(f"The gradient of step {first} is not finite") == 1
    run = tmp_path / "runs" / "run"
    if how == "backward":
        whole = [sample for part in (1, 2, 3, 4) for sample in micro_batch(first, part)]
        assert f"{said}{listed(whole[:8])}, …; epoch 1)" in outcome.output
    assert steps_saved(run) == list(range(4, first, 4))
    check_finite(run)
    assert [row["step"] for row in rows(run, "train")] == list(range(1, first)), "the bad step was logged"


def test_a_save_that_is_due_long_before_the_next_row_is_not_made_of_a_bad_step(tmp_path: Path) -> None:
    """In the very step of the save, and in the one before a stop: nothing of it is in a checkpoint."""
    settings = with_bad_data(micro_batch(8, 1)[0])
    outcome = start(tmp_path, settings, 2)
    assert outcome.codes == [1, 1]
    run = tmp_path / "runs" / "run"
    assert steps_saved(run) == [4]
    assert "step 8" in status(run)["reason"]
    # SIGTERM comes in step 5, before the bad one; if the ranks agree in time, they stop before it.
    stage.interrupt(tmp_path, "loss", 2 * 3 + 1, rank=1)
    outcome = start(tmp_path, settings, 2)
    assert outcome.codes in ([0, 0], [1, 1])
    assert steps_saved(run)[-1] < 8
    check_finite(run)


@pytest.mark.parametrize("policy", ["stop", "skip"])
def test_an_update_that_overflows_though_its_gradient_is_finite_is_in_no_checkpoint(
    tmp_path: Path, policy: str
) -> None:
    settings = {**SETTINGS, "dtype": "float32", "checkpoint": {"every_steps": 1}}
    settings["optim"] = {"name": "sgd", "lr": 1e40}
    outcome = start(tmp_path, settings, 2, "--train.on-nonfinite", policy)
    assert outcome.codes == [1, 1], outcome.output
    assert outcome.output.count("parameters are not finite after step 1") == 1
    run = tmp_path / "runs" / "run"
    assert steps_saved(run) == []
    assert status(run)["state"] == "failed"


# ---- skip ----------------------------------------------------------------------------------------------------


def by_hand(
    settings: dict[str, Any], world_size: int, left_out: set[int], tokens: bool = False
) -> tuple[dict[str, torch.Tensor], dict[int, dict[str, torch.Tensor]], list[float]]:
    """The same training in plain PyTorch without the steps in `left_out`: state of rank 0's model, the optimizer's
    state, and the sums of the losses and of the weights of the last epoch."""
    data = points().train  # the bad samples are never used
    torch.manual_seed(0)
    models = [network(3).double() for _ in range(world_size)]
    for model in models:
        model.load_state_dict(models[0].state_dict())
    optim = settings["optim"]
    groups = parameter_groups(models[0], optim.get("weight_decay", 0.05))
    optimizer: torch.optim.Optimizer
    if optim["name"] == "sgd":
        optimizer = torch.optim.SGD(groups, lr=optim["lr"], momentum=0.9, foreach=False)
    else:
        kind = torch.optim.AdamW if optim["name"] == "adamw" else torch.optim.Adam
        optimizer = kind(groups, lr=optim["lr"], foreach=False)
    sums = [0.0, 0.0]
    for step in range(1, settings["train"]["steps"] + 1):
        if step % STEPS_PER_EPOCH == 1:
            sums = [0.0, 0.0]
        if step in left_out:
            continue
        total = weight = torch.zeros((), dtype=torch.float64)
        for part in range(4):
            indices = micro_batch(step, part + 1)
            targets = data.targets[indices]
            losses = functional.cross_entropy(
                models[part % world_size](data.inputs[indices]), targets, reduction="none"
            )
            weights = 2.0 - (targets == 0).double() if tokens else torch.ones(3)
            total, weight = total + (losses * weights).sum(), weight + weights.sum()
        optimizer.zero_grad()
        for model in models[1:]:
            model.zero_grad()
        (total / weight).backward()
        for parameter, *others in zip(*(model.parameters() for model in models), strict=True):
            assert parameter.grad is not None
            for other in others:
                assert other.grad is not None
                parameter.grad += other.grad
        torch.nn.utils.clip_grad_norm_(models[0].parameters(), optim["clip_norm"])
        optimizer.step()
        with torch.no_grad():
            for parameter, *others in zip(*(model.parameters() for model in models), strict=True):
                for other in others:
                    other.copy_(parameter)
        sums = [sums[0] + float(total.detach()), sums[1] + float(weight)]
    return dict(models[0].state_dict()), optimizer.state_dict()["state"], sums


# The first step too: moments are made in it. With world size, and how many of the optimizers.
@pytest.mark.parametrize(
    ("optimizer", "world_size", "bad_step", "how"),
    [
        ("adamw", 2, 6, "data"),
        ("sgd", 1, 6, "backward"),
        ("sgd", 1, 1, "data"),
        ("adam", 1, 1, "tokens"),
        *(
            pytest.param(optimizer, world_size, bad_step, how, marks=pytest.mark.long)
            for optimizer in ("sgd", "adam", "adamw")
            for world_size in (1, 2)
            for bad_step in (1, 7)
            for how in ("data", "inf", "backward", "tokens")
        ),
    ],
)
def test_a_step_that_is_left_out_leaves_no_trace(
    tmp_path: Path, optimizer: str, world_size: int, bad_step: int, how: str
) -> None:
    (tmp_path / "seen").mkdir()
    sample = micro_batch(bad_step, world_size)[2]
    settings = with_bad_data(sample) if how in ("data", "tokens") else with_bad_loss(sample, how)
    task = {"name": "tests.lab.nonfinite:Watched", **(settings["task"])}
    task["args"] = {**task.get("args", {}), "folder": "seen"}
    task["name"] += "Tokens" if how == "tokens" else ""
    settings |= {
        "task": task,
        "optim": {"name": optimizer, "lr": 0.05, "clip_norm": 0.5, "weight_decay": 0.02},
        "log": {"every_steps": 3},
        "train": {"steps": 8, "on_nonfinite": "skip"},
    }
    outcome = start(tmp_path, settings, world_size).check()
    run = tmp_path / "runs" / "run"
    assert outcome.output.count("\ndistloop: WARNING: The gradient of step") == 1
    assert f"WARNING: The gradient of step {bad_step} is not finite" in outcome.output
    assert outcome.output.count("It was left out.") == 1

    expected, moments, sums = by_hand(settings, world_size, {bad_step}, how == "tokens")
    found = weights(run)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert float((found[name] - tensor).abs().max()) < 1e-11, name
    assert int(found["1.num_batches_tracked"]) == 7 * 4 // world_size
    newest = published_in(run / "checkpoints")[-1]
    stored = torch.load(newest / "optimizer.pt", weights_only=True)["state"]
    assert stored.keys() == moments.keys()
    for key, values in moments.items():
        assert stored[key].keys() == values.keys()
        for name, tensor in values.items():
            assert float((stored[key][name] - tensor).abs().max()) < 1e-11, f"{name} of {key}"
    state = json.loads((newest / "state.json").read_text())
    extra = 12 * 7 if how == "backward" else 0  # the root of one, for each other sample
    assert state["skipped_steps"] == 1
    for row in rows(run, "train"):
        assert row["skipped_steps"] == (row["step"] >= bad_step)
        assert row["running_loss"] is not None
    assert rows(run, "epoch")[0]["loss"] == pytest.approx((sums[0] + extra) / sums[1], rel=1e-10)
    check_finite(run)

    seen = [(tmp_path / "seen" / str(rank)).read_text().splitlines() for rank in range(world_size)]
    warm_up = 2 if world_size > 1 else 1  # passes of the rehearsal
    micro_batches = 4 // world_size
    assert all(len(digests) == warm_up + 8 * micro_batches for digests in seen)
    assert all(digests == seen[0] for digests in seen), "the ranks' parameters differ"
    before, after = (seen[0][warm_up + step * micro_batches] for step in (bad_step - 1, bad_step))
    assert before == after, "the step that was left out has changed parameters"
    assert len(set(seen[0])) == 7


def test_steps_that_were_left_out_are_counted_once_over_attempts(tmp_path: Path) -> None:
    first, second = micro_batch(2, 1)[0], micro_batch(5, 4)[1]
    data = {"name": "tests.lab.nonfinite:points", "args": {"bad": [first, second]}}
    settings = {**SETTINGS, "data": data, "train": {"steps": 8, "on_nonfinite": "skip"}}
    settings |= {"log": {"every_steps": 1}, "checkpoint": {"every_steps": 100}}
    start(tmp_path, settings, 2, "--name", "whole").check()
    stopped = ("--name", "stopped")
    stage.interrupt(tmp_path, "loss", 2 * 2 + 1, rank=1)  # in step 3
    start(tmp_path, settings, 2, *stopped, TEST_SLOW="0.015").check()
    run, whole = tmp_path / "runs" / "stopped", tmp_path / "runs" / "whole"
    assert status(run)["state"] == "stopped"
    assert 3 <= status(run)["step"] < 8
    outcome = start(tmp_path, settings, 2, *stopped).check()
    assert "The gradient of step 2" not in outcome.output
    assert [row["skipped_steps"] for row in rows(run, "train")] == [0, 1, 1, 1, 2, 2, 2, 2]
    assert [row["loss"] is None for row in rows(run, "train")] == [step in (2, 5) for step in range(1, 9)]
    assert losses(run) == losses(whole)
    assert largest_difference(weights(run), weights(whole)) == 0


@pytest.mark.parametrize(
    ("optimizer", "world_size"), [("adamw", 2), ("sgd", 1), pytest.param("adam", 2, marks=pytest.mark.long)]
)
def test_without_a_bad_step_both_policies_train_the_same_bits(tmp_path: Path, optimizer: str, world_size: int) -> None:
    settings = {
        "data": "digits",
        "model": {"name": "cnn", "args": {"width": 4, "norm": "batch", "dropout": 0.2}},
        "optim": {"name": optimizer, "clip_norm": 1.0},
        "batch": {"global_size": 64, "micro_size": 16},
        "train": {"steps": 15},
        "log": {"every_steps": 1},
    }
    for policy in ("stop", "skip"):
        start(tmp_path, settings, world_size, "--name", policy, "--train.on-nonfinite", policy).check()
    stop, skip = tmp_path / "runs" / "stop", tmp_path / "runs" / "skip"
    assert losses(stop) == losses(skip)
    assert largest_difference(weights(stop), weights(skip)) == 0
    one, other = (
        torch.load(published_in(run / "checkpoints")[-1] / "optimizer.pt", weights_only=True)["state"]
        for run in (stop, skip)
    )
    for key, moments in one.items():
        for name, tensor in moments.items():
            assert torch.equal(tensor, other[key][name]), f"{name} of {key}"
