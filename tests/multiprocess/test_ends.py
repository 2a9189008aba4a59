"""Ends that user code is in the way of: it takes signals, loads for long, starts what outlives it, leaves by itself."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from distloop.ranks.meeting import GRACE_SECONDS
from tests.lab.ends import LEAVES, STARTS, TAKES
from tests.tools import stage
from tests.tools.ranks import Ranks, clean_environment, free_port, rank_environment, train, wait_until
from tests.tools.records import run_of, status
from tests.tools.stopping import NOTICE, check_finished, check_stopped, processes_of, reached, waiting_run

pytestmark = pytest.mark.usefixtures("nothing_is_left")
SOON = 15.0  # seconds, on a busy machine too


def run_with(folder: Path, data: str = "tests.lab.stopping:points", args: Any = None, **changes: Any) -> list[str]:
    return waiting_run(folder, data={"name": data, "args": args or {}}, **changes)


def send(ranks: Ranks, number: int = signal.SIGTERM) -> None:
    for process in ranks.processes:
        os.kill(process.pid or 0, number)


def fresh(folder: Path, arguments: list[str], world_size: int = 1) -> tuple[list[int], str]:
    """Exit codes and output of ranks that are processes of their own, which end as a user's do."""
    port, started = free_port(), []
    with open(folder / ".fresh", "w") as output:
        for rank in range(world_size):
            environment = {**clean_environment(), **rank_environment(rank, world_size, port)}
            words = [sys.executable, "-m", "distloop.train", *arguments, "--tracking.no-report"]
            started.append(subprocess.Popen(words, cwd=folder, env=environment, stdout=output, stderr=output))
    return [process.wait(120) for process in started], (folder / ".fresh").read_text()


# ---- signals that other code takes ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("how", "world_size"),
    [
        *(pytest.param(how, 1, marks=[] if how in ("an error", "ignored") else pytest.mark.long) for how in TAKES),
        ("asyncio", 2),
        ("sys.exit", 2),
        pytest.param("ignored", 2, marks=pytest.mark.long),
    ],
)
def test_a_signal_that_user_code_takes_still_saves(tmp_path: Path, how: str, world_size: int) -> None:
    arguments = run_with(tmp_path, "tests.lab.ends:taking", {"how": how})
    stage.hold(tmp_path, "step")
    ranks = Ranks(tmp_path, arguments, world_size)
    stage.arrived(tmp_path, "step", range(world_size))
    check_saves(tmp_path, ranks, how)
    train(tmp_path, arguments, world_size).check()
    check_finished(tmp_path, status(run_of(tmp_path))["first_step"])


@pytest.mark.parametrize(
    "how", ["sys.exit", "asyncio", *(pytest.param(how, marks=pytest.mark.long) for how in ("the default", "ignored"))]
)
def test_a_signal_that_user_code_takes_in_the_middle_of_training_still_saves(tmp_path: Path, how: str) -> None:
    arguments = waiting_run(tmp_path, task={"name": "tests.lab.ends:TakingLater", "args": {"how": how}})
    ranks = Ranks(tmp_path, [*arguments, "--train.steps", "100000"])
    reached(tmp_path, 150)  # a second and a half after the fifth step: the watch looks twice a second
    check_saves(tmp_path, ranks, how)


def check_saves(folder: Path, ranks: Ranks, how: str) -> None:
    send(ranks)
    wait_until(lambda: NOTICE in ranks.outputs[0].read_text(), "the notice")
    if (folder / "stage").exists():
        stage.let_go(folder, "step")
    outcome = ranks.join().check()
    run = run_of(folder)
    assert (status(run)["state"], status(run)["reason"]) == ("stopped", "SIGTERM"), outcome.output
    assert (run / "checkpoints" / f"step_{status(run)['step']:08}").exists()
    assert outcome.output.count(NOTICE) == 1
    is_told = how in ("a handler", "sys.exit", "an error", "calls the one before")
    assert (folder / "noted").exists() == is_told, "a handler of the user's own is called as well"
    said = "asks for a stop, and calls tests.lab.ends." if is_told else "which other code ignored, asks for a stop"
    assert len(re.findall(f"distloop: SIGTERM,? {said}", outcome.output)) == (is_told or how == "ignored")
    failed = (
        "distloop: tests.lab.ends.fail, a handler of SIGTERM, raised ValueError: as in a handler of a user's; the run"
    )
    assert outcome.output.count(failed) == (how == "an error")


@pytest.mark.parametrize("how", ["a pool", "a process"])
def test_processes_that_user_code_forks_can_be_ended_and_do_not_stop_the_run(tmp_path: Path, how: str) -> None:
    outcome = train(tmp_path, run_with(tmp_path, "tests.lab.ends:with_processes", {"how": how})).check()
    assert NOTICE not in outcome.output
    assert status(run_of(tmp_path))["state"] == "finished"


@pytest.mark.parametrize(
    ("how", "name"),
    [
        ("an executor", "SIGUSR1"),
        *(pytest.param("an executor", name, marks=pytest.mark.long) for name in ("SIGUSR2", "SIGINT", "SIGHUP")),
        pytest.param("a pool", "SIGUSR1", marks=pytest.mark.long),
    ],
)
def test_a_signal_to_all_processes_of_a_run_leaves_those_that_user_code_forks_at_work(
    tmp_path: Path, how: str, name: str
) -> None:
    data = {"name": "tests.lab.ends:forked", "args": {"how": how}, "workers": 0}
    # One sample at a time, so that the step that is held needs further ones.
    arguments = waiting_run(tmp_path, data=data, batch={"global_size": 16, "micro_size": 1})
    stage.hold(tmp_path, "step")
    output = tmp_path / ".output"
    with open(output, "w") as file:
        words = [sys.executable, "-m", "distloop.train", *arguments, "--tracking.no-report"]
        run = subprocess.Popen(
            words, cwd=tmp_path, env=clean_environment(), stdout=file, stderr=file, start_new_session=True
        )
    stage.arrived(tmp_path, "step")
    os.killpg(run.pid, signal.Signals[name])  # as Slurm and a terminal do
    wait_until(lambda: NOTICE in output.read_text(), "the notice")
    stage.let_go(tmp_path, "step")
    assert run.wait(60) == 0, output.read_text()
    check_stopped(tmp_path, output.read_text(), name)


# ---- before there is anything to save --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["SIGTERM", *(pytest.param(name, marks=pytest.mark.long) for name in ("SIGINT", "SIGHUP"))]
)
@pytest.mark.parametrize(("world_size", "whom"), [(1, 0), (2, 0), (2, 1)])
def test_a_stop_while_data_load_for_minutes_ends_soon(tmp_path: Path, name: str, world_size: int, whom: int) -> None:
    arguments = run_with(tmp_path, "tests.lab.ends:slow")
    stage.hold(tmp_path, "start")
    ranks = Ranks(tmp_path, arguments, world_size)
    stage.arrived(tmp_path, "start", range(world_size))
    begun = time.monotonic()
    os.kill(ranks.processes[whom].pid or 0, signal.Signals[name])
    ranks.processes[whom].join(SOON)
    stage.let_go(tmp_path, "start")  # rank 0 may hear of rank 1 only then
    outcome = ranks.join().check()
    assert time.monotonic() - begun < 2 * SOON
    said = "ended before the loop began, with nothing to save" if whom == 0 else f"was asked to stop ({name})"
    assert said in outcome.output, outcome.output
    assert "Traceback" not in outcome.output
    assert not (run_of(tmp_path) / "status.json").exists() or status(run_of(tmp_path))["state"] == "stopped"
    train(tmp_path, arguments, world_size).check()
    check_finished(tmp_path, 0)


class Listener:
    """A port at which somebody listens, and that says nothing: no run's."""

    def __init__(self) -> None:
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.port = self.socket.getsockname()[1]

    def wait(self) -> None:
        self.socket.settimeout(60)
        self.socket.accept()


def listens(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
        return True
    return False


OFTEN = ("a thread that does not end", "a process with last words", "a manager")
OTHERS = [pytest.param(name, marks=pytest.mark.long) for name in ("SIGINT", "SIGHUP", "SIGUSR2")]


@pytest.mark.parametrize("name", ["SIGTERM", *OTHERS])
def test_rank_0_that_waits_for_others_ends_soon_when_it_is_told_to(tmp_path: Path, name: str) -> None:
    port = free_port()
    ranks = Ranks(tmp_path, run_with(tmp_path), 1, rank_environment(0, 2, port))
    wait_until(lambda: listens(port), "rank 0")
    check_ends_soon(ranks, name, "while waiting for rank 1 of 2. Nothing was trained")


@pytest.mark.long
@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_another_rank_that_waits_for_rank_0_ends_soon_when_it_is_told_to(tmp_path: Path, name: str) -> None:
    listener = Listener()
    environment = {**rank_environment(1, 2, listener.port), "LOCAL_RANK": "0"}  # of another machine
    ranks = Ranks(tmp_path, run_with(tmp_path), 1, environment)
    listener.wait()
    check_ends_soon(ranks, name, f"while waiting for rank 0 at 127.0.0.1:{listener.port}. Nothing was trained")


def check_ends_soon(ranks: Ranks, name: str, said: str) -> None:
    begun = time.monotonic()
    send(ranks, signal.Signals[name])
    outcome = ranks.join().check()
    assert time.monotonic() - begun < GRACE_SECONDS + SOON
    assert outcome.output.count(f"distloop: Stopped ({name}) {said}") == 1
    assert "Traceback" not in outcome.output


# ---- a rank that does not answer -------------------------------------------------------------------------------


@pytest.mark.parametrize("suspended", [0, 1])
@pytest.mark.long
def test_a_stop_while_a_rank_is_suspended_ends_soon_and_names_it(tmp_path: Path, suspended: int) -> None:
    arguments = run_with(tmp_path, "tests.lab.ends:short_silence")
    stage.hold(tmp_path, "step")
    ranks = Ranks(tmp_path, arguments, 2)
    stage.arrived(tmp_path, "step", range(2))
    os.kill(ranks.processes[suspended].pid or 0, signal.SIGSTOP)
    stage.let_go(tmp_path, "step")  # the other one waits in an all-reduce from here on
    try:
        begun = time.monotonic()
        os.kill(ranks.processes[1 - suspended].pid or 0, signal.SIGTERM)
        ranks.processes[1 - suspended].join(60)
        assert time.monotonic() - begun < 2 * SOON
        assert ranks.processes[1 - suspended].exitcode == 1
    finally:
        os.kill(ranks.processes[suspended].pid or 0, signal.SIGCONT)
        outcome = ranks.join()
    assert outcome.output.count(f"distloop: rank {suspended} on ") == 1, outcome.output
    assert "has not been heard of for 2 s, while the run is asked to stop: it is suspended" in outcome.output


# ---- what outlives the run --------------------------------------------------------------------------------------

ON_TWO_RANKS = ("a thread that does not end", "a process with last words", "a manager", "a pool")
ENDED_WITH_THE_RUN = ("a process that an exit function ends", "a manager", "a pool")


@pytest.mark.parametrize(
    ("what", "world_size"),
    [
        *(pytest.param(what, 1, marks=[] if what in OFTEN else pytest.mark.long) for what in STARTS),
        *(pytest.param(what, 2, marks=[] if what in OFTEN else pytest.mark.long) for what in ON_TWO_RANKS),
    ],
)
def test_the_end_waits_a_while_for_what_user_code_has_started(tmp_path: Path, what: str, world_size: int) -> None:
    has_words = "last words" in what or what == "an executor"
    ends = has_words or what in ENDED_WITH_THE_RUN
    args = {"what": what, "seconds": 60.0 if has_words else 1.0 if not ends else 8.0}
    codes, output = fresh(tmp_path, run_with(tmp_path, "tests.lab.ends:outlived", args, train={"steps": 3}), world_size)
    left = processes_of(tmp_path)
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    assert codes == [0] * world_size, output
    assert status(run_of(tmp_path))["state"] == "finished"
    assert [(tmp_path / f"last-words-{rank}").exists() for rank in range(world_size)] == [has_words] * world_size
    name = {"a thread that does not end": "the thread uploader", "a process that does not end": "the process server ("}
    assert output.count("distloop: did not wait longer than ") == (0 if ends else world_size)
    assert name.get(what, "") in output
    assert len(left) == (what == "a process that does not end"), left


# ---- user code that leaves --------------------------------------------------------------------------------------

SAID = {
    "sys.exit(0)": (1, "it left with sys.exit(0) before the run was done"),
    "SystemExit": (1, "it left with sys.exit(None) before the run was done"),
    "KeyboardInterrupt": (130, "ended at once; the same command continues from the last checkpoint"),
}


@pytest.mark.parametrize(
    ("how", "world_size"), [(how, 2) for how in SAID] + [pytest.param(how, 1, marks=pytest.mark.long) for how in SAID]
)
def test_user_code_that_leaves_is_no_run_that_is_done(tmp_path: Path, how: str, world_size: int) -> None:
    task = {"name": "tests.lab.ends:Leaving", "args": {"how": how}}
    outcome = train(tmp_path, waiting_run(tmp_path, task=task), world_size)
    code, said = SAID[how]
    assert outcome.codes == [code] * world_size, outcome.output
    assert outcome.output.count(said) >= 1
    assert status(run_of(tmp_path))["state"] == ("stopped" if code == 130 else "failed")
    train(tmp_path, waiting_run(tmp_path), world_size)
    assert set(SAID) | {"os._exit(0)"} == set(LEAVES)


def test_a_rank_that_leaves_by_os_exit_is_named(tmp_path: Path) -> None:
    task = {"name": "tests.lab.ends:Leaving", "args": {"how": "os._exit(0)", "rank": 1}}
    outcome = train(tmp_path, waiting_run(tmp_path, task=task), 2)
    assert outcome.codes == [1, 0], outcome.output
    assert (
        "was the first to end, without a word: killed (out of memory, kill -9), or left by os._exit" in outcome.output
    )
