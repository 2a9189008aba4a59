"""How ranks find each other: all of them within a limit, or with the names of those that are missing.

torch is imported where it is needed: the environment has to be in order before that.
"""

from __future__ import annotations

import ctypes
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from distloop.errors import RunFailed, Unanswered, UsageError
from distloop.ranks.environment import node_name

if TYPE_CHECKING:
    from distloop.config.settings import Ddp
    from distloop.ranks.roll_call import RollCall

UNKNOWN_NAME_SECONDS = 5.0  # a name server may stumble once, but a wrong name stays wrong
BACKEND_SECONDS = 180  # behind the limit by which the roll call names who hangs: W&B and the report may end in between
TELLING_SECONDS = 10.0  # for what rank 0 has to say of those that are missing


def join(environ: Mapping[str, str], limit_seconds: float) -> Any:
    """The store that all ranks share (a torch.distributed.Store), once all have come. Collective.

    Reads torch's variables, RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT, and those of an elastic agent, which
    keeps the store itself. Raises UsageError for an address or port that cannot be right, RunFailed for ranks
    that did not come.
    """
    from torch.distributed import PrefixStore  # type: ignore[attr-defined]

    agent = environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    rank, world_size = int(environ["RANK"]), int(environ["WORLD_SIZE"])
    store = open_store(environ["MASTER_ADDR"], environ["MASTER_PORT"], rank == 0 and not agent, limit_seconds, "rank")
    # An agent keeps its store over restarts of the ranks: each has keys of its own.
    store = PrefixStore(f"distloop/{environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
    meet(store, rank, world_size, limit_seconds, "rank")
    return store


def open_store(host: str, port: str, is_master: bool, limit_seconds: float, members: str) -> Any:
    """The torch TCPStore at this address; number 0 of the `members` ("rank", "machine") keeps it."""
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    if not (port.isdecimal() and 0 < int(port) < 65536):
        raise UsageError(f"MASTER_PORT = {port!r} is not a port: give a number between 1024 and 65535.")
    if is_master:
        _wait_for_name(host, limit_seconds)
        host = "localhost"  # of itself; it listens at all its addresses
    else:
        _wait_for_answer(host, int(port), limit_seconds, members)
    made: list[Any] = []

    def make() -> None:
        timeout = timedelta(seconds=limit_seconds)
        options: dict[str, Any] = {"timeout": timeout, "wait_for_workers": False, "multi_tenant": True}
        try:
            made.append(TCPStore(host, int(port), is_master=is_master, **options))
        except (RuntimeError, ValueError) as error:
            made.append(error)

    # In a thread: it waits without a limit for the answer of a program that is something else.
    maker = threading.Thread(target=make, name="distloop-store", daemon=True)
    maker.start()
    maker.join(limit_seconds)
    if not made:
        made.append(TimeoutError("it does not answer"))
    if isinstance(made[0], Exception):
        text, here = str(made[0]).splitlines()[0], node_name()
        if "EADDRINUSE" in text or "in use" in text:
            raise UsageError(
                f"Port {port} of {here} is in use by another program: choose another MASTER_PORT."
            ) from None
        who = f"cannot be listened on by {here}" if is_master else f"of {host} is not that of a run's {members} 0"
        raise RunFailed(f"Port {port} {who}: {text}") from None
    return made[0]


def _wait_for_name(host: str, limit_seconds: float) -> None:
    """Raise UsageError if nobody knows this name, asked several times."""
    begun = time.monotonic()
    while True:
        try:
            socket.getaddrinfo(host, None)
            return
        except socket.gaierror as error:
            if time.monotonic() - begun > min(UNKNOWN_NAME_SECONDS, limit_seconds):
                raise _unknown(host, error) from None
        time.sleep(0.2)


def _unknown(host: str, error: OSError) -> UsageError:
    return UsageError(f"MASTER_ADDR = {host!r} is no name or address that {node_name()} knows ({error.strerror}).")


def _wait_for_answer(host: str, port: int, limit_seconds: float, members: str) -> None:
    """Wait until somebody listens there. torch would wait as well, but say it in pages."""
    here, begun = node_name(), time.monotonic()
    while True:
        try:
            socket.create_connection((host, port), timeout=min(5.0, limit_seconds)).close()
            return
        except OSError as error:
            waited, problem = time.monotonic() - begun, error
        if isinstance(problem, socket.gaierror) and waited > min(UNKNOWN_NAME_SECONDS, limit_seconds):
            raise _unknown(host, problem)
        if waited > limit_seconds:
            raise Unanswered(
                f"No answer from {members} 0 at {host}:{port} within {limit_seconds:.0f} s, asked from {here} "
                f"({problem.strerror or problem}). Is the address right, was {members} 0 started, is there a firewall?"
            )
        time.sleep(0.2)


def meet(store: Any, number: int, expected: int, limit_seconds: float, members: str) -> None:
    """Wait for all members, numbered from 0. Raises RunFailed, on all that came, with the names of the missing."""
    here = [f"here/{other}" for other in range(expected)]
    store.set(here[number], node_name())
    if number:
        try:
            told = _within(limit_seconds + TELLING_SECONDS, lambda: store.check(["result"]))
            problem = store.get("result").decode() if told else ""
            store.add("told", 1)
        except RuntimeError:
            told = False
        if not told:
            raise Unanswered(f"{members.capitalize()} 0, for which the others waited, is gone or hangs.")
    else:
        _within(limit_seconds, lambda: store.check(here))
        present = [other for other in range(expected) if store.check([here[other]])]
        problem = ""
        if len(present) < expected:
            missing = ", ".join(str(other) for other in range(expected) if other not in present)
            came = ", ".join(f"{other} ({store.get(here[other]).decode()})" for other in present)
            problem = (
                f"{members.capitalize()} {missing} of {expected} did not come within {limit_seconds:.0f} s; here are "
                f"{came}. Was each started, with the same address, port and number of {members}s, and what does its "
                "own output say?"
            )
        store.set("result", problem)
        # Who keeps the store must not leave before the others have read this.
        _within(TELLING_SECONDS, lambda: store.add("told", 0) >= len(present) - 1)
    if problem:
        raise RunFailed(problem)


def _within(seconds: float, condition: Callable[[], bool]) -> bool:
    until = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > until:
            return False
        time.sleep(0.05)
    return True


def start_group(environ: Mapping[str, str], settings: Ddp, cuda_device: int | None, roll_call: RollCall) -> None:
    """Bring all ranks together: their roll call first, which tells who is missing, then torch's process group.

    Accelerate takes a group that exists. Made here it has its limit, and knows its device. Collective.
    """
    import torch
    import torch.distributed as dist
    from torch.distributed import PrefixStore  # type: ignore[attr-defined]

    store = join(environ, settings.join_seconds)
    rank, world_size = int(environ["RANK"]), int(environ["WORLD_SIZE"])
    roll_call.gather(
        PrefixStore("roll_call", store), rank, world_size, environ["MASTER_ADDR"], settings.timeout_seconds
    )
    dist.init_process_group(
        # What ranks tell each other need not wait in the GPUs' queue.
        "gloo" if cuda_device is None else "cuda:nccl,cpu:gloo",
        store=PrefixStore("group", store),
        rank=rank,
        world_size=world_size,
        timeout=group_timeout(settings),
        device_id=None if cuda_device is None else torch.device("cuda", cuda_device),
    )


def group_timeout(settings: Ddp) -> timedelta:
    """The backends' own limit: behind that of the roll call, which can say who is waited for."""
    return timedelta(seconds=settings.timeout_seconds + BACKEND_SECONDS)


def main(arguments: list[str]) -> int:
    """Meet the other machines, for launch/multi_node.sh: HOST PORT NUMBER MACHINES SECONDS; returns the exit code."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: when the script is killed, nobody needs this
    host, port, *numbers = arguments
    try:
        number, machines, limit = (int(value) for value in numbers)
        if not 0 <= number < machines:
            raise UsageError(f"MACHINE_RANK = {number} is not one of 0 to {machines - 1} (MACHINES = {machines}).")
        print(f"machine {number} of {machines}: waiting for the others at {host}:{port}", flush=True)
        meet(open_store(host, port, number == 0, limit, "machine"), number, machines, limit, "machine")
    except (UsageError, RunFailed) as error:
        print(f"\ndistloop: {error}", file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1
    except ValueError:
        print(f"\ndistloop: MACHINE_RANK, MACHINES and JOIN_SECONDS are numbers, not {numbers}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
