"""TRAIN=my_train.py sbatch slurm/….sbatch: a loop of one's own has all that distloop's has under Slurm."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.slurm.test_failures import RANK_1, SETTINGS
from tests.slurm.test_jobs import DIGITS, check_same, reference_losses
from tests.tools import stage
from tests.tools.launching import failing_line, own_loop
from tests.tools.ranks import train, write_config
from tests.tools.records import losses, run_of, status
from tests.tools.slurm_cluster import Cluster
from tests.tools.slurm_jobs import GENEROUS, SCRIPTS, finished_in, heard, held_run, stopped, submit


def check_file(run: Path, file: Path) -> None:
    """The run was trained by this file."""
    assert json.loads((run / "environment.json").read_text())["command"][0] == str(file)


@pytest.mark.long
def test_it_is_warned_and_requeued_and_goes_on_where_it_was(cluster: Cluster, tmp_path: Path) -> None:
    file = own_loop(tmp_path / "my loops" / "my train.py")
    arguments = held_run(tmp_path)
    job = submit(cluster, tmp_path, "multi_node", *arguments, environment={"TRAIN": "my loops/my train.py"})
    job.arrived("step", [0, 1])
    cluster.run("scancel", "--signal=USR2", "--full", job.number)  # the script and the ranks, as before a limit
    heard(job, 1)
    step = stopped(job, 0)
    assert status(run_of(tmp_path))["reason"] == "SIGUSR2"
    job.wait("PENDING", "RUNNING", restarts=1)
    stage.let_go(tmp_path, "step")
    job.ends(restarts=1)
    finished_in(job, attempts=2)
    assert status(run_of(tmp_path))["first_step"] == step
    check_file(run_of(tmp_path), file)
    train(tmp_path, [*arguments, "--name", "reference"]).check()
    assert losses(run_of(tmp_path)) == pytest.approx(losses(tmp_path / "runs" / "reference"), rel=1e-5)


def test_a_file_that_is_not_there_is_refused_before_anything_starts(cluster: Cluster, tmp_path: Path) -> None:
    own_loop(tmp_path / "my_train.py")
    jobs = [
        submit(cluster, tmp_path, script, *more, options=options, environment={"TRAIN": "my_tarin.py"})
        for script, more, options in (("single_node", (), ()), ("sweep", ("lines.txt",), ("--array=1",)))
    ]
    for job in jobs:
        log = job.ends("FAILED", "2:0")
        assert log.count("distloop: ") == 1
        assert f"distloop: TRAIN=my_tarin.py: there is no file {tmp_path}/my_tarin.py" in log
    assert not (tmp_path / "runs").exists()


@pytest.mark.long
def test_the_other_scripts_train_it_too(cluster: Cluster, tmp_path: Path) -> None:
    reference = reference_losses(tmp_path)
    file, elsewhere = own_loop(tmp_path / "my_train.py"), tmp_path / "elsewhere"
    elsewhere.mkdir()
    config = str(write_config(tmp_path, DIGITS))
    (tmp_path / "lines.txt").write_text("--batch.micro-size 16\n--batch.micro-size 8\n")
    # A path from the folder of submission, though the job works in another.
    options = [f"--chdir={elsewhere}"]
    single = submit(
        cluster, tmp_path, "single_node", "--config", config, tasks=2, options=options, environment={"TRAIN": file.name}
    )
    options = ["--array=1-2", "--cpus-per-task=1", "--time=10"]
    arguments, script = ["lines.txt", "--config", config], SCRIPTS / "sweep.sbatch"
    number = cluster.submit(script, *arguments, options=options, folder=tmp_path, environment={"TRAIN": str(file)})
    single.ends()
    cluster.wait_until(
        lambda: [job["JobState"] for job in cluster.jobs(number)] == 2 * ["COMPLETED"],
        lambda: str(cluster.jobs(number)),
        GENEROUS,
    )
    for run in (elsewhere / "runs" / "run", tmp_path / "runs" / "lines-1", tmp_path / "runs" / "lines-2"):
        check_same(run, reference)
        check_file(run, file)


def test_a_rank_that_raises_is_named_with_the_line_of_that_loop(cluster: Cluster, tmp_path: Path) -> None:
    file = own_loop(tmp_path / "my_train.py")
    stage.fail(tmp_path, "forward", "raise", rank=1)
    config = str(write_config(tmp_path, SETTINGS))
    job = submit(cluster, tmp_path, "multi_node", "--config", config, environment={"TRAIN": file.name})
    found = job.wait()
    log = job.log
    assert (found["JobState"], found["Restarts"]) == ("FAILED", "0"), log
    [blame] = [line for line in log.splitlines() if "rank 1 on" in line]
    assert blame == f"distloop: {RANK_1} ({failing_line(file)}), failed first: ValueError: a value that nobody likes"
    assert "distloop/train.py" not in log
    assert "requeued" not in log
