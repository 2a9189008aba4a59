"""For tests of launch/*.sh: the scripts as a user types them, on a machine without a GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tests.ranks import REPOSITORY, command, free_port

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
