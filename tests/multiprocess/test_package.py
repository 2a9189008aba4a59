"""The wheel: what is in it, and that it is enough to begin a project in another folder, and to train there."""

from __future__ import annotations

import json
import subprocess
import sys
import tarfile
import zipfile
from email import message_from_bytes
from pathlib import Path

import pytest

from distloop.commands.copy import copy_of
from tests.tools.installed import Installed, build, say_where
from tests.tools.ranks import REPOSITORY, command
from tests.tools.records import rows, status

PROJECT = "distloop/project"
# Folder of the repository -> where it is in the wheel.
PACKED = {"distloop": "distloop", **{name: f"{PROJECT}/{name}" for name in ("configs", "examples", "launch", "slurm")}}


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Installed:
    return Installed(tmp_path_factory.mktemp("installed") / "venv")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def project(installed: Installed, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return installed.project(tmp_path_factory.mktemp("elsewhere") / "my project")


def files_of_git(*folders: str) -> list[str]:
    """The repository's files in these folders, new ones too, but for what git ignores."""
    words = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", *folders]
    done = subprocess.run(words, cwd=REPOSITORY, text=True, capture_output=True, check=True, timeout=60)
    return sorted(name for name in done.stdout.split("\0") if name and (REPOSITORY / name).exists())


# ---- the files -------------------------------------------------------------------------------------------------------


def test_the_wheel_has_the_package_and_what_init_writes_and_nothing_else(wheel: Path) -> None:
    expected = {}
    for name in files_of_git(*PACKED):
        folder, _, rest = name.partition("/")
        expected[f"{PACKED[folder]}/{rest}"] = (REPOSITORY / name).read_bytes()
    assert f"{PROJECT}/launch/accelerate/cpu.yaml" in expected
    with zipfile.ZipFile(wheel) as archive:
        packed = {name: archive.read(name) for name in archive.namelist() if ".dist-info/" not in name}
        about = {name.partition(".dist-info/")[2] for name in archive.namelist() if ".dist-info/" in name}
    assert sorted(packed) == sorted(expected)
    assert packed == expected
    assert about == {"METADATA", "WHEEL", "RECORD", "entry_points.txt", "licenses/LICENSE"}


def test_a_wheel_that_is_built_from_the_sdist_has_the_same_files(wheel: Path, tmp_path: Path) -> None:
    words = [sys.executable, "-m", "hatchling", "build", "--target", "sdist", "--directory", str(tmp_path)]
    done = command(words, REPOSITORY)
    assert done.returncode == 0, done.stdout
    [sdist] = tmp_path.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"tests/unit/test_rooms.py", "docs/own-loop.md", "Makefile", "CHANGELOG.md", "LICENSE"} <= names
    second = build(tmp_path, sdist)
    with zipfile.ZipFile(wheel) as one, zipfile.ZipFile(second) as other:
        assert sorted(other.namelist()) == sorted(one.namelist())
        assert all(other.read(name) == one.read(name) for name in one.namelist())


def test_the_metadata_say_what_an_index_shows(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        [name] = [name for name in archive.namelist() if name.endswith("/METADATA")]
        text = archive.read(name)
    metadata = message_from_bytes(text)
    assert (metadata["License-Expression"], metadata["License-File"]) == ("Apache-2.0", "LICENSE")
    assert metadata["Description-Content-Type"] == "text/markdown"
    assert text.partition(b"\n\n")[2] == (REPOSITORY / "README.md").read_bytes()


def test_a_type_checker_knows_the_types_of_an_installed_distloop(installed: Installed, tmp_path: Path) -> None:
    (tmp_path / "mypy.ini").write_text("[mypy]\nstrict = True\n[mypy-torch.*]\nfollow_imports = skip\n")
    (tmp_path / "own.py").write_text(
        "from distloop.config import Config\n"
        "from distloop.tasks import Task\n"
        "from distloop.training import LearningRate\n\n\n"
        "class Mine(Task):\n    best = 3\n\n\n"
        "rate: str = LearningRate(Config(), 10)(0)\n"
    )
    words = [sys.executable, "-m", "mypy", "--python-executable", str(installed.python), "own.py"]
    done = installed.run(tmp_path, *words)
    errors = [line for line in done.stdout.splitlines() if ": error: " in line]
    assert [line.split(":")[1] for line in errors] == ["7", "10"], done.stdout
    assert '"Task"' in errors[0]
    assert '"float"' in errors[1]


# ---- a project -------------------------------------------------------------------------------------------------------


def test_init_writes_the_repositorys_files_and_the_loop_and_the_scripts_can_be_started(
    installed: Installed, tmp_path: Path
) -> None:
    done = installed.run(tmp_path, "distloop", "init")
    assert done.returncode == 0, done.stdout
    expected = {name.removeprefix("examples/"): name for name in files_of_git("configs", "examples", "launch", "slurm")}
    written = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    assert written == {*expected, "my_train.py"}
    for name, origin in expected.items():
        assert (tmp_path / name).read_bytes() == (REPOSITORY / origin).read_bytes()
        if (REPOSITORY / origin).stat().st_mode & 0o111:
            assert (tmp_path / name).stat().st_mode & 0o111 == 0o111
    loop = (REPOSITORY / "distloop" / "train.py").read_text()
    assert (tmp_path / "my_train.py").read_text() == copy_of(loop, "my_train.py")


def test_the_example_is_trained_by_the_command_that_init_names(installed: Installed, tmp_path: Path) -> None:
    said = installed.run(tmp_path, "distloop", "init", "a project").stdout
    say_where(tmp_path / "a project")
    typed = said.partition("To begin:\n")[2]
    done = installed.run(tmp_path, "bash", "-ec", typed)
    assert done.returncode == 0, done.stdout
    installed.check_imported(done.stdout, 1)
    assert status(tmp_path / "a project" / "runs" / "mine")["state"] == "finished"
    accuracies = [row["accuracy"] for row in rows(tmp_path / "a project" / "runs" / "mine", "validate")]
    assert accuracies[-1] > 0.93  # of tumours; three of five are benign


@pytest.mark.long
def test_two_ranks_are_started_by_a_script_of_the_project(installed: Installed, project: Path) -> None:
    words = ["launch/single_node.sh", "--config", "configs/mine.yaml", "--train.epochs", "2"]
    done = installed.run(project, *words, PROCESSES=2)
    assert done.returncode == 0, done.stdout
    installed.check_imported(done.stdout, 2)
    run = project / "runs" / "mine"
    assert status(run)["state"] == "finished"
    assert json.loads((run / "environment.json").read_text())["world_size"] == 2
    assert (run / "loop.py").read_bytes() == (installed.package / "train.py").read_bytes()


def test_digits_are_trained_by_a_script_with_the_projects_own_loop(
    installed: Installed, project: Path, tmp_path: Path
) -> None:
    words = ["launch/debug.sh", "--config", "configs/digits.yaml"]
    done = installed.run(project, *words, TRAIN="my_train.py", TMPDIR=tmp_path)
    assert done.returncode == 0, done.stdout
    [run] = tmp_path.glob("*/digits")
    assert (status(run)["state"], status(run)["step"]) == ("finished", 20)
    assert (run / "loop.py").read_bytes() == (project / "my_train.py").read_bytes()


def test_without_the_package_a_script_says_what_is_missing(installed: Installed, project: Path, tmp_path: Path) -> None:
    for name in ("accelerate", "python"):  # an environment with Accelerate and without distloop
        (tmp_path / name).write_text(f'#!/bin/sh\nexec {sys.executable} -I -S "$@"\n')
        (tmp_path / name).chmod(0o755)
    done = installed.run(project, "launch/single_node.sh", PATH=f"{tmp_path}:/usr/bin:/bin")
    assert done.returncode == 2
    assert done.stdout == (
        "single_node.sh: python has no distloop (ModuleNotFoundError: No module named 'distloop'): activate the "
        "environment that distloop is installed in\n"
    )
