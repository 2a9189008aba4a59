"""Whatever asks a run to stop, and wherever it is: it stops in order, on all ranks, and the same command goes on."""

from __future__ import annotations

import contextlib
import datetime
import itertools
import os
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

import pytest

from distloop.ranks.stopping import SECOND_INTERRUPT_SECONDS
from distloop.run.checkpoint import newest_good, step_of
from tests.tools import stage
from tests.tools.ranks import REPOSITORY, Ranks, clean_environment, free_port, rank_environment, train, wait_until
from tests.tools.records import rows, run_of, status
from tests.tools.stopping import (
    NOTICE,
    STEPS,
    check_finished,
    check_nothing_runs,
    check_stopped,
    children,
    press_again,
    waiting_run,
)

pytestmark = pytest.mark.usefixtures("nothing_is_left")

PLACES = ("start", "step", "validation", "save")
ASKS = ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1", "SIGUSR2", "STOP")
EVERYONE = "all ranks"
# (place, what asks, number of ranks, whom): each of them, and most pairs. The full product is marked long.
COVERING = {
    ("start", "SIGTERM", 2, "rank 1"),
    ("start", "SIGINT", 1, EVERYONE),
    ("start", "STOP", 2, "rank 0"),
    ("step", "SIGTERM", 1, EVERYONE),
    ("step", "SIGUSR2", 2, "rank 0"),
    ("step", "SIGHUP", 2, "rank 1"),
    ("validation", "SIGHUP", 1, EVERYONE),
    ("step", "STOP", 1, "rank 0"),
    ("validation", "SIGUSR1", 1, EVERYONE),
    ("validation", "SIGINT", 2, EVERYONE),
    ("save", "SIGUSR1", 2, "rank 1"),
    ("save", "SIGUSR2", 1, EVERYONE),
    ("save", "STOP", 2, "rank 0"),
}


def combinations() -> list:
    found = []
    for place, ask, world_size in itertools.product(PLACES, ASKS, (1, 2)):
        whom = ["rank 0"] if ask == "STOP" else [EVERYONE] if world_size == 1 else [EVERYONE, "rank 0", "rank 1"]
        for name in whom:
            case = (place, ask, world_size, name)
            found.append(pytest.param(*case, marks=() if case in COVERING else pytest.mark.long))
    return found


def await_notice(ranks: Ranks) -> None:
    """Wait until rank 0 has said that it is going to stop."""
    wait_until(lambda: NOTICE in ranks.outputs[0].read_text(), "the notice")


def send(ranks: Ranks, number: signal.Signals, whom: str = EVERYONE) -> None:
    for process in ranks.processes if whom == EVERYONE else [ranks.processes[int(whom.removeprefix("rank "))]]:
        os.kill(process.pid or 0, number)


@pytest.mark.parametrize(("place", "ask", "world_size", "whom"), combinations())
def test_a_run_stops_in_order_and_the_same_command_continues(
    tmp_path: Path, place: str, ask: str, world_size: int, whom: str
) -> None:
    arguments = waiting_run(tmp_path)
    stage.hold(tmp_path, place)
    ranks = Ranks(tmp_path, arguments, world_size)
    stage.arrived(tmp_path, place, (0,) if place == "save" else range(world_size))
    if ask == "STOP":
        run_of(tmp_path).mkdir(parents=True, exist_ok=True)
        (run_of(tmp_path) / "STOP").touch()
        reason = "the file STOP"
    else:
        send(ranks, signal.Signals[ask], whom)
        reason = ask
    if whom != "rank 1" and (ask, place) != ("STOP", "start"):
        await_notice(ranks)  # at once, while the run still waits
    stage.let_go(tmp_path, place)
    outcome = ranks.join().check()
    step = check_stopped(tmp_path, outcome.outputs[0], reason, heard=whom != "rank 1")
    check_nothing_runs(tmp_path)
    train(tmp_path, arguments, world_size).check()
    check_finished(tmp_path, step)
    check_nothing_runs(tmp_path)


# ---- as early as a signal can be caught ----------------------------------------------------------------------

EARLY = [(name, world_size) for name in ASKS if name != "STOP" for world_size in (1, 2)]
EARLY_COVERING = {("SIGTERM", 1), ("SIGINT", 2)}


WAIT_IN_IMPORTS = """
import sys
from tests.lab import stage

class Wait:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            stage.at("import")

sys.meta_path.insert(0, Wait())
"""


@pytest.mark.parametrize(
    ("name", "world_size"),
    [pytest.param(*case, marks=() if case in EARLY_COVERING else pytest.mark.long) for case in EARLY],
)
def test_a_signal_during_the_imports_is_kept(tmp_path: Path, name: str, world_size: int) -> None:
    arguments, port, marker = waiting_run(tmp_path), free_port(), uuid.uuid4().hex
    (tmp_path / "sitecustomize.py").write_text(WAIT_IN_IMPORTS)
    stage.hold(tmp_path, "import")
    path = f"{tmp_path}:{REPOSITORY}"
    fresh = []
    for rank in range(world_size):
        environment = {
            **clean_environment(),
            **rank_environment(rank, world_size, port),
            "MARKER": marker,
            "PYTHONPATH": path,
        }
        with open(tmp_path / f".fresh-{rank}", "w") as output:
            words = [sys.executable, "-m", "distloop.train", *arguments]
            fresh.append(subprocess.Popen(words, cwd=tmp_path, env=environment, stdout=output, stderr=output))
    try:
        stage.arrived(tmp_path, "import", range(world_size))
        for process in fresh:
            process.send_signal(signal.Signals[name])
        wait_until(lambda: NOTICE in (tmp_path / ".fresh-0").read_text(), "the answer")
        stage.let_go(tmp_path, "import")
        assert [process.wait(120) for process in fresh] == [0] * world_size, (tmp_path / ".fresh-0").read_text()
    finally:
        for process in fresh:
            process.kill()
    step = check_stopped(tmp_path, (tmp_path / ".fresh-0").read_text(), name)
    assert step <= world_size  # several ranks hear of each other one step later
    check_nothing_runs(tmp_path, marker)
    train(tmp_path, arguments, world_size).check()
    check_finished(tmp_path, step)


# ---- whom a signal reaches -----------------------------------------------------------------------------------


@pytest.mark.parametrize("world_size", [1, pytest.param(2, marks=pytest.mark.long)])
@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", pytest.param("SIGUSR1", marks=pytest.mark.long)])
def test_a_signal_to_the_whole_group_does_not_take_the_loader_workers_away(
    tmp_path: Path, name: str, world_size: int
) -> None:
    data = {"name": "tests.lab.stopping:points", "workers": 2, "args": {"own_group": True, "slow_disk": True}}
    arguments = waiting_run(tmp_path, data=data)
    stage.hold(tmp_path, "step")
    ranks = Ranks(tmp_path, arguments, world_size)
    stage.arrived(tmp_path, "step", range(world_size))
    for process in ranks.processes:
        assert len(children(process.pid or 0)) >= 2, "there are no workers to be disturbed"
        os.killpg(process.pid or 0, signal.Signals[name])  # as a terminal and Slurm do
    await_notice(ranks)
    stage.let_go(tmp_path, "step")
    step = check_stopped(tmp_path, ranks.join().check().outputs[0], name)
    check_nothing_runs(tmp_path)
    train(tmp_path, arguments, world_size).check()
    check_finished(tmp_path, step)


def test_a_signal_to_the_group_while_loader_workers_start_does_not_take_them_away(tmp_path: Path) -> None:
    data = {"name": "tests.lab.stopping:points", "workers": 2, "args": {"own_group": True, "slow_workers": True}}
    arguments = waiting_run(tmp_path, data=data)
    stage.hold(tmp_path, "worker")
    ranks = Ranks(tmp_path, arguments)
    stage.arrived(tmp_path, "worker")
    wait_until(lambda: len(children(ranks.processes[0].pid or 0)) >= 2, "both workers")
    os.killpg(ranks.processes[0].pid or 0, signal.SIGTERM)
    await_notice(ranks)
    stage.let_go(tmp_path, "worker")
    check_stopped(tmp_path, ranks.join().check().outputs[0], "SIGTERM")
    check_nothing_runs(tmp_path)


@pytest.mark.long
def test_a_signal_to_the_group_leaves_workers_from_a_forkserver_alone(tmp_path: Path) -> None:
    # Beside a GPU loader workers come from a forkserver, which the group's signal reaches as well.
    args = {"own_group": True, "workers": "forkserver"}
    arguments = waiting_run(
        tmp_path,
        data={"name": "tests.lab.stopping:points", "workers": 2, "args": args},
        validate={"every_steps": 4, "batch_size": 1},  # more batches than are loaded ahead
    )
    stage.hold(tmp_path, "validation")
    output = tmp_path / ".fresh"
    with open(output, "w") as file:
        words = [sys.executable, "-m", "distloop.train", *arguments]
        process = subprocess.Popen(words, cwd=tmp_path, env=clean_environment(), stdout=file, stderr=file)
    try:
        stage.arrived(tmp_path, "validation")
        os.killpg(process.pid, signal.SIGTERM)
        wait_until(lambda: NOTICE in output.read_text(), "the answer")
        stage.let_go(tmp_path, "validation")
        assert process.wait(120) == 0, output.read_text()
    finally:
        process.kill()
    check_stopped(tmp_path, output.read_text(), "SIGTERM")
    check_nothing_runs(tmp_path)


def test_signals_to_loader_workers_alone_stop_nothing(tmp_path: Path) -> None:
    arguments = waiting_run(tmp_path)
    stage.hold(tmp_path, "step")
    ranks = Ranks(tmp_path, arguments)
    stage.arrived(tmp_path, "step")
    workers = children(ranks.processes[0].pid or 0)
    assert len(workers) >= 2
    for worker in workers:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
            os.kill(worker, number)
    stage.let_go(tmp_path, "step")
    outcome = ranks.join().check()
    assert NOTICE not in outcome.output
    assert status(run_of(tmp_path))["state"] == "finished"
    check_nothing_runs(tmp_path)


# ---- Ctrl-C again --------------------------------------------------------------------------------------------


def check_ended_at_once(folder: Path, ranks: Ranks, arguments: list[str]) -> None:
    """Exit code 130, status stopped, the checkpoint before it whole, and the same command goes on from there."""
    outcome = ranks.join()
    assert outcome.codes == [130] * len(outcome.codes), outcome.output
    check_nothing_runs(folder)
    assert "the same command continues from the last checkpoint" in outcome.outputs[0]
    assert "Traceback" not in outcome.output
    run = run_of(folder)
    assert status(run)["state"] == "stopped", status(run)
    assert "without saving" in status(run)["reason"]
    newest, passed_over = newest_good(run / "checkpoints")
    assert newest is not None
    assert passed_over == []
    stage.clear(folder)
    train(folder, arguments, len(outcome.codes)).check()
    check_finished(folder, step_of(newest))


@pytest.mark.parametrize(
    ("place", "in_c", "world_size"),
    [
        ("save", False, 1),  # the loop waits for the thread that saves
        pytest.param("step", True, 1, marks=pytest.mark.long),
        ("step", False, 2),
        pytest.param("step", False, 1, marks=pytest.mark.long),
        pytest.param("step", True, 2, marks=pytest.mark.long),
        pytest.param("validation", False, 1, marks=pytest.mark.long),
    ],
)
def test_a_second_ctrl_c_two_seconds_later_ends_at_once(
    tmp_path: Path, place: str, in_c: bool, world_size: int
) -> None:
    arguments = waiting_run(tmp_path)
    if place != "save":
        stage.hold(tmp_path, place, in_c=in_c)
    ranks = Ranks(tmp_path, arguments, world_size)
    wait_until((run_of(tmp_path) / "checkpoints" / "step_00000003").exists, "a checkpoint")
    if place == "save":
        stage.hold(tmp_path, place)  # a later one
    stage.arrived(tmp_path, place, range(world_size))
    send(ranks, signal.SIGINT)
    await_notice(ranks)
    press_again(ranks, range(world_size))
    check_ended_at_once(tmp_path, ranks, arguments)


def test_ctrl_c_pressed_on_and_on_ends_as_the_second_one_does(tmp_path: Path) -> None:
    arguments = waiting_run(tmp_path)
    ranks = Ranks(tmp_path, arguments)
    wait_until((run_of(tmp_path) / "checkpoints" / "step_00000003").exists, "a checkpoint")
    stage.hold(tmp_path, "step")
    stage.arrived(tmp_path, "step")
    send(ranks, signal.SIGINT)
    await_notice(ranks)
    press_again(ranks, [0])
    while ranks.processes[0].is_alive():
        with contextlib.suppress(ProcessLookupError):
            os.kill(ranks.processes[0].pid or 0, signal.SIGINT)
        time.sleep(0.01)  # as a keyboard repeats a key that is held down, only faster
    check_ended_at_once(tmp_path, ranks, arguments)


def test_ctrl_c_that_arrives_twice_at_once_is_one(tmp_path: Path) -> None:
    arguments = waiting_run(tmp_path)
    stage.hold(tmp_path, "step")
    ranks = Ranks(tmp_path, arguments)
    stage.arrived(tmp_path, "step")
    send(ranks, signal.SIGINT)
    await_notice(ranks)
    send(ranks, signal.SIGINT)
    stage.let_go(tmp_path, "step")
    check_stopped(tmp_path, ranks.join().check().outputs[0], "SIGINT")


def test_one_ctrl_c_is_one_however_late_the_main_thread_hears_it(tmp_path: Path) -> None:
    # Rank 0 computes for long, rank 1 waits for it in a collective: in neither does Python get to its handlers.
    arguments = waiting_run(tmp_path)
    stage.hold(tmp_path, "step", in_c=True)
    ranks = Ranks(tmp_path, arguments, 2)
    stage.arrived(tmp_path, "step", range(2))
    send(ranks, signal.SIGINT)
    await_notice(ranks)
    time.sleep(SECOND_INTERRUPT_SECONDS + 0.2)  # by now another one would be a second one
    stage.let_go(tmp_path, "step")
    check_stopped(tmp_path, ranks.join().check().outputs[0], "SIGINT")


def test_a_second_ctrl_c_before_the_first_step_is_recorded_too(tmp_path: Path) -> None:
    stage.hold(tmp_path, "any-step")  # of the rehearsal
    ranks = Ranks(tmp_path, waiting_run(tmp_path), 2)
    stage.arrived(tmp_path, "any-step", range(2))
    send(ranks, signal.SIGINT)
    await_notice(ranks)
    press_again(ranks, range(2))
    outcome = ranks.join()
    assert outcome.codes == [130, 130], outcome.output
    check_nothing_runs(tmp_path)
    assert status(run_of(tmp_path))["state"] == "stopped"


# ---- the end is near: deadlines ------------------------------------------------------------------------------


def endless(folder: Path, stop: dict[str, float], **task: float) -> list[str]:
    return waiting_run(
        folder,
        train={"steps": 100_000},
        stop={"reserve_seconds": 0, **stop},
        task={"name": "tests.lab.stopping:Waiting", "args": task},
        validate={"every_steps": 5, "batch_size": 8},
    )


def test_a_run_ends_before_its_deadline_though_a_validation_takes_long(tmp_path: Path) -> None:
    seconds = 6.0
    arguments = endless(tmp_path, {"after_minutes": seconds / 60}, validation_seconds=1.0)
    begun = time.monotonic()
    ranks = Ranks(tmp_path, arguments, 2)
    outcome = ranks.join().check()
    took = time.monotonic() - begun
    check_stopped(tmp_path, outcome.outputs[0], "stop.after_minutes", steps=100_000)
    # One that did not keep a validation's time free would be asked at the deadline, and still validate and save.
    assert took < seconds + 0.5
    assert rows(run_of(tmp_path), "validate")


def test_the_end_that_slurm_tells_is_a_deadline(tmp_path: Path) -> None:
    arguments = endless(tmp_path, {})
    environment = {"SLURM_JOB_ID": "4242", "SLURM_JOB_END_TIME": str(int(time.time()) + 3)}
    outcome = train(tmp_path, arguments, 1, environment).check()
    check_stopped(tmp_path, outcome.outputs[0], "Slurm's time limit", steps=100_000)


def test_the_end_that_squeue_tells_is_a_deadline(tmp_path: Path) -> None:
    end = datetime.datetime.now() + datetime.timedelta(seconds=3)
    squeue = tmp_path / "bin" / "squeue"
    squeue.parent.mkdir()
    squeue.write_text(
        f"""#!/bin/sh
        case "$*" in *"--job 4242 "*) echo {end.isoformat(timespec="seconds")} ;; *) exit 1 ;; esac
        """
    )
    squeue.chmod(0o755)
    environment = {"SLURM_JOB_ID": "4242", "PATH": f"{squeue.parent}:{os.environ['PATH']}"}
    outcome = train(tmp_path, endless(tmp_path, {}), 1, environment).check()
    check_stopped(tmp_path, outcome.outputs[0], "Slurm's time limit", steps=100_000)


# ---- the file STOP, and the end ------------------------------------------------------------------------------


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_stop_file_that_lies_there_before_stops_the_attempt_after_a_step(tmp_path: Path, world_size: int) -> None:
    arguments = waiting_run(tmp_path)
    run_of(tmp_path).mkdir(parents=True)
    (run_of(tmp_path) / "STOP").touch()
    outcome = train(tmp_path, arguments, world_size).check()
    step = check_stopped(tmp_path, outcome.outputs[0], "the file STOP")
    assert step < STEPS / 2
    train(tmp_path, arguments, world_size).check()
    check_finished(tmp_path, step)


@pytest.mark.parametrize("world_size", [1, pytest.param(2, marks=pytest.mark.long)])
def test_a_signal_after_the_last_step_leaves_the_run_finished(tmp_path: Path, world_size: int) -> None:
    arguments = [*waiting_run(tmp_path), "--train.steps", "3", "--checkpoint.every-steps", "1000"]
    stage.hold(tmp_path, "save")
    ranks = Ranks(tmp_path, arguments, world_size)
    stage.arrived(tmp_path, "save")
    send(ranks, signal.SIGTERM)
    await_notice(ranks)
    stage.let_go(tmp_path, "save")
    ranks.join().check()
    assert status(run_of(tmp_path))["state"] == "finished"
    check_nothing_runs(tmp_path)


def test_signals_while_the_process_ends_do_not_change_its_exit_code(tmp_path: Path) -> None:
    arguments = [*waiting_run(tmp_path), "--train.steps", "3"]
    output = tmp_path / ".fresh"
    with open(output, "w") as file:
        words = [sys.executable, "-m", "distloop.train", *arguments]
        process = subprocess.Popen(words, cwd=tmp_path, env=clean_environment(), stdout=file, stderr=file)
    wait_until(lambda: "finished: " in output.read_text(), "the end")
    while process.poll() is None:  # from here on, until it is gone
        process.send_signal(signal.SIGTERM)
        time.sleep(0.001)
    assert process.returncode == 0, output.read_text()
    assert status(run_of(tmp_path))["state"] == "finished"
    assert "Traceback" not in output.read_text()
