"""train.early_stop: a run that is finished since its validations are no better, whole or stopped and continued."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from distloop.commands.reading import read_run
from distloop.run.checkpoint import published_in
from tests.multiprocess.test_failed_validation import arguments, check_same
from tests.tools import stage
from tests.tools.ranks import train
from tests.tools.records import rows, run_of, status, steps_saved

PATIENCE = {"patience": 2, "metric": "max loss"}  # which falls: the first validation, of step 5, stays the best
REASON = "no better loss than {} of step 5 in 2 validations"


def words_of(folder: Path, **early_stop: object) -> list[str]:
    return arguments(folder, train={"steps": 30, "early_stop": {**PATIENCE, **early_stop}})


def reason_in(run: Path) -> str:
    return REASON.format(f"{rows(run, 'validate')[0]['loss']:.4g}")


def check_finished(run: Path) -> None:
    newest = published_in(run / "checkpoints")[-1]
    state = json.loads((newest / "state.json").read_text())
    assert (state["step"], state["finished"]) == (15, reason_in(run))
    ended = status(run)
    assert (ended["state"], ended["step"], ended["reason"]) == ("finished", 15, reason_in(run))
    assert [row["step"] for row in rows(run, "train")] == list(range(1, 16))
    assert (read_run(run).state, read_run(run).reason) == ("finished", reason_in(run))


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_run_that_is_stopped_and_killed_ends_after_the_same_step_with_the_same_bits(
    tmp_path: Path, world_size: int
) -> None:
    whole = tmp_path / "whole"
    outcome = train(whole, words_of(whole), world_size).check()
    expected = run_of(whole)
    assert f"finished: runs/run\n  after step 15 of 30: {reason_in(expected)}\n" in outcome.output
    assert "--resume extend --train.early-stop.patience N goes on with this one" in outcome.output
    check_finished(expected)

    folder = tmp_path / "interrupted"
    words, run = words_of(folder), run_of(folder)
    if world_size == 1:
        stage.interrupt(folder, "metrics", 10)
        train(folder, words).check()
        stopped = status(run)
        assert stopped["state"] == "stopped"
        stage.fail(folder, "metrics", "kill", count=15 - stopped["step"])  # of this attempt's updates
        assert train(folder, words).codes == [-9]
        stage.fail(folder, "metrics", "raise", count=15 - steps_saved(run)[-1])
    else:
        stage.fail(folder, "metrics", "raise", rank=1, count=15)
    assert train(folder, words, world_size).codes[0] == 1  # step 15 is saved, and not validated
    assert steps_saved(run)[-1] == 15
    outcome = train(folder, words, world_size).check()
    assert f"after step 15 of 30: {reason_in(run)}" in outcome.output
    check_finished(run)
    check_same(run, expected)
    assert [row["step"] for row in rows(run, "validate")] == [5, 10, 15]

    # Once more, as after a kill before status.json said so; then the same command, which says what is finished.
    ended = status(run)
    (run / "status.json").write_text(json.dumps({**ended, "state": "running"}))
    train(folder, words, world_size).check()
    check_finished(run)
    outcome = train(folder, words, world_size).check()
    assert f"runs/run is finished after step 15: {reason_in(run)}; its metrics are in" in outcome.output
    assert "--resume extend --train.early-stop.patience N goes on with this one" in outcome.output
    assert status(run)["attempt"] == (5 if world_size == 1 else 3)

    if world_size == 1:
        train(folder, [*words_of(folder, patience=3), "--resume", "extend"]).check()
        assert (status(run)["state"], status(run)["step"]) == ("finished", 20)
        assert status(run)["reason"].endswith("of step 5 in 3 validations")


def test_a_metric_that_validation_does_not_give_is_refused_before_the_first_step(tmp_path: Path) -> None:
    outcome = train(tmp_path, words_of(tmp_path, metric="max auc"))
    assert outcome.codes == [2]
    assert "train.early_stop.metric: validation gives no 'auc', but loss" in outcome.output


def test_a_begun_run_takes_an_early_stop(tmp_path: Path) -> None:
    words = arguments(tmp_path, train={"steps": 10})
    train(tmp_path, words).check()
    settings = ["--train.steps", "30", "--train.early-stop", "{patience: 2, metric: max loss}", "--resume", "extend"]
    train(tmp_path, [*words, *settings]).check()
    assert (status(run_of(tmp_path))["state"], status(run_of(tmp_path))["step"]) == ("finished", 25)
