"""The parts of stopping: what is kept free before a deadline, when it is, who is a launcher, and the agreement."""

from __future__ import annotations

import datetime
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch.distributed as dist

from distloop.config.settings import Stop
from distloop.data.workers import leave_signals_to_parent
from distloop.ranks import agreement as agreement_module
from distloop.ranks import leaving, stopping
from distloop.ranks.agreement import MOST_STEPS_BETWEEN, Agreement
from distloop.ranks.attempt_base import AttemptBase
from distloop.ranks.leaving import SIGNALS
from distloop.ranks.stopping import StopReason, Watch
from tests.tools import ranks
from tests.tools.ranks import command, wait_until


def apart(function: Callable[..., Any], *arguments: Any, processes: int = 1) -> list[Any]:
    """The results of `function`, one from each of new processes: signals and the Watch belong to a process.

    Several are given their rank as the first argument.
    """
    with ProcessPoolExecutor(processes, mp_context=ranks.forkserver) as pool:
        own: list[tuple[Any, ...]] = [(rank,) for rank in range(processes)] if processes > 1 else [()]
        tasks = [pool.submit(function, *first, *arguments) for first in own]
        return [task.result(60) for task in tasks]


def run_here(folder: Path) -> Watch:
    """A Watch of the run in `folder`, in this process."""
    watch = stopping.listen()
    watch.look_for(folder, Stop(), {})
    return watch


# ---- a deadline ----------------------------------------------------------------------------------------------


class Clock:
    """In place of the module time: it goes on when it is told to."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now

    def time(self) -> float:
        return self.now


def measured_reserve(kept: float, step: float, validation: float, steps: int) -> list[float]:
    """The reserve after each of these steps, with a validation after every fifth."""
    watch, clock = stopping.listen(), Clock()
    stopping.time = agreement_module.time = clock  # type: ignore[attr-defined, assignment]
    watch.reserve_seconds = kept
    agreement = Agreement(watch, 1, datetime.timedelta(seconds=60))
    reserves = []
    for number in range(1, steps + 1):
        clock.now += step
        agreement.reached()
        reserves.append(watch.reserve())
        if number % 5 == 0:
            with watch.timed("validation"):
                clock.now += validation
    return reserves


def test_the_reserve_is_what_the_next_step_validation_and_save_may_take() -> None:
    (reserves,) = apart(measured_reserve, 20.0, 1.0, 0.0, 8)
    assert reserves[-1] == pytest.approx(20 + 1.5 * 3)  # the agreement of several ranks takes some steps
    (reserves,) = apart(measured_reserve, 0.0, 1.0, 60.0, 8)
    # A validation is kept free once, and is not taken for a part of the step after it.
    assert all(60 < reserve < 100 for reserve in reserves[5:])


def longest_of_each() -> list[float]:
    watch = stopping.listen()
    reserves = []
    for what, seconds in (("save", 8.0), ("save", 2.0), ("validation", 4.0), ("steps", 2.0), ("steps", 1.0)):
        watch.took(what, seconds)
        reserves.append(watch.reserve())
    return reserves


def test_the_longest_save_and_validation_count_and_the_latest_steps() -> None:
    assert apart(longest_of_each) == [[12.0, 12.0, 18.0, 21.0, 19.5]]


def test_slurms_end_time_is_read_inside_of_a_job_only() -> None:
    assert stopping.slurm_end_time({"SLURM_JOB_ID": "7", "SLURM_JOB_END_TIME": "1800000000"}) == 1.8e9
    assert stopping.slurm_end_time({"SLURM_JOB_END_TIME": "1800000000"}) is None


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("echo 2031-02-03T04:05:06", datetime.datetime(2031, 2, 3, 4, 5, 6).timestamp()),
        ("echo N/A", None),
        ("echo Unknown", None),
        ("true", None),
        ("exit 1", None),
    ],
)
def test_squeue_is_asked_where_the_environment_does_not_say(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answer: str, expected: float | None
) -> None:
    squeue = tmp_path / "squeue"
    squeue.write_text(f"#!/bin/sh\n{answer}\n")
    squeue.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert stopping.slurm_end_time({"SLURM_JOB_ID": "7", "SLURM_JOB_END_TIME": "Unknown"}) == expected


def test_without_squeue_there_is_no_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert stopping.slurm_end_time({"SLURM_JOB_ID": "7"}) is None


# ---- what asks -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reason", StopReason)
def test_a_reason_is_known_by_its_words(reason: StopReason) -> None:
    assert StopReason.of(reason.text) is reason
    assert reason.is_signal == (reason.text == reason.name)  # SIGTERM; the others have words of their own
    assert reason.is_signal == (reason in SIGNALS)


def test_words_that_are_no_reason_have_none() -> None:
    assert StopReason.of("all steps are done") is None
    assert StopReason.of("") is None
    assert len({reason.text for reason in StopReason}) == len(StopReason)


def wishes_after(numbers: list[int]) -> list[StopReason | None]:
    watch = stopping.listen()
    found = []
    for number in numbers:
        os.kill(os.getpid(), number)
        wait_until(lambda: watch.wish, "the wish")
        found.append(watch.wish)
    return found


def test_the_first_reason_counts() -> None:
    assert apart(wishes_after, [signal.SIGUSR2, signal.SIGTERM]) == [[StopReason.SIGUSR2] * 2]


def goes_on_watching(folder: Path, what_fails: str) -> tuple[bool, StopReason | None]:
    """Whether the thread looked again after a look at the disk failed, and what it finds then."""

    looked: list[int] = []

    class BadDisk(type(folder)):  # type: ignore[misc]
        def __fspath__(self) -> str:
            looked.append(1)
            raise OSError(116, "Stale file handle")

    class BadAttempt(AttemptBase):
        def tick(self) -> None:
            looked.append(1)
            raise OSError(5, "Input/output error")

    watch = stopping.listen()
    if what_fails == "the file STOP":
        watch.stop_file = BadDisk(folder)
    else:
        watch.attempt = BadAttempt()
    deadline = time.monotonic() + 10 * stopping.POLL_SECONDS
    while time.monotonic() < deadline and len(looked) < 2:
        time.sleep(0.01)
    os.kill(os.getpid(), signal.SIGTERM)  # while it still fails
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline and not watch.wish:
        time.sleep(0.01)
    return len(looked) >= 2, watch.wish


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("what_fails", ["the file STOP", "the attempt's heartbeat"])
def test_a_disk_that_fails_for_a_while_does_not_end_the_watch(tmp_path: Path, what_fails: str) -> None:
    assert apart(goes_on_watching, tmp_path, what_fails) == [(True, StopReason.SIGTERM)]


def wish_for_stop_file(folder: Path) -> StopReason | None:
    watch = run_here(folder)
    (folder / "STOP").touch()
    wait_until(lambda: watch.wish, "the wish")
    return watch.wish


def test_the_stop_file_is_found(tmp_path: Path) -> None:
    assert apart(wish_for_stop_file, tmp_path) == [StopReason.STOP_FILE]


@pytest.mark.parametrize("ignored", ["SIGINT", "SIGHUP"])
def test_what_a_shell_or_nohup_ignores_stays_ignored(tmp_path: Path, ignored: str) -> None:
    # `command &` in a shell script: Ctrl-C is for what runs in the foreground. nohup: a hangup is for no one.
    code = (
        f"import os, signal; from distloop.ranks import stopping; watch = stopping.listen(); watch.begin_loop(); "
        f"os.kill(os.getpid(), signal.{ignored}); "
        f"print(signal.getsignal(signal.{ignored}).name, watch.wish)"
    )
    done = command(["sh", "-c", f'trap "" {ignored[3:]}; "$@"', "sh", sys.executable, "-c", code], tmp_path)
    assert done.stdout == "SIG_IGN None\n"


# ---- leaving without the main thread -------------------------------------------------------------------------


def leave_stuck(folder: Path, how: str) -> None:
    """A process whose main thread hangs, and that is to end all the same; what is told before goes into a file."""
    watch = stopping.listen()

    class ToldAttempt(AttemptBase):
        def cut_off(self, state: str, reason: str) -> None:
            (folder / "told").write_text(f"{state}: {reason}")
            time.sleep(600)  # a disk that does not answer

    watch.attempt = ToldAttempt()
    watch.leave_within(0.1, 7, "rank 1 failed first")
    if how == "called off":
        watch.leave_within(None)
        os.kill(os.getpid(), signal.SIGTERM)
        wait_until(lambda: watch.wish, "the wish")  # by a thread that would have ended the process before
        time.sleep(3 * stopping.POLL_SECONDS)
        os._exit(0)
    if how == "launcher":
        os.kill(os.getpid(), signal.SIGTERM)  # which ends what is left
    time.sleep(600)


@pytest.mark.parametrize(("how", "code"), [("", 7), ("launcher", 7), ("called off", 0)])
def test_a_process_that_is_to_leave_does_so_without_its_main_thread(tmp_path: Path, how: str, code: int) -> None:
    call = f"test_stopping.leave_stuck(pathlib.Path({str(tmp_path)!r}), {how!r})"
    done = command([sys.executable, "-c", f"import pathlib; from tests.unit import test_stopping; {call}"], tmp_path)
    assert done.returncode == code, done.stdout
    told = tmp_path / "told"
    assert (told.read_text() if told.exists() else "") == ("failed: rank 1 failed first" if code else "")
    assert ("finishing what is going on" in done.stdout) == (how == "called off")  # nothing is saved where it fails


# ---- loader workers ------------------------------------------------------------------------------------------


def ignored_by_worker() -> list[str]:
    leave_signals_to_parent()
    return [signal.getsignal(number).name for number in SIGNALS]  # type: ignore[union-attr]


def test_a_worker_ignores_what_asks_for_a_stop() -> None:
    assert apart(ignored_by_worker) == [["SIG_IGN"] * len(SIGNALS)]


def late_worker(folder: Path, parent: int) -> None:
    """A worker that gets to its setting up when the process that started it is dead."""
    (folder / "pid").write_text(str(os.getpid()))
    wait_until(lambda: os.getppid() != parent, "the parent's death")
    leave_signals_to_parent()
    (folder / "survived").touch()
    time.sleep(60)


def busy_worker(folder: Path, parent: int) -> None:
    """A worker that is set up, and so busy with a sample that it does not look for its parent."""
    leave_signals_to_parent()
    (folder / "pid").write_text(str(os.getpid()))
    wait_until(lambda: os.getppid() != parent, "the parent's death")
    time.sleep(1)  # it is killed meanwhile
    (folder / "survived").touch()


@pytest.mark.parametrize("worker_of", ["late_worker", "busy_worker"])
def test_a_worker_ends_with_its_parent_set_up_or_not(tmp_path: Path, worker_of: str) -> None:
    code = (
        f"import multiprocessing, os, pathlib, sys; from tests.unit.test_stopping import {worker_of}; "
        f"multiprocessing.get_context('fork').Process(target={worker_of}, "
        "args=(pathlib.Path(sys.argv[1]), os.getpid()), daemon=True).start(); "
        "exec('while not os.path.exists(sys.argv[1] + \"/pid\"): pass'); os.kill(os.getpid(), 9)"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], env=ranks.clean_environment(), check=False)
    wait_until((tmp_path / "pid").read_text, "the worker's number")
    worker = int((tmp_path / "pid").read_text())

    def gone() -> bool:
        try:
            return Path(f"/proc/{worker}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
        except OSError:
            return True

    wait_until(lambda: gone() or (tmp_path / "survived").exists(), "the worker")
    survived = (tmp_path / "survived").exists()
    if not gone():
        os.kill(worker, signal.SIGKILL)
    assert not survived


def workers_at_exit() -> int:
    """How many daemonic children that ignore SIGTERM are left after what atexit does."""
    process = multiprocessing.get_context("fork").Process(target=deaf, daemon=True)
    process.start()
    leaving.kill_workers()
    process.join(10)
    return process.exitcode or 0


def deaf() -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    time.sleep(60)


def test_workers_that_do_not_listen_are_killed_at_the_end() -> None:
    code = "from tests.unit.test_stopping import workers_at_exit; print(workers_at_exit())"
    done = command([sys.executable, "-c", code], ranks.REPOSITORY)
    assert done.stdout == f"{-signal.SIGKILL}\n"


# ---- the agreement -------------------------------------------------------------------------------------------


Wishes = dict[int, StopReason]  # {call: what a rank wishes from then on}


def agree(
    rank: int, port: int, seconds: tuple[float, float], wishes: tuple[Wishes, Wishes], calls: int
) -> dict[str, Any]:
    """The answers of `calls` steps of this rank, which take `seconds[rank]`."""
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    original, exchanges, intervals, answers = dist.all_reduce, [], [], []

    def counted(*arguments: Any, **options: Any) -> Any:
        exchanges.append(call)
        return original(*arguments, **options)

    dist.all_reduce = counted
    watch = SimpleNamespace(wish=None, signals=SimpleNamespace(taken=False), between_steps=0.0, took=lambda *_: None)
    agreement = Agreement(watch, 2, datetime.timedelta(seconds=30))  # type: ignore[arg-type]
    for call in range(1, calls + 1):
        time.sleep(seconds[rank])
        watch.wish = wishes[rank].get(call, watch.wish)
        answers.append(agreement.reached())
        intervals.append(agreement.interval)
        if answers[-1]:
            break
    agreement.close()
    dist.destroy_process_group()
    return {"answers": answers, "intervals": intervals, "exchanges": exchanges}


def of_two_ranks(seconds: tuple[float, float], wishes: tuple[Wishes, Wishes], calls: int) -> list[dict[str, Any]]:
    return apart(agree, ranks.free_port(), seconds, wishes, calls, processes=2)


@pytest.mark.parametrize("rank", [0, 1])
def test_all_ranks_hear_one_ranks_wish_at_the_same_step(rank: int) -> None:
    wishes: tuple[Wishes, Wishes] = ({}, {})
    wishes[rank][5] = StopReason.SIGTERM
    one, other = of_two_ranks((0.03, 0.001), wishes, 100)
    assert one["answers"] == other["answers"]
    assert one["answers"][-1] is StopReason.SIGTERM
    assert 5 <= len(one["answers"]) <= 5 + 2 * MOST_STEPS_BETWEEN


@pytest.mark.parametrize(
    ("one", "other", "common"),
    [
        (StopReason.SIGINT, StopReason.SIGUSR1, StopReason.SIGUSR1),
        (StopReason.SIGTERM, StopReason.STOP_FILE, StopReason.STOP_FILE),
        (StopReason.SAVE_FAILED, StopReason.LAUNCHER_GONE, StopReason.SAVE_FAILED),
    ],
)
def test_of_the_reasons_of_several_ranks_the_greatest_is_that_of_all(
    one: StopReason, other: StopReason, common: StopReason
) -> None:
    first, second = of_two_ranks((0.0, 0.0), ({2: one}, {2: other}), 100)  # heard of before the second exchange
    assert first["answers"] == second["answers"]
    assert first["answers"][-1] is common


def test_ranks_that_are_asked_at_different_steps_give_one_reason() -> None:
    one, other = of_two_ranks((0.0, 0.0), ({5: StopReason.SIGINT}, {3: StopReason.SIGUSR1}), 100)
    assert one["answers"] == other["answers"]
    assert one["answers"][-1] in (StopReason.SIGINT, StopReason.SIGUSR1)


def test_ranks_exchange_rarely_where_steps_are_short_and_always_at_the_same_steps() -> None:
    calls = 160
    one, other = of_two_ranks((0.0005, 0.0005), ({}, {}), calls)
    assert one["answers"] == other["answers"] == [None] * calls
    assert one["exchanges"] == other["exchanges"]
    assert one["intervals"] == other["intervals"]
    assert max(one["intervals"]) <= MOST_STEPS_BETWEEN
    assert len(one["exchanges"]) < calls / 4


def test_ranks_exchange_after_each_step_where_steps_are_long() -> None:
    one, other = of_two_ranks((0.2, 0.2), ({}, {}), 6)
    assert one["exchanges"] == other["exchanges"] == list(range(1, 7))


def alone(wish_at: int) -> list[StopReason | None]:
    watch = stopping.listen()
    agreement = Agreement(watch, 1, datetime.timedelta(seconds=30))
    answers = []
    for call in range(1, 100):
        time.sleep(0.03)
        if call == wish_at:
            watch.wish = StopReason.STOP_FILE
        answers.append(agreement.reached())
        if answers[-1]:
            break
    return answers


def test_one_process_answers_at_the_end_of_the_step() -> None:
    assert apart(alone, 4) == [[None, None, None, StopReason.STOP_FILE]]


# ---- who is a launcher ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["accelerate", "launch", "train.py"], True),
        (["python", "-m", "accelerate.commands.launch", "train.py"], True),
        (["python", "/x/site-packages/accelerate/commands/launch.py", "train.py"], True),
        (["python", "/x/bin/accelerate", "launch", "train.py"], True),
        (["/x/bin/python", "/x/bin/torchrun", "train.py"], True),
        (["python", "-m", "torch.distributed.run", "train.py"], True),
        (["bash"], False),
        (["bash", "-c", "accelerate launch train.py"], False),
        (["tmux"], False),
        (["python", "-m", "pytest"], False),
        (["make", "train"], False),
    ],
)
def test_launchers_are_known_by_their_command_line(
    monkeypatch: pytest.MonkeyPatch, words: list[str], expected: bool
) -> None:
    parents = []

    def cmdline(process: psutil.Process) -> list[str]:
        parents.append(process.pid)
        return words

    monkeypatch.setattr(psutil.Process, "cmdline", cmdline)
    assert stopping.launcher({}) == (os.getppid() if expected else None)
    assert parents == [os.getppid()]


@pytest.mark.parametrize("error", [psutil.NoSuchProcess(1), psutil.AccessDenied(1), OSError(23, "Too many open files")])
def test_a_parent_that_may_not_be_read_is_no_launcher(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def refuse(_: psutil.Process) -> None:
        raise error

    monkeypatch.setattr(psutil.Process, "cmdline", refuse)
    monkeypatch.setattr(os, "getppid", lambda: 1)
    assert stopping.launcher({"TORCHELASTIC_RUN_ID": "7"}) is None


def test_a_launcher_that_has_died_is_known_by_its_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(psutil.Process, "cmdline", lambda _: ["/sbin/init"])
    monkeypatch.setattr(os, "getppid", lambda: 1)
    assert stopping.launcher({"TORCHELASTIC_RUN_ID": "7"}) == -1
    assert stopping.launcher({}) is None
