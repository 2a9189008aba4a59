"""batch.micro_size: auto finds the largest micro-batch that fits on all ranks, and trains what its number trains."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file

from tests.multiprocess.test_exact_resume import bits, go_on, newest, stop
from tests.tools.ranks import Outcome, train, write_config
from tests.tools.records import all_rows, found, losses, rows

SETTINGS: dict[str, Any] = {
    "device": "cpu",
    "data": "digits",
    "model": {"name": "tests.lab.memory:LimitedNet", "args": {"most": 20}},
    "task": "tests.lab.resuming:StoppedClassification",
    "optim": {"name": "adamw", "clip_norm": 1.0, "ema_decay": 0.9},
    "batch": {"global_size": 64},
    "train": {"steps": 8},
    "log": {"every_steps": 1},
    "validate": {"every_steps": 4},
}
AUTO = ["--batch.micro-size", "auto", "--name", "run"]


def config(folder: Path, **settings: Any) -> list[str]:
    return ["--config", str(write_config(folder, {**SETTINGS, **settings}))]


def recorded(folder: Path) -> Any:
    return yaml.safe_load((folder / "runs/run/config.yaml").read_text())["batch"]["micro_size"]


# What fails on one rank, fits on none; a share of 32 or 64 has 16 as the largest divisor up to 20.
@pytest.mark.parametrize("world_size", [pytest.param(1, marks=pytest.mark.long), 2])
def test_the_size_that_fits_on_all_ranks_is_found_recorded_and_kept_by_a_continued_run(
    tmp_path: Path, world_size: int
) -> None:
    model = {"name": SETTINGS["model"]["name"], "args": {"most": 20, "rank": world_size - 1}}
    base = config(tmp_path, model=model)
    train(tmp_path, [*base, "--batch.micro-size", "16", "--name", "whole"], world_size).check()
    step = stop(tmp_path, [*base, *AUTO], world_size, 5 * 64 // 16 // world_size)
    first = (tmp_path / ".output-0").read_text()
    assert f"batch.micro_size: auto: 16, since 32 samples at once ran out of memory on 1 of {world_size} rank" in first
    assert "BatchNorm (inner.1, inner.4, inner.8" in first
    assert "dropout (inner.15) draws for a micro-batch" in first
    assert f"× {4 // world_size} micro-batches × 16 samples" in first
    assert recorded(tmp_path) == 16
    outcome = go_on(tmp_path, [*base, *AUTO], world_size, step)
    assert "batch.micro_size: auto: 16, as in runs/run/config.yaml" in outcome.output
    assert "ran out of memory" not in outcome.output, "the size is not tried again"
    assert recorded(tmp_path) == 16
    run, whole = (tmp_path / "runs" / name for name in ("run", "whole"))
    for name in ("model.safetensors", "averaged.safetensors"):
        assert bits(newest(run) / name) == bits(newest(whole) / name)
    assert losses(run) == losses(whole)


@pytest.mark.parametrize(
    ("world_size", "backward"), [(2, True), *(pytest.param(1, each, marks=pytest.mark.long) for each in (True, False))]
)
def test_nothing_stays_of_the_trials(tmp_path: Path, world_size: int, backward: bool) -> None:
    """Model and task change with each pass, in tensors, lists, arrays and numbers, and follow what has changed."""
    args = {"num_outputs": 10, "most": 9, "rank": 0, "backward": backward}
    settings = {"model": {"name": "tests.lab.memory:LimitedRestless", "args": args}}
    base = config(tmp_path, **settings, task="tests.lab.memory:LimitedRestful", optim={"name": "adamw"})
    results = []
    for words in (AUTO, ["--batch.micro-size", "8", "--name", "number"]):
        train(tmp_path, [*base, *words], world_size).check()
        run = tmp_path / "runs" / words[-1]
        weights = load_file(newest(run) / "model.safetensors")
        results.append((weights, [found(row) for row in all_rows(run)]))
    assert recorded(tmp_path) == 8
    (weights, logged), (others, other_rows) = results
    assert logged == other_rows
    assert all(tensor.equal(others[name]) for name, tensor in weights.items())


def test_where_all_fits_a_ranks_whole_share_is_taken(tmp_path: Path) -> None:
    base = config(tmp_path, model="linear", task="tests.lab.rehearsed:Contrastive", train={"steps": 2})
    outcome = train(tmp_path, [*base, *AUTO]).check()
    assert "batch.micro_size: auto: 64, a rank's whole share, which fits into memory; a CPU" in outcome.output
    assert "Contrastive.loss() compares the samples of a micro-batch with each other" in outcome.output
    assert recorded(tmp_path) == 64


def test_a_model_that_does_not_even_fit_with_one_sample_is_refused(tmp_path: Path) -> None:
    model = {"name": SETTINGS["model"]["name"], "args": {"most": 0, "rank": 1}}
    outcome = train(tmp_path, [*config(tmp_path, model=model), *AUTO], 2)
    assert outcome.codes == [2, 2], outcome.output
    assert outcome.output.count("not even one sample at once fits into the memory of 1 of 2 ranks") == 1
    assert "Traceback" not in outcome.output


def test_a_loop_that_tries_nothing_is_told_to(tmp_path: Path) -> None:
    outcome = train(tmp_path, [*config(tmp_path), *AUTO], loop="tests.lab.unrehearsed")
    assert outcome.codes == [2], outcome.output
    assert "batch.micro_size: auto is found by rehearse(…), which this loop does not call" in outcome.output


def later(folder: Path, when: str, *words: str, ranks: int = 1) -> Outcome:
    task = {"name": "tests.lab.memory:RunsOutLater", "args": {"when": when}}
    base = config(folder, model="linear", task=task, train={"steps": 6}, checkpoint={"every_steps": 2})
    return train(folder, [*base, "--name", "run", *words], ranks)


@pytest.mark.parametrize("when", ["training", pytest.param("validation", marks=pytest.mark.long)])
def test_memory_that_runs_out_later_ends_the_run_with_the_size_to_set(tmp_path: Path, when: str) -> None:
    outcome = later(tmp_path, when, "--batch.micro-size", "32")
    assert outcome.codes == [1], outcome.output
    option = "--batch.micro-size 16" if when == "training" else "--validate.batch-size 128"
    assert f"out of memory: set {option}, and the same command goes on" in outcome.output
    key, _, value = option.partition(" ")
    outcome = later(tmp_path, "never", key, value, "--resume", "extend")  # another task.args
    assert outcome.codes == [0], outcome.output
    assert [row["step"] for row in rows(tmp_path / "runs/run", "train")] == [1, 2, 3, 4, 5, 6]
