"""Guards against runs that are not what was started."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest

from distloop.errors import UsageError
from distloop.ranks import launch_guards
from distloop.ranks.launch_guards import Launch, check_launch, check_world, override_launcher, right_commands
from tests.tools.ranks import REPOSITORY

# ---- Accelerate's launcher -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("variable", "value", "key"),
    [
        ("ACCELERATE_MIXED_PRECISION", "fp16", "precision"),
        ("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR", "compile"),
        ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4", "batch.micro_size"),
    ],
)
def test_what_the_launcher_says_otherwise_is_warned_of_once_and_taken_away(variable: str, value: str, key: str) -> None:
    environ = {variable: value, "RANK": "0"}
    (warning,) = override_launcher(environ, "bf16")
    assert f"{variable}={value.lower()}" in warning
    assert f"({key})" in warning
    assert environ == {"RANK": "0"}
    assert override_launcher(environ, "bf16") == []


def test_what_a_launcher_exports_unasked_is_taken_away_in_silence() -> None:
    environ = {
        "ACCELERATE_MIXED_PRECISION": "no",
        "ACCELERATE_DYNAMO_BACKEND": "NO",
        "ACCELERATE_DYNAMO_MODE": "default",
        "ACCELERATE_DYNAMO_USE_FULLGRAPH": "False",
        "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "1",
        "ACCELERATE_USE_FSDP": "false",
        "ACCELERATE_USE_CPU": "true",
    }
    assert override_launcher(environ, "bf16") == []
    assert environ == {"ACCELERATE_USE_FSDP": "false"}


def test_a_launcher_that_says_the_same_as_the_config_is_not_warned_of() -> None:
    assert override_launcher({"ACCELERATE_MIXED_PRECISION": "bf16"}, "bf16") == []


@pytest.mark.parametrize("name", ["DEEPSPEED", "FSDP", "MEGATRON_LM", "PARALLELISM_CONFIG"])
@pytest.mark.parametrize("value", ["true", "True"])
def test_what_is_not_ddp_is_refused_by_name(name: str, value: str) -> None:
    with pytest.raises(UsageError, match=rf"ACCELERATE_USE_{name}.*DDP only.*launch without it"):
        override_launcher({f"ACCELERATE_USE_{name}": value}, "no")


@pytest.mark.parametrize(
    ("words", "position"),
    [
        (["accelerate", "launch", "train.py"], 2),
        (["/usr/bin/python3", "/opt/venv/bin/accelerate", "launch", "--cpu", "train.py"], 3),
        (["python", "-u", "/opt/venv/bin/accelerate", "launch", "train.py"], 4),
        (["python", "/opt/venv/bin/accelerate-launch", "train.py"], 2),
        (["python", "-m", "accelerate.commands.launch", "train.py"], 3),
        (["python", "/lib/site-packages/accelerate/commands/launch.py", "train.py"], 2),
        (["accelerate", "config"], None),
        (["accelerate"], None),
        (["python", "train.py", "--name", "x", "accelerate", "launch"], None),
        (["python", "-m", "torch.distributed.run", "train.py"], None),
        (["/bin/bash", "-c", "accelerate launch train.py"], None),
        ([], None),
    ],
)
def test_the_launchers_own_arguments_are_found_in_a_command_line(words: list[str], position: int | None) -> None:
    assert launch_guards._first_argument(words) == position


@pytest.mark.parametrize(
    ("words", "launch"),
    [
        (
            ["accelerate", "launch", "--multi_gpu", "--num_processes", "3", "here/train.py", "--num_processes", "9"],
            Launch(3, True, "here/train.py"),
        ),
        (
            ["accelerate", "launch", "--cpu", "--num_processes", "2", "train.py", "--optim.lr", "1"],
            Launch(2, False, "train.py"),
        ),
        (["accelerate", "launch", "-m", "distloop.train", "--optim.lr", "1"], Launch(0, False, "distloop.train", True)),
        (["accelerate", "launch", "--no_such_option", "train.py"], None),
        (["something", "else"], None),
    ],
)
def test_the_launch_is_read_from_the_parents_command_line(
    words: list[str], launch: Launch | None, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    program = "print('here', flush=True); input()"  # its further words are what is looked at
    with subprocess.Popen(
        [sys.executable, "-c", program, *words], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as parent:
        assert parent.stdout
        parent.stdout.readline()  # its command line is there only once it runs
        monkeypatch.setattr(os, "getppid", lambda: parent.pid)
        found = launch_guards.launched_by()
        parent.communicate("\n")
    assert found == launch
    assert capfd.readouterr().err == ""


@pytest.fixture(autouse=True)
def started_as_a_module(monkeypatch: pytest.MonkeyPatch) -> None:
    """As by `python -m distloop.train`, where each test would see how pytest was started."""
    monkeypatch.setattr(sys, "argv", [str(REPOSITORY / "distloop" / "train.py")])


RANKS = {"RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
THREE = Launch(3, True, "here/train.py")
ONE = Launch(1, False, "here/train.py")


@pytest.mark.parametrize(
    ("environ", "launch", "device", "use_cpu"),
    [
        ({}, None, "auto", True),
        ({}, ONE, "auto", True),
        ({**RANKS, "WORLD_SIZE": "3"}, THREE, "auto", False),
        ({**RANKS, "WORLD_SIZE": "3", "ACCELERATE_USE_CPU": "true"}, THREE, "auto", True),
        ({**RANKS, "WORLD_SIZE": "3"}, THREE, "cpu", True),
        ({**RANKS, "WORLD_SIZE": "3"}, None, "auto", True),  # torchrun on a machine without GPUs
        ({"WORLD_SIZE": "1", "ACCELERATE_MIXED_PRECISION": "no"}, ONE, "auto", True),
    ],
)
def test_launches_that_become_the_world_they_ask_for_pass(
    environ: dict[str, str], launch: Launch | None, device: str, use_cpu: bool
) -> None:
    check_launch(environ, launch, device, use_cpu)


@pytest.mark.parametrize("environ", [{}, {"WORLD_SIZE": "1"}, {**RANKS, "WORLD_SIZE": "2"}])
def test_a_launch_whose_processes_do_not_come_to_be_is_refused_with_the_right_commands(environ: dict[str, str]) -> None:
    with pytest.raises(UsageError) as refusal:
        check_launch(environ, THREE, "auto", True)
    message = str(refusal.value)
    assert "asked for 3 processes" in message
    assert f"one process of {environ.get('WORLD_SIZE', '1')}" in message
    assert right_commands(THREE) in message


@pytest.mark.parametrize(
    ("environ", "launch"),
    [({**RANKS, "WORLD_SIZE": "3"}, THREE), ({**RANKS, "WORLD_SIZE": "3", "ACCELERATE_MIXED_PRECISION": "no"}, None)],
)
def test_a_launch_for_gpus_where_there_are_none_is_refused(environ: dict[str, str], launch: Launch | None) -> None:
    with pytest.raises(UsageError, match="no GPU is visible") as refusal:
        check_launch(environ, launch, "auto", True)
    assert "ACCELERATE_USE_CPU=true accelerate launch" in str(refusal.value)
    assert "--num_processes 3" in str(refusal.value)


@pytest.mark.parametrize(
    ("world", "environ", "expected", "launch"),
    [
        (1, {}, None, None),
        (1, {"WORLD_SIZE": "1", "SLURM_STEP_NUM_TASKS": "1"}, 1, ONE),
        (3, {"WORLD_SIZE": "3"}, 3, THREE),
        (4, {"WORLD_SIZE": "4", "SLURM_STEP_NUM_TASKS": "4"}, 4, None),
        (8, {"WORLD_SIZE": "8", "SLURM_STEP_NUM_TASKS": "2"}, 8, None),  # a launcher of four per node
        (4, {"WORLD_SIZE": "4"}, None, ONE),  # a parent that says nothing of other machines
        (1, {"SLURM_NTASKS": "4"}, None, None),
    ],
)
def test_a_world_that_is_what_was_started_passes(
    world: int, environ: dict[str, str], expected: int | None, launch: Launch | None
) -> None:
    check_world(world, environ, expected, launch)


@pytest.mark.parametrize(
    ("environ", "expected", "launch", "said"),
    [
        ({}, 4, None, "--expect-world says 4 processes, but the run has 2"),
        ({"WORLD_SIZE": "4"}, None, None, "WORLD_SIZE says 4 processes, but the run has 2"),
        ({"WORLD_SIZE": "1"}, None, None, "WORLD_SIZE says 1 processes, but the run has 2"),
        ({"SLURM_STEP_NUM_TASKS": "4"}, None, None, "srun started 4 tasks, but the run has 2 processes"),
        ({"SLURM_STEP_NUM_TASKS": "4"}, 2, None, "srun --ntasks=4 python -m distloop.train"),
    ],
)
def test_a_world_that_is_not_what_was_started_is_refused_with_who_said_so(
    environ: dict[str, str], expected: int | None, launch: Launch | None, said: str
) -> None:
    with pytest.raises(UsageError) as refusal:
        check_world(2, environ, expected, launch)
    assert said in str(refusal.value)


def test_tasks_that_do_not_make_up_the_world_evenly_are_refused() -> None:
    with pytest.raises(UsageError, match="srun started 2 tasks, but the run has 3 processes"):
        check_world(3, {"SLURM_STEP_NUM_TASKS": "2"}, None, None)


def test_the_right_commands_start_so_many_processes_of_the_users_script() -> None:
    cpu, gpu = right_commands(THREE, 5).splitlines()
    for line in (cpu, gpu):
        assert "--num_processes 5" in line
        assert "--multi_gpu" in line
        assert "here/train.py" in line
    assert "ACCELERATE_USE_CPU=true" in cpu
    assert "ACCELERATE_USE_CPU" not in gpu
    assert "--num_processes 3" in right_commands(THREE)
    assert right_commands(None, 1) == "One process: python -m distloop.train …"
    assert right_commands(None) == "One process: python -m distloop.train …"
    assert right_commands(Launch(1, False, "distloop.train", True)) == "One process: python -m distloop.train …"
    assert right_commands(None, 2).count(" -m distloop.train …") == 2


@pytest.mark.parametrize(
    ("typed", "shown"), [("my_train.py", "my_train.py"), ("../my loops/mixup.py", "'../my loops/mixup.py'")]
)
def test_the_right_commands_start_a_loop_of_the_users_own(
    monkeypatch: pytest.MonkeyPatch, typed: str, shown: str
) -> None:
    monkeypatch.setattr(sys, "argv", [typed, "--name", "x"])
    assert right_commands(None, 1) == f"One process: python {shown} …"
    assert right_commands(Launch(1, False, typed)) == f"One process: python {shown} …"
    for line in right_commands(None, 2).splitlines():
        assert line.endswith(f" {shown} …")
    with pytest.raises(UsageError, match=re.escape(f"srun --ntasks=4 python {shown} …")):
        check_world(2, {"SLURM_STEP_NUM_TASKS": "4"}, 2, None)


def test_the_right_commands_are_ones_that_accelerate_reads_as_meant() -> None:
    from accelerate.commands.launch import launch_command_parser

    for line in right_commands(None, 2).splitlines():
        words = line.rpartition("accelerate launch ")[2].split()
        arguments = launch_command_parser().parse_args(words)
        assert (arguments.num_processes, arguments.multi_gpu, arguments.num_machines) == (2, True, 1)
        assert (arguments.module, arguments.training_script) == (True, "distloop.train")
