"""The roll call over real sockets: several of them in this process, as ranks that share a store."""

from __future__ import annotations

import contextlib
import json
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from torch.distributed import HashStore  # type: ignore[attr-defined]

from distloop.errors import UsageError
from distloop.ranks import judge, verdicts
from distloop.ranks import roll_call as module
from distloop.ranks.attempt_base import AttemptBase
from distloop.ranks.roll_call import RollCall
from distloop.ranks.verdicts import Verdict
from distloop.run.failures import FailureRecords
from tests.tools.ranks import wait_until

LIMIT = 100.0  # seconds: for tests that do not wait for it


class FakeWatch:
    """In place of the Watch, which would end this process."""

    def __init__(self) -> None:
        self.leaves: list[float | None] = []
        self.grace_seconds = 0.0
        self.attempt: Any = AttemptBase()
        self.wish = None

    def leave_within(self, seconds: float | None, code: int = 1, failure: str | None = None) -> None:
        self.leaves.append(seconds)


class Call(RollCall):
    """A rank. ends() closes its connections without a word, as the kernel does for a process that is killed."""

    watch: Any

    def __init__(self) -> None:
        super().__init__(FakeWatch())  # type: ignore[arg-type]

    def ends(self) -> None:
        self._is_closed = True
        self._connections.wake()
        assert self._thread is not None
        self._thread.join()
        self._connections.drop()

    @property
    def lives(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def knows(self) -> int:
        """How many ranks it is connected to."""
        return len(self._connections.ranks())


class Attempt:
    """Keeps the failure records of rank 0 in a folder, and what it was told."""

    def __init__(self, folder: Path, crash: str = "") -> None:
        self.keep_failure = FailureRecords(folder, 3, 0).keep
        self.crash = crash
        self.lost: list[str] = []

    def crash_report(self, rank: int) -> str:
        return self.crash

    def rank_0_is_lost(self, reason: str) -> None:
        self.lost.append(reason)


class Calls:
    """The ranks of a run; rank r is calls[r]."""

    def __init__(self) -> None:
        self.store = HashStore()
        self.made: list[Call] = []

    def __getitem__(self, rank: int) -> Call:
        return self.made[rank]

    def join(self, ranks: range, world_size: int, limit: float = LIMIT) -> None:
        for rank in ranks:
            call = Call()
            self.made.append(call)
            call.gather(self.store, rank, world_size, "127.0.0.1", limit)

    def all_know_each_other(self) -> None:
        wait_until(lambda: self[0].knows() == len(self.made) - 1, "all ranks at rank 0")

    def verdicts(self, without: tuple[int, ...] = ()) -> list[Verdict]:
        """What the ranks have been told; the same for all."""
        rest = [call for call in self.made if call.rank not in without]
        wait_until(lambda: all(call.verdict is not None for call in rest), "the verdicts")
        return [call.verdict for call in rest if call.verdict is not None]

    def close(self) -> None:
        for call in self.made:
            call.close()


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[Calls]:
    monkeypatch.setattr(module, "BEAT_SECONDS", 0.02)
    made = Calls()
    yield made
    made.close()


def gathered(calls: Calls, world_size: int, limit: float = LIMIT) -> Calls:
    calls.join(range(world_size), world_size, limit)
    calls.all_know_each_other()
    return calls


def in_thread(function: Callable[[], Any]) -> threading.Thread:
    thread = threading.Thread(target=function)
    thread.start()
    return thread


# ---- who is there --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("world_size", [2, 16, 64])
def test_rank_0_knows_where_all_ranks_are(calls: Calls, world_size: int) -> None:
    gathered(calls, world_size)
    for rank in range(world_size):
        calls[rank].position.start_step(7 + rank)
        calls[rank].position.enter("forward pass")
    expected = list(range(7, 7 + world_size))
    wait_until(lambda: [place.step for place in calls[0].places] == expected, "the positions")
    assert all(place.pid and place.node != "an unknown machine" for place in calls[0].places)
    assert [place.phase for place in calls[0].places] == ["forward pass"] * world_size


def test_the_port_is_closed_when_all_have_come(calls: Calls) -> None:
    gathered(calls, 3)
    port = int(calls.store.get("roll_call").decode().split()[0])

    def is_closed() -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", port)) != 0

    wait_until(is_closed, "the end of the port")


# ---- who is no rank ------------------------------------------------------------------------------------------

WRONG = [
    b"",
    b"GET / HTTP/1.0\r\n\r\n",
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(range(256)),  # a TLS greeting
    b"\n\n\n",
    b"null\n1\n[]\n{}\n",
    b'{"token": "wrong", "rank": 1, "node": "n", "pid": 1}\n',
    b'{"token": "\xc3\xa4", "rank": 1, "node": "n", "pid": 1}\n',
    b'{"token": 5, "rank": 1, "node": "n", "pid": 1}\n',
    b'{"end": "failed", "what": "nothing", "trace": "", "step": 1, "marks": 1, "phase": "none"}\n',
    b'{"verdict": [1, "no", "no"]}\n',
    b"[" * 50_000 + b"\n",  # deeper than Python's JSON goes
    b"x" * 200_000,  # a line that never ends
]


@pytest.mark.parametrize("ending", ["stays", "closes", "resets"])
def test_who_is_no_rank_does_not_disturb(calls: Calls, ending: str) -> None:
    calls.join(range(1), 3)
    port = int(calls.store.get("roll_call").decode().split()[0])
    with contextlib.ExitStack() as strangers:
        for words in WRONG:
            stranger = strangers.enter_context(socket.create_connection(("127.0.0.1", port)))
            with contextlib.suppress(OSError):  # it may be hung up on meanwhile
                stranger.sendall(words)
            if ending == "resets":
                stranger.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            if ending != "stays":
                stranger.close()
        calls.join(range(1, 3), 3)
        calls.all_know_each_other()
        assert calls[0].lives
        assert calls[0].verdict is None
        calls[2].ends()
        (first, second) = calls.verdicts(without=(2,))
        assert first.reason.startswith("rank 2 on ")
        assert second == first


def test_what_a_stranger_sends_is_not_kept_without_a_limit(calls: Calls) -> None:
    calls.join(range(1), 2)
    port = int(calls.store.get("roll_call").decode().split()[0])
    with socket.create_connection(("127.0.0.1", port)) as stranger:
        stranger.settimeout(20)
        with contextlib.suppress(ConnectionError):  # it is hung up on; else sendall ends with a TimeoutError
            while True:
                stranger.sendall(b"x" * 100_000)


def test_a_rank_that_does_not_reach_rank_0s_port_says_which(calls: Calls) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    calls.store.set("roll_call", f"{port} token head")
    with pytest.raises(UsageError, match=rf"Rank 1 on .* reaches rank 0 at 127.0.0.1, but not on its port {port}"):
        Call().gather(calls.store, 1, 2, "127.0.0.1", LIMIT)


def test_a_rank_that_never_comes_to_the_roll_call_is_named(calls: Calls, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verdicts, "ABSENT_SECONDS", 0.3)
    calls.join(range(2), 3)  # rank 2 has met the others, and ended then
    for verdict in calls.verdicts():
        assert verdict.code == 1
        assert "rank 2 on " in verdict.reason


# ---- who was first -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("culprit", [0, 1, 3])
def test_all_ranks_hear_who_failed_first_and_with_what(calls: Calls, culprit: int) -> None:
    gathered(calls, 4)
    calls[culprit].position.start_step(5)
    calls[culprit].position.enter("forward pass")
    mine = calls[culprit].report_failure(ValueError("no"))
    assert mine.reason.startswith(f"rank {culprit} on ")
    assert mine.reason.endswith(", in step 5, forward pass, failed first: ValueError: no")
    assert calls.verdicts() == [mine] * 4


@pytest.mark.parametrize("culprit", [0, 2])
def test_a_rank_that_ends_without_a_word_was_first(calls: Calls, culprit: int) -> None:
    gathered(calls, 3)
    calls[culprit].ends()
    for verdict in calls.verdicts(without=(culprit,)):
        assert verdict.reason.startswith(f"rank {culprit} on ")
        assert "without a word" in verdict.reason


GONE = RuntimeError("[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer")


def test_a_long_traceback_arrives_whole_from_a_rank_that_leaves_at_once(calls: Calls, tmp_path: Path) -> None:
    gathered(calls, 2)
    calls[0].watch.attempt = Attempt(tmp_path)
    lines = [f"line {number} of many" for number in range(30_000)]
    calls[1].report_failure(ValueError("\n".join(lines)))
    calls[1].close()
    calls.verdicts()
    calls[0].close()
    record = json.loads((tmp_path / "attempt_0003.json").read_text())
    assert lines[-1] in record["traceback"]
    assert (record["rank"], record["kind"], record["attempt"]) == (1, "failed", 3)
    assert [position["rank"] for position in record["ranks"]] == [0, 1]


def test_a_mistake_has_exit_code_2_on_all_ranks(calls: Calls) -> None:
    gathered(calls, 2)
    calls[1].report_failure(UsageError("do it rightly"))
    assert [(verdict.code, verdict.reason) for verdict in calls.verdicts()] == [(2, "do it rightly")] * 2


def test_a_rank_that_has_just_come_hears_of_a_mistake(calls: Calls) -> None:
    """Its connection waits to be accepted, when rank 0 meets a mistake: all meet it, and one of them says it."""
    calls.join(range(1), 2)
    connections, (reads, may_go_on) = calls[0]._connections, (threading.Event(), threading.Event())
    read = connections.read

    def reads_nothing_yet(seconds: float) -> list[Any]:
        connections.read = read  # type: ignore[method-assign]
        reads.set()
        may_go_on.wait(30)
        return []

    connections.read = reads_nothing_yet  # type: ignore[method-assign]
    assert reads.wait(30)
    calls.join(range(1, 2), 2)
    reports = in_thread(lambda: calls[0].report_failure(UsageError("one GPU each")))
    wait_until(lambda: bool(calls[0]._judge.ends), "the mistake")
    may_go_on.set()
    reports.join()
    calls[0].ends()
    assert [(verdict.code, verdict.reason) for verdict in calls.verdicts()] == [(2, "one GPU each")] * 2


def test_two_that_fail_at_once_give_one_verdict(calls: Calls) -> None:
    gathered(calls, 4)
    threads = [in_thread(lambda rank=rank: calls[rank].report_failure(ValueError(f"{rank}"))) for rank in range(4)]  # type: ignore[misc]
    for thread in threads:
        thread.join()
    assert len(set(calls.verdicts())) == 1


# ---- who stands still ----------------------------------------------------------------------------------------


def go_on(calls: Calls, steps: dict[int, int]) -> None:
    for rank, step in steps.items():
        calls[rank].position.start_step(step)
        calls[rank].position.enter("forward pass")


def test_a_rank_that_keeps_the_others_waiting_for_longer_than_the_limit_is_named(calls: Calls) -> None:
    culprit = 2
    gathered(calls, 3, limit=0.6)
    go_on(calls, {rank: 4 if rank == culprit else 5 for rank in range(3)})
    for verdict in calls.verdicts():
        assert verdict.reason.startswith(f"rank {culprit} on ")
        assert "has kept the others waiting for 1 s" in verdict.reason


@pytest.mark.parametrize("culprit", [0, 1])
def test_a_rank_that_was_suspended_accuses_nobody_when_it_wakes_up(
    calls: Calls, monkeypatch: pytest.MonkeyPatch, culprit: int
) -> None:
    monkeypatch.setattr(module, "SUSPENDED_SECONDS", 0.5)
    gathered(calls, 3, limit=1.0)
    asleep = threading.Event()

    def sleep_once() -> None:
        if not asleep.is_set():
            asleep.set()
            calls.verdicts(without=(culprit,))  # after its limit, which is more than SUSPENDED_SECONDS

    monkeypatch.setattr(calls[culprit], "_note_own_place", sleep_once)
    others = calls.verdicts(without=(culprit,))
    assert {verdict.reason.startswith(f"rank {culprit} on ") for verdict in others} == {True}
    assert calls.verdicts()[culprit].reason in {verdict.reason for verdict in others}


# ---- an end that is no failure -------------------------------------------------------------------------------


@pytest.mark.parametrize("world_size", [2, 16])
def test_ranks_that_end_in_order_hear_of_no_failure(calls: Calls, world_size: int) -> None:
    for _ in range(5):
        calls.__init__()  # type: ignore[misc]
        gathered(calls, world_size)
        ends = [in_thread(call.close) for call in calls.made]
        for end in ends:
            end.join()
        assert [call.verdict for call in calls.made] == [None] * world_size
        assert [call.watch.leaves[-1] for call in calls.made] == [None] * world_size


@pytest.mark.parametrize("leaver", [0, 2])
def test_a_rank_that_leaves_for_a_reason_ends_the_others_without_a_word(
    calls: Calls, leaver: int, capsys: pytest.CaptureFixture[str]
) -> None:
    gathered(calls, 3)
    calls[leaver].leave("its run directory was taken over")
    calls[leaver].ends()
    for verdict in calls.verdicts(without=(leaver,)):
        assert verdict.code == 1
        assert verdict.text == ""
        assert verdict.reason.endswith("left: its run directory was taken over")
    captured = capsys.readouterr()
    assert captured.out + captured.err == ""


# ---- the time to leave in ------------------------------------------------------------------------------------


def test_a_main_thread_on_its_way_out_has_more_time_than_one_that_is_stuck(calls: Calls) -> None:
    gathered(calls, 3)
    calls[1].report_failure(ValueError("no"))
    calls.verdicts()
    wait_until(lambda: calls[0].watch.leaves == [judge.STUCK_SECONDS], "the limit")
    calls[0].report_failure(GONE)
    assert calls[0].watch.leaves == [judge.STUCK_SECONDS, judge.LEAVE_SECONDS]
    wait_until(lambda: calls[2].watch.leaves == [judge.STUCK_SECONDS], "the limit")
    # And what its thread hears later does not shorten that.
    assert calls[1].watch.leaves[-1] == judge.LEAVE_SECONDS
    calls[0].close()
    assert calls[0].watch.leaves[-1] is None


# ---- records -------------------------------------------------------------------------------------------------


def test_a_failure_is_recorded_with_where_all_ranks_were(calls: Calls, tmp_path: Path) -> None:
    gathered(calls, 2)
    calls[0].watch.attempt = Attempt(tmp_path)
    go_on(calls, {0: 5, 1: 4})
    calls[1].report_failure(ValueError("no"))
    calls.verdicts()
    record = json.loads((tmp_path / "attempt_0003.json").read_text())
    keys = ["attempt", "written", "kind", "what", "notes", "traceback", "rank", "node", "step", "phase", "line"]
    keys += ["ranks", "said"]
    assert list(record) == keys
    assert (record["rank"], record["step"], record["phase"], record["line"]) == (1, 4, "forward pass", "")
    assert [list(there) for there in record["ranks"]] == [["rank", "node", "pid", "step", "phase", "line"]] * 2
    assert record["said"] == [{"rank": 1, "kind": "failed", "what": "ValueError: no"}]


def test_the_stack_of_a_rank_that_crashed_is_shown(calls: Calls, tmp_path: Path) -> None:
    gathered(calls, 2)
    calls[0].watch.attempt = Attempt(tmp_path, crash="Fatal Python error: Segmentation fault")
    calls[1].ends()
    (verdict,) = calls.verdicts(without=(1,))
    assert "it crashed in native code" in verdict.reason
    assert "  Fatal Python error: Segmentation fault\n" in verdict.text


def test_the_rank_that_speaks_for_rank_0_writes_that_it_is_lost(calls: Calls, tmp_path: Path) -> None:
    gathered(calls, 3)
    attempts = [Attempt(tmp_path) for _ in calls.made]
    for call, attempt in zip(calls.made, attempts, strict=True):
        call.watch.attempt = attempt
    calls[0].ends()
    verdict = calls.verdicts(without=(0,))[0]
    wait_until(lambda: attempts[1].lost == [verdict.reason], "its word for rank 0")
    assert attempts[0].lost == []


def test_a_disk_that_fails_does_not_end_the_roll_call(calls: Calls, tmp_path: Path) -> None:
    gathered(calls, 2)
    calls[0].watch.attempt = Attempt(tmp_path / "is" / "not" / "there")
    calls[1].ends()
    assert calls.verdicts(without=(1,))[0].reason.startswith("rank 1 on ")
    assert calls[0].lives


def test_the_table_has_the_own_position_of_this_moment(calls: Calls) -> None:
    calls.join(range(1), 1)
    go_on(calls, {0: 12})
    assert [(there["step"], there["phase"]) for there in calls[0].table()] == [(12, "forward pass")]


def test_one_process_has_nobody_to_ask() -> None:
    call = Call()
    verdict = call.report_failure(ValueError("no"))
    assert (verdict.code, verdict.reason) == (1, "ValueError: no")
    assert call.report_failure(KeyError("another")) == verdict  # the first counts
    call.close()


# ---- the line of the loop ------------------------------------------------------------------------------------


def step_that_fails() -> None:
    raise ValueError("no")


def loop() -> None:
    step_that_fails()  # comments are left out


def test_a_failure_is_said_with_the_line_of_the_loop_that_met_it(calls: Calls) -> None:
    gathered(calls, 2)
    calls[1].position.code = loop.__code__
    line = f"test_roll_call.py:{loop.__code__.co_firstlineno + 1} step_that_fails()"
    go_on(calls, {0: 5, 1: 5})
    with pytest.raises(ValueError, match="no") as raised:
        loop()
    verdict = calls[1].report_failure(raised.value)
    assert verdict.reason.endswith(f", in step 5, forward pass ({line}), failed first: ValueError: no")
    wait_until(lambda: calls[0].places[1].line == line, "the line")
    assert [there["line"] for there in calls[0].table()] == ["", line]
