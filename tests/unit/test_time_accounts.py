"""time.json: what each attempt's seconds were worth once it is known what had to be done again."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from distloop.run.accounts import TimeAccounts, attempts, goodput, settle, totals
from distloop.run.clock import ACCOUNTS, Clock
from distloop.run.files import TIME, Start

SECONDS = {"start_up": 5.0, "data": 10.0, "compute": 60.0, "validation": 20.0, "checkpoint": 4.0, "lost": 0.0}
MARK = {"start_up": 5.0, "data": 6.0, "compute": 40.0, "validation": 20.0, "checkpoint": 1.0, "lost": 0.0}


def entry(attempt: int, **seconds: float) -> dict[str, Any]:
    return {"attempt": attempt, "state": "stopped", "seconds": {**SECONDS, **seconds}}


def mark(attempt: int, **seconds: float) -> dict[str, Any]:
    return {"attempt": attempt, "seconds": {**MARK, **seconds}}


def test_work_after_the_checkpoint_is_lost_and_the_sum_stays() -> None:
    settled = settle(entry(1), mark(1))["seconds"]
    lost = 4.0 + 20.0  # data and compute after it; start-up and saving are not work that is done again
    assert settled == {**SECONDS, "data": 6.0, "compute": 40.0, "lost": lost}
    assert sum(settled.values()) == sum(SECONDS.values())


def test_without_a_checkpoint_all_work_is_lost() -> None:
    settled = settle(entry(3), None)["seconds"]
    assert settled == {**SECONDS, "data": 0.0, "compute": 0.0, "validation": 0.0, "lost": 90.0}


def test_what_was_done_before_the_attempt_of_the_checkpoint_counts() -> None:
    assert settle(entry(1), mark(2)) == entry(1)


def test_attempts_after_that_of_the_checkpoint_are_lost_whole() -> None:
    # Their own checkpoints were damaged and passed over, or they had none.
    assert settle(entry(3), mark(1))["seconds"]["lost"] == 90.0


@pytest.mark.parametrize("at", [mark(1), mark(2), None])
def test_settling_twice_is_settling_once(at: dict[str, Any] | None) -> None:
    for attempt in (1, 2, 3):
        once = settle(entry(attempt), at)
        assert settle(once, at) == once


def test_what_was_lost_from_a_later_checkpoint_is_not_lost_again_from_an_earlier_one() -> None:
    later, earlier = mark(1), mark(1, data=1.0, compute=10.0, validation=0.0)
    assert settle(settle(entry(1), later), earlier) == settle(entry(1), earlier)
    assert settle(settle(entry(1), earlier), later) == settle(entry(1), earlier)


def test_a_mark_that_is_newer_than_what_a_killed_attempt_could_write_loses_nothing() -> None:
    assert settle(entry(1), mark(1, data=11.0, compute=61.0))["seconds"] == SECONDS


def test_an_attempt_that_could_not_say_how_it_ended_was_killed() -> None:
    assert settle({**entry(1), "state": "running"}, mark(2))["state"] == "killed"
    assert settle({**entry(1), "state": "failed"}, mark(2))["state"] == "failed"


def test_goodput_is_the_share_of_steps_that_counted() -> None:
    assert goodput({"start_up": 10.0, "data": 5.0, "compute": 70.0, "lost": 15.0}) == 0.75
    assert goodput({"start_up": 10.0}) == 0.0
    assert goodput({}) is None
    assert goodput(dict.fromkeys(ACCOUNTS, 0.0)) is None


# ---- time.json -----------------------------------------------------------------------------------------------


def start_of(run: Path, attempt: int = 1, step: int = 0, at: dict[str, Any] | None = None) -> Start:
    """How an attempt begins: with `at`, from a checkpoint that has this mark."""
    checkpoint = None
    if at is not None:
        checkpoint = run / "checkpoints" / f"step_{step:08d}"
        checkpoint.mkdir(parents=True, exist_ok=True)
        (checkpoint / "state.json").write_text(json.dumps({"step": step, "time": at}))
    return Start(run, attempt, checkpoint, None, step, False, [], {})


def accounts_of(start: Start, owned: Any = lambda: None, enabled: bool = True) -> TimeAccounts:
    return TimeAccounts(start, Clock(torch.device("cpu")), 2, enabled, owned)


def test_an_attempt_is_known_from_its_first_moment_on(tmp_path: Path) -> None:
    accounts_of(start_of(tmp_path, step=7)).write()
    (found,) = attempts(tmp_path)
    assert found["seconds"]["start_up"] > 0
    assert {key: found[key] for key in ("attempt", "state", "world_size", "device", "first_step", "step")} == {
        "attempt": 1,
        "state": "running",
        "world_size": 2,
        "device": "cpu",
        "first_step": 7,
        "step": 7,
    }
    assert "T" in found["began"]


@pytest.mark.parametrize("state", ["failed", "stopped"])
def test_how_an_attempt_ended_that_did_not_end_in_order(tmp_path: Path, state: str) -> None:
    accounts = accounts_of(start_of(tmp_path))
    accounts.write()
    accounts.close(state)
    assert attempts(tmp_path)[0]["state"] == state


def test_the_step_and_the_state_are_those_of_the_end(tmp_path: Path) -> None:
    accounts = accounts_of(start_of(tmp_path, step=10, at=mark(0)))
    for _ in range(3):
        accounts.clock.add(64)
    accounts.write("finished")
    accounts.close()
    found = attempts(tmp_path)[0]
    assert (found["first_step"], found["step"], found["state"]) == (10, 13, "finished")


def test_another_process_may_have_the_directory_once_the_accounts_are_closed(tmp_path: Path) -> None:
    old = accounts_of(start_of(tmp_path))
    old.close()
    (tmp_path / TIME).write_text("another's")
    old.next_write = 0.0
    old.write_now_and_then()
    old.write()
    assert (tmp_path / TIME).read_text() == "another's"


def test_it_is_written_now_and_then_by_its_owner_on_one_rank(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    now = [1000.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    accounts = accounts_of(start_of(tmp_path), lambda: asked.append(now[0]))
    monkeypatch.setattr(accounts.clock, "totals", lambda: {"compute": 1000.0})
    accounts.write()
    asked.clear()
    for now[0] in (1004.9, 1005.1, 1005.2, 1010.2):  # half a percent of 1000 s between two
        accounts.write_now_and_then()
    assert asked == [1005.1, 1010.2]
    monkeypatch.setattr(accounts.clock, "totals", lambda: {"compute": 1e6})
    accounts.write()
    asked.clear()
    for now[0] in (1040.3, 1070.4):  # never longer than half a minute
        accounts.write_now_and_then()
    assert asked == [1040.3, 1070.4]
    other = tmp_path / "other"
    other.mkdir()
    accounts = accounts_of(start_of(other), enabled=False)
    accounts.write()
    accounts.write_now_and_then()
    accounts.close("failed")
    assert list(other.iterdir()) == []


def test_two_threads_do_not_write_into_each_others_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_text = Path.write_text
    inside: list[str] = []
    together = threading.Event()

    def slowly(path: Path, text: str, **options: Any) -> int:
        inside.append(threading.current_thread().name)
        if len(inside) > 1:
            together.set()
        together.wait(0.3)
        inside.pop()
        return write_text(path, text, **options)

    accounts = accounts_of(start_of(tmp_path))
    monkeypatch.setattr(Path, "write_text", slowly)
    watching = threading.Thread(target=accounts.write)
    watching.start()
    accounts.write()
    watching.join()
    assert not together.is_set()
    assert len(attempts(tmp_path)) == 1


def test_a_disk_that_is_full_ends_nothing(tmp_path: Path) -> None:
    accounts = accounts_of(start_of(tmp_path / "missing"))
    accounts.write()
    accounts.close()
    assert attempts(tmp_path / "missing") == []


@pytest.mark.parametrize(
    "content",
    [
        None,
        "",
        "{",
        "[]",
        "null",
        '{"attempts": null}',
        '{"attempts": 3}',
        '{"attempts": [1, null, {}, {"attempt": 1}, {"seconds": {}}, {"attempt": "1", "seconds": {"data": 1}}]}',
        '{"attempts": [{"attempt": 1, "seconds": {"data": null}}]}',
        '{"attempts": [{"attempt": 1, "seconds": {"data": NaN}}]}',
        '{"attempts": [{"attempt": 1, "seconds": [1, 2]}]}',
    ],
)
def test_a_time_json_that_is_missing_or_damaged_is_no_error(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / TIME).write_text(content)
    assert attempts(tmp_path) == []
    assert totals(tmp_path) == {}
    accounts_of(start_of(tmp_path, attempt=2, step=3, at=mark(1))).write()
    assert [found["attempt"] for found in attempts(tmp_path)] == [2]


def test_bytes_that_are_no_text_are_no_error(tmp_path: Path) -> None:
    (tmp_path / TIME).write_bytes(b"\xff\xfe\x00")
    assert attempts(tmp_path) == []


def test_what_is_whole_of_a_damaged_file_counts(tmp_path: Path) -> None:
    (tmp_path / TIME).write_text(json.dumps({"attempts": [entry(1), {"attempt": 2}, entry(3)]}))
    assert [found["attempt"] for found in attempts(tmp_path)] == [1, 3]


def test_the_history_of_a_run(tmp_path: Path) -> None:
    """Killed before any save, killed after one, stopped, its last checkpoint damaged, and twice from the same one."""

    def attempt(number: int, at: dict[str, Any] | None, step: int = 0, state: str | None = None) -> TimeAccounts:
        accounts = accounts_of(start_of(tmp_path, number, step, at))
        accounts.clock.totals = lambda: SECONDS  # type: ignore[method-assign]
        accounts.write(state)
        return accounts

    def lost() -> list[float]:
        return [found["seconds"]["lost"] for found in attempts(tmp_path)]

    work, after_mark = 90.0, 24.0
    attempt(1, None)
    attempt(2, None)
    assert lost() == [work, 0.0]
    attempt(3, mark(2), 20, "stopped")
    assert lost() == [work, after_mark, 0.0]
    attempt(4, mark(3, **SECONDS), 30)  # where it was stopped
    assert lost() == [work, after_mark, 0.0, 0.0]
    attempt(5, mark(2), 20)  # those of 3 and 4 are damaged
    assert lost() == [work, after_mark, work, work, 0.0]
    attempt(6, mark(2), 20)  # once more from there
    assert lost() == [work, after_mark, work, work, work, 0.0]
    states = [found["state"] for found in attempts(tmp_path)]
    assert states == ["killed", "killed", "stopped", "killed", "killed", "running"]
    sums = totals(tmp_path)
    assert sum(sums.values()) == 6 * sum(SECONDS.values())
    assert goodput(sums) == pytest.approx((6 + 40 + 10 + 60) / (6 * sum(SECONDS.values())))
