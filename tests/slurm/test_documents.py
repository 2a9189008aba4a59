"""What README.md and docs/ tell a reader to type for Slurm runs on the cluster of two small nodes.

The sbatch scripts of the working copy ask for as much as a node here has; so do options that ask for more, which are
replaced. All other words are typed as they are printed.
"""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from tests.tools.documents import PAGES, Block, blocks_of, environment, working_copy
from tests.tools.ranks import REPOSITORY, free_port
from tests.tools.records import status
from tests.tools.slurm_cluster import ENDED, Cluster
from tests.tools.slurm_jobs import GENEROUS

pytestmark = pytest.mark.timeout(600)  # several jobs, one after the other
BLOCKS = [block for page in PAGES for block in blocks_of(page) if block.is_for_slurm and block.needs is None]
OF_README = [block for block in BLOCKS if block.page == "README.md"]
OF_DOCS = [block for block in BLOCKS if block.language == "sh" and block.page != "README.md"]
FITTING = {"--nodes=4": "--nodes=2", "=8": "=2", "--ntasks=4": "--ntasks=2"}
FITTING_IN_SCRIPTS = {
    "--ntasks-per-node=4": "--ntasks-per-node=1",
    "--gpus-per-node=4": "--gpus-per-node=1",
    "--cpus-per-task=8": "--cpus-per-task=1",
    "--cpus-per-task=32": "--cpus-per-task=2",
    "--time=12:00:00": "--time=10",
    "--time=04:00:00": "--time=10",
    '$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)': "127.0.0.1",  # both nodes; n1 is no host's name
}


@pytest.fixture
def folder(cluster: Cluster, tmp_path: Path) -> Path:
    copy = working_copy(tmp_path, digits_epochs=2)
    for script in (copy / "slurm").glob("*.sbatch"):
        script.write_text(replaced(script.read_text(), FITTING_IN_SCRIPTS))
    return copy


def replaced(text: str, by: dict[str, str]) -> str:
    for old, new in by.items():
        text = text.replace(old, new)
    return text


def run(cluster: Cluster, folder: Path, text: str) -> str:
    """Type commands, in an allocation if srun needs one, and wait until the jobs that they submit are done.

    Returns what was printed: by the commands, then by the jobs.
    """
    variables = {**environment(folder), "SLURM_CONF": str(cluster.configuration)}
    shell = ["bash", "-euo", "pipefail", "-c", replaced(text, FITTING)]
    allocation = ["salloc", "-N2", "--ntasks-per-node=1", "--time=10"] if text.startswith("srun") else []
    words = [*allocation, *shell]
    done = subprocess.run(
        words, cwd=folder, env=variables, text=True, capture_output=True, timeout=GENEROUS, check=False
    )
    assert done.returncode == 0, f"{text}\n{done.stdout}{done.stderr}"
    logs = [log_of(cluster, number) for number in re.findall(r"Submitted batch job (\d+)", done.stdout)]
    return "\n".join([done.stdout, *logs])


def log_of(cluster: Cluster, number: str) -> str:
    """Wait until a job, or each of an array, has ended well; returns what it has printed."""
    cluster.wait_until(
        lambda: all(job["JobState"] in ENDED for job in cluster.jobs(number)),
        lambda: str(cluster.jobs(number)),
        GENEROUS,
    )
    log = "\n".join(Path(job["StdOut"]).read_text() for job in cluster.jobs(number))
    assert {(job["JobState"], job["ExitCode"]) for job in cluster.jobs(number)} == {("COMPLETED", "0:0")}, log
    return log


@pytest.mark.long
def test_a_reader_can_type_what_the_readme_says(cluster: Cluster, folder: Path) -> None:
    for block in OF_README:
        run(cluster, folder, block.text)
    for name in ("cifar10", "imagenet"):
        assert status(folder / "runs" / name)["state"] == "finished"


@pytest.mark.long
@pytest.mark.parametrize("block", OF_DOCS, ids=str)
def test_a_reader_can_type_what_the_pages_say(cluster: Cluster, folder: Path, block: Block) -> None:
    if "my_train.py" in block.text:
        subprocess.run(["distloop", "copy", "my_train.py"], cwd=folder, env=environment(folder), check=True)
    printed = run(cluster, folder, block.text)
    runs = [path.parent for path in (folder / "runs").glob("*/status.json")]
    assert {status(path)["state"] for path in runs} == ({"finished"} if "doctor" not in block.text else set())
    assert len(runs) == printed.count("finished: runs/")


@pytest.mark.long
def test_the_script_with_a_launcher_on_each_node_trains(cluster: Cluster, folder: Path) -> None:
    [block] = [block for block in blocks_of(REPOSITORY / "docs" / "slurm.md") if block.file == "accelerate.sbatch"]
    (folder / "accelerate.sbatch").write_text(replaced(block.text, FITTING_IN_SCRIPTS))
    printed = run(cluster, folder, f"PROCESSES=1 MASTER_PORT={free_port()} sbatch --time=10 accelerate.sbatch")
    assert "2 processes on cpu" in printed
    assert status(folder / "runs" / "imagenet")["state"] == "finished"
