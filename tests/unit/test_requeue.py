"""Whether a Slurm job goes back to the queue: each rule alone, and the answer that the sbatch scripts get."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from distloop.commands.requeue import decide
from tests.tools.ranks import clean_environment, write_config

STATUS = {
    "state": "stopped",
    "reason": "SIGUSR1",
    "step": 40,
    "first_step": 20,
    "total_steps": 100,
    "attempt": 2,
    "slurm_job": "7",
    "slurm_restart": 1,
}
JOB = {"JobId": "7", "JobState": "RUNNING", "Requeue": "1", "Restarts": "1", "PreemptTime": "None"}
PREEMPTED = {"PreemptTime": "2026-02-03T04:05:06"}
SHOWN = (
    "JobId=7 JobName=run\n   JobState=RUNNING Reason=None\n   Requeue=1 Restarts=1 BatchFlag=1\n   PreemptTime=None\n"
)


@pytest.mark.parametrize(
    ("status", "job", "said"),
    [
        # Its time is over: the warning signals of sbatch --signal, or Slurm's limit, known from the start.
        ({}, {}, "requeued after step 40 of 100 (SIGUSR1); it continues there"),
        ({"reason": "SIGUSR2"}, {}, "requeued after step 40 of 100 (SIGUSR2); it continues there"),
        (
            {"reason": "Slurm's time limit"},
            {},
            "requeued after step 40 of 100 (Slurm's time limit); it continues there",
        ),
        # SIGTERM is what scancel sends, and what a preemption sends.
        (
            {"reason": "SIGTERM"},
            {},
            "not requeued: the run was stopped by SIGTERM; the same sbatch command continues it",
        ),
        ({"reason": "SIGTERM"}, PREEMPTED, "requeued after step 40 of 100 (preempted); it continues there"),
        # Somebody wants it to end.
        ({"reason": "SIGINT"}, {}, "not requeued: the run was stopped by SIGINT; the same sbatch command continues it"),
        ({"reason": "the file STOP"}, {}, "not requeued: the run was stopped by the file STOP; the same"),
        ({"reason": "the file STOP"}, PREEMPTED, "not requeued: the run was stopped by the file STOP; the same"),
        ({"reason": "stop.after_minutes"}, {}, "not requeued: the run was stopped by stop.after_minutes; the same"),
        # Slurm is at it already: scancel, or scontrol requeue.
        ({}, {"JobState": "COMPLETING"}, "not requeued: Slurm is ending the job (COMPLETING)"),
        ({"reason": "SIGTERM"}, {"JobState": "CANCELLED"}, "not requeued: Slurm is ending the job (CANCELLED)"),
        # May it?
        ({}, {"Requeue": "0"}, "not requeued: the job was submitted with --no-requeue; the same sbatch command"),
        ({"slurm_restart": 3}, {"Restarts": "3"}, "not requeued: restarted 3 times already (stop.max_requeues)"),
        ({"slurm_restart": 2}, {"Restarts": "2"}, "requeued after step 40 of 100"),
        # Does it get anywhere?
        ({"first_step": 40}, {}, "not requeued: no progress, attempt 2 began and ended with step 40."),
        ({"first_step": 40}, PREEMPTED, "requeued after step 40 of 100 (preempted)"),  # it had not had its time
        ({"first_step": 0, "step": 0, "attempt": 1}, {}, "requeued after step 0 of 100"),  # the first is slow
        # Nothing is to be said: it has ended for good, or says why itself.
        ({"state": "finished", "reason": "all steps are done"}, {}, ""),
        ({"state": "failed", "reason": "ValueError: no"}, {}, ""),
        ({"state": "running"}, {}, ""),
        # Another one's words: the run is owned by another job, or this start got nowhere.
        ({"slurm_job": "8"}, {}, ""),
        ({"slurm_job": None}, {}, ""),
        ({"slurm_restart": 0}, {}, ""),
        ({"slurm_restart": 0}, {"Restarts": "0"}, "requeued after step 40 of 100"),
        # A preemption that comes while ranks start, or data load: the status is that of an earlier start.
        ({"slurm_restart": 0}, PREEMPTED, "requeued after step 40 of 100 (preempted); it continues there"),
        ({"slurm_job": "8", "state": "failed"}, PREEMPTED, "requeued after step 40 of 100 (preempted)"),
        ({"slurm_restart": 0, "first_step": 40}, PREEMPTED, "requeued after step 40 of 100 (preempted)"),
        ({"slurm_restart": 0}, PREEMPTED | {"Requeue": "0"}, "not requeued: the job was submitted with --no-requeue"),
    ],
)
def test_a_job_goes_back_to_the_queue_when_its_time_was_up_and_only_then(
    status: dict[str, Any], job: dict[str, str], said: str
) -> None:
    requeue, line = decide({**STATUS, **status}, {**JOB, **job}, max_requeues=3)
    assert line.startswith(said)
    assert bool(line) == bool(said)
    assert requeue == said.startswith("requeued")


@pytest.mark.parametrize(
    ("status", "job", "said"),
    [
        (
            {"state": "failed", "reason": "rank 1 on n2 was the first to end"},
            {},
            "requeued after step 40 of 100 (a node",
        ),
        ({"state": "running", "reason": None}, {}, "requeued after step 40 of 100 (a node is lost)"),  # rank 0's
        ({}, {"Requeue": "0"}, "not requeued: the job was submitted with --no-requeue"),
        ({"slurm_restart": 3}, {"Restarts": "3"}, "not requeued: restarted 3 times already"),
        ({"state": "failed", "first_step": 40}, {}, "not requeued: no progress"),  # a run that breaks each node
        ({"state": "failed"}, {"JobState": "NODE_FAIL"}, "not requeued: Slurm is ending the job (NODE_FAIL)"),
        # Before this start has said anything.
        ({"slurm_restart": 0, "first_step": 40}, {}, "requeued after step 40 of 100 (a node is lost)"),
    ],
)
def test_a_job_that_has_lost_a_node_goes_back_to_the_queue(
    status: dict[str, Any], job: dict[str, str], said: str
) -> None:
    requeue, line = decide({**STATUS, **status}, {**JOB, **job}, max_requeues=3, node_lost=True)
    assert line.startswith(said)
    assert requeue == said.startswith("requeued")


@pytest.mark.parametrize(
    ("job", "node_lost", "why"), [(JOB, True, "a node is lost"), (JOB | PREEMPTED, False, "preempted")]
)
def test_a_job_that_ends_before_the_run_has_a_directory_goes_back(
    job: dict[str, str], node_lost: bool, why: str
) -> None:
    assert decide({}, job, 3, node_lost) == (True, f"requeued before the run had begun ({why})")


def ask(
    folder: Path, nodes: str = "answer", shown: str = SHOWN, job: str = "7", *arguments: str
) -> subprocess.CompletedProcess[str]:
    """What slurm/common.sh asks, as it asks it."""
    return subprocess.run(
        [sys.executable, "-m", "distloop.commands.requeue", nodes, "--config", str(folder / "run.yaml"), *arguments],
        cwd=folder,
        env={**clean_environment(), "SLURM_JOB_ID": job},
        input=shown,
        text=True,
        capture_output=True,
        timeout=60,
        check=False,
    )


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """The directory of a run that Slurm's signal has stopped; its config lies beside "runs"."""
    write_config(tmp_path, {"data": "diabetes", "model": "linear", "task": "regression"})
    folder = tmp_path / "runs" / "run"
    folder.mkdir(parents=True)
    (folder / "status.json").write_text(json.dumps(STATUS))
    return folder


def test_the_script_is_answered_by_an_exit_code_and_the_log_by_a_line(tmp_path: Path, run: Path) -> None:
    done = ask(tmp_path)
    assert (done.returncode, done.stdout) == (
        0,
        "distloop: requeued after step 40 of 100 (SIGUSR1); it continues there\n",
    ), done.stderr
    done = ask(tmp_path, "answer", SHOWN.replace("Requeue=1", "Requeue=0"))
    assert done.returncode == 3
    assert "--no-requeue" in done.stdout


def test_the_settings_on_the_command_line_count(tmp_path: Path, run: Path) -> None:
    assert ask(tmp_path, "answer", SHOWN, "7", "--stop.max-requeues", "1").returncode == 3
    assert ask(tmp_path, "answer", SHOWN, "7", "--name", "other").returncode == 3
    run.rename(tmp_path / "elsewhere")
    assert ask(tmp_path, "answer", SHOWN, "7", "--runs-dir", str(tmp_path), "--name", "elsewhere").returncode == 0


def test_a_task_of_an_array_is_known_by_its_own_number(tmp_path: Path, run: Path) -> None:
    shown = SHOWN.replace("JobId=7", "JobId=7 ArrayJobId=5 ArrayTaskId=2")
    assert ask(tmp_path, "answer", shown).returncode == 0
    assert ask(tmp_path, "answer", shown.replace("JobId=7", "JobId=9"), "7").returncode == 0
    assert ask(tmp_path, "answer", shown, "9").returncode == 3  # the run belongs to another task


def test_a_lost_node_is_told_by_the_script(tmp_path: Path, run: Path) -> None:
    (run / "status.json").write_text(json.dumps({**STATUS, "state": "failed", "reason": "rank 3 on n2 was first"}))
    assert ask(tmp_path).returncode == 3
    done = ask(tmp_path, "lost")
    assert (done.returncode, "a node is lost" in done.stdout) == (0, True), done.stdout + done.stderr


@pytest.mark.parametrize("text", [None, "", "not JSON"])
def test_a_run_that_has_said_nothing_legible_does_not_go_back(tmp_path: Path, run: Path, text: str | None) -> None:
    (run / "status.json").unlink()
    if text is not None:
        (run / "status.json").write_text(text)
    done = ask(tmp_path)
    assert done.returncode == 3, done.stdout + done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("shown", ["", "slurm_load_jobs error: Invalid job id specified\n"])
def test_where_slurm_does_not_answer_the_job_does_not_go_back(tmp_path: Path, run: Path, shown: str) -> None:
    assert ask(tmp_path, "answer", shown).returncode == 3


def test_a_users_mistake_does_not_go_back(tmp_path: Path, run: Path) -> None:
    done = ask(tmp_path, "lost", SHOWN, "7", "--train.stepz", "5")
    assert done.returncode not in (0, 1)
    assert "Traceback" not in done.stderr
