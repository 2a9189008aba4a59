"""Who this process is: its rank from the environment, its machine's name, its share of the CPUs.

torch and Accelerate are imported where they are needed: the environment has to be in order before that.
"""

from __future__ import annotations

import contextlib
import os
import re
import socket
import subprocess
import sys
from collections.abc import Mapping, MutableMapping

from distloop.errors import UsageError
from distloop.ranks.leaving import leave


def prepare_environment() -> None:
    """Set the variables that torch reads when it is imported: ranks under `srun`, and CPU threads.

    Leaves with code 2 when Slurm's variables make no sense.
    """
    try:
        adopt_slurm(os.environ)
    except UsageError as error:
        print(f"distloop: {error}", file=sys.stderr)
        leave(2)
    share_cpus(os.environ)


def adopt_slurm(environ: MutableMapping[str, str]) -> bool:
    """Under `srun` with several tasks, set the variables that torch reads; whether that was so.

    SLURM_NTASKS alone means nothing: an interactive shell in an allocation has it and is one process.
    """
    tasks = int(environ.get("SLURM_STEP_NUM_TASKS", 1))
    if "RANK" in environ or tasks <= 1 or "SLURM_PROCID" not in environ:
        return False
    node = int(environ.get("SLURM_NODEID", 0))
    job, step = int(environ.get("SLURM_JOB_ID", 0)), int(environ.get("SLURM_STEP_ID", 0))
    environ["RANK"] = environ["SLURM_PROCID"]
    environ["WORLD_SIZE"] = str(tasks)
    environ["LOCAL_RANK"] = environ.get("SLURM_LOCALID", "0")
    environ["LOCAL_WORLD_SIZE"] = str(_tasks_on_node(environ.get("SLURM_STEP_TASKS_PER_NODE", str(tasks)), node))
    environ.setdefault("MASTER_ADDR", address_of(first_host(environ.get("SLURM_STEP_NODELIST", "127.0.0.1"))))
    # The same on all ranks, different for jobs and steps that share a node, below the ephemeral ports.
    environ.setdefault("MASTER_PORT", str(10000 + (job * 16 + step) % 20000))
    return True


def first_host(nodelist: str) -> str:
    """The first name of a Slurm node list such as "gpu[03-07,11],cpu1"."""
    match = re.match(r"[^,\[](?:[^,\[]|\[[^\]]*\])*", nodelist)  # up to a comma outside of brackets
    if match is None:
        raise UsageError(f"SLURM_STEP_NODELIST = {nodelist!r} is not a list of nodes; set MASTER_ADDR.")
    return re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", match[0])


def address_of(node: str) -> str:
    """The node's name, or the address that Slurm has for it where the name means nothing here."""
    try:
        socket.getaddrinfo(node, None)
        return node
    except OSError:
        command = ("scontrol", "show", "node", node)
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            shown = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout
            match = re.search(r"\bNodeAddr=(\S+)", shown)
            if match:
                return match[1]
    return node


def _tasks_on_node(counts: str, node: int) -> int:
    """Slurm's "2(x3),1" is 2, 2, 2, 1."""
    expanded: list[int] = []
    for part in counts.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part)
        if match:
            expanded += [int(match[1])] * int(match[2] or 1)
    return expanded[node] if node < len(expanded) else 1


def node_name() -> str:
    """What this machine is called: by Slurm, where it has a name of its own for it."""
    return os.environ.get("SLURMD_NODENAME") or os.uname().nodename


def cpus_per_rank(environ: Mapping[str, str]) -> int:
    """The CPUs that this rank may use: Slurm's share of the task, else its part of what the process is bound to.

    Not os.cpu_count(): a job on a shared node may use a few of its CPUs only.
    """
    if "SLURM_CPUS_PER_TASK" in environ:
        return int(environ["SLURM_CPUS_PER_TASK"])
    bound = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1  # not on macOS
    return max(1, bound // int(environ.get("LOCAL_WORLD_SIZE", 1)))


def share_cpus(environ: MutableMapping[str, str]) -> None:
    """Where several ranks share a machine and nobody set a thread count, give each its share of the CPUs."""
    if int(environ.get("LOCAL_WORLD_SIZE", 1)) > 1:
        environ.setdefault("OMP_NUM_THREADS", str(cpus_per_rank(environ)))
