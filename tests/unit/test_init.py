"""`distloop init`: what it says, and that it overwrites nothing. test_package.py tests what it writes from a wheel."""

from __future__ import annotations

import os
import re
import resource
import shlex
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from distloop import __version__
from distloop.commands import init
from tests.tools.ranks import REPOSITORY, command


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def contents(folder: Path) -> dict[Path, bytes | None]:
    """All that is in a folder, with the bytes of files and links."""
    found: dict[Path, bytes | None] = {}
    for path in folder.rglob("*"):
        if path.is_symlink():
            found[path] = os.fsencode(os.readlink(path))
        else:
            found[path] = None if path.is_dir() else path.read_bytes()
    return found


def test_it_says_what_it_has_written_and_what_to_type_next(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert init.main([]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0] == f"distloop {__version__} has written to {here}:"
    end = said.index("")
    assert sorted(line.split()[0] for line in said[1:end]) == sorted(path.name for path in here.iterdir())
    assert said[end:] == ["", "To begin:", "  distloop train --config configs/mine.yaml"]
    assert (here / "configs" / "mine.yaml").exists()


def test_a_folder_of_another_name_is_made_and_entered(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert init.main(["projects/it's mine"]) == 0
    enter = capsys.readouterr().out.splitlines()[-2]
    assert shlex.split(enter) == ["cd", "projects/it's mine"]
    assert (here / "projects" / "it's mine" / "my_train.py").is_file()


def test_scripts_can_be_started_by_all_who_may_read_them(here: Path) -> None:
    before = os.umask(0o027)
    try:
        assert init.main([]) == 0
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in (here / "launch").glob("*_node.sh")} == {0o750}
    assert (here / "launch" / "common.sh").stat().st_mode & 0o777 == 0o640


def test_the_readme_is_short_and_all_that_it_names_is_there(here: Path) -> None:
    assert init.main([]) == 0
    text = (here / "README.md").read_text()
    assert len(text.splitlines()) <= 12
    named = set(re.findall(r"\b(?:(?:configs|launch|slurm)/\S+|\w+)\.(?:py|yaml|sh|sbatch)\b", text))
    assert named >= {"launch/debug.sh", "launch/single_node.sh", "slurm/single_node.sbatch", "configs/mine.yaml"}
    assert [name for name in named if not (here / name).is_file()] == []


# What is there already -> what is named for it.
THERE: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "a file": (lambda here: (here / "README.md").write_text("mine"), ["README.md"]),
    "files of folders": (
        lambda here: [shutil.copytree(REPOSITORY / name, here / name) for name in ("launch", "slurm")],
        [f"slurm/{path.name}" for path in (REPOSITORY / "slurm").iterdir()] + ["launch/accelerate/cpu.yaml"],
    ),
    "a folder": (lambda here: (here / "mine.py").mkdir(), ["mine.py"]),
    "a file where a folder would be": (lambda here: (here / "configs").write_text("mine"), ["configs"]),
    "a link to nothing": (lambda here: (here / "my_train.py").symlink_to("nothing"), ["my_train.py"]),
    "a folder that is a link to nothing": (lambda here: (here / "slurm").symlink_to("nothing"), ["slurm"]),
}


@pytest.mark.parametrize("case", THERE)
def test_nothing_is_written_where_something_would_be_overwritten(
    here: Path, capsys: pytest.CaptureFixture[str], case: str
) -> None:
    make, named = THERE[case]
    make(here)
    before = contents(here)
    assert init.main([]) == 2
    assert contents(here) == before
    out, err = capsys.readouterr()
    assert out == ""
    assert len(err.splitlines()) == 1
    assert err.startswith(f"distloop: Nothing was written: in {here} there are already ")
    words = re.split(r"[, ]+", err.partition("already ")[2].partition(". ")[0])
    assert set(named) <= set(words)
    assert all(os.path.lexists(here / word) for word in words)


def test_a_second_time_it_says_that_all_is_there_and_changes_nothing(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert init.main(["mine"]) == 0
    (here / "mine" / "mine.py").write_text("changed")
    before = contents(here)
    capsys.readouterr()
    assert init.main(["mine"]) == 2
    assert contents(here) == before
    assert capsys.readouterr().err == (
        f"distloop: {here}/mine has all that is written here: it stays as it is. "
        "distloop init my_project writes to another folder.\n"
    )


REFUSED = {
    "file": "file is there, and no folder: name another",
    "nothing": "nothing is there, and no folder",
    "distloop/ranks": "distloop/ranks is a part of distloop itself",
    "file/my/project": "distloop: file is there, and no folder",
}


@pytest.mark.parametrize("typed", REFUSED)
def test_a_folder_that_is_none_is_refused(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, typed: str
) -> None:
    shutil.copytree(REPOSITORY / "distloop", here / "distloop")
    for name in ("configs", "examples", "launch", "slurm"):
        (here / name).symlink_to(REPOSITORY / name)
    monkeypatch.setattr(init, "PACKAGE", here / "distloop")
    (here / "file").write_text("mine")
    Path("nothing").symlink_to("nowhere")
    before = contents(here)
    assert init.main([typed]) == 2
    err = capsys.readouterr().err
    assert len(err.splitlines()) == 1
    assert REFUSED[typed] in err
    assert contents(here) == before


def test_what_there_is_no_room_for_leaves_nothing(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3500, before[1]))  # room for the configs, not for slurm/common.sh
    try:
        code = init.main(["mine"])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert code == 2
    assert "mine/slurm/common.sh cannot be written: File too large" in capsys.readouterr().err
    assert list(here.iterdir()) == []


def test_an_installation_without_the_files_says_so(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (here / "packages" / "distloop").mkdir(parents=True)
    shutil.copy(REPOSITORY / "distloop" / "train.py", here / "packages" / "distloop")
    monkeypatch.setattr(init, "PACKAGE", here / "packages" / "distloop")
    assert init.main(["mine"]) == 1
    assert capsys.readouterr().err == (
        f"distloop: README.md, configs, launch, mine.py, slurm: not in {here}/packages. Install distloop again.\n"
    )
    assert not (here / "mine").exists()


def test_the_command_imports_neither_torch_nor_the_loop(here: Path) -> None:
    program = (
        "import sys; from distloop.commands.cli import main\n"
        "try: main()\nexcept SystemExit as end: assert end.code == 0\n"
        "print(sorted({'torch', 'numpy', 'accelerate', 'yaml', 'distloop.train'} & set(sys.modules)))"
    )
    done = command([sys.executable, "-c", program, "init", "mine"], here)
    assert done.stdout.splitlines()[-1] == "[]", done.stdout
    assert (here / "mine" / "mine.py").exists()


def test_a_folder_that_is_a_link_is_in_the_way(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "configs").symlink_to("../elsewhere")
    assert init.main([str(tmp_path / "mine")]) == 2
    assert "there are already configs" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "elsewhere").iterdir()] == []
