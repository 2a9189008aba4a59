"""A project that an installed `distloop init` wrote: its own sbatch scripts train there, without a checkout."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.tools.installed import Installed
from tests.tools.records import status
from tests.tools.slurm_cluster import Cluster
from tests.tools.slurm_jobs import Job

OPTIONS = ["--ntasks-per-node=2", "--gpus-per-node=2", "--cpus-per-task=1", "--time=10"]
TRAIN_MINE = ["--config", "configs/mine.yaml", "--train.epochs", "2", "--device", "cpu"]


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Installed:
    return Installed(tmp_path_factory.mktemp("installed") / "venv")


def submit(cluster: Cluster, project: Path, variables: dict[str, str], *arguments: str) -> Job:
    """sbatch slurm/single_node.sbatch, as typed in the project, with two tasks."""
    script = project / "slurm" / "single_node.sbatch"
    number = cluster.submit(script, *arguments, options=OPTIONS, folder=project, environment=variables)
    return Job(cluster, number, project)


def test_the_projects_script_trains_the_example_with_the_package_that_is_active(
    cluster: Cluster, installed: Installed, tmp_path: Path
) -> None:
    project = installed.project(tmp_path / "project")
    log = submit(cluster, project, installed.environment, *TRAIN_MINE).ends()
    installed.check_imported(log, 2)
    assert "2 processes" in log
    assert status(project / "runs" / "mine")["state"] == "finished"
    assert (project / "runs" / "mine" / "loop.py").read_bytes() == (installed.package / "train.py").read_bytes()


@pytest.mark.long
def test_the_projects_own_loop_is_trained_with_the_environment_beside_it(
    cluster: Cluster, installed: Installed, tmp_path: Path
) -> None:
    project = installed.project(tmp_path / "project")
    (project / ".venv").symlink_to(installed.folder)
    variables = {"PYTHONPATH": "", "TRAIN": "my_train.py", "VIRTUAL_ENV": ""}  # first on PATH is the tests' own Python
    log = submit(cluster, project, variables, *TRAIN_MINE).ends()
    installed.check_imported(log, 2)
    assert (project / "runs" / "mine" / "loop.py").read_bytes() == (project / "my_train.py").read_bytes()


def test_a_job_without_the_package_is_refused_before_anything_starts(
    cluster: Cluster, installed: Installed, tmp_path: Path
) -> None:
    project = installed.project(tmp_path / "project")
    (tmp_path / "python").write_text(f'#!/bin/sh\nexec {sys.executable} -I -S "$@"\n')
    (tmp_path / "python").chmod(0o755)
    variables = {"PYTHONPATH": "", "PATH": f"{tmp_path}:/usr/bin:/bin"}
    log = submit(cluster, project, variables, *TRAIN_MINE).ends("FAILED", "2:0")
    assert log.splitlines() == [
        "distloop: python has no distloop (ModuleNotFoundError: No module named 'distloop'): activate the environment "
        f"that distloop is installed in before you submit, or set it up in {project}/slurm/common.sh"
    ]
    assert not (project / "runs").exists()
