"""Ranks wait for each other; after a time limit, those that came name those that did not. Functions import torch,
since it reads the environment."""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from distloop.errors import RunFailed, Unanswered, UsageError
from distloop.ranks import launch_guards
from distloop.ranks.environment import cpus_per_rank, hide_stacks, node_name
from distloop.ranks.leaving import leave

if TYPE_CHECKING:
    from distloop.config.settings import Ddp
    from distloop.ranks.roll_call import RollCall

UNKNOWN_NAME_SECONDS = 5.0  # a name server may stumble once, but a wrong name stays wrong
BACKEND_SECONDS = 180  # after the limit at which the roll call names who hangs; W&B and the report may end meanwhile
RESULT_SECONDS = 10.0  # for rank 0 to say who is missing, and for the others to read it


def join_ranks(environ: Mapping[str, str], limit_seconds: float) -> Any:
    """Wait for all ranks; returns the store that they share, a torch.distributed.Store. Collective. Reads torch's
    variables, and those of an elastic agent, which keeps the store itself. Raises UsageError for a wrong address or
    port, RunFailed if ranks are missing."""
    from torch.distributed import PrefixStore  # type: ignore[attr-defined]

    agent = environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    rank, world_size = int(environ["RANK"]), int(environ["WORLD_SIZE"])
    store = open_store(environ["MASTER_ADDR"], environ["MASTER_PORT"], rank == 0 and not agent, limit_seconds, "rank")
    # An agent keeps its store when it restarts the ranks: each restart needs keys of its own.
    store = PrefixStore(f"distloop/{environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
    wait_for_all(store, rank, world_size, limit_seconds, "rank")
    return store


def open_store(host: str, port: str, is_master: bool, limit_seconds: float, members: str) -> Any:
    """The torch TCPStore at this address. `is_master`: this process keeps it. `members`: "rank" or "machine". Raises
    UsageError or RunFailed if it cannot be opened."""
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    if not (port.isdecimal() and 0 < int(port) < 65536):
        raise UsageError(f"MASTER_PORT = {port!r} is not a port: give a number between 1024 and 65535.")
    _wait_for_address(host, int(port), is_master, limit_seconds, members)
    results: list[Any] = []  # the store, or why there is none

    def open_it() -> None:
        address = "localhost" if is_master else host  # the store listens at all addresses of this machine
        timeout = timedelta(seconds=limit_seconds)
        try:
            results.append(
                TCPStore(address, int(port), None, is_master, timeout, wait_for_workers=False, multi_tenant=True)
            )
        except (RuntimeError, ValueError) as error:
            results.append(error)

    # In a thread, since torch waits without a limit if another program listens there.
    thread = threading.Thread(target=open_it, name="distloop-store", daemon=True)
    thread.start()
    thread.join(limit_seconds)
    result = results[0] if results else TimeoutError("it does not answer")
    if isinstance(result, Exception):
        text, here = str(result).splitlines()[0], node_name()
        if "EADDRINUSE" in text or "in use" in text:
            raise UsageError(f"Port {port} of {here} is in use by another program: choose another MASTER_PORT.")
        who = f"cannot be listened on by {here}" if is_master else f"of {host} is not that of a run's {members} 0"
        raise RunFailed(f"Port {port} {who}: {text}")
    return result


def _wait_for_address(host: str, port: int, is_master: bool, limit_seconds: float, members: str) -> None:
    """Wait until the name is known and, unless this is the master, a program listens at the port. torch would wait as
    well, but fail with pages of text."""
    here, begun = node_name(), time.monotonic()
    while True:
        try:
            if is_master:
                socket.getaddrinfo(host, None)
            else:
                socket.create_connection((host, port), timeout=min(5.0, limit_seconds)).close()
            return
        except OSError as error:
            waited, reason = time.monotonic() - begun, error.strerror or error
            if isinstance(error, socket.gaierror) and waited > min(UNKNOWN_NAME_SECONDS, limit_seconds):
                raise UsageError(
                    f"MASTER_ADDR = {host!r} is no name or address that {here} knows ({reason})."
                ) from None
            if waited > limit_seconds:
                raise Unanswered(
                    f"No answer from {members} 0 at {host}:{port} within {limit_seconds:.0f} s, asked from {here} "
                    f"({reason}). Is the address right, was {members} 0 started, is there a firewall?"
                ) from None
        time.sleep(0.2)


def wait_for_all(store: Any, number: int, expected: int, limit_seconds: float, members: str) -> None:
    """Wait for all members, numbered from 0. Raises RunFailed on all that came, with the numbers of the missing."""
    keys = [f"here/{other}" for other in range(expected)]
    store.set(keys[number], node_name())
    if number:
        try:
            has_result = _within(limit_seconds + RESULT_SECONDS, lambda: store.check(["result"]))
            problem = store.get("result").decode() if has_result else ""
            store.add("told", 1)
        except RuntimeError:
            has_result = False
        if not has_result:
            raise Unanswered(f"{members.capitalize()} 0, for which the others waited, is gone or hangs.")
    else:
        _within(limit_seconds, lambda: store.check(keys))
        present = [other for other in range(expected) if store.check([keys[other]])]
        problem = ""
        if len(present) < expected:
            missing = ", ".join(str(other) for other in range(expected) if other not in present)
            came = ", ".join(f"{other} ({store.get(keys[other]).decode()})" for other in present)
            problem = (
                f"{members.capitalize()} {missing} of {expected} did not come within {limit_seconds:.0f} s; here are "
                f"{came}. Was each started, with the same address, port and number of {members}s, and what does its "
                "own output say?"
            )
        store.set("result", problem)
        # The store ends with this process: the others must have read the result before.
        _within(RESULT_SECONDS, lambda: store.add("told", 0) >= len(present) - 1)
    if problem:
        raise RunFailed(problem)


def _within(seconds: float, condition: Callable[[], bool]) -> bool:
    """Wait until the condition holds, so many seconds at most; returns True if it holds."""
    until = time.monotonic() + seconds
    while not (holds := condition()) and time.monotonic() <= until:
        time.sleep(0.05)
    return holds


def start_group(environ: Mapping[str, str], settings: Ddp, cuda_device: int | None, roll_call: RollCall) -> None:
    """Start the ranks' roll call, then torch's process group, which Accelerate uses. Collective. `cuda_device`: None
    for the CPU. Raises UsageError and RunFailed as join_ranks() does, and UsageError as check_devices() does."""
    import torch
    import torch.distributed as dist
    from torch.distributed import PrefixStore  # type: ignore[attr-defined]

    store = join_ranks(environ, settings.join_seconds)
    rank, world_size = int(environ["RANK"]), int(environ["WORLD_SIZE"])
    keys = PrefixStore("roll_call", store)
    roll_call.gather(keys, rank, world_size, environ["MASTER_ADDR"], settings.timeout_seconds)
    launch_guards.check_devices(store, rank, world_size, launch_guards.gpu_of(cuda_device))
    dist.init_process_group(
        # Objects that ranks send each other go over gloo, so that they need not wait for the GPU's queue.
        "gloo" if cuda_device is None else "cuda:nccl,cpu:gloo",
        store=PrefixStore("group", store),
        rank=rank,
        world_size=world_size,
        timeout=group_timeout(settings),
        device_id=None if cuda_device is None else torch.device("cuda", cuda_device),
    )
    take_fewest_threads(environ)


def take_fewest_threads(environ: Mapping[str, str]) -> None:
    """Compute with as few CPU threads as the rank that has the fewest, unless OMP_NUM_THREADS was set by hand: the
    machines of a run may have other numbers of CPUs, and ranks with other numbers of threads are refused. Collective.
    """
    import torch
    import torch.distributed as dist

    fewest = torch.tensor(torch.get_num_threads())
    dist.all_reduce(fewest, dist.ReduceOp.MIN)  # over gloo
    set_by_hand = environ.get("OMP_NUM_THREADS", "") not in ("", str(cpus_per_rank(environ)))  # not by share_cpus()
    if int(fewest) < torch.get_num_threads() and not set_by_hand:
        torch.set_num_threads(int(fewest))


def group_timeout(settings: Ddp) -> timedelta:
    """The time limit of torch's backends: longer than that of the roll call, which names the rank that hangs."""
    return timedelta(seconds=settings.timeout_seconds + BACKEND_SECONDS)


def main(arguments: list[str]) -> int:
    """Wait for the other machines, for launch/multi_node.sh; returns the exit code. `arguments`: HOST PORT NUMBER
    MACHINES SECONDS."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: end with the script, also when it is killed
    hide_stacks(os.environ)
    host, port, *numbers = arguments
    try:
        number, machines, limit = (int(value) for value in numbers)
        if not 0 <= number < machines:
            raise UsageError(f"MACHINE_RANK = {number} is not one of 0 to {machines - 1} (MACHINES = {machines}).")
        print(f"machine {number} of {machines}: waiting for the others at {host}:{port}", flush=True)
        store = open_store(host, port, number == 0, limit, "machine")
        wait_for_all(store, number, machines, limit, "machine")
    except (UsageError, RunFailed) as error:
        print(f"\ndistloop: {error}", file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1
    except ValueError:
        print(f"\ndistloop: MACHINE_RANK, MACHINES and JOIN_SECONDS are numbers, not {numbers}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    leave(main(sys.argv[1:]))  # without torch's shutdown, which aborts while a thread of it still asks
