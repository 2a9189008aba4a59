"""A rank that fails under Slurm ends the job at once, by name and cause, and the job does not come back."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from tests.tools import stage
from tests.tools.ranks import write_config
from tests.tools.records import run_of, status
from tests.tools.slurm_cluster import Cluster
from tests.tools.slurm_jobs import submit

SETTINGS = {
    "data": {"name": "tests.lab.failing:points", "workers": 1},
    "model": "linear",
    "task": "tests.lab.failing:Failing",
    "batch": {"global_size": 16},
    "train": {"steps": 60},
    "checkpoint": {"every_steps": 2},
    "device": "cpu",
}
SECONDS = 30  # within which all is over
WITHOUT_A_WORD = "rank 1 on n2 was the first to end, without a word: "
# how -> what is said of it
RANK_1 = "rank 1 on n2, in step 5, forward and backward pass"
SAID = {
    "raise": f"{RANK_1}, failed first: ValueError: a value that nobody likes",
    "kill": WITHOUT_A_WORD + "killed (out of memory, kill -9), or left by os._exit",
    "os._exit": WITHOUT_A_WORD + "killed (out of memory, kill -9), or left by os._exit",
    "segfault": WITHOUT_A_WORD + "it crashed in native code",
    # Where it was when it was last heard of, a quarter of a second before, perhaps before its first step; and then how
    # it was noticed: not heard of, or waited for, for 5 s.
    "suspend": "rank 1 on n2, ",
}
IN_CI = ("kill", "os._exit")


@pytest.mark.parametrize("how", [pytest.param(how, marks=() if how in IN_CI else pytest.mark.long) for how in SAID])
def test_a_failed_rank_ends_the_job_and_is_named(cluster: Cluster, tmp_path: Path, how: str) -> None:
    stage.fail(tmp_path, "forward", how, rank=1)
    config = str(write_config(tmp_path, SETTINGS))
    # Short for the suspended one only: the others may be slow.
    limit = 5 if how == "suspend" else 100
    arguments = ["--config", config, "--ddp.timeout-seconds", str(limit)]
    job = submit(cluster, tmp_path, "multi_node", *arguments)
    job.until(lambda: stage.is_there(tmp_path, "forward", 1), "the failure")
    # srun waits 30 s for a rank that does not end before it kills it.
    found = job.wait(timeout=limit + 40 if how == "suspend" else SECONDS)
    log = job.log
    assert (found["JobState"], found["Restarts"]) == ("FAILED", "0"), log
    assert found["ExitCode"].partition(":")[0] != "0"
    blame = [line for line in log.splitlines() if "rank 1 on" in line]
    assert len(blame) == 1, log
    without_line = re.sub(r" \(train\.py:\d+ .*\)(?=, )", "", blame[0])
    assert without_line.startswith(f"distloop: {SAID[how]}"), blame[0]
    assert how != "suspend" or re.match("distloop: rank 1 on n2, (in step [0-9]|before the first step, )", blame[0])
    assert ("for 5 s (ddp.timeout_seconds)" in blame[0]) == (how == "suspend")
    assert ("a value that nobody likes" in log) == (how == "raise")
    assert ("Traceback" in log) == (how == "raise")
    assert "requeued" not in log
    assert (status(run_of(tmp_path))["state"], status(run_of(tmp_path))["attempt"]) == ("failed", 1)
    record = json.loads((run_of(tmp_path) / "failures" / "attempt_0001.json").read_text())
    assert (record["rank"], record["node"], [rank["node"] for rank in record["ranks"]]) == (1, "n2", ["n1", "n2"])
