"""Who am I: ranks from the environment; what all ranks have to know together; who says a mistake.

torch and Accelerate are imported where they are needed: the environment has to be in order before that.
"""

from __future__ import annotations

import atexit
import contextlib
import io
import multiprocessing
import multiprocessing.util  # registers its own end before ours, so that ours comes first
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Mapping, MutableMapping
from typing import TYPE_CHECKING, Any, TypeVar

from distloop.errors import RunFailed, UsageError

if TYPE_CHECKING:
    from distloop.failures import Position
    from distloop.stopping import Watch

Result = TypeVar("Result")
SPEAKING_SECONDS = 20  # enough to import torch on a busy machine; the launcher cuts it short


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


def from_main(function: Callable[[], Result], here: Position | None = None) -> Result:
    """The result of `function`, called on rank 0 alone; a UsageError or RunFailed of it is raised on all ranks.

    `here`: this rank's position, by which it is known who waits for whom.
    """
    import torch.distributed as dist

    if not (dist.is_initialized() and dist.get_world_size() > 1):
        return function()
    answer: list[Any] = [None]
    if dist.get_rank() == 0:
        try:
            answer = [function()]
        except (UsageError, RunFailed) as error:
            answer = [error]
    if here is not None:
        here.enter(here.phase if dist.get_rank() == 0 else "waiting for rank 0")
    dist.broadcast_object_list(answer)
    if isinstance(answer[0], (UsageError, RunFailed)):
        raise answer[0]
    return answer[0]


def say(text: str, file: Any = None) -> None:
    """Print a line. Where it cannot be written (a full disk, a terminal that is gone) it is lost, and no more."""
    with contextlib.suppress(OSError, ValueError):
        print(text, file=file or sys.stdout, flush=True)


def speak_clearly() -> None:
    """Show each warning once, on rank 0 and its first loader worker, and a ? for what the output's encoding lacks.

    Each rank and each worker meets the same warnings, and Python's own "once for each place" forgets at every
    warnings.catch_warnings, which libraries use in each step.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    seen: set[tuple[str, str]] = set()
    show = warnings.showwarning

    def show_once(message: Warning | str, category: type[Warning], *where: Any, **more: Any) -> None:
        torch = sys.modules.get("torch")
        worker = torch.utils.data.get_worker_info() if torch else None
        if int(os.environ.get("RANK", 0)) or (worker and worker.id) or (category.__name__, str(message)) in seen:
            return
        seen.add((category.__name__, str(message)))
        show(message, category, *where, **more)

    warnings.showwarning = show_once


def let_others_speak(watch: Watch | None = None) -> None:
    """Before leaving in silence: an elastic launcher ends all ranks when the first one leaves, said or not.

    Its signal, once one that did speak has left, ends the waiting; `watch` hears it, where there is one.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ and not speaks(os.environ):
        until = time.monotonic() + SPEAKING_SECONDS
        while not (watch and watch.wish) and time.monotonic() < until:
            time.sleep(0.1)


def speaks(environ: Mapping[str, str]) -> bool:
    """Whether this process says what it meets before ranks can talk: one on each machine, which may differ."""
    return int(environ.get("LOCAL_RANK", 0)) == 0


@atexit.register
def kill_workers() -> None:
    """End loader workers: multiprocessing asks its daemons by SIGTERM and waits, but ours do not listen to it."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler takes the end of a worker for an accident
    for child in multiprocessing.active_children():
        if child.daemon:
            child.kill()


def leave(code: int) -> None:
    """End the process with this exit code."""
    kill_workers()
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)  # nothing is left to stop, and Python gives its handlers up as it ends
    if code != 130 and int(os.environ.get("WORLD_SIZE", 1)) == 1:
        atexit._run_exitfuncs()  # what libraries have to bring to an end, as sys.exit would
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
        sys.stderr.flush()
    # Without taking the interpreter down: that takes seconds once torch is loaded, and with gloo or NCCL it now and
    # then aborts, or hangs where a peer is gone. What has to be closed is closed.
    os._exit(code)
