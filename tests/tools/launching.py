"""For tests of launch/*.sh: the scripts as a user types them, on a machine without a GPU, and a loop for them."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from distloop.commands.copy import copy_of
from tests.tools.ranks import REPOSITORY, command, free_port

LAUNCH = REPOSITORY / "launch"


def script(name: str, *, folder: Path = LAUNCH, threads: int | None = None, **variables: object) -> list[str]:
    """The words of `VARIABLE=value … launch/NAME`; threads: the user's own OMP_NUM_THREADS.

    `env` becomes the script, and the script the launcher: one process, to which signals can be sent.
    """
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    settings = {"PATH": path, "VIRTUAL_ENV": sys.prefix, "CUDA_VISIBLE_DEVICES": "", **variables}
    if threads is not None:
        settings["OMP_NUM_THREADS"] = threads
    words = [f"{variable}={value}" for variable, value in settings.items()]
    return ["env", "-u", "OMP_NUM_THREADS", *words, str(folder / name)]


def own_loop(file: Path) -> Path:
    """Write a loop of a user's own as `distloop copy` does, with a line more, in a folder that is made if need be."""
    file.parent.mkdir(parents=True, exist_ok=True)
    text = copy_of((REPOSITORY / "distloop" / "train.py").read_text(), file.name)
    file.write_text(
        text.replace(
            "\n\ndef train(", "\n# All that follows is a line further down than in distloop's.\n\n\ndef train(", 1
        )
    )
    return file


def failing_line(file: Path) -> str:
    """What a message says of the line of the forward pass in a loop: "train.py:95 outputs = task.forward(…)"."""
    statement = "outputs = task.forward(task_model, micro.batch)"
    [number] = [number for number, line in enumerate(file.read_text().splitlines(), 1) if statement in line]
    return f"{file.name}:{number} {statement}"


def machines(processes: int, **variables: object) -> list[list[str]]:
    """The words of launch/multi_node.sh on each of two "machines" that are this one."""
    common: dict[str, Any] = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": free_port(),
        "MACHINES": 2,
        "PROCESSES": processes,
        **variables,
    }
    return [script("multi_node.sh", **{"MACHINE_RANK": rank, **common}) for rank in range(2)]


def at_once(commands: list[list[str]], folder: Path) -> list[subprocess.CompletedProcess[str]]:
    """Run all of the commands at the same time, each to its end."""
    with ThreadPoolExecutor(len(commands)) as pool:
        return list(pool.map(lambda words: command(words, folder), commands))
