"""A disk that is full or read-only, and files that are damaged: said plainly, nothing lost, nothing run."""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError

from distloop.run.checkpoint import (
    MANIFEST,
    MODEL,
    OPTIMIZER,
    STATE,
    Snapshot,
    Weights,
    digest_of,
    publish,
    published_in,
    verify,
)
from distloop.run.metrics import MetricsFile
from tests.lab.crashing import limit_files, make_read_only, make_writable, mount, mount_is_allowed, no_limit
from tests.tools import stage
from tests.tools.ranks import Outcome, Ranks, train, write_config
from tests.tools.records import largest_difference, rows, status, steps_saved, weights
from tests.tools.trap import Trap

# A checkpoint is 105 kB of weights, 210 kB of optimizer and three small files. They are due after 5, 10, 15, … steps.
SETTINGS: dict[str, Any] = {
    "data": "digits",
    "model": {"name": "mlp"},
    "validate": {"every_epochs": None, "every_steps": 1000},
    "log": {"every_steps": 1},
}
STEPS = 30
NEVER = 1000


def arguments(folder: Path, steps: int = STEPS, **checkpoint: Any) -> list[str]:
    settings = {
        **SETTINGS,
        "train": {"steps": steps},
        "checkpoint": {"every_steps": 5, **checkpoint},
        "task": "tests.lab.crashing:NoRoom",
    }
    return ["--config", str(write_config(folder, settings))]


def trouble(kind: str, what: object, begin: int, end: int) -> dict[str, str]:
    """How rank 0 cannot write, and between which updates of the attempt: the environment of a run."""
    return {"TROUBLE": json.dumps([kind, str(what), begin, end])}


def names_in(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir())


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a run of STEPS that had no trouble leaves, with the checkpoints of steps 20, 25 and 30."""
    folder = tmp_path_factory.mktemp("whole")
    train(folder, arguments(folder, keep_last=3)).check()
    return folder / "runs" / "run"


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A small file system."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if not mount_is_allowed(folder):
        pytest.skip("no right to mount a file system here")
    mount("-t", "tmpfs", "-o", "size=2m", "distloop-test", str(folder))
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.fixture
def checkpoints(tmp_path: Path) -> Iterator[Path]:
    """The folder of checkpoints that a run is about to use; writable again after the test."""
    folder = tmp_path / "runs" / "run" / "checkpoints"
    folder.mkdir(parents=True)
    if os.geteuid() == 0 and not mount_is_allowed(folder):
        pytest.skip("root, who may write anything, and no right to mount")
    yield folder
    if os.geteuid():
        folder.chmod(0o755)
    else:
        subprocess.run(["umount", "--lazy", str(folder)], check=False, capture_output=True)


def check_message(outcome: Outcome, step: int, where: Path | str, why: str, last: int) -> None:
    """Which checkpoint, where, why, and what there is instead: once, and no traceback."""
    failed = [line for line in outcome.output.splitlines() if f"WARNING: The checkpoint of step {step} " in line]
    assert len(failed) == 1, outcome.output
    assert f"could not be written to {where}: " in failed[0]
    assert why in failed[0]
    assert f"The last one, step_{last:08d}, is whole." in failed[0]
    assert "Traceback" not in outcome.output


# ---- a disk that is full, for a while ----------------------------------------------------------------------------


@pytest.mark.parametrize(("world_size", "largest"), [(1, 150_000), (2, 60_000)], ids=["optimizer", "weights"])
def test_a_save_on_a_full_disk_is_said_and_the_next_one_succeeds(
    tmp_path: Path, whole: Path, world_size: int, largest: int
) -> None:
    """`largest` is the size that a file may have: too little for the optimizer's, or for that of the weights too."""
    outcome = train(tmp_path, arguments(tmp_path), world_size, trouble("limit", largest, 8, 11)).check()
    check_message(outcome, 10, "runs/run/checkpoints", "File too large", last=5)
    assert outcome.output.count("could not be written") == 1
    assert "The next save tries again." in outcome.output
    run = tmp_path / "runs" / "run"
    assert names_in(run) == ["step_00000025", "step_00000030"]
    for path in published_in(run / "checkpoints"):
        verify(path)
    assert status(run) == {**status(run), "state": "finished", "step": STEPS}
    assert largest_difference(weights(run), weights(whole)) <= (0 if world_size == 1 else 1e-6)
    assert [row["step"] for row in rows(run, "train")] == list(range(1, STEPS + 1))


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_run_whose_last_checkpoint_cannot_be_written_fails_and_can_be_continued(
    tmp_path: Path, whole: Path, world_size: int
) -> None:
    outcome = train(tmp_path, arguments(tmp_path), world_size, trouble("limit", 60_000, 8, NEVER))
    assert outcome.codes == [1] * world_size
    for step in (10, 15, 20, 25, 30):
        check_message(outcome, step, "runs/run/checkpoints", "File too large", last=5)
    assert outcome.output.count("The run's last checkpoint is missing") == 1
    run = tmp_path / "runs" / "run"
    assert names_in(run) == ["step_00000005"]  # whole, and nothing of the others
    verify(run / "checkpoints" / "step_00000005")
    assert status(run) == {**status(run), "state": "failed", "step": 5}
    assert "The checkpoint of step 30 could not be written" in status(run)["reason"]
    assert not (run / "lock.json").exists()

    train(tmp_path, arguments(tmp_path), world_size).check()  # where there is room again
    assert status(run)["first_step"] == 5
    assert largest_difference(weights(run), weights(whole)) <= (0 if world_size == 1 else 1e-6)
    assert [row["step"] for row in rows(run, "train")] == list(range(1, STEPS + 1))


def test_with_the_policy_stop_the_first_failed_save_stops_the_run(tmp_path: Path) -> None:
    outcome = train(tmp_path, arguments(tmp_path, 60, on_failure="stop"), 2, trouble("limit", 60_000, 8, 11))
    assert outcome.codes == [1, 1]
    check_message(outcome, 10, "runs/run/checkpoints", "File too large", last=5)
    assert "checkpoint.on_failure" in outcome.output
    run = tmp_path / "runs" / "run"
    # By the time that all have stopped there is room: what was done is saved.
    last = rows(run, "train")[-1]["step"]
    assert 11 <= last < 60
    assert steps_saved(run)[-1] == last
    assert status(run) == {**status(run), "state": "failed", "step": last}
    assert "a checkpoint could not be written" in status(run)["reason"]


def test_with_the_policy_stop_a_disk_that_stays_full_ends_the_run_with_its_last_whole_checkpoint(
    tmp_path: Path,
) -> None:
    outcome = train(tmp_path, arguments(tmp_path, 60, on_failure="stop"), 1, trouble("limit", 60_000, 8, NEVER))
    assert outcome.codes == [1]
    run = tmp_path / "runs" / "run"
    assert rows(run, "train")[-1]["step"] < 60
    assert names_in(run) == ["step_00000005"]
    assert status(run)["state"] == "failed"
    assert "The run's last checkpoint is missing" in status(run)["reason"]


@pytest.mark.parametrize("world_size", [1, 2])
def test_on_a_full_file_system_rows_wait_and_the_previous_checkpoint_stays(
    tmp_path: Path, disk: Path, world_size: int
) -> None:
    # Long enough for the rows to fill the last block that the file has, which has room on a full disk as well.
    config = [*arguments(tmp_path, 60), "--runs-dir", str(disk / "runs")]
    outcome = train(tmp_path, config, world_size, trouble("full", disk, 8, 51)).check()
    run = disk / "runs" / "run"
    for step in range(10, 51, 5):
        check_message(outcome, step, run / "checkpoints", "No space left on device", last=5)
    assert outcome.output.count("its rows wait in memory") == 1
    assert [row["step"] for row in rows(run, "train")] == list(range(1, 61))
    assert names_in(run) == ["step_00000055", "step_00000060"]
    assert status(run)["state"] == "finished"


def test_a_run_whose_log_is_on_the_full_disk_as_well_goes_on(tmp_path: Path, whole: Path) -> None:
    """As under Slurm, where the log of a job lies beside its runs. What is said then may be lost, and no more."""
    train(tmp_path, arguments(tmp_path), 1, trouble("limit", 0, 8, 18)).check()
    run = tmp_path / "runs" / "run"
    assert [row["step"] for row in rows(run, "train")] == list(range(1, STEPS + 1))
    assert names_in(run) == ["step_00000025", "step_00000030"]
    assert largest_difference(weights(run), weights(whole)) == 0
    assert status(run)["state"] == "finished"


def test_a_disk_that_stays_full_leaves_the_record_whole(tmp_path: Path, disk: Path) -> None:
    config = [*arguments(tmp_path, 60), "--runs-dir", str(disk / "runs")]
    outcome = train(tmp_path, config, 1, trouble("full", disk, 8, NEVER))
    assert outcome.codes == [1]
    run = disk / "runs" / "run"
    (disk / "ballast").unlink()
    assert "rows could not be written to" in outcome.output
    steps = [row["step"] for row in rows(run, "train")]  # no line is torn
    assert steps == list(range(1, len(steps) + 1))
    assert 7 <= len(steps) < 60
    assert names_in(run) == ["step_00000005"]
    verify(run / "checkpoints" / "step_00000005")
    assert "WARNING: status.json cannot be written (No space left on device): failed" in outcome.output


# ---- the parts alone; with capsys, as what is printed must not go into a file, which would be limited too ---------


def test_rows_are_written_whole_and_once_whatever_there_is_room_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "metrics.jsonl"
    file = MetricsFile(path)
    try:
        for number in range(60):
            limit_files(number * 37)  # grows more slowly than the rows do: often a part of one would fit
            file.log({"kind": "train", "step": number, "text": "." * (number % 50)})
            assert all(json.loads(line) for line in path.read_text().splitlines())
        assert len(path.read_text().splitlines()) < 60
        no_limit()
        file.log({"kind": "train", "step": 60})
    finally:
        no_limit()
    file.close()
    assert [row["step"] for row in rows(tmp_path, "train")] == list(range(61))
    assert "cannot be written" in capsys.readouterr().out


def test_the_end_of_a_run_writes_the_rows_that_there_is_room_for_by_then(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = MetricsFile(tmp_path / "metrics.jsonl")
    try:
        limit_files(0)
        file.log({"kind": "validate", "step": 1})
    finally:
        no_limit()
    file.close()
    assert [row["step"] for row in rows(tmp_path, "validate")] == [1]


def test_whichever_file_meets_the_limit_a_checkpoint_is_whole_or_not_there(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = {"text": "x" * 40_000}  # makes the manifest the largest file
    weights = Weights({"weight": torch.ones(64, 64)}, {})
    optimizer = {"state": {0: torch.ones(9000)}}
    modules = {"model": weights, "averaged": weights}
    snapshot = Snapshot(modules, {"optimizer": optimizer}, {"step": 1, "text": "x" * 25_000}, text)
    folder = tmp_path / "checkpoints"
    published = []
    for size in range(0, 60_000, 3000):
        try:
            limit_files(size)
            publish(folder, size, snapshot)
            published.append(size)
        except (OSError, RuntimeError, SafetensorError):
            pass
        finally:
            no_limit()
    assert [int(path.name.removeprefix("step_")) for path in published_in(folder)] == published
    assert 0 < len(published) < 10
    for path in published_in(folder):
        verify(path)


# ---- a directory that is read-only -------------------------------------------------------------------------------


def test_a_save_into_a_read_only_directory_is_said_and_the_next_one_succeeds(tmp_path: Path, checkpoints: Path) -> None:
    outcome = train(tmp_path, arguments(tmp_path), 2, trouble("read-only", checkpoints, 8, 11)).check()
    why = "Permission denied" if os.geteuid() else "Read-only file system"
    check_message(outcome, 10, "runs/run/checkpoints", why, last=5)
    run = tmp_path / "runs" / "run"
    assert names_in(run) == ["step_00000025", "step_00000030"]
    assert status(run) == {**status(run), "state": "finished", "step": STEPS}


def test_a_directory_that_stays_read_only_fails_the_run_and_keeps_its_checkpoint(
    tmp_path: Path, checkpoints: Path
) -> None:
    outcome = train(tmp_path, arguments(tmp_path), 1, trouble("read-only", checkpoints, 8, NEVER))
    assert outcome.codes == [1]
    make_writable(checkpoints)
    run = tmp_path / "runs" / "run"
    assert names_in(run) == ["step_00000005"]
    verify(checkpoints / "step_00000005")
    assert status(run)["state"] == "failed"


def test_a_run_in_a_read_only_directory_is_refused_with_one_message(tmp_path: Path, whole: Path) -> None:
    run = unfinished(whole, tmp_path)
    if os.geteuid() == 0 and not mount_is_allowed(run):
        pytest.skip("root, who may write anything, and no right to mount")
    before = sorted(path.name for path in run.rglob("*"))
    make_read_only(run)
    try:
        outcome = train(tmp_path, arguments(tmp_path, keep_last=3), 2)
    finally:
        make_writable(run)
    assert outcome.codes == [2, 2]
    assert outcome.output.count("cannot be written") == 1
    assert "Traceback" not in outcome.output
    assert sorted(path.name for path in run.rglob("*")) == before


# ---- damage, met by a whole run (each form by each file: tests/unit/test_checkpoint.py) --------------------------


def cut(path: Path) -> None:
    (path / OPTIMIZER).write_bytes((path / OPTIMIZER).read_bytes()[:-1000])


def flip(path: Path) -> None:
    contents = bytearray((path / MODEL).read_bytes())
    contents[len(contents) // 2] ^= 16
    (path / MODEL).write_bytes(contents)


def remove(path: Path) -> None:
    (path / STATE).unlink()


def clear(path: Path) -> None:
    shutil.rmtree(path)
    path.mkdir()


def unfinished(whole: Path, folder: Path) -> Path:
    """A copy of the whole run, as if it had been killed before it could say that it was finished."""
    run = folder / "runs" / "run"
    shutil.copytree(whole, run)
    (run / "status.json").unlink()
    return run


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (cut, f"{OPTIMIZER} has "),
        (flip, f"{MODEL} does not have the contents that were written"),
        (remove, f"{STATE} is missing"),
        (clear, f"{MANIFEST} is missing"),
    ],
)
def test_a_run_names_its_damaged_checkpoint_and_continues_from_the_one_before(
    tmp_path: Path, whole: Path, damage: Callable[[Path], None], reason: str
) -> None:
    run = unfinished(whole, tmp_path)
    newest = run / "checkpoints" / "step_00000030"
    damage(newest)
    outcome = train(tmp_path, arguments(tmp_path, keep_last=3)).check()
    assert f"passed over a damaged checkpoint: runs/run/checkpoints/step_00000030: {reason}" in outcome.output
    assert status(run)["first_step"] == 25
    assert largest_difference(weights(run), weights(whole)) == 0
    assert [row["step"] for row in rows(run, "train")] == list(range(1, STEPS + 1))
    verify(newest)  # the damaged one has been replaced
    assert names_in(run) == ["step_00000020", "step_00000025", "step_00000030"]


def test_a_run_of_which_no_checkpoint_is_whole_is_refused_and_left_as_it_is(tmp_path: Path, whole: Path) -> None:
    run = unfinished(whole, tmp_path)
    for path, damage in zip(published_in(run / "checkpoints"), (cut, flip, remove), strict=True):
        damage(path)
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file()}
    outcome = train(tmp_path, arguments(tmp_path, keep_last=3))
    assert outcome.codes == [2]
    for words in ("step_00000020: ", "step_00000025: ", "step_00000030: ", "--resume never"):
        assert outcome.output.count(words) == 1
    assert "Traceback" not in outcome.output
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(("name", "world_size"), [(OPTIMIZER, 2), (MODEL, 1)])
def test_a_run_does_not_run_code_that_is_in_its_checkpoint(
    tmp_path: Path, whole: Path, name: str, world_size: int
) -> None:
    run, trap = unfinished(whole, tmp_path), tmp_path / "sprung"
    newest = run / "checkpoints" / "step_00000030"
    torch.save({"state": Trap(trap), "param_groups": []}, newest / name)
    # Whoever writes the file writes the manifest that vouches for it.
    manifest = json.loads((newest / MANIFEST).read_text())
    contents = (newest / name).read_bytes()
    manifest["files"][name] = {"size": len(contents), "sha256": hashlib.sha256(contents).hexdigest()}
    del manifest["sha256"]
    (newest / MANIFEST).write_text(json.dumps({**manifest, "sha256": digest_of(manifest)}))
    verify(newest)
    outcome = train(tmp_path, arguments(tmp_path, keep_last=3), world_size)
    assert outcome.codes == [2] * world_size
    assert outcome.output.count("cannot be read as") == 1
    assert str(newest.relative_to(tmp_path) / name) in outcome.output
    assert "Traceback" not in outcome.output
    assert not trap.exists()
    torch.load(io.BytesIO(contents), weights_only=False)
    assert trap.exists(), "the trap would not have sprung, so that this test shows nothing"


def test_what_a_killed_save_left_is_removed_at_the_next_start(tmp_path: Path) -> None:
    settings = {**SETTINGS, "train": {"steps": 9}, "checkpoint": {"every_steps": 3}, "task": "tests.lab.crashing:Held"}
    folder = tmp_path / "runs" / "run" / "checkpoints"
    for leftover in (".writing_step_00000003", ".replaced_step_00000002", ".writing_step_00000099"):
        (folder / leftover).mkdir(parents=True)
        (folder / leftover / MODEL).write_bytes(b"a part")
    stage.hold(tmp_path, "update", count=2)
    with Ranks(tmp_path, ["--config", str(write_config(tmp_path, settings))]) as ranks:
        stage.arrived(tmp_path, "update")
        assert list(folder.iterdir()) == []  # before anything is saved
        stage.let_go(tmp_path, "update")
        ranks.join().check()
