"""Submit the scripts in slurm/ as a user would, with options that fit this cluster, and look at what becomes of it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distloop.run.checkpoint import published_in, step_of, verify
from tests.tools import stage
from tests.tools.ranks import REPOSITORY
from tests.tools.records import rows, run_of, status
from tests.tools.slurm_cluster import Cluster
from tests.tools.stopping import NOTICE, waiting_run

SCRIPTS = REPOSITORY / "slurm"
GENEROUS = 150  # seconds, for anything that a job does by itself


@dataclass(eq=False)
class Job:
    """A job of one of the scripts, submitted from `folder`, where its runs lie."""

    cluster: Cluster
    number: str
    folder: Path

    @property
    def log(self) -> str:
        """What it has printed, in all of its attempts."""
        return self.cluster.log(self.number)

    def says(self, text: str, times: int = 1) -> None:
        """Wait until it has printed the text so many times."""
        self.until(lambda: self.log.count(text) >= times, repr(text))

    def until(self, condition: Any, what: str, timeout: float = GENEROUS) -> None:
        self.cluster.wait_until(condition, lambda: f"{what}; {self.cluster.job(self.number)}\n{self.log}", timeout)

    def arrived(self, place: str, ranks: Iterable[int]) -> None:
        """Wait until these ranks are at the place (see tests/tools/stage.py); the next attempt arrives anew."""
        self.until(lambda: all(stage.is_there(self.folder, place, rank) for rank in ranks), f"ranks {ranks} at {place}")
        stage.forget(self.folder, place)

    def wait(self, *states: str, restarts: int = 0, timeout: float = GENEROUS) -> dict[str, str]:
        return self.cluster.wait(self.number, *states, restarts=restarts, timeout=timeout)

    def ends(self, state: str = "COMPLETED", code: str = "0:0", restarts: int = 0, timeout: float = GENEROUS) -> str:
        """Wait for its end, which is this one, after so many restarts; returns what it has printed."""
        found = self.wait(restarts=restarts, timeout=timeout)
        assert (found["JobState"], found["ExitCode"], found["Restarts"]) == (state, code, str(restarts)), self.log
        return self.log

    def scontrol(self, *words: str) -> None:
        self.cluster.run("scontrol", *words)


def submit(
    cluster: Cluster,
    folder: Path,
    script: str,
    *arguments: str,
    tasks: int = 1,
    options: Sequence[str] = (),
    environment: dict[str, str] | None = None,
) -> Job:
    """sbatch slurm/`script`.sbatch from `folder`, with so many tasks and GPUs on each node."""
    words = [f"--ntasks-per-node={tasks}", f"--gpus-per-node={tasks}", "--cpus-per-task=1", "--time=10", *options]
    path = SCRIPTS / f"{script}.sbatch"
    number = cluster.submit(path, *arguments, options=words, folder=folder, environment=environment)
    return Job(cluster, number.partition(";")[0], folder)


def held_run(folder: Path, **changes: Any) -> list[str]:
    """The arguments of a run of sixty steps that waits in its seventh, and in all later ones, until let go."""
    stage.hold(folder, "step")
    data = {"name": "tests.lab.stopping:points", "workers": 1}
    return [*waiting_run(folder, data=data, **changes), "--device", "cpu"]


def stopped(job: Job, restarts: int) -> int:
    """Let the ranks, which have been asked to stop, go on to do so; returns the step that is saved.

    The next attempt is held again.
    """
    stage.let_go(job.folder, "step")
    run = run_of(job.folder)

    def is_stopped() -> bool:
        return status(run)["state"] == "stopped" and status(run)["slurm_restart"] == restarts

    job.until(is_stopped, "the ranks to stop")
    stage.hold(job.folder, "step")
    newest = published_in(run / "checkpoints")[-1]
    verify(newest)
    assert step_of(newest) == status(run)["step"] == rows(run, "train")[-1]["step"]
    return step_of(newest)


def heard(job: Job, times: int) -> None:
    """Wait until a rank of each node has heard a signal, in so many attempts."""
    job.says(NOTICE, 2 * times)


def finished_in(job: Job, attempts: int, steps: int = 60, redone: bool = False) -> None:
    """The run has all of its steps, each once, after so many attempts; some were done again only if `redone`."""
    run = run_of(job.folder)
    now = status(run)
    assert (now["state"], now["step"], now["attempt"]) == ("finished", steps, attempts), job.log
    assert [row["step"] for row in rows(run, "train")] == list(range(1, steps + 1))
    assert [path.name for path in run.parent.iterdir()] == [run.name]
    aside = run / "metrics.set_aside.jsonl"
    assert redone or not aside.exists() or not aside.read_text()
