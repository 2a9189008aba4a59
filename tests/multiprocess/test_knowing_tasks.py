"""A task knows the step, gives sums by name and batches of its own: the same over stops, ranks and micro-batches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.multiprocess.test_exact_resume import check_same, go_on, newest, stop
from tests.multiprocess.test_weights import refused
from tests.tools.ranks import train, write_config
from tests.tools.records import rows

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
        for row in rows(run, "validate"):
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
        assert state["losses"] == 30
        assert len(set(state["history"].tolist())) == 3
    else:
        averaged, last = (load_file(newest(run) / name) for name in reversed(files))
        assert last["temperature"] != 1
        assert last["temperature"] != averaged["temperature"]
