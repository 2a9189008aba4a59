"""`distloop copy`: this version's loop as a file of one's own, and what it is not written to."""

from __future__ import annotations

import ast
import difflib
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from distloop import __version__
from distloop.commands import copy
from distloop.errors import RunFailed
from tests.tools.ranks import REPOSITORY, command

LOOP = (REPOSITORY / "distloop" / "train.py").read_text()


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def changes(text: str) -> tuple[list[str], list[str]]:
    """The lines that train.py has and `text` has not, and the other way round; empty ones apart."""
    compared = list(difflib.ndiff(LOOP.splitlines(), text.splitlines()))
    gone, new = ([line[2:] for line in compared if line[0] == sign and line[2:]] for sign in "-+")
    return gone, new


def test_a_copy_is_the_loop_but_for_its_commands_its_path_and_its_stamp(here: Path) -> None:
    assert copy.main(["my_train.py"]) == 0
    gone, new = changes((here / "my_train.py").read_text())
    comment = "# before torch is imported: ranks from Slurm, CPU threads, signals that only ask for a stop"
    assert new == [
        "    accelerate launch my_train.py --config configs/digits.yaml",
        "    python my_train.py --config configs/digits.yaml --optim.lr 0.01",
        f"    {comment}",
        f'    prepare_process(copied_from="{__version__}")',
    ]
    assert [line.partition("  # ")[0] for line in gone] == [
        "    accelerate launch distloop/train.py --config configs/digits.yaml",
        "    python -m distloop.train --config configs/digits.yaml --optim.lr 0.01",
        "import sys",
        "from pathlib import Path",
        "if not __package__:",
        "    sys.path[0] = str(Path(__file__).resolve().parent.parent)",
        "    prepare_process()",
    ]


def test_the_training_itself_is_the_same_to_the_letter(here: Path) -> None:
    copy.main(["my_train.py"])
    texts = [LOOP, (here / "my_train.py").read_text()]
    functions = [text[text.index("def train(") :] for text in texts]
    assert functions[0] == functions[1]
    assert functions[1].endswith('if __name__ == "__main__":\n    start(train)\n')


def ruff(*words: str) -> subprocess.CompletedProcess[str]:
    options = ["--no-cache", "--config", str(REPOSITORY / "pyproject.toml")]
    return command([sys.executable, "-m", "ruff", *words, *options, "."], Path.cwd())


def test_a_copy_passes_this_repositorys_lint(here: Path) -> None:
    copy.main(["my_train.py"])
    for words in (["check"], ["format", "--check"]):
        done = ruff(*words)
        assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    "name", ["train.py", "my-train.py", "my train.py", "zwei_Köpfe.py", "my.train.py", "{x}%s$y.py"]
)
def test_the_commands_name_the_file_as_a_shell_takes_it(
    here: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    (here / "my loops").mkdir()
    assert copy.main([f"my loops/{name}"]) == 0
    text = (here / "my loops" / name).read_text(encoding="utf-8")
    assert [path.name for path in here.rglob("*.py")] == [name]
    said = capsys.readouterr().out
    starts = ["python ", "accelerate launch ", "TRAIN="]
    typed = [next(line for line in said.splitlines() if line.strip().startswith(start)) for start in starts]
    own = [line for line in (ast.get_docstring(ast.parse(text)) or "").splitlines() if "--config" in line]
    for line, file in [(line, f"my loops/{name}") for line in typed] + [(line, name) for line in own]:
        program = line.replace("…", "").replace("TRAIN=", "echo ")
        for word in ("accelerate launch", "python"):
            program = program.replace(word, "echo")
        words = command(["bash", "-c", program], here).stdout
        assert words.startswith(f"{file} "), line
    assert len(own) == 2
    assert "docs/own-loop.md" in said
    assert f"distloop {__version__}" in said


# what is typed -> what is said of it
REFUSED = {
    "there.py": "there.py is there already",
    "dangling.py": "dangling.py is there already",
    "folder.py": "folder.py is a folder: name the file to write, such as folder.py/my_train.py",
    ".": ". is a folder: name the file to write, such as my_train.py",
    "my_train": "it ends in .py, as my_train.py does",
    "my_train.yaml": "it ends in .py, as my_train.py does",
    ".py": "is no name of a Python file",
    "nowhere/my_train.py": "there is no folder nowhere",
    "there.py/my_train.py": "there is no folder there.py",
    'my"""train.py': "a name without quotes",
    "my\ntrain.py": "a name without quotes",
    "distloop/my_train.py": "would be a part of distloop itself",
    "distloop/ranks/my_train.py": "would be a part of distloop itself",
    "distloop.py": "the installed module 'distloop', which other modules import. Choose another name, such as "
    "my_distloop.py",
    **{
        f"{module}.py": f"the installed module '{module}'"
        for module in ("torch", "accelerate", "random", "copy", "yaml")
    },
    "/proc/my_train.py": "cannot be written",
}


@pytest.mark.parametrize("typed", REFUSED)
def test_what_would_do_harm_is_refused_with_one_message_and_nothing_is_written(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, typed: str
) -> None:
    monkeypatch.setattr(copy, "PACKAGE", here / "distloop")
    (here / "distloop" / "ranks").mkdir(parents=True)
    (here / "distloop" / "train.py").write_text(LOOP)
    (here / "there.py").write_text("mine")
    (here / "dangling.py").symlink_to("nothing")
    (here / "folder.py").mkdir()
    before = sorted(here.rglob("*"))
    assert copy.main([typed]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("distloop: ")
    assert REFUSED[typed] in err
    assert len(err.splitlines()) == 1
    assert sorted(here.rglob("*")) == before
    assert (here / "there.py").read_text() == "mine"


def test_a_copy_that_there_is_no_room_for_leaves_nothing(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))
    try:
        code = copy.main(["my_train.py"])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert code == 2
    assert "my_train.py cannot be written: File too large" in capsys.readouterr().err
    assert list(here.iterdir()) == []


@pytest.mark.parametrize(
    "change",
    [
        ("prepare_process()  #", "prepare_process() #"),
        ("if not __package__:", "if __package__ is None:"),
        ("import sys\n", ""),
        ("accelerate launch distloop/train.py ", ""),
        ("python -m distloop.train ", "python -m distloop.train python -m distloop.train "),
    ],
)
def test_a_loop_that_is_not_this_versions_is_not_copied(change: tuple[str, str]) -> None:
    assert copy.copy_of(LOOP, "my_train.py")
    changed = LOOP.replace(*change)
    assert changed != LOOP
    with pytest.raises(RunFailed, match=rf"distloop/train\.py is not that of distloop {__version__}"):
        copy.copy_of(changed, "my_train.py")


def test_the_command_imports_neither_torch_nor_the_loop(here: Path) -> None:
    program = (
        "import sys; from distloop.commands.cli import main\n"
        "try: main()\nexcept SystemExit as end: assert end.code == 0\n"
        "print(sorted({'torch', 'numpy', 'accelerate', 'yaml', 'distloop.train'} & set(sys.modules)))"
    )
    done = command([sys.executable, "-c", program, "copy", "my_train.py"], here)
    assert done.stdout.splitlines()[-1] == "[]", done.stdout
    assert (here / "my_train.py").exists()
