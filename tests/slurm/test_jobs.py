"""The scripts in slurm/ start what a user means, train it to the end, and say what is wrong with the rest."""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.tools import stage
from tests.tools.ranks import command, train, write_config
from tests.tools.records import losses, rows, run_of, status
from tests.tools.slurm_cluster import Cluster
from tests.tools.slurm_jobs import GENEROUS, SCRIPTS, held_run, submit

DIGITS: dict[str, Any] = {
    "data": "digits",
    "model": {"name": "mlp", "args": {"hidden": 32, "layers": 1}},
    "optim": {"name": "sgd", "lr": 0.3},
    "batch": {"global_size": 64},
    "train": {"steps": 30},
    "log": {"every_steps": 1},
    "device": "cpu",
}


def reference_losses(folder: Path) -> list[float]:
    """The losses of the run with one process, without Slurm."""
    train(folder, ["--config", str(write_config(folder, DIGITS)), "--name", "reference"]).check()
    reference = losses(folder / "runs" / "reference")
    assert reference[-1] < 0.8 * reference[0]  # it learns, so that equal losses say something
    return reference


def noting(folder: Path, name: str) -> list[str]:
    task = {"name": "tests.lab.launched:Noting", "args": {"name": name}}
    return ["--config", str(write_config(folder, {**DIGITS, "task": task}, name))]


def seen(folder: Path, name: str, ranks: int) -> list[dict[str, str]]:
    assert len(list(folder.glob(f"{name}-*.json"))) == ranks
    return [json.loads((folder / f"{name}-{rank}.json").read_text()) for rank in range(ranks)]


def check_same(run: Path, reference: list[float]) -> None:
    assert status(run)["state"] == "finished"
    assert losses(run) == pytest.approx(reference, rel=1e-5)


def test_the_scripts_train_what_one_process_trains(cluster: Cluster, tmp_path: Path) -> None:
    reference = reference_losses(tmp_path)
    several = submit(cluster, tmp_path, "multi_node", *noting(tmp_path, "several"), tasks=2)
    single = submit(cluster, tmp_path, "single_node", *noting(tmp_path, "single"), tasks=2)
    nodes = {single: ["n1", "n1"], several: ["n1", "n1", "n2", "n2"]}
    for job, name in ((several, "several"), (single, "single")):
        log = job.ends()
        check_same(tmp_path / "runs" / name, reference)
        ranks = seen(tmp_path, name, len(nodes[job]))
        assert [rank["SLURMD_NODENAME"] for rank in ranks] == nodes[job]
        for rank in ranks:
            assert rank["CUDA_VISIBLE_DEVICES"] == "0,1"  # scheduled, and peers not hidden
            assert (rank["SLURM_CPUS_PER_TASK"], rank["WANDB_MODE"]) == ("1", "offline")
        topology = [
            line for line in log.splitlines() if line.startswith(f"distloop: job {job.number}, restart 0, on n")
        ]
        assert len(topology) == 1, log
        assert "a node has 2 tasks and 2 GPUs, a task has 1 CPUs" in topology[0]
        assert not re.findall(r"^(?:WARNING|Traceback|(?:srun|slurmstepd|sbatch): (?:error|warning)).*", log, re.M)


def devices_of_ranks(cluster: Cluster, node: str) -> set[tuple[str, str | None]]:
    """(job, CUDA_VISIBLE_DEVICES) of all ranks on a node."""
    found = set()
    for process in cluster.processes(node):
        with contextlib.suppress(OSError):
            words = Path(f"/proc/{process}/cmdline").read_text().split("\0")
            text = Path(f"/proc/{process}/environ").read_text()
            variables = dict(line.split("=", 1) for line in text.split("\0") if "=" in line)
            if "python" in words[0] and "distloop.train" in words:
                found.add((variables["SLURM_JOB_ID"], variables.get("CUDA_VISIBLE_DEVICES")))
    return found


def test_two_jobs_on_the_same_nodes_do_not_disturb_each_other(cluster: Cluster, tmp_path: Path) -> None:
    arguments = held_run(tmp_path)
    jobs = {name: submit(cluster, tmp_path, "multi_node", *arguments, "--name", name) for name in ("one", "other")}
    for name, job in jobs.items():
        # Each waits with a step in the middle of training, so that both are there at once.
        job.until(lambda name=name: (tmp_path / "runs" / name / "metrics.jsonl").exists(), f"the run {name}")
    assert {job.wait("RUNNING")["NodeList"] for job in jobs.values()} == {"n[1-2]"}
    for node in ("n1", "n2"):
        assert devices_of_ranks(cluster, node) == {(jobs["one"].number, "0"), (jobs["other"].number, "1")}
    stage.let_go(tmp_path, "step")
    for job in jobs.values():
        assert "2 processes" in job.ends()
    one, other = (tmp_path / "runs" / name for name in jobs)
    assert len(losses(one)) == 60
    assert losses(one) == losses(other)


def test_the_second_job_on_a_run_is_refused_and_told_who_has_it(cluster: Cluster, tmp_path: Path) -> None:
    arguments = held_run(tmp_path)
    owner = submit(cluster, tmp_path, "single_node", *arguments)
    owner.arrived("step", [0])
    log = submit(cluster, tmp_path, "single_node", *arguments).ends("FAILED", "2:0")
    assert re.search(rf"runs/run belongs to a run that is going on: process \d+ on \w+, Slurm job {owner.number},", log)
    stage.let_go(tmp_path, "step")
    owner.ends()
    assert status(run_of(tmp_path))["slurm_job"] == owner.number


@pytest.mark.long
def test_a_sweep_is_a_run_for_each_line(cluster: Cluster, tmp_path: Path) -> None:
    lines = ["--optim.lr 1e-4", "--optim.lr 0.3", "--model.args '{hidden: 8, layers: 1}'", '--optim.lr "0.03" --seed 2']
    (tmp_path / "lines.txt").write_text("\n".join(lines) + "\n")
    config = str(write_config(tmp_path, DIGITS))
    # As from a shell that is somewhere else: a script by a relative path.
    script = os.path.relpath(SCRIPTS / "sweep.sbatch", tmp_path)
    options = ["--array=1-4", "--cpus-per-task=1", "--time=10"]
    number = cluster.submit(Path(script), "lines.txt", "--config", config, options=options, folder=tmp_path)
    cluster.wait_until(
        lambda: [job["JobState"] for job in cluster.jobs(number)] == 4 * ["COMPLETED"],
        lambda: str(cluster.jobs(number)),
        GENEROUS,
    )
    assert sorted(path.name for path in tmp_path.glob("*.out")) == [
        f"distloop-sweep-{number}_{task}.out" for task in range(1, 5)
    ]
    best = {
        run.name: max(row["accuracy"] for row in rows(run, "validate")) for run in (tmp_path / "runs").glob("lines-*")
    }
    assert sorted(best) == ["lines-1", "lines-2", "lines-3", "lines-4"]
    table = command(
        [sys.executable, "-m", "distloop.commands.cli", "status", "--sort", "accuracy", "runs"],
        tmp_path,
        {"COLUMNS": "200"},
    )
    assert table.returncode == 0, table.stdout
    shown = re.findall(r"\blines-\d", table.stdout)
    assert [best[name] for name in shown] == sorted(best.values(), reverse=True)
    assert "hidden: 8" in (tmp_path / "runs" / "lines-3" / "config.yaml").read_text()
    assert "seed: 2" in (tmp_path / "runs" / "lines-4" / "config.yaml").read_text()


def test_what_is_wrong_with_a_submission_is_said(cluster: Cluster, tmp_path: Path) -> None:
    (tmp_path / "lines.txt").write_text("--seed 1\n--seed 2\n")
    said = {
        ("sweep", ("lines.txt",), ()): "no array: sbatch --array=1-N slurm/sweep.sbatch lines.txt",
        ("sweep", ("lines.txt",), ("--array=3",)): "lines.txt has no line 3",
        ("sweep", ("other.txt",), ("--array=1",)): "the first argument is the file of overrides, a run on each line; "
        "other.txt is none",
        ("sweep", (), ("--array=1",)): "nothing is none",
        ("multi_node", (), ("--gpus-per-node=2",)): "1 tasks for 2 GPUs on a node: each GPU needs a task, "
        "sbatch --gpus-per-node=2 --ntasks-per-node=2",
        ("single_node", (), ("--ntasks-per-node=2",)): "2 tasks for 1 GPUs on a node: each GPU needs a task, "
        "sbatch --gpus-per-node=1 --ntasks-per-node=1",
    }
    jobs = {key: submit(cluster, tmp_path, key[0], *key[1], options=key[2]) for key in said}
    for key, job in jobs.items():
        log = job.ends("FAILED", "2:0")
        assert f"distloop: {said[key]}" in log or f"; {said[key]}" in log
        assert "job " not in log  # nothing was started
    assert not (tmp_path / "runs").exists()
    by_hand = cluster.run("bash", str(SCRIPTS / "multi_node.sbatch"), check=False)
    assert (by_hand.returncode, by_hand.stderr) == (2, f"submit it: sbatch {SCRIPTS / 'multi_node.sbatch'} …\n")


def test_srun_inside_an_allocation_needs_nothing_exported(cluster: Cluster, tmp_path: Path) -> None:
    reference = reference_losses(tmp_path)
    inner = ["srun", sys.executable, "-m", "distloop.train", "--config", str(write_config(tmp_path, DIGITS))]
    words = ["salloc", "-N2", "--ntasks-per-node=1", "--gpus-per-node=1", "--time=10", *inner, "--name", "by-hand"]
    done = subprocess.run(
        words, cwd=tmp_path, env=cluster.environment, text=True, capture_output=True, timeout=GENEROUS, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 processes" in done.stdout
    check_same(tmp_path / "runs" / "by-hand", reference)


@pytest.mark.parametrize("kind", ["folder", pytest.param("tar", marks=pytest.mark.long)])
def test_data_is_staged_to_the_node_and_removed_again(cluster: Cluster, tmp_path: Path, kind: str) -> None:
    source = tmp_path / "shared"
    source.mkdir()
    inputs = torch.linspace(-1, 1, 64)[:, None]
    torch.save((inputs, 2 * inputs + 1), source / "points.pt")
    if kind == "tar":
        with tarfile.open(tmp_path / "shared.tar", "w") as archive:
            archive.add(source / "points.pt", "points.pt")
        source = tmp_path / "shared.tar"
    settings = {**DIGITS, "data": "tests.lab.on_slurm:stored", "model": "linear", "task": "regression"}
    config = str(write_config(tmp_path, {**settings, "batch": {"global_size": 16}}))
    environment = {"DISTLOOP_STAGE": str(source), "TMPDIR": str(tmp_path)}
    job = submit(cluster, tmp_path, "single_node", "--config", config, tasks=2, environment=environment)
    job.ends()
    staged = tmp_path / f"distloop-{job.number}"
    assert (tmp_path / f"root-{job.number}").read_text() == str(staged)
    assert not staged.exists()


def test_data_that_is_not_there_is_not_staged(cluster: Cluster, tmp_path: Path) -> None:
    environment = {"DISTLOOP_STAGE": str(tmp_path / "nothing.tar"), "TMPDIR": str(tmp_path)}
    log = submit(cluster, tmp_path, "multi_node", environment=environment).ends("FAILED", "2:0")
    assert f"distloop: {tmp_path}/nothing.tar could not be copied to {tmp_path}/distloop-" in log
    assert "on all nodes" in log
