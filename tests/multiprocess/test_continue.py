"""A run is continued by the same command: nothing is repeated, skipped or lost."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch

from distloop.config.load import load_config
from distloop.data.datasets import load_data
from distloop.run.directory import open_directory, record_start
from distloop.run.identity import identity_of
from distloop.run.lock import RunLock
from distloop.run.status import RunStatus
from tests.tools.ranks import Ranks, train, wait_until, write_config
from tests.tools.records import largest_difference, losses, rows, status, weights

# Everything that could carry a state: augmentation, BatchNorm, dropout, momentum, accumulation, clipping.
SETTINGS = {
    "data": "digits",
    "model": {"name": "cnn", "args": {"width": 8, "norm": "batch", "dropout": 0.3}},
    "optim": {"name": "adamw", "clip_norm": 1.0},
    "batch": {"global_size": 64, "micro_size": 16},
    "train": {"steps": 80},
    "log": {"every_steps": 1},
    "checkpoint": {"every_steps": 15},
}


def kill_after_checkpoint(folder: Path, arguments: list[str], world_size: int, step: int) -> None:
    """Start the run, and kill -9 all its ranks once a row beyond the checkpoint of `step` is written."""
    run = folder / "runs" / arguments[arguments.index("--name") + 1]
    ranks = Ranks(folder, arguments, world_size)
    wait_until(
        lambda: (run / "checkpoints" / f"step_{step:08d}").exists() and rows(run, "train")[-1]["step"] > step,
        f"the checkpoint of step {step}",
    )
    ranks.kill()
    ranks.join()
    assert status(run)["state"] == "running", "the run was over before it was killed"


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_killed_run_continues_to_the_same_bits(tmp_path: Path, world_size: int) -> None:
    config = ["--config", str(write_config(tmp_path, SETTINGS))]
    train(tmp_path, [*config, "--name", "whole"], world_size).check()
    kill_after_checkpoint(tmp_path, [*config, "--name", "killed"], world_size, 15)
    outcome = train(tmp_path, [*config, "--name", "killed"], world_size).check()
    assert "continuing after step" in outcome.outputs[0]
    whole, killed = tmp_path / "runs" / "whole", tmp_path / "runs" / "killed"
    assert [row["step"] for row in rows(killed, "train")] == list(range(1, 81))
    assert {row["attempt"] for row in rows(killed, "train")} == {1, 2}
    assert losses(killed) == losses(whole)
    assert [row["loss"] for row in rows(killed, "epoch")] == pytest.approx(
        [row["loss"] for row in rows(whole, "epoch")]
    )
    assert [row["step"] for row in rows(killed, "validate")] == [row["step"] for row in rows(whole, "validate")]
    assert largest_difference(weights(killed), weights(whole)) == 0
    assert status(killed)["state"] == "finished"
    assert status(killed)["attempt"] == 2


def test_a_run_continues_on_another_number_of_processes(tmp_path: Path) -> None:
    settings = {**SETTINGS, "dtype": "float64", "model": {"name": "mlp"}, "batch": {"global_size": 24}}
    config = ["--config", str(write_config(tmp_path, settings))]
    train(tmp_path, [*config, "--name", "whole"], 1).check()
    kill_after_checkpoint(tmp_path, [*config, "--name", "moved"], 2, 15)
    train(tmp_path, [*config, "--name", "moved"], 3).check()
    whole, moved = tmp_path / "runs" / "whole", tmp_path / "runs" / "moved"
    assert losses(moved) == pytest.approx(losses(whole), rel=1e-10)
    assert largest_difference(weights(moved), weights(whole)) < 1e-10


def small(tmp_path: Path, **changes: object) -> list[str]:
    settings = {"data": "diabetes", "model": "linear", "task": "regression", "train": {"epochs": 2}, **changes}
    return ["--config", str(write_config(tmp_path, settings))]


def test_a_finished_run_says_so_and_is_left_alone(tmp_path: Path) -> None:
    arguments = small(tmp_path)
    train(tmp_path, arguments, 2).check()
    run = tmp_path / "runs" / "run"
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    outcome = train(tmp_path, arguments, 2).check()
    assert outcome.output.count("is finished") == 1
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before


def test_what_does_not_change_training_may_change(tmp_path: Path) -> None:
    train(tmp_path, small(tmp_path)).check()
    free = ["--data.workers", "2", "--batch.micro-size", "8", "--log.every-steps", "3", "--checkpoint.keep-last", "5"]
    assert "is finished" in train(tmp_path, [*small(tmp_path), *free]).check().output


def test_another_config_under_the_same_name_is_refused_with_the_differences(tmp_path: Path) -> None:
    train(tmp_path, small(tmp_path)).check()
    outcome = train(tmp_path, [*small(tmp_path), "--optim.lr", "0.5"], 2)
    assert outcome.codes == [2, 2]
    for words in ("optim.lr: 0.001 there, 0.5 now", "--name", "--resume never", "--resume extend"):
        assert outcome.output.count(words) == 1
    assert "Traceback" not in outcome.output


def test_resume_never_moves_the_old_run_aside(tmp_path: Path) -> None:
    train(tmp_path, small(tmp_path)).check()
    for _ in range(2):
        train(tmp_path, [*small(tmp_path), "--optim.lr", "0.5", "--resume", "never"]).check()
    names = sorted(path.name for path in (tmp_path / "runs").iterdir())
    assert names == ["run", "run.old-1", "run.old-2"]
    assert "lr: 0.001" in (tmp_path / "runs" / "run.old-1" / "config.yaml").read_text()
    assert status(tmp_path / "runs" / "run")["attempt"] == 1


def test_a_requeued_job_with_resume_never_moves_aside_what_others_have_trained_only(tmp_path: Path) -> None:
    arguments = [*small(tmp_path), "--resume", "never"]

    def start(job: str, restart: int) -> list[str]:
        train(tmp_path, arguments, environment={"SLURM_JOB_ID": job, "SLURM_RESTART_COUNT": str(restart)}).check()
        return sorted(path.name for path in (tmp_path / "runs").iterdir())

    assert start("7", 0) == ["run"]
    assert start("7", 1) == ["run"]  # else it would begin anew after each time limit
    assert start("8", 1) == ["run", "run.old-1"]  # it was requeued before it had begun the run
    assert start("8", 0) == ["run", "run.old-1", "run.old-2"]


def test_resume_never_is_refused_in_a_restart_by_the_launcher(tmp_path: Path) -> None:
    train(tmp_path, small(tmp_path)).check()
    again = train(tmp_path, [*small(tmp_path), "--resume", "never"], environment={"TORCHELASTIC_RESTART_COUNT": "1"})
    assert again.codes == [2]
    assert "--resume never in restart 1 of the launcher" in again.output
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["run"]


def test_resume_extend_continues_and_records_the_change(tmp_path: Path) -> None:
    train(tmp_path, small(tmp_path)).check()
    run = tmp_path / "runs" / "run"
    steps = status(run)["step"]
    train(tmp_path, [*small(tmp_path), "--train.epochs", "4", "--resume", "extend"]).check()
    assert status(run) == {**status(run), "state": "finished", "step": 2 * steps, "attempt": 2}
    assert [row["step"] for row in rows(run, "epoch")] == [steps // 2 * epoch for epoch in (1, 2, 3, 4)]
    record = json.loads((run / "config_changes.jsonl").read_text())
    assert record["changes"] == {"train.epochs": [2, 4]}
    assert record["after_step"] == steps
    # The extended run is now the run of this name, and finished.
    assert "is finished" in train(tmp_path, [*small(tmp_path), "--train.epochs", "4"]).check().output


@pytest.mark.parametrize("world_size", [1, 2])
def test_resume_extend_says_what_changes_and_what_becomes_of_the_learning_rate(tmp_path: Path, world_size: int) -> None:
    own = {"log": {"every_steps": 1}, "checkpoint": {"every_steps": 2}, "schedule": "constant", "optim": {"lr": 0.0003}}
    words, run = small(tmp_path, train={"steps": 4}, **own), tmp_path / "runs" / "run"
    train(tmp_path, words, world_size).check()
    shutil.rmtree(run / "checkpoints" / "step_00000004")  # as if it had been killed after step 2
    (run / "status.json").write_text(json.dumps({**status(run), "state": "running"}))
    outcome = train(tmp_path, [*words, "--optim.lr", "0.0009", "--resume", "extend"], world_size).check()
    assert outcome.output.count("--resume extend: optim.lr goes from 0.0003 to 0.0009\n") == 1
    assert outcome.output.count("the learning rate at step 3 goes from 0.0003 to 0.0009\n") == 1
    assert [row["lr"] for row in rows(run, "train")] == [0.0003] * 2 + [0.0009] * 2

    # Only where it changes: a longer run of a constant rate, and then one that falls.
    words = [*words, "--optim.lr", "0.0009"]
    outcome = train(tmp_path, [*words, "--train.steps", "6", "--resume", "extend"], world_size).check()
    assert outcome.output.count("--resume extend: train.steps goes from 4 to 6\n") == 1
    assert "the learning rate at" not in outcome.output
    words = [*words, "--train.steps", "8", "--schedule", "linear"]
    outcome = train(tmp_path, [*words, "--resume", "extend"], world_size).check()
    lr = rows(run, "train")[6]["lr"]
    assert f"the learning rate at step 7 goes from 0.0009, that of step 6, to {lr:.4g}\n" in outcome.output
    assert lr < 0.0003
    assert "--resume extend: " not in train(tmp_path, [*words, "--resume", "extend"], world_size).check().output


def test_resume_extend_refuses_what_would_change_the_meaning_of_the_steps(tmp_path: Path) -> None:
    train(tmp_path, small(tmp_path)).check()
    outcome = train(tmp_path, [*small(tmp_path), "--batch.global-size", "32", "--resume", "extend"])
    assert outcome.codes == [2]
    assert "batch.global_size" in outcome.output


def test_a_run_that_has_taken_all_its_steps_is_not_changed_without_more(tmp_path: Path) -> None:
    train(tmp_path, small(tmp_path)).check()
    outcome = train(tmp_path, [*small(tmp_path), "--optim.lr", "0.07", "--resume", "extend"])
    assert outcome.codes == [2]
    assert "has taken all its 10 steps: with optim.lr changed, none would be trained" in outcome.output
    assert "is finished" in train(tmp_path, small(tmp_path)).check().output  # with the config that it had


def test_a_run_cannot_be_extended_to_less_than_it_has_done(tmp_path: Path) -> None:
    train(tmp_path, small(tmp_path)).check()
    outcome = train(tmp_path, [*small(tmp_path), "--train.epochs", "1", "--resume", "extend"])
    assert outcome.codes == [2]
    assert "is already at step 10; it cannot end at step 5" in outcome.output
    assert "is finished" in train(tmp_path, small(tmp_path)).check().output


def test_an_extended_run_is_not_finished_from_the_moment_its_config_is_replaced(tmp_path: Path) -> None:
    train(tmp_path, small(tmp_path)).check()
    config = load_config([*small(tmp_path), "--runs-dir", str(tmp_path / "runs"), "--train.epochs", "4"])
    identity = identity_of(config, load_data(config.data), torch.device("cpu"))
    lock, status_file = RunLock(), RunStatus(True, total_steps=20)
    extended = dataclasses.replace(config, resume="extend")
    start = open_directory(extended, lock, status_file, 1, identity, None)
    record_start(start, extended, 1, None)  # and then it is killed
    lock.release()
    assert status(tmp_path / "runs" / "run")["state"] == "running"
    train(tmp_path, [*small(tmp_path), "--train.epochs", "4"]).check()
    assert status(tmp_path / "runs" / "run")["step"] == 20


def test_data_of_another_size_is_refused(tmp_path: Path) -> None:
    settings = {"data": {"name": "tests.lab.points:points", "args": {"samples": 16}}, "batch": {"global_size": 4}}
    arguments = small(tmp_path, **settings)
    train(tmp_path, arguments).check()
    (tmp_path / "runs" / "run" / "status.json").unlink()  # as if it had been killed
    config = tmp_path / "runs" / "run" / "config.yaml"
    config.write_text(config.read_text().replace("samples: 16", "samples: 24"))  # the same name of other contents
    outcome = train(tmp_path, [*arguments, "--data.args.samples", "24"])
    assert outcome.codes == [2]
    assert "was trained on 16 samples, the data has 24 now" in outcome.output
    assert "no --resume goes on" in outcome.output
    assert "samples that were trained on" in outcome.output  # by a random split of another length
    assert "--name OTHER --init-from runs/run" in outcome.output
    train(tmp_path, [*arguments, "--data.args.samples", "24", "--name", "other", "--init-from", "runs/run"]).check()


def test_a_mistake_before_anything_was_saved_can_be_corrected_under_the_same_name(tmp_path: Path) -> None:
    outcome = train(tmp_path, [*small(tmp_path), "--init-from", str(tmp_path / "nowhere")])
    assert outcome.codes == [2]
    assert "no run, checkpoint or .safetensors, .pt or .pth file there" in outcome.output
    train(tmp_path, small(tmp_path)).check()


def test_a_damaged_checkpoint_is_named_and_passed_over(tmp_path: Path) -> None:
    arguments = small(tmp_path, train={"steps": 9}, checkpoint={"every_steps": 3})
    train(tmp_path, arguments).check()
    run = tmp_path / "runs" / "run"
    whole = weights(run)
    newest = run / "checkpoints" / "step_00000009"
    (newest / "model.safetensors").write_bytes((newest / "model.safetensors").read_bytes()[:-1])
    (run / "status.json").unlink()  # as if it had been killed before it could say that it was finished
    outcome = train(tmp_path, arguments).check()
    assert "step_00000009: model.safetensors has" in outcome.output
    assert status(run)["first_step"] == 6
    assert largest_difference(weights(run), whole) == 0
    assert [row["step"] for row in rows(run, "epoch")] == [5]


def test_checksums_are_made_beside_the_start_by_rank_0_and_find_a_single_byte(tmp_path: Path) -> None:
    arguments = [*small(tmp_path, train={"steps": 9}, checkpoint={"every_steps": 3}), "--tracking.no-report"]
    train(tmp_path, arguments, 2, loop="tests.lab.checksums").check()
    assert json.loads((tmp_path / "checksums.0").read_text()) == [[], []]  # nothing was there
    run = tmp_path / "runs" / "run"
    newest = run / "checkpoints" / "step_00000009"
    files = sorted(path.name for path in newest.iterdir())
    content = bytearray((newest / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (newest / "model.safetensors").write_bytes(content)
    (run / "status.json").unlink()  # as if it had been killed before it could say that it was finished
    outcome = train(tmp_path, arguments, 2, loop="tests.lab.checksums").check()
    assert "step_00000009: model.safetensors does not have the contents that were written" in outcome.output
    assert status(run)["first_step"] == 6
    begun, asked_for = json.loads((tmp_path / "checksums.0").read_text())
    assert set(begun) <= set(files)
    assert "model.safetensors" in begun
    assert asked_for.count("model.safetensors") == 2  # of the newest, and of the one before
    assert json.loads((tmp_path / "checksums.1").read_text()) == [[], []]
    train(tmp_path, [*arguments, "--resume", "never"], loop="tests.lab.checksums").check()
    assert json.loads((tmp_path / "checksums.0").read_text()) == [[], []]


def test_a_run_that_fails_says_so_in_its_status(tmp_path: Path) -> None:
    outcome = train(tmp_path, small(tmp_path, task="tests.lab.failing:FailingTask", train={"steps": 5}))
    assert outcome.codes == [1]
    assert status(tmp_path / "runs" / "run")["state"] == "failed"
    assert "the third step is too much" in status(tmp_path / "runs" / "run")["reason"]


def test_a_run_starts_from_the_weights_of_another(tmp_path: Path) -> None:
    train(tmp_path, [*small(tmp_path), "--name", "first"]).check()
    first = tmp_path / "runs" / "first"
    for number, source in enumerate((first, max((first / "checkpoints").iterdir()))):
        arguments = [*small(tmp_path), "--name", f"next-{number}", "--init-from", str(source), "--optim.lr", "1e-12"]
        train(tmp_path, arguments).check()
        assert largest_difference(weights(tmp_path / "runs" / f"next-{number}"), weights(first)) < 1e-6
    outcome = train(tmp_path, [*small(tmp_path), "--name", "other", "--model", "mlp", "--init-from", str(first)])
    assert outcome.codes == [2]
    assert "belongs to another model" in outcome.output
