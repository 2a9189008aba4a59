"""A validation that fails loses nothing: its step is saved, and the next start validates it before it trains on."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from distloop.errors import RunFailed
from distloop.ranks.judge import STUCK_SECONDS
from distloop.ranks.verdicts import Verdict
from distloop.run.checkpoint import newest_good
from distloop.training.validation import Validation
from tests.tools import stage
from tests.tools.ranks import Outcome, Ranks, train, wait_until, write_config
from tests.tools.records import found, largest_difference, losses, rows, run_of, status, steps_saved, weights

STEPS, FAILS, SAVED_BEFORE = 14, 10, 8  # in the middle of an epoch, and not a step that is saved anyway
VALIDATED = [5, 10, 14]


def arguments(folder: Path, **changes: Any) -> list[str]:
    settings: dict[str, Any] = {
        "data": {"name": "tests.lab.fragile:points", "workers": 0},
        "model": "tests.lab.fragile:normalised",
        "task": "tests.lab.fragile:Fragile",
        "device": "cpu",
        "optim": {"lr": 0.01},
        "batch": {"global_size": 16},
        "train": {"steps": STEPS},
        "validate": {"every_steps": 5, "batch_size": 2},
        "checkpoint": {"every_steps": 4},
        "log": {"every_steps": 1},
        **changes,
    }
    folder.mkdir(exist_ok=True)
    return ["--config", str(write_config(folder, settings))]


def state_of(run: Path, step: int) -> dict[str, Any]:
    return json.loads((run / "checkpoints" / f"step_{step:08d}" / "state.json").read_text())


def whole(folder: Path, world_size: int, **changes: Any) -> Path:
    """The run that never failed."""
    train(folder / "whole", arguments(folder / "whole", **changes), world_size).check()
    return run_of(folder / "whole")


def check_same(run: Path, expected: Path) -> None:
    """Rows, best, curves and weights are those of the run that never failed."""
    for kind in ("train", "validate", "epoch"):
        ours, theirs = (list(map(found, rows(path, kind))) for path in (run, expected))
        assert [row["step"] for row in ours] == [row["step"] for row in theirs]
        for our, their in zip(ours, theirs, strict=True):
            assert our.pop("running_loss", 0) == pytest.approx(their.pop("running_loss", 0), rel=1e-12)  # of two parts
            assert our.pop("loss") == pytest.approx(their.pop("loss"), rel=1e-12)
            assert our == their
    assert losses(run) == losses(expected)
    assert list(map(found, rows(run, "validate"))) == list(map(found, rows(expected, "validate")))
    assert status(run)["best"] == status(expected)["best"]
    assert largest_difference(weights(run), weights(expected)) == 0
    assert steps_saved(run) == steps_saved(expected)


def check_saved(outcome: Outcome, run: Path, step: int = FAILS) -> None:
    """The run has failed, with its last step in a checkpoint that is not validated."""
    assert steps_saved(run)[-1] == step, outcome.output
    assert state_of(run, step)["unvalidated"] is True
    assert (status(run)["state"], status(run)["step"]) == ("failed", step)
    assert outcome.output.count(f"saved step {step}, which is not validated yet") == 1, outcome.output
    assert newest_good(run / "checkpoints")[1] == []


@pytest.mark.parametrize(
    ("place", "how", "rank", "world_size", "code"),
    [
        ("metrics", "raise", 0, 1, 1),
        ("summary", "sys.exit", 0, 1, 1),
        ("metrics", "mistake", 0, 1, 2),
        ("forward", "raise", 1, 2, 1),
        ("metrics", "raise", 0, 2, 1),
        ("metrics", "kill", 1, 2, 1),
        ("summary", "raise", 1, 2, 1),  # rank 0 has no collective of the validation left
    ],
)
def test_a_validation_that_fails_loses_no_step(
    tmp_path: Path, place: str, how: str, rank: int, world_size: int, code: int
) -> None:
    expected = whole(tmp_path, world_size)
    folder = tmp_path / "failed"
    words = arguments(folder)
    stage.fail(folder, place, how, rank=rank, count=FAILS)
    outcome = train(folder, words, world_size)
    assert outcome.codes[0] == code, outcome.output
    run = run_of(folder)
    check_saved(outcome, run)
    assert [row["step"] for row in rows(run, "validate")] == VALIDATED[:1]

    outcome = train(folder, words, world_size).check()
    assert f"step {FAILS} is not validated yet: its validation comes first" in outcome.output
    assert status(run)["first_step"] == FAILS
    assert [(row["step"], row["attempt"]) for row in rows(run, "validate")] == [(5, 1), (10, 2), (14, 2)]
    check_same(run, expected)


def test_with_averaged_weights_these_are_validated_later(tmp_path: Path) -> None:
    optim = {"lr": 0.01, "ema_decay": 0.9}
    expected = whole(tmp_path, 2, optim=optim)
    folder = tmp_path / "failed"
    words = arguments(folder, optim=optim)
    stage.fail(folder, "metrics", "raise", rank=1, count=FAILS)
    check_saved(train(folder, words, 2), run_of(folder))
    train(folder, words, 2).check()
    check_same(run_of(folder), expected)


@pytest.mark.parametrize("world_size", [1, 2])
def test_the_validation_after_the_last_step_is_made_up_for_and_nothing_trains_again(
    tmp_path: Path, world_size: int
) -> None:
    expected = whole(tmp_path, world_size)
    folder = tmp_path / "failed"
    words = arguments(folder)
    stage.fail(folder, "metrics", "raise", rank=0, count=STEPS)
    check_saved(train(folder, words, world_size), run_of(folder), STEPS)
    outcome = train(folder, words, world_size).check()
    run = run_of(folder)
    assert [row["attempt"] for row in rows(run, "train")] == [1] * STEPS
    assert (status(run)["state"], status(run)["step"]) == ("finished", STEPS)
    assert "unvalidated" not in state_of(run, STEPS)
    assert f"(step {STEPS})" in outcome.output
    check_same(run, expected)


def test_a_validation_that_fails_again_loses_nothing_either(tmp_path: Path) -> None:
    expected = whole(tmp_path, 1)
    folder = tmp_path / "failed"
    words = arguments(folder)
    run = run_of(folder)
    for _ in range(2):
        stage.fail(folder, "summary", "raise", count=FAILS if not run.exists() else None)
        outcome = train(folder, words)
        assert outcome.codes == [1]
        assert steps_saved(run)[-1] == FAILS
        assert state_of(run, FAILS)["unvalidated"] is True
    train(folder, words).check()
    assert status(run)["attempt"] == 3
    check_same(run, expected)


def test_killed_after_the_later_validation_its_row_is_still_there_once(tmp_path: Path) -> None:
    expected = whole(tmp_path, 1)
    folder = tmp_path / "failed"
    words = arguments(folder)
    stage.fail(folder, "metrics", "raise", count=FAILS)
    train(folder, words)
    run = run_of(folder)
    stage.fail(folder, "save", "kill", count=FAILS)  # once it is validated it is saved again
    assert train(folder, words).codes == [-signal.SIGKILL]
    assert rows(run, "validate")[-1]["step"] == FAILS
    assert state_of(run, FAILS)["unvalidated"] is True
    train(folder, words).check()
    assert [(row["step"], row["attempt"]) for row in rows(run, "validate")] == [(5, 1), (10, 3), (14, 3)]
    check_same(run, expected)


def test_a_save_that_fails_as_well_is_said_and_the_checkpoints_before_are_whole(tmp_path: Path) -> None:
    expected = whole(tmp_path, 1)
    folder = tmp_path / "failed"
    words = arguments(folder)
    stage.fail(folder, "metrics", "raise", count=FAILS)
    stage.fail(folder, "save", "reset", count=FAILS)
    outcome = train(folder, words)
    assert outcome.codes == [1]
    run = run_of(folder)
    assert f"WARNING: The checkpoint of step {FAILS} could not be written" in outcome.output
    assert "ValueError: a value that nobody likes" in status(run)["reason"]
    assert steps_saved(run)[-1] == SAVED_BEFORE
    train(folder, words).check()
    assert status(run)["first_step"] == SAVED_BEFORE
    check_same(run, expected)


@pytest.mark.long
def test_rank_0_saves_also_if_it_has_long_to_validate_when_another_one_fails(tmp_path: Path) -> None:
    words = arguments(tmp_path)
    stage.fail(tmp_path, "metrics", "raise", rank=1, count=FAILS)
    stage.hold(tmp_path, "forward", rank=0, count=FAILS)
    stage.hold(tmp_path, "before metrics", rank=1, count=FAILS)
    with Ranks(tmp_path, words, 2) as ranks:
        stage.arrived(tmp_path, "forward", [0])
        stage.arrived(tmp_path, "before metrics", [1])
        stage.let_go(tmp_path, "before metrics")
        wait_until(lambda: "distloop: rank 1" in ranks.outputs[0].read_text(), "the verdict")
        time.sleep(STUCK_SECONDS + 2)  # that it takes so long is the subject
        stage.let_go(tmp_path, "forward")
        outcome = ranks.join()
    assert outcome.codes == [1, 1]
    check_saved(outcome, run_of(tmp_path))


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_stop_during_the_later_validation_stops_in_order(tmp_path: Path, world_size: int) -> None:
    expected = whole(tmp_path, world_size)
    folder = tmp_path / "failed"
    words = arguments(folder)
    stage.fail(folder, "metrics", "raise", rank=0, count=FAILS)
    train(folder, words, world_size)
    stage.hold(folder, "summary", rank=0)
    run = run_of(folder)
    with Ranks(folder, words, world_size) as ranks:
        stage.arrived(folder, "summary", [0])
        os.kill(ranks.processes[0].pid or 0, signal.SIGTERM)
        wait_until(lambda: "finishing what is going on" in ranks.outputs[0].read_text(), "the wish")
        stage.let_go(folder, "summary")
        ranks.join().check()
    assert status(run)["state"] == "stopped"
    assert "unvalidated" not in state_of(run, steps_saved(run)[-1])
    train(folder, words, world_size).check()
    assert [row["step"] for row in rows(run, "validate")] == VALIDATED
    assert losses(run) == losses(expected)
    assert status(run)["best"] == status(expected)["best"]
    assert largest_difference(weights(run), weights(expected)) == 0


def test_no_batch_is_validated_once_another_rank_has_failed() -> None:
    roll_call = SimpleNamespace(verdict=None)
    validation = Validation.__new__(Validation)
    validation.ranks = SimpleNamespace(roll_call=roll_call)  # type: ignore[assignment]
    batches = validation._until_verdict([1, 2, 3])
    assert next(batches) == 1
    roll_call.verdict = Verdict(1, "rank 1 failed first", "")
    with pytest.raises(RunFailed, match="rank 1 failed first"):
        next(batches)
