"""A run that is stopped and continued ends with the bits of the one that was not; its directory is all it needs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from distloop.run.checkpoint import published_in, verify
from tests.lab.resuming import store_points
from tests.tools import stage
from tests.tools.ranks import Outcome, train, write_config
from tests.tools.records import found, largest_difference, losses, rows, status, steps_saved, weights

# Everything that could carry a state: augmentation, BatchNorm, dropout, moments, accumulation, clipping, averaging.
SETTINGS: dict[str, Any] = {
    "data": "digits",
    "model": {"name": "cnn", "args": {"width": 8, "norm": "batch", "dropout": 0.3}},
    "task": "tests.lab.resuming:StoppedClassification",
    "optim": {"name": "adamw", "clip_norm": 1.0, "ema_decay": 0.99},
    "batch": {"global_size": 64, "micro_size": 8},
    "train": {"steps": 36},
    "log": {"every_steps": 1},
    "checkpoint": {"every_steps": 30},
    "validate": {"every_steps": 15},
}
STEPS_PER_EPOCH = 22
SMALL: dict[str, Any] = {
    "data": "diabetes",
    "model": "linear",
    "task": "tests.lab.resuming:StoppedRegression",
    "log": {"every_steps": 1},
}


def newest(run: Path) -> Path:
    return published_in(run / "checkpoints")[-1]


def stop(folder: Path, arguments: list[str], world_size: int, call: int, rank: int = 0) -> int:
    """Run until one rank gets SIGTERM in its `call`th loss; returns the step after which all stopped."""
    stage.interrupt(folder, "loss", call, rank=rank)
    outcome = train(folder, arguments, world_size).check()
    run = folder / "runs" / arguments[arguments.index("--name") + 1]
    assert status(run)["state"] == "stopped", outcome.output
    assert status(run)["reason"] == "SIGTERM"
    step = status(run)["step"]
    assert newest(run).name == f"step_{step:08d}"
    return step


def go_on(folder: Path, arguments: list[str], world_size: int, step: int) -> Outcome:
    """Run to the end, from `step`."""
    outcome = train(folder, arguments, world_size).check()
    assert status(folder / "runs" / arguments[arguments.index("--name") + 1])["first_step"] == step
    return outcome


def bits(path: Path) -> dict[str, bytes]:
    """The bytes of each tensor, for a message on the one that differs."""
    return {name: tensor.numpy().tobytes() for name, tensor in load_file(path).items()}


def check_same(run: Path, whole: Path) -> None:
    """All that was trained and logged is the same, bit for bit."""
    for name in ("model.safetensors", "averaged.safetensors"):
        assert (newest(run) / name).exists() == (newest(whole) / name).exists()
        if (newest(whole) / name).exists():
            assert bits(newest(run) / name) == bits(newest(whole) / name), name
            assert (newest(run) / name).read_bytes() == (newest(whole) / name).read_bytes(), name
    one, other = (torch.load(newest(path) / "optimizer.pt", weights_only=True)["state"] for path in (run, whole))
    assert one.keys() == other.keys()
    for key, moments in other.items():
        assert one[key].keys() == moments.keys()
        for name, tensor in moments.items():
            assert torch.equal(one[key][name], tensor), f"{name} of parameter {key}"
    assert [row["step"] for row in rows(run, "train")] == list(range(1, status(whole)["step"] + 1))
    assert losses(run) == losses(whole)

    def validations(path: Path) -> list[dict[str, Any]]:
        return [found(row) for row in rows(path, "validate")]

    assert validations(run) == validations(whole)
    assert len(validations(run)) > 1
    epochs = [[row["loss"] for row in rows(path, "epoch")] for path in (run, whole)]
    assert epochs[0] == pytest.approx(epochs[1], rel=1e-12)  # a sum of two parts
    assert status(run)["state"] == "finished"


def check_stopped_twice(folder: Path, settings: dict[str, Any], world_size: int, workers: tuple[int, ...]) -> None:
    """Two stops, each in the midst of an epoch, then to the end, with as many loader workers in each attempt."""
    config = ["--config", str(write_config(folder, settings))]
    train(folder, [*config, "--name", "whole", "--data.workers", "0"], world_size).check()
    batch = settings["batch"]
    accumulation = batch["global_size"] // world_size // batch.get("micro_size", batch["global_size"]) or 1
    attempts = [[*config, "--name", "stopped", "--data.workers", str(number)] for number in workers]
    # A signal comes in the last micro-batch but one of a step, where there are several.
    first = stop(folder, attempts[0], world_size, 6 * accumulation - 1, rank=world_size - 1)
    assert 6 <= first < STEPS_PER_EPOCH - 1
    second = stop(folder, attempts[1], world_size, 18 * accumulation, rank=0)
    assert STEPS_PER_EPOCH < second < 36
    go_on(folder, attempts[2], world_size, second)
    run = folder / "runs" / "stopped"
    check_same(run, folder / "runs" / "whole")
    assert {row["attempt"] for row in rows(run, "train")} == {1, 2, 3}


# On four ranks in float32: there, and only there, does the order in which DDP adds gradients up show in the bits
# (of bfloat16's products the sums are exact), so that a run without the warm-up at its start would fail.
@pytest.mark.parametrize(
    ("world_size", "workers", "precision"), [(1, (2, 0, 2), "bf16"), (2, (0, 0, 2), "bf16"), (4, (0, 0, 0), "no")]
)
def test_a_run_that_is_stopped_twice_continues_to_the_same_bits(
    tmp_path: Path, world_size: int, workers: tuple[int, ...], precision: str
) -> None:
    batch = {"global_size": 64, "micro_size": 8 if world_size == 4 else 16}
    check_stopped_twice(tmp_path, {**SETTINGS, "precision": precision, "batch": batch}, world_size, workers)


@pytest.mark.long
@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_any_run_that_is_stopped_twice_continues_to_the_same_bits(
    tmp_path: Path, world_size: int, workers: int, precision: str, seed: int
) -> None:
    settings = {**SETTINGS, "precision": precision, "seed": seed}
    check_stopped_twice(tmp_path, settings, world_size, (workers,) * 3)


LANGUAGE_MODEL = {
    "data": {
        "name": "tests.lab.user_code:lines",
        "collate": "tests.lab.user_code:pad",
        "args": {"samples": 320},
        "workers": 0,
    },
    "model": "tests.lab.user_code:LanguageModel",
    "task": "tests.lab.resuming:StoppedNextLetter",
    "batch": {"global_size": 16, "micro_size": 4},
    "train": {"steps": 16},
    "validate": {"every_steps": 8},
}
CHANNELS_LAST = {"model": "tests.lab.resuming:channels_last", "train": {"steps": 30}}
# 1437 samples make 13 steps of 104 and one of 85, which two ranks share unevenly; in that one the signal comes.
SHORT_STEPS = {"batch": {"global_size": 104, "micro_size": 26, "remainder": "train"}, "train": {"steps": 34}}
# The stop comes before step 14, where a group begins to be trained.
GROUPS = {
    "optim": {
        "ema_decay": 0.9,
        "groups": [
            {"match": r"^0\.", "freeze": True},
            {"match": "^3", "until_step": 14, "lr_scale": 0.5},
            {"match": r"^1\d\.weight", "optimizer": {"name": "nadam"}},
        ],
    },
    "schedule": {"name": "tests.lab.resuming:halving"},
    "train": {"steps": 20},
}
SGD = {"name": "sgd", "lr": 0.05, "ema_decay": 0.9}


@pytest.mark.parametrize(
    ("changes", "world_size", "call"),
    [
        pytest.param(LANGUAGE_MODEL, 2, 12, id="tied weights"),
        pytest.param(CHANNELS_LAST, 1, 60, id="channels_last"),
        pytest.param({**SHORT_STEPS, "optim": SGD}, 1, 13 * 4 + 1, id="short steps, sgd"),
        pytest.param(GROUPS, 2, 40, id="groups"),
        pytest.param(GROUPS, 1, 80, id="groups on 1", marks=pytest.mark.long),
        pytest.param({"optim": {"name": "nadam"}, "train": {"steps": 30}}, 2, 40, id="nadam", marks=pytest.mark.long),
        pytest.param({"optim": {"name": "adam"}, "train": {"steps": 30}}, 1, 80, id="adam", marks=pytest.mark.long),
        pytest.param(
            {**CHANNELS_LAST, "optim": {"name": "adam"}}, 2, 40, id="channels_last, adam", marks=pytest.mark.long
        ),
        pytest.param({**CHANNELS_LAST, "optim": SGD}, 2, 40, id="channels_last, sgd", marks=pytest.mark.long),
        pytest.param(
            {**LANGUAGE_MODEL, "optim": {"name": "adam"}}, 4, 8, id="tied weights, adam", marks=pytest.mark.long
        ),
        pytest.param({**LANGUAGE_MODEL, "optim": SGD}, 1, 20, id="tied weights, sgd", marks=pytest.mark.long),
        pytest.param(SHORT_STEPS, 2, 2 + 13 * 2 + 1, id="short steps on 2", marks=pytest.mark.long),
        pytest.param(SHORT_STEPS, 4, 2 + 13 + 1, id="short steps on 4", marks=pytest.mark.long),
        pytest.param({"dtype": "float64"}, 4, 40, id="float64", marks=pytest.mark.long),
    ],
)
def test_models_of_any_kind_continue_to_the_same_bits(
    tmp_path: Path, changes: dict[str, Any], world_size: int, call: int
) -> None:
    config = ["--config", str(write_config(tmp_path, {**SETTINGS, **changes}))]
    train(tmp_path, [*config, "--name", "whole"], world_size).check()
    arguments = [*config, "--name", "stopped"]
    go_on(tmp_path, arguments, world_size, stop(tmp_path, arguments, world_size, call, rank=world_size - 1))
    check_same(tmp_path / "runs" / "stopped", tmp_path / "runs" / "whole")


def test_all_ranks_go_on_with_the_buffers_that_were_saved_interrupted_or_not(tmp_path: Path) -> None:
    settings = {
        **SMALL,
        "model": "tests.lab.resuming:Centred",
        "schedule": "constant",
        "batch": {"global_size": 32},
        "checkpoint": {"every_steps": 10},
        "validate": {"every_steps": 1000},  # so that it gives no rank the buffers of another
        "train": {"steps": 20},
    }
    config = ["--config", str(write_config(tmp_path, settings))]
    train(tmp_path, [*config, "--name", "whole"], 2).check()
    train(tmp_path, [*config, "--name", "stopped", "--train.steps", "10"], 2).check()
    train(tmp_path, [*config, "--name", "stopped", "--resume", "extend"], 2).check()
    stopped, whole = (tmp_path / "runs" / name for name in ("stopped", "whole"))
    assert losses(stopped) == losses(whole)
    assert bits(newest(stopped) / "model.safetensors") == bits(newest(whole) / "model.safetensors")


# ---- another number of processes -----------------------------------------------------------------------------

WORLD_SIZES = (4, 2, 1, 3)
ACCUMULATION = {4: 1, 2: 2, 1: 4, 3: 2}  # of a global batch of 24 in micro-batches of at most 6


def recorded_steps(folder: Path, attempt: str, world_size: int, first_step: int) -> dict[int, list[str]]:
    """What was trained on in each step of an attempt: "index:digest" of all samples, sorted."""
    steps: dict[int, list[str]] = {}
    for rank in range(world_size):
        lines = (folder / f"{attempt}-{rank}").read_text().splitlines()
        lines = lines[2 if world_size > 1 else 1 :]  # after the rehearsal
        accumulation = ACCUMULATION[world_size]
        assert len(lines) % accumulation == 0
        for number, line in enumerate(lines):
            steps.setdefault(first_step + number // accumulation, []).extend(line.split())
    return {step: sorted(samples) for step, samples in steps.items()}


def test_four_two_one_and_three_ranks_continue_one_run_with_the_same_samples_in_each_step(tmp_path: Path) -> None:
    (tmp_path / "seen").mkdir()
    settings = {
        **SETTINGS,
        "data": "tests.lab.resuming:indexed_digits",
        "model": {"name": "mlp", "args": {"hidden": 32}},
        "task": {"name": "tests.lab.resuming:RecordedClassification", "args": {"folder": "seen"}},
        "dtype": "float64",
        "batch": {"global_size": 24, "micro_size": 6},
        "train": {"steps": 150},
    }
    config = ["--config", str(write_config(tmp_path, settings))]
    train(tmp_path, [*config, "--name", "whole"], 1, {"TEST_ATTEMPT": "whole"}).check()
    seen: dict[int, list[str]] = {}
    step, stops = 0, []
    for world_size in WORLD_SIZES:
        attempt = f"on-{world_size}"
        variables = {"TEST_ATTEMPT": attempt}
        if world_size != WORLD_SIZES[-1]:
            stage.interrupt(tmp_path, "loss", 20 * ACCUMULATION[world_size], rank=world_size - 1)
        train(tmp_path, [*config, "--name", "moved"], world_size, variables).check()
        assert status(tmp_path / "runs" / "moved")["first_step"] == step
        now = recorded_steps(tmp_path / "seen", attempt, world_size, step)
        assert not now.keys() & seen.keys()
        seen |= now
        step = status(tmp_path / "runs" / "moved")["step"]
        stops.append(step)
    assert any(step % 59 for step in stops[:-1]), "it was to stop in the midst of an epoch"
    expected = recorded_steps(tmp_path / "seen", "whole", 1, 0)
    assert sorted(seen) == list(range(150))
    assert all(len(set(samples)) == 24 for samples in expected.values())
    assert seen == expected
    whole, moved = tmp_path / "runs" / "whole", tmp_path / "runs" / "moved"
    assert losses(moved) == pytest.approx(losses(whole), rel=1e-10)
    assert largest_difference(weights(moved), weights(whole)) < 1e-10
    assert {row["attempt"] for row in rows(moved, "train")} == {1, 2, 3, 4}


# ---- a run is its directory ----------------------------------------------------------------------------------


def test_a_run_that_was_moved_continues_from_its_directory_alone(tmp_path: Path) -> None:
    source = ["--config", str(write_config(tmp_path, {**SETTINGS, "train": {"steps": 3}}, "source"))]
    train(tmp_path, source).check()
    config = ["--config", str(write_config(tmp_path, {**SETTINGS, "init_from": "runs/source"}))]
    train(tmp_path, [*config, "--name", "whole"]).check()
    stop(tmp_path, [*config, "--name", "stopped"], 1, 70)
    moved = tmp_path / "elsewhere" / "another-name"
    moved.parent.mkdir()
    (tmp_path / "runs" / "stopped").rename(moved)
    (tmp_path / "runs" / "whole").rename(tmp_path / "whole")
    shutil.rmtree(tmp_path / "runs")
    (tmp_path / "run.yaml").unlink()
    (tmp_path / "source.yaml").unlink()
    arguments = ["--config", str(moved / "config.yaml"), "--runs-dir", str(moved.parent), "--name", moved.name]
    outcome = train(tmp_path, arguments).check()
    assert "continuing after step" in outcome.output
    check_same(moved, tmp_path / "whole")
    assert not (tmp_path / "runs").exists()
    assert "is finished" in train(tmp_path, arguments).check().output


def test_data_of_other_contents_is_refused_or_recorded(tmp_path: Path) -> None:
    data = {"name": "tests.lab.resuming:stored_points", "args": {"file": "points.pt"}}
    settings = {**SMALL, "data": data, "batch": {"global_size": 4}, "train": {"epochs": 50}}
    arguments = ["--config", str(write_config(tmp_path, settings)), "--name", "run"]
    store_points(tmp_path / "points.pt", seed=1)
    stop(tmp_path, arguments, 1, 3)
    store_points(tmp_path / "points.pt", seed=1)  # the same data, written anew
    step = stop(tmp_path, arguments, 1, 1)
    run = tmp_path / "runs" / "run"
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    old = json.loads((newest(run) / "manifest.json").read_text())["dataset"]

    store_points(tmp_path / "points.pt", seed=2)
    outcome = train(tmp_path, arguments)
    assert outcome.codes == [2]
    assert outcome.output.count("these 16 samples have other contents") == 1
    assert "samples that were trained on" in outcome.output  # by a random split that is another one now
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
    outcome = train(tmp_path, [*arguments, "--resume", "extend"]).check()
    assert outcome.output.count(f"WARNING: the training data have other contents than when step {step} was") == 1
    assert "samples that were trained on" in outcome.output, "whoever extends to train longer may not know it"
    assert status(run)["first_step"] == step
    record = json.loads((run / "config_changes.jsonl").read_text())
    new = json.loads((newest(run) / "manifest.json").read_text())["dataset"]
    assert record["after_step"] == step
    assert record["changes"] == {"dataset": [old, new]}
    assert old["samples"] == new["samples"] == 16
    assert old["sha256"] != new["sha256"]


@pytest.mark.parametrize("form", ["relative", "absolute", pytest.param("checkpoint", marks=pytest.mark.long)])
def test_a_new_run_may_start_from_the_weights_of_the_one_that_it_replaces(tmp_path: Path, form: str) -> None:
    config = str(write_config(tmp_path, {**SMALL, "train": {"epochs": 1}, "optim": {"lr": 0.1}}))
    train(tmp_path, ["--config", config]).check()
    run = tmp_path / "runs" / "run"
    old = weights(run)
    source = {"relative": "runs/run", "absolute": str(run), "checkpoint": str(newest(run).relative_to(tmp_path))}[form]
    again = ["--config", config, "--resume", "never", "--init-from", source, "--optim.lr", "1e-12"]
    train(tmp_path, again).check()
    assert largest_difference(weights(run), old) < 1e-6
    assert status(run)["attempt"] == 1
    assert largest_difference(weights(tmp_path / "runs" / "run.old-1"), old) == 0


# ---- which checkpoints are kept ------------------------------------------------------------------------------


def expected_to_be_kept(
    run: Path, total: int, every: int, keep_every: int | None, keep_last: int, best: str, stops: tuple[int, ...] = ()
) -> tuple[list[int], int]:
    """By the rules: the steps whose checkpoints are left at the end, and the best one."""
    direction, metric = best.split()
    sign = 1 if direction == "max" else -1
    values = {row["step"]: sign * row[metric] for row in rows(run, "validate")}
    kept: list[int] = []
    best_step = 0
    for step in range(1, total + 1):
        new_best = step in values and (not best_step or values[step] > values[best_step])
        best_step = step if new_best else best_step
        for_keeps = bool(keep_every) and step % (keep_every or 1) == 0
        if step % every == 0 or for_keeps or new_best or step == total or step in stops:
            kept = [
                old
                for old in [*kept, step]
                if old in [*kept, step][-keep_last:] or old == best_step or (keep_every and old % keep_every == 0)
            ]
    return kept, best_step


@pytest.mark.parametrize(
    ("named", "best", "every", "keep_every", "keep_last"),
    [
        (None, "min loss", 5, None, 2),
        ("max loss", "max loss", 3, 7, 3),
        *(
            pytest.param(named, named, every, 7, keep_last, marks=pytest.mark.long)
            for named in ("min loss", "max loss", "min r2", "max r2")
            for every, keep_last in ((5, 2), (1, 4))
        ),
    ],
)
def test_the_last_the_best_and_those_for_keeps_are_kept_after_a_restart_too(
    tmp_path: Path, named: str | None, best: str, every: int, keep_every: int | None, keep_last: int
) -> None:
    checkpoint = {"every_steps": every, "keep_every_steps": keep_every, "keep_last": keep_last, "best": named}
    settings = {**SMALL, "optim": {"lr": 0.05}, "train": {"steps": 40}, "validate": {"every_steps": 4}}
    config = ["--config", str(write_config(tmp_path, {**settings, "checkpoint": checkpoint})), "--name", "run"]
    stopped = stop(tmp_path, config, 1, 12)
    go_on(tmp_path, config, 1, stopped)
    run = tmp_path / "runs" / "run"
    kept, best_step = expected_to_be_kept(run, 40, every, keep_every, keep_last, best, (stopped,))
    assert steps_saved(run) == kept
    assert best_step in kept
    assert json.loads((newest(run) / "state.json").read_text())["best"]["step"] == best_step
    for path in published_in(run / "checkpoints"):
        verify(path)
    assert {path.name for path in (run / "checkpoints").iterdir()} == {f"step_{step:08d}" for step in kept}


def test_a_new_best_is_saved_at_once(tmp_path: Path) -> None:
    settings = {**SMALL, "train": {"steps": 40}, "validate": {"every_steps": 4}, "checkpoint": {"every_steps": 30}}
    config = ["--config", str(write_config(tmp_path, {**settings, "optim": {"lr": 0.05}})), "--name", "run"]
    outcome = train(tmp_path, [*config, "--checkpoint.best", "max loss"]).check()
    run = tmp_path / "runs" / "run"
    values = [row["loss"] for row in rows(run, "validate")]
    best = 4 * (values.index(max(values)) + 1)
    assert best not in (30, 40)
    assert steps_saved(run) == [best, 30, 40]
    assert f"{run.relative_to(tmp_path)}/checkpoints/step_{best:08d}/model.safetensors" in outcome.output


def test_a_metric_that_validation_does_not_give_is_refused_with_those_it_gives(tmp_path: Path) -> None:
    config = ["--config", str(write_config(tmp_path, {**SMALL, "train": {"epochs": 2}})), "--name", "run"]
    outcome = train(tmp_path, [*config, "--checkpoint.best", "max accuracy"], 2)
    assert outcome.codes == [2, 2], outcome.output
    assert outcome.output.count("'accuracy'") == 1
    assert "loss, r2" in outcome.output
    assert "Traceback" not in outcome.output
    train(tmp_path, [*config, "--checkpoint.best", "max r2"], 2).check()
