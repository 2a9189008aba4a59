"""Whichever rank fails first, wherever and however: all ranks end soon, and the run says who it was, where and why."""

from __future__ import annotations

import itertools
import json
import os
import re
import signal
import time
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from distloop.run.checkpoint import newest_good, published_in, step_of, verify
from distloop.run.lock import RunLock
from tests.lab.failing import FAILING_STEP, GLOBAL_BATCH
from tests.tools import stage
from tests.tools.ranks import Outcome, Ranks, train, wait_until, write_config
from tests.tools.records import rows, run_of, status
from tests.tools.stopping import check_nothing_runs, press_again

STEPS = 12
LIMIT = 5  # ddp.timeout_seconds
SOON = 45.0  # beyond the limit, on a machine that does other things as well
IN_STEP = f"in step {FAILING_STEP}"
NODE = os.uname().nodename
NOT_THE_CAUSE = ("Connection closed by peer", "Connection reset by peer", "DistBackendError", "terminate called")


class Case(NamedTuple):
    place: str
    how: str
    rank: int
    world_size: int


class Expected(NamedTuple):
    """What is said of a rank that failed so: a pattern for where, what, and what stands in its traceback."""

    where: str
    says: str
    traceback: str
    code: int = 1


PLACES = {  # where a rank says that it is; a batch is loaded ahead
    "model": r"before the first step, starting \(train\.py:\d+ bare_model = build_model\(",
    "forward": rf"{IN_STEP}, forward and backward pass \(train\.py:\d+ outputs = task\.forward\(",
    "data": r"in step \d+, loading a batch",
    "worker": r"in step \d+, loading a batch",
    "validation": r"in step \d+, validation",
}
HOWS = {
    "raise": ("failed first: ValueError: ", "a value that nobody likes"),
    "sys.exit": (r"failed first: it left with sys.exit\(0\) before the run was done", "sys.exit(0)"),
    "kill": (r"was the first to end, without a word: killed", ""),
    "os._exit": (r"was the first to end, without a word: .*or left by os._exit", ""),
    "segfault": (
        r"was the first to end, without a word: it crashed in native code",
        "Fatal Python error: Segmentation",
    ),
    "suspend": (rf"has not been heard of for {LIMIT} s \(ddp.timeout_seconds\)", ""),
    "loop": (rf"has kept the others waiting for {LIMIT} s \(ddp.timeout_seconds\)", "in fail_by_endless_loop"),
}
SILENT = ("kill", "os._exit", "segfault", "suspend")  # of these it is known where they were up to a beat before
FAILURES = [(place, "raise") for place in PLACES] + [("forward", how) for how in HOWS if how != "raise"]
# (place, how, rank, number of ranks): each failure, each rank and number. The full product is marked long.
COVERING = {
    Case("model", "raise", 0, 2),
    Case("forward", "raise", 1, 2),
    Case("forward", "raise", 0, 4),
    Case("data", "raise", 1, 2),
    Case("worker", "raise", 0, 2),
    Case("validation", "raise", 1, 2),
    Case("forward", "sys.exit", 0, 2),
    Case("forward", "kill", 2, 4),
    Case("forward", "kill", 0, 2),
    Case("forward", "os._exit", 1, 2),
    Case("forward", "segfault", 1, 2),
    Case("forward", "suspend", 1, 2),
    Case("forward", "loop", 1, 2),
}


def cases() -> list[Any]:
    found = []
    for (place, how), (rank, world_size) in itertools.product(FAILURES, [(0, 2), (1, 2), (0, 4), (2, 4)]):
        case = Case(place, how, rank, world_size)
        found.append(
            pytest.param(case, id="-".join(map(str, case)), marks=() if case in COVERING else pytest.mark.long)
        )
    return found


def failing_run(folder: Path, **changes: Any) -> list[str]:
    """The arguments of a run of tests.lab.failing, for RUN in `folder`."""
    settings: dict[str, Any] = {
        "data": {"name": "tests.lab.failing:points", "workers": 0},
        "model": {"name": "tests.lab.failing:linear"},
        "task": {"name": "tests.lab.failing:Failing"},
        "device": "cpu",
        "batch": {"global_size": GLOBAL_BATCH},
        "train": {"steps": STEPS},
        "validate": {"every_steps": FAILING_STEP + 1, "batch_size": 2},
        "checkpoint": {"every_steps": 2},
        "log": {"every_steps": 1},
        "ddp": {"timeout_seconds": LIMIT},
        **changes,
    }
    return ["--config", str(write_config(folder, settings))]


def join_the_living(ranks: Ranks, suspended: int | None = None) -> Outcome:
    """Wait until all ranks have ended by themselves; the suspended one is woken then, and is to end, too."""
    deadline = time.monotonic() + LIMIT + SOON
    for rank, process in enumerate(ranks.processes):
        if rank != suspended:
            process.join(max(0.1, deadline - time.monotonic()))
            assert not process.is_alive(), f"rank {rank} goes on:\n{ranks.outputs[rank].read_text()}"
    if suspended is not None:
        os.kill(ranks.processes[suspended].pid or 0, signal.SIGCONT)
        ranks.processes[suspended].join(SOON)
        assert not ranks.processes[suspended].is_alive(), f"rank {suspended}, woken up, goes on"
    return ranks.join()


def failing(folder: Path, arguments: list[str], world_size: int, place: str, how: str, rank: int) -> Ranks:
    """Ranks of which this one is failing by now."""
    stage.fail(folder, place, how, rank=rank)
    ranks = Ranks(folder, arguments, world_size)
    stage.arrived(folder, place, [rank])
    return ranks


def check_said(outcome: Outcome, rank: int, where: str, says: str, trace: str) -> str:
    """The output of all ranks names this one, once, with its traceback and no other's; returns the headline."""
    lines = [line for line in outcome.output.splitlines() if re.match(r"distloop: rank \d", line)]
    assert len(lines) == 1, outcome.output
    (headline,) = lines
    assert headline.startswith(f"distloop: rank {rank} on {NODE}"), headline
    assert re.search(where, headline), headline
    assert re.search(says, headline), headline
    assert outcome.output.count(f"all {len(outcome.codes)} ranks end because of it") == 1
    assert trace in outcome.output
    assert outcome.output.count("Traceback (most recent call last)") <= (2 if "loader worker" in headline else 1)
    assert not [words for words in NOT_THE_CAUSE if words in outcome.output], outcome.output
    return headline.removeprefix("distloop: ")


@pytest.mark.parametrize("case", cases())
def test_who_failed_first_is_named_and_the_next_start_continues(tmp_path: Path, case: Case) -> None:
    place, how, culprit, world_size = case
    workers = 2 if place == "worker" or how in ("kill", "segfault") else 0  # which have copies of all sockets
    data = {"name": "tests.lab.failing:points", "workers": workers}
    arguments = failing_run(tmp_path, data=data)
    with failing(tmp_path, arguments, world_size, place, how, culprit) as ranks:
        outcome = join_the_living(ranks, culprit if how == "suspend" else None)
    check_nothing_runs(tmp_path)
    expected = {"kill": -signal.SIGKILL, "os._exit": 0, "segfault": -signal.SIGSEGV}.get(how, 1)
    assert outcome.codes == [expected if rank == culprit else 1 for rank in range(world_size)], outcome.output

    says, trace = HOWS[how]
    where = r"(in step \d+|before the first step), [a-z ]+" if how in SILENT else PLACES[place]
    headline = check_said(outcome, culprit, where, says, trace)

    run = run_of(tmp_path)
    begun = place != "model"  # the run's directory is opened after that
    if begun:
        record = json.loads((run / "failures" / "attempt_0001.json").read_text())
        assert (record["rank"], record["node"], record["attempt"]) == (culprit, NODE, 1)
        assert [position["rank"] for position in record["ranks"]] == list(range(world_size))
        assert all({"node", "step", "phase", "line"} <= position.keys() for position in record["ranks"])
        if how not in SILENT:
            assert record["step"] == (FAILING_STEP if place == "forward" else record["step"])
            assert trace in record["traceback"]
            assert record["line"].startswith("train.py:")
            assert f"({record['line']})" in headline
        now = status(run)
        assert (now["state"], now["reason"]) == ("failed", headline), outcome.output
    check_continues(tmp_path, arguments, world_size)
    left = [path.name for path in (run / "failures").iterdir()]  # of the records, those that say what happened
    assert left == (["attempt_0001.json"] if begun else [])


def check_continues(folder: Path, arguments: list[str], world_size: int) -> None:
    """The same command, where nothing fails any more, goes on from the newest checkpoint to the end."""
    checkpoints = run_of(folder) / "checkpoints"
    for path in published_in(checkpoints) if checkpoints.exists() else []:
        verify(path)
    newest = newest_good(checkpoints)[0] if checkpoints.exists() else None
    train(folder, arguments, world_size).check()
    if newest is not None:
        assert status(run_of(folder))["first_step"] == step_of(newest)
    assert status(run_of(folder))["state"] == "finished"
    assert [row["step"] for row in rows(run_of(folder), "train")] == list(range(1, STEPS + 1))


def ended_by_mistake(outcome: Outcome, words: str) -> None:
    assert outcome.codes == [2] * len(outcome.codes), outcome.output
    assert outcome.output.count(words) == 1
    assert "Traceback" not in outcome.output
    assert "ended because" not in outcome.output


@pytest.mark.parametrize(
    ("rank", "world_size"),
    [(1, 2), *(pytest.param(*case, marks=pytest.mark.long) for case in [(0, 2), (0, 4), (3, 4)])],
)
def test_a_users_mistake_on_one_rank_in_mid_run_is_said_once_with_exit_code_2(
    tmp_path: Path, rank: int, world_size: int
) -> None:
    arguments = failing_run(tmp_path)
    with failing(tmp_path, arguments, world_size, "forward", "mistake", rank) as ranks:
        outcome = join_the_living(ranks)
    ended_by_mistake(outcome, "distloop: tests.lab.stage: this is used wrongly; use it rightly.")
    assert status(run_of(tmp_path))["state"] == "failed"
    assert status(run_of(tmp_path))["reason"] == "tests.lab.stage: this is used wrongly; use it rightly."
    check_continues(tmp_path, arguments, world_size)


# ---- what looks like a failure, and is none ------------------------------------------------------------------


@pytest.mark.parametrize("place", ["validation", pytest.param("forward", marks=pytest.mark.long)])
def test_ranks_that_are_all_at_the_same_place_may_take_longer_than_the_limit(tmp_path: Path, place: str) -> None:
    limit = 2
    arguments = failing_run(tmp_path, ddp={"timeout_seconds": limit})
    stage.hold(tmp_path, place)
    with Ranks(tmp_path, arguments, 2) as ranks:
        stage.arrived(tmp_path, place, range(2))
        time.sleep(2.5 * limit)  # that it takes so long is the subject
        stage.let_go(tmp_path, place)
        outcome = ranks.join().check()
    assert "distloop: " not in outcome.output
    assert status(run_of(tmp_path))["state"] == "finished"


# ---- where a rank waits that has failed, or what it waits for ------------------------------------------------


@pytest.mark.parametrize(
    ("place", "changes", "where"),
    [
        ("model", {}, PLACES["model"]),
        pytest.param("validation", {}, PLACES["validation"], marks=pytest.mark.long),
        pytest.param("summary", {}, r"in step \d+, adding up the validation", marks=pytest.mark.long),
        pytest.param("data", {}, PLACES["data"], marks=pytest.mark.long),
        pytest.param("data", {"on_bad_sample": "skip"}, PLACES["data"], marks=pytest.mark.long),
    ],
)
def test_a_rank_that_hangs_is_named_wherever_it_hangs(
    tmp_path: Path, place: str, changes: dict[str, Any], where: str
) -> None:
    """The others wait for it, mostly in the same line of the loop."""
    arguments = failing_run(tmp_path, data={"name": "tests.lab.failing:points", "workers": 0, **changes})
    with failing(tmp_path, arguments, 2, place, "loop", 1) as ranks:
        outcome = join_the_living(ranks)
    check_said(outcome, 1, where, *HOWS["loop"])


@pytest.mark.parametrize(
    ("how", "error"),
    [
        ("reset", "ConnectionResetError: [Errno 104] Connection reset by peer"),
        ("runtime", "RuntimeError: Connection closed by peer: the database of the user"),
    ],
)
def test_an_error_of_the_users_own_connections_is_no_consequence(tmp_path: Path, how: str, error: str) -> None:
    arguments = failing_run(tmp_path)
    with failing(tmp_path, arguments, 2, "forward", how, 1) as ranks:
        outcome = join_the_living(ranks)
    assert outcome.codes == [1, 1]
    reason = status(run_of(tmp_path))["reason"]
    line = r"\(train\.py:\d+ outputs = task\.forward\(.*\)\)"
    assert re.fullmatch(
        rf"rank 1 on {NODE}, {IN_STEP}, forward and backward pass {line}, failed first: {re.escape(error)}", reason
    ), reason
    assert outcome.output.count(f"distloop: {reason}") == 1, outcome.output
    assert outcome.output.count("Traceback (most recent call last)") == 1


# ---- what is going on when a rank fails ----------------------------------------------------------------------


@pytest.mark.parametrize("how", ["raise", pytest.param("kill", marks=pytest.mark.long)])
def test_a_rank_that_fails_while_a_checkpoint_is_written_leaves_the_published_ones_whole(
    tmp_path: Path, how: str
) -> None:
    arguments = failing_run(tmp_path)
    stage.hold(tmp_path, "save", count=FAILING_STEP - 1)  # it is under way in the next step
    with failing(tmp_path, arguments, 2, "forward", how, 1) as ranks:
        stage.arrived(tmp_path, "save")
        wait_until(lambda: "distloop: rank 1" in ranks.outputs[0].read_text(), "the verdict")
        stage.let_go(tmp_path, "save")
        outcome = join_the_living(ranks)
    check_said(outcome, 1, IN_STEP if how == "raise" else "", *HOWS[how])
    checkpoints = run_of(tmp_path) / "checkpoints"
    assert step_of(newest_good(checkpoints)[0] or Path("step_0")) == 4  # which was waited for
    assert status(run_of(tmp_path))["state"] == "failed"
    check_continues(tmp_path, arguments, 2)


# ---- an end that is no failure -------------------------------------------------------------------------------


def held(folder: Path, arguments: list[str]) -> Ranks:
    """Two ranks that are held in FAILING_STEP."""
    stage.hold(folder, "forward")
    ranks = Ranks(folder, arguments, 2)
    stage.arrived(folder, "forward", range(2))
    return ranks


def no_verdict(outcome: Outcome) -> None:
    said = ("failed first", "was the first", "has not been heard of", "ranks end because", "Traceback")
    assert not [words for words in said if words in outcome.output], outcome.output


@pytest.mark.parametrize("whom", [(0, 1), pytest.param((1,), marks=pytest.mark.long)])
def test_a_second_ctrl_c_is_no_failure(tmp_path: Path, whom: tuple[int, ...]) -> None:
    arguments = failing_run(tmp_path)
    with held(tmp_path, arguments) as ranks:
        for rank in whom:
            os.kill(ranks.processes[rank].pid or 0, signal.SIGINT)
        press_again(ranks, whom)
        outcome = join_the_living(ranks)
        stage.clear(tmp_path)
    assert all(outcome.codes[rank] == 130 for rank in whom), outcome.output
    no_verdict(outcome)
    assert list((run_of(tmp_path) / "failures").glob("attempt_*")) == []
    check_continues(tmp_path, arguments, 2)


@pytest.mark.long
def test_a_run_directory_that_was_taken_over_ends_all_ranks_quietly(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = failing_run(tmp_path)
    monkeypatch.setattr("distloop.run.lock.DEAD_SECONDS", 0.5)  # for the one that takes over, below the owner's beat
    with held(tmp_path, arguments) as ranks:
        other = RunLock()
        other.identity.update(machine="elsewhere", processes="the boot of another machine")
        other.acquire(run_of(tmp_path))
        outcome = join_the_living(ranks)
        other.release()
    assert outcome.codes == [1, 1]
    assert outcome.output.count("was taken over by process ") == 1
    no_verdict(outcome)
    assert list((run_of(tmp_path) / "failures").glob("attempt_*")) == []
