"""The scripts of launch/: what they ask of Accelerate's launcher, and what they refuse before they start anything."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file

from tests.tools.launching import LAUNCH
from tests.tools.ranks import REPOSITORY, clean_environment

CONFIGS = sorted((LAUNCH / "accelerate").glob("*.yaml"))
SCRIPTS = ["debug.sh", "single_node.sh", "multi_node.sh"]
TRAIN = str(REPOSITORY / "distloop" / "train.py")
HEAD = {"MASTER_ADDR": "10.0.0.1", "MACHINES": "2", "MACHINE_RANK": "1"}
# Stand in for the programs of those names: the launcher notes what it was given; Python, how many GPUs there are, and
# that the other machines were met.
LAUNCHER = """#!/bin/bash
printf '%s\\0' "$@" >words
env -0 >environment
"""
PYTHON = """#!/bin/bash
if [ "$1" = -c ]; then echo "$GPUS"; else printf '%s ' "$@" >>met; exit "${MEETING:-0}"; fi
"""


class Launch:
    """How a script, run in `folder`, ended, and what it gave to the launcher, if it came to that."""

    def __init__(self, folder: Path, name: str, arguments: list[str], variables: dict[str, str], scripts: Path) -> None:
        programs = folder / "programs"
        programs.mkdir(exist_ok=True)
        for program, text in {"accelerate": LAUNCHER, "python": PYTHON}.items():
            (programs / program).write_text(text)
            (programs / program).chmod(0o755)
        environment = {**clean_environment(), "VIRTUAL_ENV": str(programs), "GPUS": "0"}
        environment["PATH"] = f"{programs}:{os.environ['PATH']}"
        del environment["OMP_NUM_THREADS"]
        words = [str(scripts / name), *arguments]
        done = subprocess.run(
            words, cwd=folder, env={**environment, **variables}, text=True, capture_output=True, timeout=60, check=False
        )
        self.code, self.errors = done.returncode, done.stderr
        self.launched = (folder / "words").exists()
        if self.launched:
            self.words = (folder / "words").read_text().split("\0")[:-1]
            lines = (folder / "environment").read_text().split("\0")[:-1]
            self.environment = dict(line.split("=", 1) for line in lines)

    def option(self, name: str) -> str:
        return self.words[self.words.index(name) + 1]


def launch(
    folder: Path, name: str, *arguments: str, variables: dict[str, str] | None = None, scripts: Path = LAUNCH
) -> Launch:
    needed = HEAD if name == "multi_node.sh" else {}
    return Launch(folder, name, list(arguments), {**needed, **(variables or {})}, scripts)


def usable_cpus() -> int:
    return len(os.sched_getaffinity(0))


@pytest.mark.parametrize("path", CONFIGS, ids=[path.stem for path in CONFIGS])
def test_each_accelerate_config_is_one_for_accelerates_own_parser(path: Path) -> None:
    config = load_config_from_file(str(path))  # it refuses unknown keys
    assert config.mixed_precision == "no"
    assert (config.num_processes > 1) == (config.distributed_type == "MULTI_GPU")


@pytest.mark.parametrize("name", SCRIPTS)
def test_further_arguments_are_passed_on_as_they_were_typed_and_count_over_those_of_the_script(
    tmp_path: Path, name: str
) -> None:
    typed = ["--model.args", "{hidden: 8}", "--name", 'it\'s "mine" $HOME *', "", "--expect-world", "3"]
    done = launch(tmp_path, name, *typed)
    assert done.words[-len(typed) :] == typed
    assert TRAIN in done.words[: -len(typed)]


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_names_its_own_accelerate_config_and_is_told_which_world_to_expect(tmp_path: Path, name: str) -> None:
    done = launch(tmp_path, name, variables={"PROCESSES": "3"})
    assert done.words[:2] == ["launch", "--quiet"]
    assert Path(done.option("--config_file")) in CONFIGS
    processes = {"debug.sh": 1, "single_node.sh": 3, "multi_node.sh": 6}[name]
    assert done.option("--expect-world") == str(processes)
    if processes > 1:
        assert done.option("--num_processes") == str(processes)


@pytest.mark.parametrize(
    ("name", "how"), [("debug.sh", "link"), ("single_node.sh", "linked folder"), ("multi_node.sh", "relative")]
)
def test_a_script_finds_what_belongs_to_it_through_a_link_and_a_path_with_spaces(
    tmp_path: Path, name: str, how: str
) -> None:
    scripts = tmp_path / "my scripts"
    if how == "linked folder":
        scripts.symlink_to(LAUNCH)
    else:
        scripts.mkdir()
        target = LAUNCH / name
        (scripts / name).symlink_to(target if how == "link" else os.path.relpath(target, scripts))
    done = launch(tmp_path, name, scripts=scripts)
    assert done.launched, done.errors
    assert Path(done.option("--config_file")).is_file()
    assert any(Path(word).samefile(TRAIN) for word in done.words if word.endswith("train.py"))


# How TRAIN is typed -> where the file lies, from the folder that one is in.
OWN_LOOPS = {
    "my_train.py": "my_train.py",
    "loops/my_train.py": "loops/my_train.py",
    "my loops/it's mine.py": "my loops/it's mine.py",
    "../{here}/my_train.py": "my_train.py",
    "{folder}/loops/my_train.py": "loops/my_train.py",
}


@pytest.mark.parametrize("typed", OWN_LOOPS)
@pytest.mark.parametrize("name", SCRIPTS)
def test_a_loop_of_ones_own_takes_the_place_of_distloops_and_finds_the_package(
    tmp_path: Path, name: str, typed: str
) -> None:
    file = tmp_path / OWN_LOOPS[typed]
    file.parent.mkdir(exist_ok=True)
    file.touch()
    (tmp_path / "scripts").symlink_to(LAUNCH)
    typed = typed.format(folder=tmp_path, here=tmp_path.name)
    variables = {"TRAIN": typed, "PYTHONPATH": "/a/folder of mine"}
    done = launch(tmp_path, name, "--name", "x", variables=variables, scripts=tmp_path / "scripts")
    assert done.launched, done.errors
    without = launch(tmp_path, name, "--name", "x", scripts=tmp_path / "scripts").words
    place = next(index for index, word in enumerate(without) if word.endswith("/distloop/train.py"))
    assert done.words[: place + 2] == [*without[:place], typed, without[place + 1]]
    assert len(done.words) == len(without)
    assert done.environment["PYTHONPATH"].split(":") == [str(REPOSITORY), "/a/folder of mine"]


@pytest.mark.parametrize("name", SCRIPTS)
def test_without_a_loop_of_ones_own_all_is_distloops(tmp_path: Path, name: str) -> None:
    for variables in ({}, {"TRAIN": ""}):
        done = launch(tmp_path, name, variables={"PYTHONPATH": "mine", **variables})
        assert any(Path(word).samefile(TRAIN) for word in done.words if word.endswith("train.py"))
        assert done.environment["PYTHONPATH"] == "mine"


@pytest.mark.parametrize("name", SCRIPTS)
@pytest.mark.parametrize("typed", ["my_tarin.py", "a folder", "distloop.train"])
def test_a_loop_of_ones_own_that_is_not_there_is_refused(tmp_path: Path, name: str, typed: str) -> None:
    (tmp_path / "a folder").mkdir()
    done = launch(tmp_path, name, variables={"TRAIN": typed})
    check_refusal(done, f"{name}: TRAIN={typed}: there is no such file in {tmp_path}")
    assert not (tmp_path / "met").exists()  # no machine waits for this one either


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A folder with the scripts and without the package, as `distloop init` writes it."""
    shutil.copytree(LAUNCH, tmp_path / "my project" / "launch")
    return tmp_path / "my project"


@pytest.mark.parametrize("name", SCRIPTS)
def test_scripts_without_a_checkout_start_the_loop_of_the_installed_package(project: Path, name: str) -> None:
    done = launch(project, name, "--name", "x", scripts=project / "launch")
    assert done.launched, done.errors
    place = done.words.index("-m")
    assert done.words[place : place + 3] == ["-m", "distloop.train", "--expect-world"]
    assert Path(done.option("--config_file")).is_relative_to(project / "launch")
    (project / "my_train.py").touch()
    done = launch(project, name, variables={"TRAIN": "my_train.py"}, scripts=project / "launch")
    assert "-m" not in done.words
    assert "my_train.py" in done.words


def test_the_environment_beside_the_scripts_is_taken_unless_one_is_active(project: Path) -> None:
    (project / ".venv" / "bin").mkdir(parents=True)
    for program in ("accelerate", "python"):
        (project / ".venv" / "bin" / program).write_text("#!/bin/bash\necho $0 >>taken\n")
        (project / ".venv" / "bin" / program).chmod(0o755)
    programs = [str(project / ".venv" / "bin" / program) for program in ("python", "accelerate")]
    active: list[tuple[dict[str, str], bool]] = [
        ({}, False),  # Launch has VIRTUAL_ENV
        ({"VIRTUAL_ENV": "", "CONDA_DEFAULT_ENV": "mine"}, False),
        ({"VIRTUAL_ENV": ""}, True),
        ({"VIRTUAL_ENV": "", "CONDA_DEFAULT_ENV": "base"}, True),
    ]
    for variables, taken in active:
        launch(project, "debug.sh", variables=variables, scripts=project / "launch")
        lines = (project / "taken").read_text().splitlines() if (project / "taken").exists() else []
        assert lines == (programs if taken else []), variables
        (project / "taken").unlink(missing_ok=True)


def test_all_gpus_of_the_machine_get_a_process_each(tmp_path: Path) -> None:
    done = launch(tmp_path, "single_node.sh", variables={"GPUS": "4"})
    assert (done.option("--num_processes"), done.option("--expect-world")) == ("4", "4")
    assert Path(done.option("--config_file")).name == "multi_gpu.yaml"
    assert "ACCELERATE_USE_CPU" not in done.environment


def test_all_gpus_of_all_machines_get_a_process_each(tmp_path: Path) -> None:
    done = launch(tmp_path, "multi_node.sh", variables={"GPUS": "4", "MACHINES": "3"})
    assert (done.option("--num_machines"), done.option("--machine_rank")) == ("3", "1")
    assert (done.option("--num_processes"), done.option("--expect-world")) == ("12", "12")
    assert (done.option("--main_process_ip"), done.option("--main_process_port")) == ("10.0.0.1", "29500")
    assert "ACCELERATE_USE_CPU" not in done.environment


@pytest.mark.parametrize("name", ["single_node.sh", "multi_node.sh"])
def test_without_a_gpu_ranks_compute_on_the_cpu(tmp_path: Path, name: str) -> None:
    done = launch(tmp_path, name)
    assert done.environment["ACCELERATE_USE_CPU"] == "true"
    assert done.option("--num_processes") == ("2" if name == "single_node.sh" else "4")


@pytest.mark.parametrize(("name", "processes"), [("debug.sh", 1), ("single_node.sh", 2), ("multi_node.sh", 1)])
def test_the_ranks_of_a_machine_share_its_cpus_unless_the_user_says_otherwise(
    tmp_path: Path, name: str, processes: int
) -> None:
    variables = {"PROCESSES": str(processes)}
    assert launch(tmp_path, name, variables=variables).environment["OMP_NUM_THREADS"] == str(
        max(1, usable_cpus() // processes)
    )
    variables["OMP_NUM_THREADS"] = "3"
    assert launch(tmp_path, name, variables=variables).environment["OMP_NUM_THREADS"] == "3"


def test_more_ranks_than_cpus_get_a_thread_each(tmp_path: Path) -> None:
    done = launch(tmp_path, "single_node.sh", variables={"PROCESSES": "1000"})
    assert done.environment["OMP_NUM_THREADS"] == "1"


@pytest.mark.parametrize("name", SCRIPTS)
@pytest.mark.parametrize("value", ["0", "abc", "-1", "1.5", "08", "2 3"])
def test_a_number_of_processes_that_is_none_is_refused(tmp_path: Path, name: str, value: str) -> None:
    check_refusal(launch(tmp_path, name, variables={"PROCESSES": value}), f"{name}: PROCESSES={value}")


@pytest.mark.parametrize("value", ["0", "two"])
def test_a_number_of_machines_that_is_none_is_refused(tmp_path: Path, value: str) -> None:
    check_refusal(launch(tmp_path, "multi_node.sh", variables={"MACHINES": value}), f"multi_node.sh: MACHINES={value}")


@pytest.mark.parametrize("missing", HEAD)
def test_a_variable_that_says_who_is_who_is_asked_for(tmp_path: Path, missing: str) -> None:
    done = launch(tmp_path, "multi_node.sh", variables={missing: ""})
    check_refusal(done, f"multi_node.sh: {missing} is not set")
    assert all(name in done.errors for name in HEAD), "a whole command, to copy"


@pytest.mark.parametrize("name", SCRIPTS)
def test_without_accelerate_a_script_says_where_it_comes_from(tmp_path: Path, name: str) -> None:
    done = launch(tmp_path, name, variables={"PATH": "/usr/bin:/bin"})
    check_refusal(done, "activate the environment")


def check_refusal(done: Launch, message: str) -> None:
    assert done.code == 2
    assert message in done.errors
    assert len(done.errors.splitlines()) == 1
    assert not done.launched


def test_machines_meet_before_any_launcher_starts_and_none_does_when_they_cannot(tmp_path: Path) -> None:
    variables = {"JOIN_SECONDS": "7", "MASTER_PORT": "4321"}
    done = launch(tmp_path, "multi_node.sh", variables={**variables, "MEETING": "1"})
    assert (tmp_path / "met").read_text() == "-m distloop.ranks.meeting 10.0.0.1 4321 1 2 7 "
    assert done.code == 1
    assert not done.launched
    done = launch(tmp_path, "multi_node.sh", variables=variables)
    assert done.option("--main_process_port") == "4321"
    assert done.option("--rdzv_conf") == "timeout=7"  # the launcher's own wait would be ten minutes


def test_signals_are_handed_on_to_the_ranks_and_these_have_the_time_to_save(tmp_path: Path) -> None:
    for name in ("single_node.sh", "multi_node.sh"):
        environment = launch(tmp_path, name).environment
        assert {"SIGTERM", "SIGINT", "SIGUSR1", "SIGUSR2"} <= set(environment["PET_SIGNALS_TO_HANDLE"].split(","))
        assert int(environment["PET_SHUTDOWN_TIMEOUT"]) >= 120
