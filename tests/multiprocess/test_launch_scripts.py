"""launch/*.sh on this machine: the run of one process, whole tracebacks, a message where machines do not meet."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml

from distloop.run.checkpoint import published_in, verify
from tests.tools import stage
from tests.tools.launching import LAUNCH, at_once, failing_line, machines, own_loop, script
from tests.tools.ranks import Ranks, command, free_port, train, write_config
from tests.tools.records import losses, rows, run_of, status
from tests.tools.stopping import check_nothing_runs, check_stopped, reached, waiting_run

STEPS = 30
SETTINGS: dict[str, Any] = {
    "data": "digits",
    "model": {"name": "mlp", "args": {"hidden": 32, "layers": 1}},
    "task": "tests.lab.launched:Noting",
    "optim": {"name": "sgd", "lr": 0.1},
    "batch": {"global_size": 64},
    "train": {"steps": STEPS},
    "log": {"every_steps": 1},
}
FAILING = {
    "data": {"name": "tests.lab.failing:points", "workers": 0},
    "model": "linear",
    "task": "tests.lab.failing:Failing",
    "batch": {"global_size": 16},
    "train": {"steps": 100000},  # which a rank that is left would go on with
}
# What `accelerate config` may have left in a user's home, for other programs.
OWN_DEFAULTS = {
    "compute_environment": "LOCAL_MACHINE",
    "distributed_type": "FSDP",
    "mixed_precision": "bf16",
    "num_machines": 1,
    "num_processes": 7,
    "fsdp_config": {"fsdp_sharding_strategy": "FULL_SHARD"},
}
STACK_OF_CPP = re.compile(r"frame #\d+|c10::")


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """The losses of the run in one process, with 8 hidden units."""
    folder = tmp_path_factory.mktemp("expected")
    words = ["--config", str(write_config(folder, SETTINGS)), "--model.args.hidden", "8"]
    train(folder, words, environment={"CUDA_VISIBLE_DEVICES": ""}).check()
    history = losses(folder / "runs" / "run")
    assert len(history) == STEPS
    assert history[-1] < 0.9 * history[0]  # it learns, so that equal losses say something
    return history


def arguments(folder: Path) -> list[str]:
    return ["--config", str(write_config(folder, SETTINGS)), "--model.args", "{hidden: 8, layers: 1}"]


def check_run(folder: Path, expected: list[float], world_size: int) -> None:
    run = folder / "runs" / "run"
    assert json.loads((run / "environment.json").read_text())["world_size"] == world_size
    assert losses(run) == pytest.approx(expected, rel=1e-5)
    assert sorted(path.name for path in folder.glob("rank-*")) == [f"rank-{rank}.json" for rank in range(world_size)]


def seen_by_rank(folder: Path, rank: int) -> dict[str, Any]:
    return json.loads((folder / f"rank-{rank}.json").read_text())


# ---- one machine ---------------------------------------------------------------------------------------------


class Done(NamedTuple):
    folder: Path
    output: str


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> Done:
    """single_node.sh on two ranks: from a folder of its own, through a link in a path with spaces, with quoted
    arguments, no thread count, and a user's own Accelerate defaults that would do something else."""
    folder = tmp_path_factory.mktemp("a folder")
    (folder / "my scripts").symlink_to(LAUNCH)
    (folder / "huggingface" / "accelerate").mkdir(parents=True)
    (folder / "huggingface" / "accelerate" / "default_config.yaml").write_text(yaml.safe_dump(OWN_DEFAULTS))
    words = script("single_node.sh", folder=folder / "my scripts", PROCESSES=2, HF_HOME=folder / "huggingface")
    done = command([*words, *arguments(folder)], folder)
    assert done.returncode == 0, done.stdout
    return Done(folder, done.stdout)


@pytest.mark.long
def test_two_ranks_of_a_machine_train_the_run_of_one_process(two_ranks: Done, expected: list[float]) -> None:
    check_run(two_ranks.folder, expected, 2)
    assert two_ranks.output.count("finished: ") == 1


def test_a_users_own_accelerate_defaults_have_no_effect(two_ranks: Done) -> None:
    assert "2 processes on cpu" in two_ranks.output  # not 7, nor FSDP
    assert "has no effect" not in two_ranks.output  # of bf16: it was never asked for


def test_a_script_says_nothing_of_its_own_about_a_run_in_order(two_ranks: Done) -> None:
    said = [line for line in two_ranks.output.splitlines() if not line.startswith("[Gloo]")]  # older torch does
    assert said[0].startswith("distloop ")
    assert not [line for line in said if line.startswith(("single_node.sh", "WARNING"))]


def test_ranks_get_their_share_of_the_threads(two_ranks: Done) -> None:
    share = str(max(1, len(os.sched_getaffinity(0)) // 2))
    assert [seen_by_rank(two_ranks.folder, rank)["OMP_NUM_THREADS"] for rank in range(2)] == [share, share]


@pytest.mark.long
@pytest.mark.parametrize("processes", [1, 4])
def test_one_or_four_ranks_of_a_machine_train_the_run_of_one_process(
    tmp_path: Path, expected: list[float], processes: int
) -> None:
    done = command([*script("single_node.sh", PROCESSES=processes, threads=3), *arguments(tmp_path)], tmp_path)
    assert done.returncode == 0, done.stdout
    check_run(tmp_path, expected, processes)
    assert [seen_by_rank(tmp_path, rank)["OMP_NUM_THREADS"] for rank in range(processes)] == ["3"] * processes


@pytest.mark.parametrize("how", ["raise", pytest.param("kill", marks=pytest.mark.long)])
def test_a_rank_that_fails_ends_the_script_and_is_named(tmp_path: Path, how: str) -> None:
    words = ["--config", str(write_config(tmp_path, FAILING))]
    stage.fail(tmp_path, "forward", how, rank=1)
    done = command([*script("single_node.sh", PROCESSES=2), *words], tmp_path)
    assert done.returncode != 0
    what = "failed first: ValueError: " if how == "raise" else "was the first to end, without a word: killed"
    verdicts = [line for line in done.stdout.splitlines() if line.startswith("distloop: rank ")]
    assert len(verdicts) == 1, done.stdout
    assert verdicts[0].startswith(f"distloop: rank 1 on {os.uname().nodename}")
    assert what in verdicts[0]
    assert status(tmp_path / "runs" / "run")["state"] == "failed"
    check_nothing_runs(tmp_path)


def test_a_mistake_of_the_user_is_said_once(tmp_path: Path) -> None:
    done = command([*script("single_node.sh", PROCESSES=2), "--config", "mistyped.yaml"], tmp_path)
    assert done.returncode != 0
    assert done.stdout.count("--config mistyped.yaml: no such file") == 1, done.stdout
    assert 'distloop/train.py", line' not in done.stdout


# ---- a loop of one's own --------------------------------------------------------------------------------------

NOT_IMPORTABLE = ""  # as PYTHONPATH: distloop, and the tests' tasks, lie where the scripts lie


def started_file(run: Path) -> str:
    return json.loads((run / "environment.json").read_text())["command"][0]


def test_a_loop_of_ones_own_trains_the_run_of_one_process(tmp_path: Path, expected: list[float]) -> None:
    own_loop(tmp_path / "my loops" / "my train.py")
    variables: dict[str, Any] = {"TRAIN": "my loops/my train.py", "PYTHONPATH": NOT_IMPORTABLE, "PROCESSES": 2}
    done = command([*script("single_node.sh", **variables), *arguments(tmp_path)], tmp_path)
    assert done.returncode == 0, done.stdout
    check_run(tmp_path, expected, 2)
    assert started_file(tmp_path / "runs" / "run") == "my loops/my train.py"


@pytest.mark.long
def test_a_loop_of_ones_own_on_two_machines_trains_the_run_of_one_process(
    tmp_path: Path, expected: list[float]
) -> None:
    file = own_loop(tmp_path / "my_train.py")
    commands = machines(1, TRAIN=file, PYTHONPATH=NOT_IMPORTABLE)
    done = at_once([[*words, *arguments(tmp_path)] for words in commands], tmp_path)
    assert [machine.returncode for machine in done] == [0, 0], done
    check_run(tmp_path, expected, 2)
    assert started_file(tmp_path / "runs" / "run") == str(file)


@pytest.mark.long
def test_a_loop_of_ones_own_is_debugged(tmp_path: Path) -> None:
    file = own_loop(tmp_path / "my_train.py")
    variables: dict[str, Any] = {"TRAIN": file, "PYTHONPATH": NOT_IMPORTABLE, "TMPDIR": tmp_path}
    words = [*script("debug.sh", folder=tmp_path / "scripts", **variables), *arguments(tmp_path)]
    (tmp_path / "scripts").mkdir()
    (tmp_path / "scripts" / "debug.sh").symlink_to(LAUNCH / "debug.sh")
    done = command(words, tmp_path)
    assert done.returncode == 0, done.stdout
    assert [row["step"] for row in rows(debugged(tmp_path), "train")] == list(range(1, 21))
    assert started_file(debugged(tmp_path)) == str(file)


def test_a_rank_that_fails_in_a_loop_of_ones_own_is_named_with_that_loops_line(tmp_path: Path) -> None:
    file = own_loop(tmp_path / "my_train.py")
    variables: dict[str, Any] = {"TRAIN": file.name, "PYTHONPATH": NOT_IMPORTABLE, "PROCESSES": 2}
    stage.fail(tmp_path, "forward", "raise", rank=1)
    words = ["--config", str(write_config(tmp_path, FAILING))]
    done = command([*script("single_node.sh", **variables), *words], tmp_path)
    assert done.returncode != 0
    [verdict] = [line for line in done.stdout.splitlines() if line.startswith("distloop: rank ")]
    assert f"({failing_line(file)}), failed first: ValueError: a value that nobody likes" in verdict
    assert "distloop/train.py" not in done.stdout
    check_nothing_runs(tmp_path)


def test_a_mistake_in_starting_a_loop_of_ones_own_is_answered_with_its_own_command(tmp_path: Path) -> None:
    own_loop(tmp_path / "my_train.py")
    config = write_config(tmp_path, SETTINGS)
    done = command([sys.executable, "my_train.py", "--config", str(config), "--expect-world", "2"], tmp_path)
    assert done.returncode == 2
    assert (
        "--num_processes 2 --main_process_port 0 --mixed_precision no --dynamo_backend no my_train.py …" in done.stdout
    )


# ---- debugging -----------------------------------------------------------------------------------------------


def debugged(folder: Path) -> Path:
    """The run directory of debug.sh, in the temporary folder that it was given."""
    (run,) = folder.glob("tmp*/run")
    return run


def test_debug_is_a_few_steps_of_one_process_each_logged_with_anomaly_detection(tmp_path: Path) -> None:
    settings = {**SETTINGS, "train": {"epochs": 10}, "schedule": {"name": "cosine", "warmup_steps": 50}}
    settings["data"] = {"name": "digits", "workers": 4}
    words = [*script("debug.sh", TMPDIR=tmp_path), "--config", str(write_config(tmp_path, settings))]
    done = command(words, tmp_path)
    assert done.returncode == 0, done.stdout
    run = debugged(tmp_path)
    assert [row["step"] for row in rows(run, "train")] == list(range(1, 21))
    assert len(re.findall(r"step \d+/20 ", done.stdout)) == 20
    assert json.loads((run / "environment.json").read_text())["world_size"] == 1
    assert yaml.safe_load((run / "config.yaml").read_text())["data"]["workers"] == 0
    assert seen_by_rank(tmp_path, 0)["detects_anomalies"]
    assert not (tmp_path / "runs").exists()  # it is no attempt of the run that is looked at


@pytest.mark.long
def test_debug_shows_the_whole_traceback_of_a_mistake_in_the_users_code(tmp_path: Path) -> None:
    settings = {**SETTINGS, "model": "linear", "task": "tests.lab.failing:Failing"}
    settings["data"] = {"name": "tests.lab.failing:points", "workers": 2}
    stage.fail(tmp_path, "data", "raise")
    words = [*script("debug.sh", TMPDIR=tmp_path), "--config", str(write_config(tmp_path, settings))]
    done = command([*words, "--batch.global-size", "16"], tmp_path)
    assert done.returncode != 0
    assert done.stdout.count("Traceback") == 1, done.stdout  # in one piece, not from a loader worker, nor a launcher's
    trace = done.stdout[done.stdout.index("Traceback") :]
    order = ["train.py", "failing.py", "in fail_by_exception", "ValueError: a value that nobody likes"]
    places = [trace.index(text) for text in order]
    assert places == sorted(places)


# ---- several machines ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.long)])
def test_two_machines_train_the_run_of_one_process(tmp_path: Path, expected: list[float], processes: int) -> None:
    done = at_once([[*words, *arguments(tmp_path)] for words in machines(processes)], tmp_path)
    assert [machine.returncode for machine in done] == [0, 0], done
    check_run(tmp_path, expected, 2 * processes)
    assert done[0].stdout.count("finished: ") == 1
    said = [line for line in done[1].stdout.splitlines() if not line.startswith("[Gloo]")]
    assert len(said) == 1
    assert said[0].startswith("machine 1 of 2: waiting for the others at 127.0.0.1:")


def check_message(done: subprocess.CompletedProcess[str], message: str, folder: Path) -> None:
    """The script has ended with this message, and nothing else."""
    assert done.returncode in (1, 2), done.stdout
    assert done.stdout.count("distloop: ") == 1, done.stdout
    assert re.search(message, done.stdout), done.stdout
    assert "Traceback" not in done.stdout
    assert not STACK_OF_CPP.search(done.stdout), done.stdout
    assert not (folder / "runs").exists()
    check_nothing_runs(folder)


@pytest.fixture
def other_program() -> Iterator[int]:
    """The port of a program that takes connections and says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


HERE = os.uname().nodename
# what is wrong -> (variables, message)
ALONE: dict[str, tuple[dict[str, object], str]] = {
    "a missing peer": ({"MACHINE_RANK": 0}, rf"Machine 1 of 2 did not come within 1 s; here are 0 \({HERE}\)"),
    "no head": ({"MACHINE_RANK": 1}, "No answer from machine 0 at 127.0.0.1:[0-9]+ within 1 s"),
    "a rank too high": ({"MACHINE_RANK": 2}, "MACHINE_RANK = 2 is not one of 0 to 1"),
    "a rank too low": ({"MACHINE_RANK": -1}, "MACHINE_RANK = -1 is not one of 0 to 1"),
    "a rank that is no number": ({"MACHINE_RANK": "first"}, "MACHINE_RANK, MACHINES and JOIN_SECONDS are numbers"),
    "a limit that is no number": ({"MACHINE_RANK": 0, "JOIN_SECONDS": "long"}, "JOIN_SECONDS are numbers"),
    "a port that is none": ({"MACHINE_RANK": 1, "MASTER_PORT": "abc"}, "MASTER_PORT = 'abc' is not a port"),
    "an unknown name, asked for by the head": (
        {"MACHINE_RANK": 0, "MASTER_ADDR": "no-such-name.invalid"},
        "MASTER_ADDR = 'no-such-name.invalid' is no name or address",
    ),
    "an unknown name": (
        {"MACHINE_RANK": 1, "MASTER_ADDR": "no-such-name.invalid"},
        "MASTER_ADDR = 'no-such-name.invalid' is no name or address",
    ),
    "an address that is not the head's": (  # the network of documentation, RFC 5737
        {"MACHINE_RANK": 0, "MASTER_ADDR": "192.0.2.1"},
        "Machine 1 of 2 did not come within 1 s",
    ),
}


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        pytest.param(*case, id=name, marks=() if name in ("a missing peer", "no head") else pytest.mark.long)
        for name, case in ALONE.items()
    ],
)
def test_machines_that_cannot_meet_say_why(tmp_path: Path, variables: dict[str, object], message: str) -> None:
    words = machines(1, **{"JOIN_SECONDS": 1, **variables})[0]
    check_message(command(words, tmp_path), message, tmp_path)


@pytest.mark.parametrize(
    ("rank", "message"),
    [
        pytest.param(
            0, "Port [0-9]+ of .* is in use by another program: choose another MASTER_PORT", marks=pytest.mark.long
        ),
        (1, "Port [0-9]+ of 127.0.0.1 is not that of a run's machine 0"),
    ],
)
def test_a_port_that_another_program_has_is_named(tmp_path: Path, other_program: int, rank: int, message: str) -> None:
    words = machines(1, JOIN_SECONDS=1, MACHINE_RANK=rank, MASTER_PORT=other_program)[0]
    check_message(command(words, tmp_path), message, tmp_path)


@pytest.mark.long
def test_machines_that_were_given_different_numbers_of_processes_say_so(tmp_path: Path) -> None:
    port = free_port()
    commands = [machines(rank + 1, MASTER_PORT=port)[rank] for rank in range(2)]
    done = at_once([[*words, *arguments(tmp_path)] for words in commands], tmp_path)
    for rank, machine in enumerate(done):
        assert machine.returncode != 0
        expected = f"asked here for {2 * (rank + 1)} processes on all machines, which have started 3"
        assert machine.stdout.count(expected) == 1, machine.stdout
    assert not (tmp_path / "runs").exists()


# ---- many ranks ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("world_size", [8, pytest.param(16, marks=pytest.mark.long)])
def test_many_ranks_start_train_stop_and_continue(tmp_path: Path, world_size: int) -> None:
    data = {"name": "tests.lab.stopping:points", "workers": 0}
    words = waiting_run(tmp_path, data=data, validate={"every_steps": 8, "batch_size": 1})
    with Ranks(tmp_path, words, world_size) as ranks:
        reached(tmp_path, 4)
        ranks.processes[world_size - 1].terminate()
        outcome = ranks.join().check()
    step = check_stopped(tmp_path, outcome.outputs[0], "SIGTERM", heard=False)
    train(tmp_path, words, world_size).check()
    assert (status(run_of(tmp_path))["state"], status(run_of(tmp_path))["first_step"]) == ("finished", step)
    assert [row["step"] for row in rows(run_of(tmp_path), "train")] == list(range(1, 61))


@pytest.mark.long
def test_sixteen_ranks_under_the_launcher_finish(tmp_path: Path) -> None:
    words = [*script("single_node.sh", PROCESSES=16), *arguments(tmp_path)]
    done = command(words, tmp_path, timeout=280)
    assert done.returncode == 0, done.stdout
    verify(published_in(tmp_path / "runs" / "run" / "checkpoints")[-1])
    assert status(tmp_path / "runs" / "run")["state"] == "finished"
