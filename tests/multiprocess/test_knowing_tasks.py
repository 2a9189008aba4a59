"""A task knows the step, gives sums by name and batches of its own, has a state and parameters: the same over stops,
ranks and micro-batches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional

from distloop.data.datasets import digits
from distloop.data.order import Order
from distloop.data.seeding import Place, uniforms
from distloop.training.models import mlp
from tests.lab.knowing import Weighing
from tests.multiprocess.test_evaluate import evaluate
from tests.multiprocess.test_exact_resume import check_same, go_on, newest, stop
from tests.multiprocess.test_weights import refused
from tests.tools.by_hand import seed
from tests.tools.ranks import Outcome, train, write_config
from tests.tools.records import largest_difference, rows, steps_saved

LAB = "tests.lab.knowing"
# 22 steps an epoch; micro-batches of 16 samples on one rank and on two.
SETTINGS: dict[str, Any] = {
    "data": "digits",
    "model": {"name": "mlp", "args": {"hidden": 16}},
    "task": f"{LAB}:Knowing",
    "batch": {"global_size": 64, "micro_size": 16},
    "train": {"steps": 30},
    "log": {"every_steps": 1},
    "validate": {"every_steps": 11},
}
OWN = ("hits", "margin", "now_step", "now_epoch", "now_total_steps", "now_training")


RANKS = pytest.mark.parametrize("world_size", [1, 2])


def own(run: Path, kind: str) -> list[list[float]]:
    return [[row[name] for name in OWN] for row in rows(run, kind)]


def mean_share(step: int) -> float:
    """Of the four micro-batches of a step, which draw from their places in it."""
    total = 0.0
    for part in range(4):
        seed(0, step, part, Place.FORWARD)
        total += float(torch.rand(16, 1, 1, 1).double().sum())
    return total / 64


def test_a_task_knows_the_step_and_its_sums_and_batches_are_those_of_any_number_of_ranks(tmp_path: Path) -> None:
    arguments = ["--config", str(write_config(tmp_path, SETTINGS)), "--name"]
    runs = {}
    for world_size, calls in ((1, 15 * 4 - 1), (2, 15 * 2 - 1)):
        whole, stopped = f"whole{world_size}", f"stopped{world_size}"
        train(tmp_path, [*arguments, whole], world_size).check()
        go_on(tmp_path, [*arguments, stopped], world_size, stop(tmp_path, [*arguments, stopped], world_size, calls))
        run = runs[world_size] = tmp_path / "runs" / whole
        check_same(tmp_path / "runs" / stopped, run)
        assert own(tmp_path / "runs" / stopped, "train") == own(run, "train")
        told = [values[2:] for values in own(run, "train")]
        assert told == [[step, step // 22, 30, 1] for step in range(30)]
        told = [values[2:] for values in own(run, "validate")]
        assert told == [[step, step // 22, 30, 0] for step in (11, 22, 30)]
        for row in rows(run, "train"):
            assert row["shares"] == pytest.approx(mean_share(row["step"] - 1), rel=1e-6)
        for row in rows(run, "validate"):
            assert row["shares"] == 0  # as they are
            assert row["hits"] == row["accuracy"]  # of both, the mean over the samples
            assert row["margin"] == -1  # as summary() says
    for kind in ("train", "validate"):
        for one, two in zip(own(runs[1], kind), own(runs[2], kind), strict=True):
            assert one == pytest.approx(two, rel=1e-3)


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("taken", ["task.loss(): 'lr' is a name that distloop uses itself", "'own_lr'"]),
        ("no number", ["task.loss(): texts is a str"]),
        ("vector", ["task.loss(): each is a Tensor of shape [10]"]),
        ("list", ["must return a dict of values by name as its third value; it gave a list"]),
        ("four", ["a dict and a dict. Return two", "A third value, if any"]),
        ("twice", ["task.loss() and task.metrics() both return 'correct'"]),
        ("no batch", ["Wrong.augment_batch() returned None"]),
    ],
)
def test_what_is_wrong_with_it_is_said_before_the_first_step(tmp_path: Path, kind: str, words: list[str]) -> None:
    settings = {**SETTINGS, "task": {"name": f"{LAB}:Wrong", "args": {"kind": kind}}}
    refused(train(tmp_path, ["--config", str(write_config(tmp_path, settings))]), *words)


def test_sums_of_one_rank_alone_are_named(tmp_path: Path) -> None:
    settings = {**SETTINGS, "task": {"name": f"{LAB}:Wrong", "args": {"kind": "of one rank"}}}
    refused(
        train(tmp_path, ["--config", str(write_config(tmp_path, settings))], 2), "sums of other names on some ranks"
    )


# ---- a state ---------------------------------------------------------------------------------------------------


@RANKS
@pytest.mark.parametrize("task", ["Remembering", "Learning"])
def test_the_state_and_the_parameters_of_a_task_go_on_where_they_were(
    tmp_path: Path, task: str, world_size: int
) -> None:
    settings = {**SETTINGS, "task": f"{LAB}:{task}", "optim": {"clip_norm": 1.0, "ema_decay": 0.9}}
    arguments = ["--config", str(write_config(tmp_path, settings)), "--name"]
    train(tmp_path, [*arguments, "whole"], world_size).check()
    calls = 15 * 4 // world_size - 1
    go_on(tmp_path, [*arguments, "run"], world_size, stop(tmp_path, [*arguments, "run"], world_size, calls))
    run, whole = (tmp_path / "runs" / name for name in ("run", "whole"))
    check_same(run, whole)
    assert own(run, "train") == own(whole, "train")
    files = {"Remembering": ["task.pt"], "Learning": ["task.safetensors", "averaged_task.safetensors"]}[task]
    for name in files:
        assert (newest(run) / name).read_bytes() == (newest(whole) / name).read_bytes(), name
    if task == "Remembering":
        state = torch.load(newest(run) / "task.pt", weights_only=True)
        assert state["losses"] == 30 * 4 // world_size  # nothing of the rehearsal
        assert len(set(state["history"].tolist())) == 3
    else:
        averaged, last = (load_file(newest(run) / name) for name in reversed(files))
        assert last["temperature"] != 1
        assert last["temperature"] != averaged["temperature"]


def by_hand(steps: int, clip_norm: float, decay: float) -> tuple[list[tuple[float, float]], nn.Module, dict[str, Any]]:
    """Digits, a small MLP, the task Weighing and SGD, in float64 and in one batch a step: (loss, norm of the gradient)
    of each step, the task, and the average of its parameters."""
    data = digits().train
    seed(0, 0, 0, Place.TASK)
    task = Weighing().double()
    torch.manual_seed(0)
    model = mlp((1, 8, 8), 10, hidden=16).double()
    parameters = [*model.parameters(), *task.parameters()]
    optimizer = torch.optim.SGD(parameters, lr=0.1, momentum=0.9)
    order, history = Order(len(data), 0), []
    average: dict[str, Any] = {}
    for step in range(steps):
        indices = order(0, step * 64, step * 64 + 64)
        images, targets = data.batch(indices, uniforms(0, 0, indices, 3))
        outputs = task.layer(model((images.double() / 255 - 0.305) / 0.376)) / task.temperature
        loss = functional.cross_entropy(outputs, targets) / 2  # two views of each
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(parameters, clip_norm)
        optimizer.step()
        optimizer.zero_grad()
        history.append((loss.item(), norm.item()))
        keep = min(decay, (1 + step) / (10 + step)) if step else 0.0
        average = {name: keep * average.get(name, 0) + (1 - keep) * p.detach() for name, p in task.named_parameters()}
    return history, task, average


@pytest.mark.parametrize(("world_size", "micro_size"), [(1, 64), (2, 8)])
def test_parameters_of_a_task_are_trained_as_in_a_loop_written_by_hand(
    tmp_path: Path, world_size: int, micro_size: int
) -> None:
    settings = {
        **SETTINGS,
        "task": f"{LAB}:Weighing",
        "optim": {"name": "sgd", "lr": 0.1, "weight_decay": 0, "clip_norm": 0.04, "ema_decay": 0.5},
        "schedule": "constant",
        "dtype": "float64",
        "batch": {"global_size": 64, "micro_size": micro_size},
        "train": {"steps": 12},
        "validate": {"every_steps": 12},
    }
    train(tmp_path, ["--config", str(write_config(tmp_path, settings))], world_size).check()
    history, task, average = by_hand(12, 0.04, 0.5)
    run = tmp_path / "runs" / "run"
    logged = rows(run, "train")
    assert [row["loss"] for row in logged] == pytest.approx([loss for loss, _ in history], rel=1e-10)
    assert [row["gradient_norm"] for row in logged] == pytest.approx([norm for _, norm in history], rel=1e-9)
    assert max(norm for _, norm in history) > 0.04  # so that they were clipped, with those of the model
    saved = load_file(newest(run) / "task.safetensors")
    assert largest_difference(saved, dict(task.state_dict())) < 1e-10
    assert largest_difference(load_file(newest(run) / "averaged_task.safetensors"), average) < 1e-10
    if world_size == 1:
        row, metrics = rows(run, "validate")[-1], evaluate(tmp_path, 1, str(run))
        assert [metrics[name] for name in ("loss", "accuracy")] == [row[name] for name in ("loss", "accuracy")]


@RANKS
def test_a_step_that_is_left_out_leaves_a_tasks_parameters_and_buffers_as_they_were(
    tmp_path: Path, world_size: int
) -> None:
    settings = {**SETTINGS, "task": f"{LAB}:Overflowing", "train": {"steps": 3, "on_nonfinite": "skip"}}
    settings |= {"checkpoint": {"every_steps": 1, "keep_last": 5}, "validate": {"every_steps": 3}}
    train(tmp_path, ["--config", str(write_config(tmp_path, settings))], world_size).check()
    saved = [tmp_path / "runs" / "run" / "checkpoints" / f"step_{step:08d}" for step in (1, 2, 3)]
    one, two, three = (load_file(path / "task.safetensors") for path in saved)
    assert all(torch.equal(two[name], three[name]) for name in two)
    assert all(not torch.equal(one[name], two[name]) for name in two)


@pytest.mark.parametrize(
    ("task", "args", "words"),
    [
        ("Learning", {"where": "unused"}, "The task's spare got no gradient in the rehearsal"),
        ("Learning", {"where": "the model"}, "Learning keeps the model, or a part of it, as an attribute (kept."),
        ("Learning", {"where": "own values"}, "the task's proxies.weight begins with other values on rank 1"),
        ("Remembering", {"kind": "of its rank"}, "Remembering.state_dict() gives something else on rank 1"),
    ],
)
def test_what_ranks_would_not_train_alike_is_refused(
    tmp_path: Path, task: str, args: dict[str, Any], words: str
) -> None:
    settings = {**SETTINGS, "task": {"name": f"{LAB}:{task}", "args": args}}
    refused(train(tmp_path, ["--config", str(write_config(tmp_path, settings))], 2), words)


def test_a_checkpoint_without_the_state_of_a_task_or_with_one_too_many_is_told(tmp_path: Path) -> None:
    def start(task: str, steps: int, **args: Any) -> Outcome:
        settings = {**SETTINGS, "task": {"name": f"{LAB}:{task}", "args": args}, "train": {"steps": steps}}
        return train(tmp_path, ["--config", str(write_config(tmp_path, settings)), "--resume", "extend"])

    start("Knowing", 2).check()  # as one that was begun before tasks had a state
    assert "step_00000002 does not hold the task's state, which begins anew" in start("Remembering", 4).check().output
    refused(start("Knowing", 6), "holds the state of a task, and this task has none")
    refused(start("Learning", 6), "holds the state of another task")
    assert steps_saved(tmp_path / "runs" / "run")[-1] == 4
