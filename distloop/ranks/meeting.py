"""Ranks wait for each other; after a time limit, those that came name those that did not. Functions import torch,
since it reads the environment."""

from __future__ import annotations

import ctypes
import math
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Mapping
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from distloop.errors import RunFailed, StoppedEarly, Unanswered, UsageError
from distloop.ranks import launch_guards
from distloop.ranks.environment import cpus_per_rank, hide_stacks, node_name
from distloop.ranks.interfaces import VARIABLE, choose_interface, is_loopback
from distloop.ranks.leaving import leave
from distloop.ranks.talking import say, speaks

if TYPE_CHECKING:
    from distloop.config.settings import Ddp
    from distloop.ranks.roll_call import RollCall
    from distloop.ranks.stopping import Watch

UNKNOWN_NAME_SECONDS = 5.0  # a name server may stumble once, but a wrong name stays wrong
BACKEND_SECONDS = 180  # after the limit at which the roll call names who hangs; W&B and the report may end meanwhile
RESULT_SECONDS = 10.0  # for rank 0 to say who is missing, and for the others to read it
SILENT_SECONDS = 20.0  # then a process says for whom it waits
GRACE_SECONDS = 10.0  # after a wish to stop: ranks that still import come, and the run can save that it was stopped
ENDED = "Stopped "  # how rank 0's answer begins if it is no failure


class Wait:
    """The wait of a process for the other members of its run, "rank" or "machine". It says once for whom it waits."""

    def __init__(self, members: str, limit_seconds: float, watch: Watch | None = None) -> None:
        """`watch`: knows whether this process is asked to stop, which soon ends the wait."""
        self.members, self.limit, self._watch = members, limit_seconds, watch
        self._say_at = time.monotonic() + SILENT_SECONDS
        self._end_at = math.inf

    @property
    def wish(self) -> str:
        """What asked this process to stop, once the others have had time to come; else ""."""
        if not (self._watch and self._watch.wish):
            return ""
        self._end_at = min(self._end_at, time.monotonic() + GRACE_SECONDS)
        return self._watch.wish.text if time.monotonic() >= self._end_at else ""

    def sleep(self, begun: float, missing: str, longest: float = 0.05, ends_early: bool = True) -> None:
        """Sleep for a moment, `longest` seconds at most, while `missing` is: since `begun`, by time.monotonic().
        `ends_early`: raise StoppedEarly if there is a wish to stop."""
        if ends_early and self.wish:
            raise StoppedEarly(stopped_early(self.wish, missing))
        if time.monotonic() > self._say_at:
            self._say_at = math.inf
            if speaks(os.environ):
                say(f"distloop: waiting for {missing}, {self.limit:.0f} s at most", sys.stderr)
        nap(begun, longest)


def nap(begun: float, longest: float = 0.05) -> None:
    """Sleep for a twentieth of the wait so far: it ends late by that part at most, and a long one asks seldom."""
    time.sleep(min(longest, max(0.001, (time.monotonic() - begun) / 20)))


def stopped_early(why: str, missing: str) -> str:
    """The message of a StoppedEarly."""
    return f"{ENDED}({why}) while waiting for {missing}. Nothing was trained; the same command starts again."


def join_ranks(environ: Mapping[str, str], limit_seconds: float, watch: Watch | None = None) -> Any:
    """Wait for all ranks; returns the store that they share, a torch.distributed.Store. Collective. Reads torch's
    variables, and those of an elastic agent, which keeps the store itself. Raises UsageError for a wrong address or
    port, RunFailed if ranks are missing, StoppedEarly if one of them is asked to stop meanwhile."""
    from torch.distributed import PrefixStore  # type: ignore[attr-defined]

    agent = environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    rank, world_size = int(environ["RANK"]), int(environ["WORLD_SIZE"])
    wait = Wait("rank", limit_seconds, watch)
    store = open_store(environ["MASTER_ADDR"], environ["MASTER_PORT"], rank == 0 and not agent, wait)
    # An agent keeps its store when it restarts the ranks: each restart needs keys of its own.
    store = PrefixStore(f"distloop/{environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
    wait_for_all(store, rank, world_size, wait)
    return store


def open_store(host: str, port: str, is_master: bool, wait: Wait) -> Any:
    """The torch TCPStore at this address. `is_master`: this process keeps it. Raises UsageError or RunFailed if it
    cannot be opened, StoppedEarly."""
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    if not (port.isdecimal() and 0 < int(port) < 65536):
        raise UsageError(f"MASTER_PORT = {port!r} is not a port: give a number between 1024 and 65535.")
    host = bare(host)
    _wait_for_address(host, int(port), is_master, wait)
    results: list[Any] = []  # the store, or why there is none

    def open_it() -> None:
        address = "localhost" if is_master else host  # the store listens at all addresses of this machine
        timeout = timedelta(seconds=wait.limit)
        try:
            results.append(
                TCPStore(address, int(port), None, is_master, timeout, wait_for_workers=False, multi_tenant=True)
            )
        except (RuntimeError, ValueError) as error:
            results.append(error)

    # In a thread, since torch waits without a limit if another program listens there.
    thread = threading.Thread(target=open_it, name="distloop-store", daemon=True)
    thread.start()
    begun = time.monotonic()
    while thread.is_alive() and time.monotonic() < begun + wait.limit:
        wait.sleep(begun, f"{wait.members} 0 at {address_text(host, port)}")
    result = results[0] if results else TimeoutError("it does not answer")
    if isinstance(result, Exception):
        text, here = str(result).splitlines()[0], node_name()
        if "EADDRINUSE" in text or "in use" in text:
            raise UsageError(f"Port {port} of {here} is in use by another program: choose another MASTER_PORT.")
        who = f"cannot be listened on by {here}" if is_master else f"of {host} is not that of a run's {wait.members} 0"
        raise RunFailed(f"Port {port} {who}: {text}")
    return result


def bare(host: str) -> str:
    """The host without the brackets in which IPv6 addresses are written beside a port."""
    return host[1:-1] if host.startswith("[") and host.endswith("]") else host


def address_text(host: str, port: int | str) -> str:
    """host:port, or [host]:port for an IPv6 address."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _wait_for_address(host: str, port: int, is_master: bool, wait: Wait) -> None:
    """Wait until the name is known and, unless this is the master, a program listens at the port. torch would wait as
    well, but fail with pages of text."""
    here, begun, first = node_name(), time.monotonic(), f"{wait.members} 0"
    where = f"{first} at {address_text(host, port)}"
    own = f" {host} is {here} itself: other machines need an address that reaches {first}."
    while True:
        try:
            if is_master:
                socket.getaddrinfo(host, None)
            else:
                socket.create_connection((host, port), timeout=min(5.0, wait.limit)).close()
            return
        except OSError as error:
            waited, reason = time.monotonic() - begun, error.strerror or error
            if isinstance(error, socket.gaierror) and waited > min(UNKNOWN_NAME_SECONDS, wait.limit):
                raise UsageError(
                    f"MASTER_ADDR = {host!r} is no name or address that {here} knows ({reason})."
                ) from None
            if waited > wait.limit:
                raise Unanswered(
                    f"No answer from {where} within {wait.limit:.0f} s, asked from {here} ({reason}). "
                    f"Is the address right, was {first} started, is there a firewall?" + own * is_loopback(host)
                ) from None
        wait.sleep(begun, where, 0.2)


def wait_for_all(store: Any, number: int, expected: int, wait: Wait) -> None:
    """Wait for all members, numbered from 0. On all that came it raises RunFailed with the numbers of the missing, or
    StoppedEarly if one of them is asked to stop."""
    keys = [f"here/{other}" for other in range(expected)]
    store.set(keys[number], node_name())
    if number:
        try:
            answer = _answer_of_first(store, number, wait)
        except RuntimeError:
            answer = None
        if answer is None:
            raise Unanswered(f"{wait.members.capitalize()} 0, for which the others waited, is gone or hangs.")
    else:
        answer = _wait_as_first(store, keys, wait)
        store.set("result", answer)
        # The store ends with this process: the others must have read the result before.
        present = sum(store.check([key]) for key in keys)
        begun = time.monotonic()
        while store.add("told", 0) < present - 1 and time.monotonic() < begun + RESULT_SECONDS:
            nap(begun)
    if answer.startswith(ENDED):
        raise StoppedEarly(answer)
    if answer:
        raise RunFailed(answer)


def _answer_of_first(store: Any, number: int, wait: Wait) -> str | None:
    """What member 0 says: "" if all came, else why the run ends; None if it does not answer."""
    asks, until = False, (begun := time.monotonic()) + wait.limit + RESULT_SECONDS
    while not store.check(["result"]):
        if wait.wish and not asks:
            asks, until = True, time.monotonic() + RESULT_SECONDS
            store.set("asks", f"{wait.wish} to {wait.members} {number}")
        if time.monotonic() > until:
            return None
        wait.sleep(begun, f"the {wait.members}s that are missing", ends_early=False)
    answer: str = store.get("result").decode()
    store.add("told", 1)
    return answer


def _wait_as_first(store: Any, keys: list[str], wait: Wait) -> str:
    """As member 0, wait for the others; returns the answer for all: "" if all came, else why the run ends."""
    begun = time.monotonic()
    while not store.check(keys):
        here = [number for number, key in enumerate(keys) if store.check([key])]
        missing = f"{', '.join(str(number) for number in range(len(keys)) if number not in here)} of {len(keys)}"
        if (who := wait.wish) or store.check(["asks"]):
            return stopped_early(who or store.get("asks").decode(), f"{wait.members} {missing}")
        if time.monotonic() > begun + wait.limit:
            came = ", ".join(f"{number} ({store.get(keys[number]).decode()})" for number in here)
            return (
                f"{wait.members.capitalize()} {missing} did not come within {wait.limit:.0f} s; here are "
                f"{came}. Was each started, with the same address, port and number of {wait.members}s, and what does "
                "its own output say?"
            )
        wait.sleep(begun, f"{wait.members} {missing}", ends_early=False)
    return ""


def start_group(environ: Mapping[str, str], settings: Ddp, cuda_device: int | None, roll_call: RollCall) -> None:
    """Start the ranks' roll call, then torch's process group, which Accelerate uses. Collective. `cuda_device`: None
    for the CPU. Raises UsageError and RunFailed as join_ranks() does, and UsageError as check_devices() does."""
    import torch
    import torch.distributed as dist
    from torch.distributed import PrefixStore  # type: ignore[attr-defined]

    store = join_ranks(environ, settings.join_seconds, roll_call.watch)
    rank, world_size = int(environ["RANK"]), int(environ["WORLD_SIZE"])
    keys = PrefixStore("roll_call", store)
    roll_call.gather(keys, rank, world_size, bare(environ["MASTER_ADDR"]), settings.timeout_seconds)
    if (interface := choose_interface(store, rank, world_size, bare(environ["MASTER_ADDR"]), environ)) is not None:
        os.environ[VARIABLE] = interface
        if speaks(os.environ):
            why = f"{os.uname().nodename}, this machine's own name, is a loopback address here"
            say(f"distloop: {why}: gloo uses {interface}, by which ranks reach each other ({VARIABLE})", sys.stderr)
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
        address = address_text(bare(host), port)
        print(f"machine {number} of {machines}: waiting for the others at {address}", flush=True)
        wait = Wait("machine", limit)
        wait_for_all(open_store(host, port, number == 0, wait), number, machines, wait)
    except (UsageError, RunFailed) as error:
        print(f"\ndistloop: {error}", file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1
    except ValueError:
        print(f"\ndistloop: MACHINE_RANK, MACHINES and JOIN_SECONDS are numbers, not {numbers}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    leave(main(sys.argv[1:]))  # without torch's shutdown, which aborts while a thread of it still asks
