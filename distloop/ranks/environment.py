"""This process's rank under Slurm, its machine's name, its share of the CPUs: read before torch is imported."""

import contextlib
import os
import re
import socket
import subprocess
import sys
from collections.abc import Mapping, MutableMapping

from distloop.errors import UsageError
from distloop.ranks.launch_guards import own_file
from distloop.ranks.leaving import leave


def prepare_environment() -> None:
    """Set the variables that torch reads when it is imported. Leaves with code 2 if Slurm's make no sense."""
    try:
        adopt_slurm(os.environ)
    except UsageError as error:
        print(f"distloop: {error}", file=sys.stderr)
        leave(2)
    share_cpus(os.environ)
    hide_stacks(os.environ)


def adopt_slurm(environ: MutableMapping[str, str]) -> bool:
    """Under `srun` with several tasks, set the variables that torch reads; returns whether they were set. SLURM_NTASKS
    does not show it: an interactive shell in an allocation has it as well, and is one process. Raises UsageError in the
    shell of a step, or if the variables make no sense."""
    tasks = int(environ.get("SLURM_STEP_NUM_TASKS", 1))
    if "RANK" in environ or tasks <= 1 or "SLURM_PROCID" not in environ:
        return False
    if _in_shell_of_step(environ):
        command = f"python {own_file() or '-m distloop.train'} …"
        raise UsageError(
            f"This is the shell of a Slurm step of {tasks} tasks (srun --pty), of which only this one has a terminal: "
            "the other ranks would never come.\n"
            f"{tasks} processes: srun --overlap --ntasks={tasks} {command}\n"
            f"One process: SLURM_STEP_NUM_TASKS=1 {command}"
        )
    node = int(environ.get("SLURM_NODEID", 0))
    job, step = int(environ.get("SLURM_JOB_ID", 0)), int(environ.get("SLURM_STEP_ID", 0))
    local_tasks = _tasks_on_node(environ.get("SLURM_STEP_TASKS_PER_NODE", str(tasks)), node)
    environ.update(RANK=environ["SLURM_PROCID"], WORLD_SIZE=str(tasks))
    environ.update(LOCAL_RANK=environ.get("SLURM_LOCALID", "0"), LOCAL_WORLD_SIZE=str(local_tasks))
    environ.setdefault("MASTER_ADDR", address_of(first_host(environ.get("SLURM_STEP_NODELIST", "127.0.0.1"))))
    # The same on all ranks; another one for each job and step on a node; below the ports the kernel gives away.
    environ.setdefault("MASTER_PORT", str(10000 + (job * 16 + step) % 20000))
    return True


def _in_shell_of_step(environ: Mapping[str, str]) -> bool:
    """True for what is typed in the shell of `srun --pty bash`: the shell is Slurm's task, leads the session of its
    terminal, and starts each command in a process group of its own. A rank of `srun --pty python` leads the session
    itself, or has no terminal; a rank of `srun` in that shell has its variables, but is a task itself."""
    session = os.getsid(0)
    is_of_shell = environ.get("SLURM_TASK_PID") == str(session) != str(os.getpgrp())
    return "SLURM_PTY_PORT" in environ and environ["SLURM_PROCID"] == "0" and is_of_shell


def first_host(nodelist: str) -> str:
    """The first name of a Slurm node list: "gpu03" of "gpu[03-07,11],cpu1". Raises UsageError for anything else."""
    match = re.match(r"[^,\[](?:[^,\[]|\[[^\]]*\])*", nodelist)  # up to a comma outside of brackets
    if match is None:
        raise UsageError(f"SLURM_STEP_NODELIST = {nodelist!r} is not a list of nodes; set MASTER_ADDR.")
    return re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", match[0])


def address_of(node: str) -> str:
    """The node's name or, if this machine cannot resolve it, the address that Slurm has for it."""
    with contextlib.suppress(OSError):
        socket.getaddrinfo(node, None)
        return node
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        command = ("scontrol", "show", "node", node)
        answer = subprocess.run(
            command, capture_output=True, encoding="utf-8", errors="replace", timeout=10, check=True
        ).stdout
        if match := re.search(r"\bNodeAddr=(\S+)", answer):
            return match[1]
    return node


def _tasks_on_node(counts: str, node: int) -> int:
    """The tasks of one node, numbered from 0; Slurm's `counts` "2(x3),1" is 2, 2, 2, 1."""
    by_node: list[int] = []
    for part in counts.split(","):
        if match := re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part):
            by_node += [int(match[1])] * int(match[2] or 1)
    return by_node[node] if node < len(by_node) else 1


def node_name() -> str:
    """This machine's name: Slurm's, where there is one, else the kernel's."""
    return os.environ.get("SLURMD_NODENAME") or os.uname().nodename


def cpus_per_rank(environ: Mapping[str, str]) -> int:
    """How many CPUs this rank may use: those of its Slurm task, else an equal share of those the job is bound to."""
    if "SLURM_CPUS_PER_TASK" in environ:
        return int(environ["SLURM_CPUS_PER_TASK"])
    bound = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1  # not on macOS
    return max(1, bound // int(environ.get("LOCAL_WORLD_SIZE", 1)))


def hide_stacks(environ: MutableMapping[str, str]) -> None:
    """Leave out torch's warnings about addresses: each has a page of C++ stack, and our message says it in a line."""
    environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")


def share_cpus(environ: MutableMapping[str, str]) -> None:
    """Give each of several ranks on a machine as many threads as it has CPUs, unless OMP_NUM_THREADS is set."""
    if int(environ.get("LOCAL_WORLD_SIZE", 1)) > 1:
        environ.setdefault("OMP_NUM_THREADS", str(cpus_per_rank(environ)))
