"""The cluster itself does what the other tests here take for granted."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.tools.slurm_cluster import Cluster, cgroup_missing, missing


def script(folder: Path, text: str) -> Path:
    path = folder / "job.sh"
    path.write_text(f"#!/bin/bash\n{text}\n")
    return path


def test_a_job_of_sixteen_tasks_runs_on_both_nodes(cluster: Cluster, tmp_path: Path) -> None:
    job = cluster.submit(
        script(tmp_path, 'srun bash -c "echo $1 \\$SLURMD_NODENAME"'), "on", options=["-N2", "--ntasks-per-node=8"]
    )
    assert cluster.wait(job)["JobState"] == "COMPLETED", cluster.log(job)
    assert sorted(cluster.log(job).splitlines()) == 8 * ["on n1"] + 8 * ["on n2"]


def test_gpus_are_scheduled(cluster: Cluster, tmp_path: Path) -> None:
    path = script(tmp_path, "echo $CUDA_VISIBLE_DEVICES; srun sleep 100")
    both = cluster.submit(path, options=["--gpus-per-node=2", "--nodelist=n1"])
    third = cluster.submit(path, options=["--gpus-per-node=1", "--nodelist=n1"])
    cluster.wait(both, "RUNNING")
    cluster.wait_until(lambda: cluster.log(both) == "0,1\n", "CUDA_VISIBLE_DEVICES")
    assert cluster.wait(third, "PENDING")["JobState"] == "PENDING"
    cluster.run("scancel", both)
    cluster.wait(third, "RUNNING")
    with pytest.raises(RuntimeError, match="node configuration is not available"):
        cluster.submit(path, options=["--gpus-per-node=3"])


@pytest.mark.long
def test_a_requeued_job_runs_again(cluster: Cluster, tmp_path: Path) -> None:
    path = script(tmp_path, "echo attempt ${SLURM_RESTART_COUNT:-0}; srun sleep ${SLURM_RESTART_COUNT:-100}")
    job = cluster.submit(path, options=["-N2", "--open-mode=append"])
    cluster.wait_until(lambda: "attempt 0" in cluster.log(job), "the job")
    cluster.run("scontrol", "requeue", job)
    assert cluster.wait(job, restarts=1)["JobState"] == "COMPLETED", cluster.log(job)
    assert "attempt 1" in cluster.log(job)


def test_a_node_that_goes_down_takes_the_job_with_it_and_comes_back(cluster: Cluster, tmp_path: Path) -> None:
    job = cluster.submit(script(tmp_path, "echo up; srun sleep 100"), options=["-N2"])
    cluster.wait_until(lambda: "up" in cluster.log(job), "the job")
    cluster.set_node("n2", "DOWN")
    assert cluster.node_state("n2").startswith("DOWN")
    cluster.wait(job, "PENDING", restarts=1)
    cluster.clean()
    assert [cluster.node_state(node) for node in ("n1", "n2")] == ["IDLE", "IDLE"]


def test_a_killed_node_takes_its_processes_with_it_and_can_be_started_again(cluster: Cluster, tmp_path: Path) -> None:
    # The process in the background has left the session and forgotten its environment, as a stray worker may.
    path = script(tmp_path, "srun bash -c 'setsid env -i sleep 100 & echo up; wait'")
    job = cluster.submit(path, options=["-N2"])
    cluster.wait_until(lambda: cluster.log(job).count("up") == 2, "both tasks")
    assert len(cluster.processes("n2")) >= 3
    cluster.kill_slurmd("n2")
    assert cluster.processes("n2") == []
    cluster.start_slurmd("n2")
    assert cluster.processes("n1") != []
    cluster.wait_until(lambda: cluster.node_state("n2") in ("MIXED", "IDLE"), "the node")


def test_everything_is_gone_after_stop(tmp_path: Path, cluster: Cluster) -> None:
    other = Cluster(tmp_path / "slurm")  # beside the first one, which it leaves alone
    with other:
        job = other.submit(script(tmp_path, "echo up; srun sleep 100"), options=["-N2"])
        other.wait_until(lambda: "up" in other.log(job), "the job")
        daemons = [daemon.pid for daemon in other.daemons.values()]
        assert other.processes("n1")
    assert other.processes("n1") == other.processes("n2") == []
    assert not [pid for pid in daemons if Path(f"/proc/{pid}").exists()]
    assert cluster.node_state("n1") == "IDLE"


@pytest.mark.long
@pytest.mark.skipif((missing() or cgroup_missing()) is not None, reason=str(missing() or cgroup_missing()))
def test_under_cgroup_only_the_task_itself_is_signalled(tmp_path: Path) -> None:
    text = 'srun bash -c \'trap "echo task" USR2; (trap "echo child" USR2; echo up; while :; do sleep 0.1; done) &'
    path = script(tmp_path, f"{text} while :; do sleep 0.1; done'")
    with Cluster(tmp_path / "slurm", proctrack="cgroup") as cluster:
        job = cluster.submit(path, options=["-N1"])
        cluster.wait_until(lambda: "up" in cluster.log(job), "the job")
        cluster.run("scancel", "--signal=USR2", job)
        cluster.wait_until(lambda: "task" in cluster.log(job), "the signal")
        assert "child" not in cluster.log(job)
    assert cgroup_missing() is None
