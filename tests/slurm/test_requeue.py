"""Runs outlive time limits, preemption and lost nodes, and what ends them for good does so."""

from __future__ import annotations

import datetime
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.tools import stage
from tests.tools.ranks import train
from tests.tools.records import losses, run_of, status
from tests.tools.slurm_cluster import Cluster, cgroup_missing, missing
from tests.tools.slurm_jobs import Job, finished_in, heard, held_run, stopped, submit
from tests.tools.stopping import NOTICE

NO_CGROUP = missing() or cgroup_missing()
cgroup = pytest.param(
    "cgroup", marks=[pytest.mark.long, pytest.mark.skipif(NO_CGROUP is not None, reason=NO_CGROUP or "")]
)


@pytest.fixture
def another(request: pytest.FixtureRequest, tmp_path: Path, cluster: Cluster) -> Iterator[Callable[..., Cluster]]:
    """Starts a cluster with other settings beside the usual one."""
    started: list[Cluster] = []

    def start(**settings: Any) -> Cluster:
        started.append(Cluster(tmp_path / f"slurm-{len(started)}", **settings))
        started[-1].start()
        return started[-1]

    yield start
    for other in started:
        other.stop()


@pytest.fixture(params=["linuxproc", cgroup])
def signalled(request: pytest.FixtureRequest, another: Callable[..., Cluster], cluster: Cluster) -> Cluster:
    """A cluster in which a signal reaches each process of a task, or the task itself only."""
    return cluster if request.param == "linuxproc" else another(proctrack=request.param)


def time_is_short(job: Job) -> None:
    """The end of the job's time comes so near that Slurm sends the script's own --signal=USR2@180."""
    end = datetime.datetime.now() + datetime.timedelta(seconds=150)
    job.scontrol("update", f"JobId={job.number}", f"EndTime={end:%Y-%m-%dT%H:%M:%S}")


def all_ranks_are_signalled(job: Job) -> None:
    job.cluster.run("scancel", "--signal=USR2", job.number)


def script_and_ranks_are_signalled(job: Job) -> None:
    job.cluster.run("scancel", "--signal=USR2", "--full", job.number)


@pytest.mark.long
def test_three_warnings_later_the_run_is_whole_and_no_step_was_done_twice(signalled: Cluster, tmp_path: Path) -> None:
    arguments = held_run(tmp_path)
    # This job's own run is not what --resume never moves aside.
    job = submit(signalled, tmp_path, "multi_node", *arguments, "--resume", "never")
    saved = [0]
    warnings = (script_and_ranks_are_signalled, all_ranks_are_signalled, time_is_short)
    for attempt, warn in enumerate(warnings):
        job.arrived("step", [0, 1])
        warn(job)
        heard(job, attempt + 1)
        saved.append(stopped(job, attempt))
        assert saved[-1] > saved[-2]
        assert status(run_of(tmp_path))["reason"] == "SIGUSR2"
        job.wait("PENDING", "RUNNING", restarts=attempt + 1)
    job.scontrol("update", f"JobId={job.number}", "TimeLimit=10")  # it kept the short one
    stage.let_go(tmp_path, "step")
    log = job.ends(restarts=3)
    finished_in(job, attempts=4)
    for step in saved[1:]:
        assert log.count(f"requeued after step {step} of 60 (SIGUSR2); it continues there") == 1
        assert log.count(f"continuing after step {step} of 60") == 1
    train(tmp_path, [*arguments, "--name", "reference"]).check()
    assert losses(run_of(tmp_path)) == pytest.approx(losses(tmp_path / "runs" / "reference"), rel=1e-5)


@pytest.mark.long
@pytest.mark.timeout(900)
def test_time_limits_of_a_minute_are_outlived(signalled: Cluster, tmp_path: Path) -> None:
    arguments = held_run(tmp_path, task={"name": "tests.lab.stopping:Waiting", "args": {"step_seconds": 2.0}})
    stage.let_go(tmp_path, "step")
    options = ["--time=1", "--signal=USR2@25"]
    job = submit(signalled, tmp_path, "multi_node", *arguments, "--stop.reserve-seconds", "0", options=options)
    found = job.wait(timeout=800)
    restarts = int(found["Restarts"])
    assert (found["JobState"], found["ExitCode"]) == ("COMPLETED", "0:0"), job.log
    assert restarts >= 2
    finished_in(job, attempts=restarts + 1)
    assert job.log.count("it continues there") == restarts


def test_scancel_saves_and_ends_for_good_and_the_same_command_goes_on(signalled: Cluster, tmp_path: Path) -> None:
    arguments = held_run(tmp_path)
    job = submit(signalled, tmp_path, "multi_node", *arguments)
    job.arrived("step", [0, 1])
    signalled.run("scancel", job.number)
    heard(job, 1)
    step = stopped(job, 0)
    log = job.ends("CANCELLED", "0:0")
    assert status(run_of(tmp_path))["reason"] == "SIGTERM"
    assert "requeued after" not in log
    stage.let_go(tmp_path, "step")
    again = submit(signalled, tmp_path, "multi_node", *arguments)
    again.ends()
    assert status(run_of(tmp_path))["first_step"] == step
    finished_in(again, attempts=2)
    assert int(job.wait()["Restarts"]) == 0


def requeue(job: Job) -> None:
    job.scontrol("requeue", job.number)


def lose_a_node(job: Job) -> None:
    job.cluster.set_node("n2", "DOWN")


def preempt(job: Job) -> None:
    script = job.folder / "urgent.sh"
    script.write_text("#!/bin/sh\nexec srun true\n")
    options = ["-N2", "--gpus-per-node=2", "--partition=urgent", "--output=urgent-%j.txt"]
    job.cluster.submit(script, options=options)


def preempt_with_notice(job: Job) -> None:
    job.scontrol("update", "PartitionName=debug", "GraceTime=60")
    preempt(job)


LONG = [pytest.param(event, marks=pytest.mark.long) for event in (requeue, lose_a_node, preempt)]


@pytest.mark.parametrize("take_away", [preempt_with_notice, *LONG])
def test_a_job_that_slurm_takes_away_saves_and_comes_back(
    signalled: Cluster, tmp_path: Path, take_away: Callable[[Job], None]
) -> None:
    job = submit(signalled, tmp_path, "multi_node", *held_run(tmp_path))
    job.arrived("step", [0, 1])
    take_away(job)
    try:
        if take_away is lose_a_node:
            job.says(NOTICE)  # what the lost node says may be lost with it
        else:
            heard(job, 1)
        step = stopped(job, 0)
        assert status(run_of(tmp_path))["reason"] == "SIGTERM"
        job.wait("PENDING", "RUNNING", restarts=1)
        if take_away is lose_a_node:
            signalled.set_node("n2", "RESUME", "")
        stage.let_go(tmp_path, "step")
        job.ends(restarts=1)
        assert status(run_of(tmp_path))["first_step"] == step
    finally:
        signalled.run("scontrol", "update", "PartitionName=debug", "GraceTime=0")
    finished_in(job, attempts=2)


@pytest.mark.long
@pytest.mark.parametrize(
    "lost",
    ["n2", "n1"],  # n1: with the script and rank 0
)
def test_a_killed_node_that_slurm_notices_brings_the_job_back_at_its_newest_checkpoint(
    cluster: Cluster, tmp_path: Path, lost: str
) -> None:
    arguments = held_run(tmp_path)
    job = submit(cluster, tmp_path, "multi_node", *arguments)
    job.arrived("step", [0, 1])
    cluster.kill_slurmd(lost)
    job.wait("PENDING", restarts=1)
    back(job, lost, seen=6)


@pytest.mark.long
def test_a_killed_node_that_slurm_does_not_notice_brings_the_job_back_all_the_same(
    another: Callable[..., Cluster], tmp_path: Path
) -> None:
    cluster = another(slurmd_timeout=300)
    job = submit(cluster, tmp_path, "multi_node", *held_run(tmp_path))
    job.arrived("step", [0, 1])
    cluster.kill_slurmd("n2")
    job.says("(a node is lost); it continues there")
    job.wait("COMPLETING", "PENDING", restarts=1)  # until the node is back or Slurm gives it up
    back(job, "n2", seen=6)


def back(job: Job, node: str, seen: int) -> None:
    """The node is there again, and so is the job."""
    stage.let_go(job.folder, "step")
    job.cluster.start_slurmd(node)
    job.until(lambda: job.cluster.node_state(node) in ("IDLE", "MIXED"), f"{node} to be back")
    job.ends(restarts=1)
    assert status(run_of(job.folder))["first_step"] == seen
    finished_in(job, attempts=2, redone=True)


def interrupted(job: Job, attempt: int = 0) -> int:
    """Signal the one rank of a job that is held, and let it stop."""
    job.arrived("step", [0])
    all_ranks_are_signalled(job)
    job.says("finishing what is going on", attempt + 1)
    return stopped(job, attempt)


@pytest.mark.long
def test_a_job_comes_back_as_often_as_it_may(cluster: Cluster, tmp_path: Path) -> None:
    job = submit(cluster, tmp_path, "single_node", *held_run(tmp_path), "--stop.max-requeues", "1")
    interrupted(job)
    job.wait("PENDING", "RUNNING", restarts=1)
    interrupted(job, 1)
    assert "not requeued: restarted 1 times already (stop.max_requeues)" in job.ends(restarts=1)


@pytest.mark.parametrize(
    ("options", "arguments", "why"),
    [
        ((), ("--stop.max-requeues", "0"), "restarted 0 times already (stop.max_requeues)"),
        (("--no-requeue",), (), "the job was submitted with --no-requeue; the same sbatch command continues it"),
    ],
    ids=["max_requeues", "--no-requeue"],
)
def test_a_job_that_may_not_come_back_does_not_and_says_why(
    cluster: Cluster, tmp_path: Path, options: tuple[str, ...], arguments: tuple[str, ...], why: str
) -> None:
    job = submit(cluster, tmp_path, "single_node", *held_run(tmp_path), *arguments, options=options)
    interrupted(job)
    assert f"distloop: not requeued: {why}" in job.ends()


@pytest.mark.long
def test_a_stop_by_hand_is_not_undone(cluster: Cluster, tmp_path: Path) -> None:
    job = submit(cluster, tmp_path, "single_node", *held_run(tmp_path))
    job.arrived("step", [0])
    (run_of(tmp_path) / "STOP").touch()
    job.says("finishing what is going on")
    stopped(job, 0)
    assert "not requeued: the run was stopped by the file STOP; the same sbatch command continues it" in job.ends()


@pytest.mark.long
def test_of_a_sweep_only_the_run_that_was_warned_comes_back(cluster: Cluster, tmp_path: Path) -> None:
    (tmp_path / "lines.txt").write_text("--seed 1\n--seed 2\n")
    sweep = submit(cluster, tmp_path, "sweep", "lines.txt", *held_run(tmp_path), options=["--array=1-2"])
    # Slurm gives one of the tasks, here the last, the number of the whole array.
    runs = [tmp_path / "runs" / f"lines-{task}" for task in (1, 2)]
    tasks = [Job(cluster, f"{sweep.number}_{task}", tmp_path) for task in (1, 2)]
    for task, run in zip(tasks, runs, strict=True):
        task.until((run / "metrics.jsonl").exists, "a run of the sweep")
    all_ranks_are_signalled(tasks[1])
    tasks[1].says("finishing what is going on")
    stage.let_go(tmp_path, "step")
    assert "requeued" not in tasks[0].ends()
    assert "requeued after step" in tasks[1].ends(restarts=1)
    assert [(status(run)["state"], status(run)["attempt"]) for run in runs] == [("finished", 1), ("finished", 2)]


@pytest.mark.long
def test_a_job_without_progress_does_not_come_back_for_ever(another: Callable[..., Cluster], tmp_path: Path) -> None:
    cluster = another(slurmd_timeout=300)
    # Nothing is saved: each attempt begins and ends with step 0.
    arguments = held_run(tmp_path, checkpoint={"every_steps": 60}, validate={"every_steps": 60})
    job = submit(cluster, tmp_path, "multi_node", *arguments)
    for says in ("it continues there", "not requeued: no progress, attempt 2 began and ended with step 0."):
        job.arrived("step", [0, 1])
        cluster.kill_slurmd("n2")
        job.says(says)
        cluster.start_slurmd("n2")
    found = job.wait(restarts=1)
    assert (found["JobState"], found["Restarts"]) == ("FAILED", "1"), job.log


@pytest.mark.parametrize(
    ("arguments", "state", "code", "line"),
    [
        (["--optim.lrr", "0.1"], "FAILED", "2:0", "lrr"),
        pytest.param(["--config", "nothing.yaml"], "FAILED", "2:0", "nothing.yaml", marks=pytest.mark.long),
        (["--help"], "COMPLETED", "0:0", "usage: distloop train"),
    ],
)
def test_what_does_not_train_does_not_come_back(
    cluster: Cluster, tmp_path: Path, arguments: list[str], state: str, code: str, line: str
) -> None:
    log = submit(cluster, tmp_path, "single_node", *arguments).ends(state, code)
    assert line in log
    assert "Traceback" not in log
