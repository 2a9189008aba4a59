"""Start ranks for tests: from a forkserver that has torch imported, or as fresh processes."""

from __future__ import annotations

import contextlib
import faulthandler
import importlib
import multiprocessing
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import yaml

REPOSITORY = Path(__file__).resolve().parent.parent.parent
TIMEOUT = 120
LOOP = "distloop.train"
SHOW_STACKS = signal.SIGRTMIN + 5  # a rank that gets it writes where all of its threads are

os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # as prepare_process() does, before torch is imported
forkserver = multiprocessing.get_context("forkserver")
# torch._dynamo comes with the first optimizer and takes longer to import than most runs here take.
forkserver.set_forkserver_preload([LOOP, "torch._dynamo"])


@dataclass
class Outcome:
    """How a run ended: exit code and output (stdout and stderr together) of each rank."""

    codes: list[int]
    outputs: list[str]

    @property
    def output(self) -> str:
        return "\n".join(self.outputs)

    def check(self) -> Outcome:
        assert self.codes == [0] * len(self.codes), self.output
        return self


def free_port() -> int:
    """A port that nobody has. Ranks without a launcher, machines and Slurm's nodes have to know theirs before anyone
    listens there; the kernel gives none of these to a program that asks for any port, so that none takes it meanwhile.
    """
    while True:
        port = 10_000 + secrets.randbelow(20_000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


@contextlib.contextmanager
def closed_port() -> Iterator[int]:
    """A port that refuses connections, and which no other program gets meanwhile: nobody listens, but it is taken."""
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        yield holder.getsockname()[1]


def rank_environment(rank: int, world_size: int, port: int) -> dict[str, str]:
    if world_size == 1:
        return {}
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }


def clean_environment() -> dict[str, str]:
    """The environment without what a launcher, a scheduler or pytest around the tests may have put there."""
    prefixes = ("SLURM_", "ACCELERATE_", "PET_", "TORCHELASTIC_")
    ranks = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    names = (*ranks, "TORCH_CPP_LOG_LEVEL", "PYTEST_ADDOPTS")
    kept = {k: v for k, v in os.environ.items() if not k.startswith(prefixes) and k not in names}
    path = os.pathsep.join(filter(None, [str(REPOSITORY), kept.get("PYTHONPATH")]))  # the GPU kit's packages are there
    return {**kept, "OMP_NUM_THREADS": "1", "PYTHONPATH": path, "PYTHONUNBUFFERED": "1"}


def _rank(loop: str, arguments: list[str], folder: str, environment: dict[str, str], output: str) -> None:
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    sys.path.insert(0, folder)
    # As in a process of its own: loader workers are forked, where Python does so, and not imported anew.
    multiprocessing.set_start_method(None, force=True)
    descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.stdout = os.fdopen(1, "w", buffering=1, closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
    faulthandler.register(SHOW_STACKS, sys.stderr)
    import torch

    torch.set_num_threads(1)
    from distloop.ranks import leaving
    from distloop.ranks.start import main

    target = importlib.import_module(loop)

    if "--tracking.report" not in arguments:  # it takes a second or two, which hundreds of runs would pay
        arguments = ["--tracking.no-report", *arguments]
    try:
        code = main(target.train, arguments, getattr(target, "OWN", None))
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    if code == 0:
        leaving.kill_workers()  # as leave() does
        sys.exit(0)
    leaving.leave(code)


class Ranks:
    """Ranks that are running in `folder`. `loop`: the module with train() and, if it has settings of its own, OWN."""

    def __init__(
        self,
        folder: Path,
        arguments: list[str],
        world_size: int = 1,
        environment: dict[str, str] | None = None,
        loop: str = LOOP,
    ) -> None:
        port = free_port()
        self.outputs = [folder / f".output-{rank}" for rank in range(world_size)]
        self.processes = []
        for rank, output in enumerate(self.outputs):
            output.unlink(missing_ok=True)
            variables = {**clean_environment(), **rank_environment(rank, world_size, port), **(environment or {})}
            process = forkserver.Process(target=_rank, args=(loop, arguments, str(folder), variables, str(output)))
            process.start()
            self.processes.append(process)

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, *error: object) -> None:
        self.kill()  # what a test that failed has left

    def kill(self) -> None:
        """kill -9 all ranks."""
        for process in self.processes:
            if process.is_alive():
                os.kill(process.pid or 0, signal.SIGKILL)

    def join(self) -> Outcome:
        """Wait for all ranks, up to TIMEOUT seconds each; the code of one that had to be killed is -9, and its output
        ends with the stacks of all ranks that ran, and of their loaders."""
        for process in self.processes:
            process.join(TIMEOUT)
        for process in self.processes:
            if process.is_alive():
                running = psutil.Process(process.pid)
                for each in (running, *running.children()):
                    each.send_signal(SHOW_STACKS)
                    time.sleep(0.2)  # nothing says that they are written
        self.kill()
        for process in self.processes:
            process.join()
        outputs = [output.read_text() if output.exists() else "" for output in self.outputs]
        return Outcome([process.exitcode or 0 for process in self.processes], outputs)


def train(
    folder: Path, arguments: list[str], world_size: int = 1, environment: dict[str, str] | None = None, loop: str = LOOP
) -> Outcome:
    """Run a loop with these arguments on `world_size` ranks, in `folder`."""
    return Ranks(folder, arguments, world_size, environment, loop).join()


def wait_until(condition: Callable[[], Any], what: str) -> None:
    """Wait for a condition, up to TIMEOUT seconds."""
    deadline = time.monotonic() + TIMEOUT
    while not condition():
        assert time.monotonic() < deadline, f"waited {TIMEOUT} s for {what}"
        time.sleep(0.01)


def command(
    words: list[str], folder: Path, environment: dict[str, str] | None = None, timeout: int = TIMEOUT
) -> subprocess.CompletedProcess[str]:
    """Run a command as a user would, in fresh processes."""
    return subprocess.run(
        words,
        cwd=folder,
        env={**clean_environment(), **(environment or {})},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=timeout,
        check=False,
    )


def accelerate_launch(processes: int, script: str | None = None, *options: str) -> list[str]:
    """The words of the form of `accelerate launch` that does start several CPU ranks (with ACCELERATE_USE_CPU)."""
    several = ["--multi_gpu", "--num_machines", "1", "--num_processes", str(processes), "--main_process_port", "0"]
    words = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        *(several if processes > 1 else ["--num_processes", "1"]),
    ]
    return [
        *words,
        "--mixed_precision",
        "no",
        "--dynamo_backend",
        "no",
        *options,
        script or str(REPOSITORY / "distloop" / "train.py"),
    ]


def write_config(folder: Path, settings: dict[str, Any], name: str = "run") -> Path:
    """A config file in `folder`; returns its path."""
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path
