"""Machines and ranks that look for each other: who is missing, and what is wrong, is said soon and in one message."""

from __future__ import annotations

import contextlib
import os
import re
import socketserver
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from torch.distributed import HashStore, TCPStore  # type: ignore[attr-defined]

from distloop.errors import RunFailed, StoppedEarly, Unanswered, UsageError
from distloop.ranks import meeting
from distloop.ranks.stopping import StopReason
from tests.tools.ranks import clean_environment, free_port, train, wait_until

SECONDS = 2  # how long they wait for each other
SOON = 60  # for an import of torch and the rest, beyond the limit
SMALLEST = ["--data", "tests.lab.points:points", "--model", "linear", "--task", "regression", "--device", "cpu"]
SMALLEST += ["--batch.global-size", "6", "--train.steps", "2"]
NOT_FOR_USERS = ("Traceback", "C++", "frame #", "c10d", "Exception raised from", "libtorch", "TCPStore")


class Machine:
    """`python -m distloop.ranks.meeting HOST PORT NUMBER MACHINES SECONDS`, as launch/multi_node.sh calls it."""

    def __init__(self, port: object, number: object, machines: object = 2, host: str = "127.0.0.1") -> None:
        words = [sys.executable, "-m", "distloop.ranks.meeting", host, *map(str, (port, number, machines, SECONDS))]
        self.process = subprocess.Popen(
            words, env=clean_environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )

    def ends(self, code: int) -> str:
        """What it has said, but for the line with which it begins; it ends with this code, and speaks to users."""
        try:
            output = self.process.communicate(timeout=SECONDS + SOON)[0]
        finally:
            self.process.kill()
        assert self.process.returncode == code, output
        assert not [words for words in NOT_FOR_USERS if words in output], output
        lines = [line for line in output.splitlines() if line and not line.startswith("machine ")]
        assert len(lines) == (code != 0), output  # one message
        return "\n".join(lines)


def test_machines_that_all_come_go_on() -> None:
    port = free_port()
    machines = [Machine(port, number, 3) for number in range(3)]
    assert [machine.ends(0) for machine in machines] == [""] * 3


def test_the_machine_that_is_missing_is_named_on_all_that_came() -> None:
    port = free_port()
    for machine in [Machine(port, number, 4) for number in (0, 2)]:
        message = machine.ends(1)
        assert f"Machine 1, 3 of 4 did not come within {SECONDS} s; here are 0 (" in message
        assert re.search(r"0 \(\S+\), 2 \(\S+\)", message)


def test_machine_0_is_missed_by_the_others() -> None:
    port = free_port()
    message = Machine(port, 1).ends(1)
    assert f"No answer from machine 0 at 127.0.0.1:{port} within {SECONDS} s, asked from " in message
    assert "Is the address right, was machine 0 started, is there a firewall?" in message


@pytest.mark.parametrize("number", [0, 1])
def test_a_name_that_nobody_knows_is_the_users_mistake(number: int) -> None:
    said = Machine(free_port(), number, host="no-such-machine.invalid").ends(2)
    assert "MASTER_ADDR = 'no-such-machine.invalid' is no name or address that " in said


@pytest.mark.parametrize("port", ["http", "0", "65536", "-1", "29500x", "²", ""])
def test_a_port_that_is_none_is_the_users_mistake(port: str) -> None:
    # In this process: no wait, and no import of torch for each.
    with pytest.raises(UsageError, match=re.escape(f"MASTER_PORT = {port!r} is not a port")):
        meeting.open_store("127.0.0.1", port, True, meeting.Wait("rank", SECONDS))


def test_numbers_that_are_none_are_the_users_mistake(capsys: pytest.CaptureFixture[str]) -> None:
    assert meeting.main(["127.0.0.1", "29500", "one", "2", "5"]) == 2
    assert "MACHINE_RANK, MACHINES and JOIN_SECONDS are numbers" in capsys.readouterr().err
    assert meeting.main(["127.0.0.1", "29500", "2", "2", "5"]) == 2
    assert "MACHINE_RANK = 2 is not one of 0 to 1 (MACHINES = 2)" in capsys.readouterr().err


class Silent(socketserver.BaseRequestHandler):
    """A server of something else, which waits for more than a store sends."""

    def handle(self) -> None:
        while self.request.recv(4096):
            pass


class Web(socketserver.BaseRequestHandler):
    """A web server, to which a store's request makes no sense."""

    def handle(self) -> None:
        with contextlib.suppress(OSError):
            self.request.recv(1)
            self.request.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n<!DOCTYPE html>\n" * 4)


@pytest.fixture(params=[Silent, Web])
def other_program(request: pytest.FixtureRequest) -> Iterator[int]:
    """The port of a program that is no run."""
    server = socketserver.ThreadingTCPServer(("127.0.0.1", 0), request.param)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield server.server_address[1]
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def test_a_port_in_use_is_the_users_mistake(other_program: int) -> None:
    assert f"Port {other_program} of " in (message := Machine(other_program, 0).ends(2))
    assert "is in use by another program: choose another MASTER_PORT." in message


def test_another_program_at_the_address_is_not_taken_for_the_run(other_program: int) -> None:
    assert f"Port {other_program} of 127.0.0.1 is not that of a run's machine 0" in Machine(other_program, 1).ends(1)


# ---- the same for ranks --------------------------------------------------------------------------------------


def ranks(folder: Path, present: list[int], world_size: int, port: int, **environment: str) -> list[tuple[int, str]]:
    """Exit code and output of these ranks of a run, whose others do not come."""
    outcomes: dict[int, tuple[int, str]] = {}

    def start(rank: int) -> None:
        (folder / str(rank)).mkdir()
        variables = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)}
        variables |= {"LOCAL_WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        arguments = ["--name", "run", "--data", "diabetes", "--model", "linear", "--task", "regression"]
        arguments += ["--device", "cpu", "--ddp.join-seconds", str(SECONDS)]
        done = train(folder / str(rank), arguments, 1, {**variables, **environment})
        outcomes[rank] = done.codes[0], done.output

    threads = [threading.Thread(target=start, args=(rank,)) for rank in present]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for _, output in outcomes.values():
        assert not [words for words in NOT_FOR_USERS if words in output], output
    return [outcomes[rank] for rank in present]


def test_the_rank_that_is_missing_is_named_on_each_machine(tmp_path: Path) -> None:
    came = ranks(tmp_path, [0, 2], 3, free_port(), LOCAL_RANK="0")  # each on a machine of its own
    assert [code for code, _ in came] == [1, 1], came
    for _, output in came:
        assert output.count("distloop: ") == 1
        assert f"Rank 1 of 3 did not come within {SECONDS} s; here are 0 (" in output
    assert list(tmp_path.glob("*/runs")) == []


def test_rank_0_is_missed_by_the_others(tmp_path: Path) -> None:
    port = free_port()
    ((code, output),) = ranks(tmp_path, [1], 2, port)
    assert code == 1
    assert output.count(f"distloop: No answer from rank 0 at 127.0.0.1:{port} within {SECONDS} s") == 1


@pytest.mark.parametrize(
    ("rank", "environment", "code", "said"),
    [
        (1, {"MASTER_ADDR": "no-such-machine.invalid"}, 2, "MASTER_ADDR = 'no-such-machine.invalid' is no name"),
        (0, {"MASTER_PORT": "http"}, 2, "MASTER_PORT = 'http' is not a port"),
    ],
)
def test_a_wrong_address_is_a_mistake(
    tmp_path: Path, rank: int, environment: dict[str, str], code: int, said: str
) -> None:
    ((ended, output),) = ranks(tmp_path, [rank], 2, free_port(), LOCAL_RANK="0", **environment)
    assert ended == code, output
    assert output.count(f"distloop: {said}") == 1


def test_another_program_at_the_port_is_said_by_rank_0_and_by_the_others(tmp_path: Path, other_program: int) -> None:
    (first, said), (second, answer) = ranks(tmp_path, [0, 1], 2, other_program, LOCAL_RANK="0")
    assert (first, second) == (2, 1)
    assert f"Port {other_program} of " in said
    assert "is in use by another program" in said
    assert f"Port {other_program} of 127.0.0.1 is not that of a run's rank 0" in answer


def test_a_rank_of_a_launch_before_the_restart_is_not_taken_for_one_that_came(monkeypatch: pytest.MonkeyPatch) -> None:
    # A launcher such as torchrun keeps the store, and what was written into it, when it starts the ranks again.
    monkeypatch.setattr(meeting, "RESULT_SECONDS", 1.0)
    port = free_port()
    kept = TCPStore("127.0.0.1", port, None, True, wait_for_workers=False)
    said: dict[tuple[int, int], str] = {}

    def come(rank: int, restart: int) -> None:
        place = {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        place |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": str(restart)}
        try:
            meeting.join_ranks(place, SECONDS)
            said[rank, restart] = ""
        except RunFailed as error:
            said[rank, restart] = str(error)

    threads = [threading.Thread(target=come, args=(rank, 0)) for rank in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    come(0, 1)
    assert (said[0, 0], said[1, 0]) == ("", "")
    assert said[0, 1].startswith(f"Rank 1 of 2 did not come within {SECONDS} s; here are 0 (")
    del kept


@pytest.mark.parametrize(
    ("gpus", "message"),
    [
        ("GPU-1 GPU-2 GPU-1", "Ranks 0, 2 are on one GPU (GPU-1 of "),
        ("GPU-2 GPU-1 GPU-1", "Ranks 1, 2 are on one GPU (GPU-1 of "),
        ("GPU-1 none GPU-2", "No GPU for rank 1, while other ranks use one: "),
    ],
)
def test_ranks_that_do_not_have_a_gpu_each_are_refused_once(tmp_path: Path, gpus: str, message: str) -> None:
    """And before there is a group: to make one, NCCL connects the GPUs, and would end in an error of its own."""
    outcome = train(tmp_path, SMALLEST, 3, {"GPUS": gpus, "NO_GROUP": "1"}, loop="tests.lab.on_gpus")
    assert outcome.codes == [2, 2, 2], outcome.output
    assert outcome.output.count(message) == outcome.output.count("distloop:") == 1, outcome.output
    assert not [words for words in NOT_FOR_USERS if words in outcome.output], outcome.output


def test_ranks_on_gpus_of_their_own_train(tmp_path: Path) -> None:
    train(tmp_path, SMALLEST, 2, {"GPUS": "GPU-1 GPU-2"}, loop="tests.lab.on_gpus").check()


# ---- the meeting alone ---------------------------------------------------------------------------------------


def meet(store: HashStore, number: int, expected: int, limit: float, said: dict[int, str]) -> threading.Thread:
    def come() -> None:
        try:
            meeting.wait_for_all(store, number, expected, meeting.Wait("rank", limit))
            said[number] = ""
        except RunFailed as error:
            said[number] = str(error)

    thread = threading.Thread(target=come)
    thread.start()
    return thread


def test_many_ranks_meet() -> None:
    store, said = HashStore(), dict[int, str]()
    for thread in [meet(store, number, 32, 60, said) for number in range(32)]:
        thread.join()
    assert said == dict.fromkeys(range(32), "")


@pytest.mark.parametrize("members", [2, 3])
def test_ranks_look_again_after_a_twentieth_of_the_wait_so_far(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, members: int
) -> None:
    begun, slept = time.monotonic(), list[tuple[float, float]]()  # (how long it may be, how long it was)
    sleep = time.sleep

    def record(seconds: float) -> None:
        slept.append((max(0.001, (time.monotonic() - begun) / 20), seconds))
        sleep(seconds)

    monkeypatch.setattr(time, "sleep", record)
    port, waiting = str(free_port()), [meeting.Wait("rank", 60) for _ in range(members)]
    stores: dict[int, TCPStore] = {}

    def come(number: int) -> None:
        stores[number] = meeting.open_store("127.0.0.1", port, number == 0, waiting[number])
        meeting.wait_for_all(stores[number], number, members, waiting[number])

    threads = [threading.Thread(target=come, args=(number,)) for number in range(members)]
    for thread in reversed(threads):  # rank 0 comes last: the others wait for its address, then for its store
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(stores) == members
    assert slept
    assert all(seconds <= most for most, seconds in slept)
    slept.clear()
    meeting.nap(begun - 1000)
    meeting.nap(begun - 1000, 0.2)
    assert [seconds for _, seconds in slept] == [0.05, 0.2]  # in a long wait the store is asked seldom


def test_each_that_came_hears_the_same_of_those_that_did_not() -> None:
    store, said = HashStore(), dict[int, str]()
    for thread in [meet(store, number, 16, 0.5, said) for number in range(16) if number not in (3, 11)]:
        thread.join()
    assert len(said) == 14
    (message,) = set(said.values())
    assert message.startswith("Rank 3, 11 of 16 did not come within ")


def test_rank_0_that_ends_while_the_others_wait_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(meeting, "RESULT_SECONDS", 0.2)
    said: dict[int, str] = {}
    meet(HashStore(), 1, 2, 0.2, said).join()
    assert said == {1: "Rank 0, for which the others waited, is gone or hangs."}


class Wish:
    """A watch that is asked to stop."""

    wish = StopReason.SIGTERM


@pytest.mark.parametrize("asked", [0, 2])
def test_all_that_came_hear_that_one_of_them_is_asked_to_stop(monkeypatch: pytest.MonkeyPatch, asked: int) -> None:
    monkeypatch.setattr(meeting, "GRACE_SECONDS", 0.2)
    store, said = HashStore(), dict[int, str]()

    def come(number: int) -> None:
        wait = meeting.Wait("rank", 60, Wish() if number == asked else None)  # type: ignore[arg-type]
        try:
            meeting.wait_for_all(store, number, 3, wait)
        except StoppedEarly as error:
            said[number] = str(error)

    threads = [threading.Thread(target=come, args=(number,)) for number in (2, 0)]
    threads[0].start()
    wait_until(lambda: store.check(["here/2"]), "rank 2")
    threads[1].start()
    for thread in threads:
        thread.join(30)
    who = "SIGTERM" if asked == 0 else "SIGTERM to rank 2"
    assert said == dict.fromkeys((0, 2), f"Stopped ({who}) while waiting for rank 1 of 3. {NOTHING}")


NOTHING = "Nothing was trained; the same command starts again."


def test_ranks_that_come_soon_after_a_wish_to_stop_meet_and_the_run_can_save_that_it_was_stopped() -> None:
    store = HashStore()
    first = threading.Thread(
        target=meeting.wait_for_all,
        args=(store, 0, 2, meeting.Wait("rank", 60, Wish())),  # type: ignore[arg-type]
    )
    first.start()
    wait_until(lambda: store.check(["here/0"]), "rank 0")
    meeting.wait_for_all(store, 1, 2, meeting.Wait("rank", 60, Wish()))  # type: ignore[arg-type]
    first.join(30)
    assert store.get("result") == b""


def test_for_whom_a_rank_waits_is_said_before_the_limit(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(meeting, "SILENT_SECONDS", 0.1)
    with pytest.raises(RunFailed):
        meeting.wait_for_all(HashStore(), 0, 3, meeting.Wait("rank", 1))
    assert capsys.readouterr().err == "distloop: waiting for rank 1, 2 of 3, 1 s at most\n"


@pytest.mark.parametrize(("host", "shown"), [("::1", "[::1]:"), ("[::1]", "[::1]:"), ("127.0.1.1", "127.0.1.1:")])
def test_a_head_whose_address_is_this_machines_own_is_told_of(host: str, shown: str) -> None:
    with pytest.raises(Unanswered) as refusal:
        meeting.open_store(host, "1", False, meeting.Wait("rank", 0.1))
    assert f"No answer from rank 0 at {shown}1 within 0 s" in str(refusal.value)
    own = f"{host.strip('[]')} is {os.uname().nodename} itself: other machines need an address that reaches rank 0."
    assert str(refusal.value).endswith(own)
