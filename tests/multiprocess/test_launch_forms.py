"""Every right way to start a run trains the same; every way that would silently not be what it says is refused."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import yaml

from tests.tools.ranks import REPOSITORY, accelerate_launch, command, free_port, rank_environment, train, write_config
from tests.tools.records import losses

SETTINGS = {
    "data": "diabetes",
    "model": "linear",
    "task": "regression",
    "dtype": "float64",
    "batch": {"global_size": 32},
    "train": {"steps": 8},
    "log": {"every_steps": 1},
}
SCRIPT = str(REPOSITORY / "distloop" / "train.py")
MODULE = [sys.executable, "-m", "distloop.train"]
ACCELERATE = str(Path(sys.executable).with_name("accelerate"))  # as a user types it
NO_GPU = {"CUDA_VISIBLE_DEVICES": ""}
CPU = {"ACCELERATE_USE_CPU": "true"}
NOT_IMPORTABLE = {"PYTHONPATH": ""}  # distloop is neither installed for the tests nor in the folder they run in
QUIET = ["--mixed_precision", "no", "--dynamo_backend", "no"]
MAIN_PROCESS = ["--main_process_ip", "127.0.0.1", "--main_process_port", "29876"]

# name -> (command, what is added to the environment, processes)
RIGHT_FORMS: dict[str, tuple[list[str], dict[str, str], int]] = {
    "python script": ([sys.executable, SCRIPT], NOT_IMPORTABLE, 1),
    "python -m": (MODULE, {}, 1),
    "accelerate launch script": ([ACCELERATE, "launch", *QUIET, SCRIPT], NOT_IMPORTABLE, 1),
    "accelerate launch -m": ([ACCELERATE, "launch", *QUIET, "-m", "distloop.train"], {}, 1),
    "accelerate launch script, two processes": (accelerate_launch(2), {**CPU, **NOT_IMPORTABLE}, 2),
}

# name -> (launcher's words, the launcher's config file)
WRONG_FORMS: dict[str, tuple[list[str], dict[str, object] | None]] = {
    "--cpu --num_processes 2": (["--cpu", "--num_machines", "1", "--num_processes", "2"], None),
    "config file with MULTI_CPU": (
        [],
        {"distributed_type": "MULTI_CPU", "use_cpu": True, "num_machines": 1, "num_processes": 2},
    ),
    "config file with NO, and --num_processes 2": (
        ["--num_processes", "2"],
        {"distributed_type": "NO", "use_cpu": True, "num_machines": 1},
    ),
    "--multi_gpu without a GPU": (
        ["--multi_gpu", "--num_machines", "1", "--num_processes", "2", "--main_process_port", "0"],
        None,
    ),
    "two machines without --multi_gpu": (
        ["--num_machines", "2", "--num_processes", "2", "--machine_rank", "0", *MAIN_PROCESS],
        None,
    ),
}

# name -> (words, environment) of one process that something around it takes for one of two
ALONE: dict[str, tuple[list[str], dict[str, str]]] = {
    "--expect-world 2": (["--expect-world", "2"], {}),
    "srun with two tasks that says no rank": ([], {"SLURM_STEP_NUM_TASKS": "2"}),
    "srun with two tasks, each a world of its own": (
        [],
        {"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "1", "RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
        | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29877"},
    ),
    "WORLD_SIZE without ranks": ([], {"WORLD_SIZE": "2"}),
}


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """The losses of the run in one process."""
    folder = tmp_path_factory.mktemp("expected")
    train(folder, ["--config", str(write_config(folder, SETTINGS))]).check()
    history = losses(folder / "runs" / "run")
    assert len(history) == 8
    return history


def check_run(folder: Path, expected: list[float], world_size: int) -> None:
    run = folder / "runs" / "run"
    assert json.loads((run / "environment.json").read_text())["world_size"] == world_size
    assert losses(run) == pytest.approx(expected, rel=1e-12)


def check_refusal(done: subprocess.CompletedProcess[str], folder: Path) -> None:
    """A non-zero code, one message of ours that shows a right command, and nothing trained."""
    assert done.returncode != 0, done.stdout
    assert done.stdout.count("distloop: ") == 1, done.stdout
    assert f'File "{REPOSITORY}/distloop' not in done.stdout, done.stdout  # a launcher may print its own traceback
    assert not (folder / "runs").exists()


def start_together(
    environments: list[dict[str, str]], words: list[str], folder: Path
) -> list[subprocess.CompletedProcess[str]]:
    """The same command in each of the environments, at the same time."""
    with ThreadPoolExecutor(len(environments)) as pool:
        return list(pool.map(lambda environment: command(words, folder, environment), environments))


LONG_FORMS = ("accelerate launch script", "accelerate launch -m")  # as one process; two are what it is for


@pytest.mark.parametrize(
    ("words", "environment", "world_size"),
    [
        pytest.param(*form, id=name, marks=pytest.mark.long if name in LONG_FORMS else ())
        for name, form in RIGHT_FORMS.items()
    ],
)
def test_a_right_form_trains_the_same_run(
    tmp_path: Path, expected: list[float], words: list[str], environment: dict[str, str], world_size: int
) -> None:
    config = write_config(tmp_path, SETTINGS)
    done = command([*words, "--config", config.name], tmp_path, {**NO_GPU, **environment})
    assert done.returncode == 0, done.stdout
    check_run(tmp_path, expected, world_size)
    assert done.stdout.count("finished: ") == 1  # rank 0 speaks for all
    assert "WARNING: " not in done.stdout
    assert "has no effect" not in done.stdout


def test_two_processes_with_nothing_but_the_variables_of_torch_are_one_run(
    tmp_path: Path, expected: list[float]
) -> None:
    config, port = write_config(tmp_path, SETTINGS), free_port()
    environments = [{**NO_GPU, **rank_environment(rank, 2, port)} for rank in range(2)]
    ranks = start_together(environments, [*MODULE, "--config", config.name], tmp_path)
    assert [rank.returncode for rank in ranks] == [0, 0], ranks
    check_run(tmp_path, expected, 2)
    said = [line for line in ranks[1].stdout.splitlines() if not line.startswith("[Gloo]")]  # older torch does
    assert said == []


def test_two_tasks_of_srun_are_one_run(tmp_path: Path, expected: list[float]) -> None:
    config = write_config(tmp_path, SETTINGS)
    step = {
        "SLURM_JOB_ID": str(random.randrange(10**6)),
        "SLURM_STEP_ID": "0",
        "SLURM_STEP_NUM_TASKS": "2",
        "SLURM_STEP_NODELIST": "localhost",
        "SLURM_STEP_TASKS_PER_NODE": "2",
        "SLURM_NTASKS": "2",
        "SLURM_NODEID": "0",
    }
    environments = [{**NO_GPU, **step, "SLURM_PROCID": str(task), "SLURM_LOCALID": str(task)} for task in range(2)]
    tasks = start_together(environments, [*MODULE, "--config", config.name], tmp_path)
    assert [task.returncode for task in tasks] == [0, 0], tasks
    check_run(tmp_path, expected, 2)


def test_a_shell_in_an_allocation_of_two_tasks_is_one_process(tmp_path: Path, expected: list[float]) -> None:
    # salloc sets these, and a process that is started without srun is alone all the same.
    allocation = {"SLURM_JOB_ID": "77", "SLURM_NTASKS": "2", "SLURM_NPROCS": "2", "SLURM_TASKS_PER_NODE": "2"}
    config = write_config(tmp_path, SETTINGS)
    train(tmp_path, ["--config", str(config)], environment={**NO_GPU, **allocation}).check()
    check_run(tmp_path, expected, 1)


@pytest.mark.parametrize(("options", "settings"), WRONG_FORMS.values(), ids=WRONG_FORMS)
def test_a_launch_that_would_silently_not_be_distributed_is_refused(
    tmp_path: Path, options: list[str], settings: dict[str, object] | None
) -> None:
    config = write_config(tmp_path, SETTINGS)
    file = ["--config_file", str(write_config(tmp_path, settings, "launcher"))] if settings else []
    words = [ACCELERATE, "launch", *file, *options, *QUIET, SCRIPT, "--config", config.name]
    done = command(words, tmp_path, NO_GPU)
    check_refusal(done, tmp_path)
    shown = " ".join(accelerate_launch(2)[3:])  # the words that a test above has seen to be right
    assert f"ACCELERATE_USE_CPU=true accelerate launch {shown} …" in done.stdout


@pytest.mark.parametrize(("words", "environment"), ALONE.values(), ids=ALONE)
def test_one_process_that_should_be_one_of_two_is_refused(
    tmp_path: Path, words: list[str], environment: dict[str, str]
) -> None:
    config = write_config(tmp_path, SETTINGS)
    done = command([*MODULE, "--config", config.name, *words], tmp_path, {**NO_GPU, **environment})
    check_refusal(done, tmp_path)
    assert done.returncode == 2
    assert "Traceback" not in done.stdout
    assert ("srun --ntasks=2" if "SLURM_STEP_NUM_TASKS" in environment else "--num_processes 2") in done.stdout


def test_a_launcher_that_asks_for_something_else_than_the_config_is_overruled_with_a_warning(
    tmp_path: Path, expected: list[float]
) -> None:
    config = write_config(tmp_path, SETTINGS)
    options = ["--mixed_precision", "bf16", "--dynamo_backend", "inductor"]
    words = [*accelerate_launch(2, None, *options), "--config", config.name]
    done = command(words, tmp_path, {**NO_GPU, **CPU})
    assert done.returncode == 0, done.stdout
    check_run(tmp_path, expected, 2)
    warnings = [line for line in done.stdout.splitlines() if "has no effect" in line]
    assert len(warnings) == 1, done.stdout  # one for both, from one rank
    assert "ACCELERATE_MIXED_PRECISION=bf16" in warnings[0]
    assert "ACCELERATE_DYNAMO_BACKEND=inductor" in warnings[0]


def test_a_users_own_default_accelerate_config_is_overruled_with_one_warning(
    tmp_path: Path, expected: list[float]
) -> None:
    config = write_config(tmp_path, SETTINGS)
    (tmp_path / "accelerate").mkdir()
    own = {
        "compute_environment": "LOCAL_MACHINE",
        "distributed_type": "NO",
        "use_cpu": True,
        "num_machines": 1,
        "num_processes": 1,
        "mixed_precision": "bf16",
    }
    (tmp_path / "accelerate" / "default_config.yaml").write_text(yaml.safe_dump(own))
    environment = {**NO_GPU, "HF_HOME": str(tmp_path)}
    done = command([ACCELERATE, "launch", SCRIPT, "--config", config.name], tmp_path, environment)
    assert done.returncode == 0, done.stdout
    check_run(tmp_path, expected, 1)
    warnings = [line for line in done.stdout.splitlines() if "has no effect" in line]
    assert len(warnings) == 1, done.stdout
    assert "bf16" in warnings[0]


def test_the_launchers_gradient_accumulation_changes_nothing(tmp_path: Path, expected: list[float]) -> None:
    config = write_config(tmp_path, SETTINGS)
    environment = {"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4", **NO_GPU}
    train(tmp_path, ["--config", str(config)], 2, environment).check()
    check_run(tmp_path, expected, 2)
