"""The process is started once more with PYTHONHASHSEED=0, where that is possible and does no harm."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.tools.ranks import clean_environment

PROGRAM = """
import os, sys, threading
print("started")
{first}
from distloop.ranks.environment import fix_hashes
fix_hashes(os.environ)
print(os.environ.get("PYTHONHASHSEED"), hash("text") == {expected}, sys.argv[1:])
sys.stdout.flush()
os._exit(0)
"""
HASH = int(
    subprocess.run(
        [sys.executable, "-c", "print(hash('text'))"],
        env={**clean_environment(), "PYTHONHASHSEED": "0"},
        capture_output=True,
        check=True,
    ).stdout
)


def run(folder: Path, options: list[str], program: str, **variables: str) -> list[str]:
    """What a program prints that is a file, or comes from stdin if there is no folder."""
    environment = {name: value for name, value in clean_environment().items() if name != "PYTHONHASHSEED"}
    (folder / "program.py").write_text(program)
    words = [sys.executable, *options, *([] if "-" in options else ["program.py"]), "a", "b c"]
    done = subprocess.run(
        words,
        cwd=folder,
        env={**environment, **variables},
        input=program,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    return done.stdout.splitlines()


def test_a_program_starts_once_more_with_its_options_and_arguments(tmp_path: Path) -> None:
    program = PROGRAM.format(first="print(sys.flags.optimize)", expected=HASH)
    assert run(tmp_path, ["-O"], program) == ["started", "1"] * 2 + ["0 True ['a', 'b c']"]


@pytest.mark.parametrize(
    ("options", "first", "variables", "left"),
    [
        pytest.param([], "", {"PYTHONHASHSEED": "7"}, "7", id="set by the user"),
        pytest.param(["-"], "", {}, "None", id="a program that comes from a pipe"),
        pytest.param([], "sys.settrace(lambda *_: None)", {}, "None", id="a debugger"),
        pytest.param(
            [], "threading.Thread(target=threading.Event().wait, daemon=True).start()", {}, "None", id="a thread"
        ),
        pytest.param(["-E"], "sys.path[:0] = {path!r}", {}, "None", id="Python that reads no variables"),
    ],
)
def test_it_does_not_where_that_would_be_wrong_or_of_no_use(
    tmp_path: Path, options: list[str], first: str, variables: dict[str, str], left: str
) -> None:
    program = PROGRAM.format(first=first.format(path=sys.path), expected=HASH)
    assert run(tmp_path, options, program, **variables) == ["started", f"{left} False ['a', 'b c']"]
