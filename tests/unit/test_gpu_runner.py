"""tests/gpu/run.sh and its runner: whatever one part does, the others run, and all stand in the table."""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.gpu.parts import LOG_BYTES, Part, keep_end
from tests.gpu.report import new_enough, table
from tests.gpu.runner import share_of
from tests.tools.ranks import REPOSITORY, clean_environment

SCRIPT = REPOSITORY / "tests" / "gpu" / "run.sh"
TIMEOUT = 120
# What tests/gpu/conftest.py does, in short: a line when a test begins, one when it has ended.
CONFTEST = """
import json, os, pytest

def write(row):
    with open(os.environ["GPU_RESULTS"], "a") as file:
        file.write(json.dumps(row) + "\\n")

@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item):
    write({"begun": item.name})
    return (yield)

def pytest_runtest_logreport(report):
    if report.when == "call" or report.outcome != "passed" and report.when == "setup":
        why = report.longrepr.reprcrash.message if report.failed else str(report.longrepr[2]) if report.skipped else ""
        name = report.location[2]
        figures = {"step": 1.5} if "figures" in name else {}
        write({"test": name, "outcome": report.outcome, "why": why, "seconds": report.duration, "figures": figures})
"""
PARTS = {
    "good": "import os\n\ndef test_with_figures():\n    assert os.environ['CUDA_VISIBLE_DEVICES'] == ''\n",
    "adding": "def test_sum():\n    assert 1 + 1 == 3, 'the sum is wrong'\n\ndef test_other():\n    pass\n",
    "unrecorded": "import os\n\nos.environ['GPU_RESULTS'] = os.devnull\n\ndef test_it():\n    pass\n",
    "skipping": "import pytest\n\n@pytest.mark.skip(reason='needs two cards')\ndef test_it():\n    pass\n",
    "crashing": "import ctypes\n\ndef test_memory():\n    ctypes.string_at(0)\n",
    "importing": "import no_such_library\n\ndef test_it():\n    pass\n",
    "blocking": """
import os, subprocess, sys, time
from pathlib import Path

def test_for_ever():
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
    Path(os.environ["GPU_OUT"], "child").write_text(str(child.pid))
    assert time.time() < float(os.environ["GPU_DEADLINE"]) < time.time() + 600
    time.sleep(600)
""",
    "chattering": """
import os

def test_output():
    while True:
        os.write(2, b"words without an end\\n" * 1000)
""",
}


@pytest.fixture
def parts(tmp_path: Path) -> Path:
    folder = tmp_path / "parts"
    folder.mkdir()
    (folder / "conftest.py").write_text(CONFTEST)
    for name, text in PARTS.items():
        (folder / f"test_{name}.py").write_text(text)
    return folder


def words_for(parts: Path, *arguments: str) -> list[str]:
    return [
        "bash",
        str(SCRIPT),
        "--device",
        "cpu",
        "--parts",
        str(parts),
        "--out",
        str(parts.parent / "out"),
        *arguments,
    ]


def environment(**changes: str) -> dict[str, str]:
    return {**clean_environment(), "PYTHON": sys.executable, **changes}


def run(parts: Path, *arguments: str, **changes: str) -> subprocess.CompletedProcess[str]:
    words = words_for(parts, *arguments)
    options: dict[str, Any] = {"cwd": parts.parent, "env": environment(**changes), "timeout": TIMEOUT}
    return subprocess.run(words, capture_output=True, text=True, check=False, **options)


def results(parts: Path) -> dict[str, Any]:
    return json.loads((parts.parent / "out" / "gpu_results.json").read_text())


def row(output: str, part: str) -> str:
    """The part's lines in the table, as one."""
    lines = iter(output.splitlines())
    found = next(line for line in lines if line.startswith(f"{part} "))
    for line in lines:
        if not line.startswith("      "):
            break
        found += " " + line.strip()
    return found


def is_gone(child: Path) -> bool:
    """Whether the process whose number is in the file has ended; who inherits it may take a moment to say so."""
    with contextlib.suppress(psutil.NoSuchProcess):
        psutil.Process(int(child.read_text())).wait(10)
    return not psutil.pid_exists(int(child.read_text()))


# ---- one fails, the others run ---------------------------------------------------------------------------------------


def test_whatever_a_part_does_the_others_run_and_all_stand_in_table_and_file_with_why(parts: Path) -> None:
    names = ["blocking", "chattering", "crashing", "importing", "adding", "skipping", "good", "unrecorded", "profile"]
    done = run(parts, "--minutes", "0.75", "--only", *names)
    assert done.returncode == 1, done.stdout + done.stderr
    found = results(parts)["parts"]
    assert set(found) == set(names)
    states = {name: part["state"] for name, part in found.items()}
    assert states == {
        "crashing": "crashed",
        "adding": "failed",
        "good": "passed",
        "blocking": "out of time",
        "importing": "crashed",
        "skipping": "skipped",
        "chattering": "out of time",
        "unrecorded": "crashed",
        "profile": "missing",
    }
    whys = {
        "crashing": "ended by SIGSEGV in test_memory",
        "adding": "test_sum: AssertionError: the sum is wrong",
        "good": "",
        "blocking": "s, and was killed in test_for_ever",
        "importing": "exit code 2: ModuleNotFoundError: No module named 'no_such_library'",
        "skipping": "skipped: Skipped: needs two cards",
        "chattering": "s, and was killed in test_output",
        "unrecorded": "exit code 0: 1 passed",
        "profile": "test_profile.py is not there",
    }
    for name, why in whys.items():
        assert states[name] in row(done.stdout, name)
        assert why in row(done.stdout, name), done.stdout
    assert row(done.stdout, "adding").split()[2:5] == ["1", "1", "0"]
    assert [test["outcome"] for test in found["adding"]["tests"]] == ["failed", "passed"]
    assert "\ngood\n  with_figures: step 1.5" in done.stdout
    assert max(map(len, done.stdout.split("\n\nAll of it")[0].splitlines())) <= 120
    out = parts.parent / "out"
    assert is_gone(out / "child"), "in a session of its own, but of the part"
    log = (out / "chattering.log").read_bytes()
    assert b"words without an end\n" * 100 in log[-3000:]
    assert len(log) <= LOG_BYTES


def test_the_machine_stands_in_the_file_and_a_run_where_all_passed_ends_with_0(parts: Path) -> None:
    (parts.parent / "tests").mkdir()  # where it is typed, there may be tests as well, and options of pytest's
    (parts.parent / "tests" / "__init__.py").write_text("raise SystemExit('not these tests')")
    done = run(parts, "--only", "good", PYTEST_ADDOPTS="--collect-only")
    assert done.returncode == 0, done.stdout + done.stderr
    found = results(parts)
    assert (found["device"], found["card"], found["minutes"], found["python"]) == (
        "cpu",
        None,
        15,
        sys.version.split()[0],
    )
    assert {"date", "driver", "torch", "cuda", "torchvision", "accelerate", "cpus"} <= set(found)
    assert list(found["parts"]) == ["good"]


def test_without_pytest_each_part_says_so(parts: Path, tmp_path: Path) -> None:
    (tmp_path / "without").mkdir()
    (tmp_path / "without" / "sitecustomize.py").write_text("import sys\nsys.modules['pytest'] = None\n")
    done = run(parts, "--only", "good", "adding", PYTHONPATH=str(tmp_path / "without"))
    assert done.returncode == 1, done.stdout + done.stderr
    for part in ("good", "adding"):
        assert "pytest" in results(parts)["parts"][part]["why"]


# ---- stopped, and refused --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_who_stops_it_has_the_table_of_what_was_found(parts: Path, number: signal.Signals) -> None:
    child, out = parts.parent / "out" / "child", {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    words = words_for(parts, "--only", "adding", "blocking", "chattering", "--minutes", "10")
    with subprocess.Popen(words, cwd=parts.parent, env=environment(), **out) as running:  # type: ignore[call-overload]
        given_up = time.monotonic() + TIMEOUT
        while not (child.exists() and child.read_text()) and time.monotonic() < given_up:
            time.sleep(0.05)
        before = results(parts)["parts"]["adding"]["state"]
        running.send_signal(number)
        output, _ = running.communicate(timeout=TIMEOUT)
    assert before == "failed", "written before the end: a kill loses nothing"
    assert running.returncode == 1, output
    assert "the sum is wrong" in row(output, "adding")
    assert "not run" in row(output, "blocking")
    assert "stopped in test_for_ever" in row(output, "blocking")
    assert "stopped before it began" in row(output, "chattering")
    assert "Traceback" not in output
    assert is_gone(child)


def python_with(folder: Path, torch: str) -> str:
    """A Python that has this file as torch."""
    (folder / "torch.py").write_text(torch)
    program = folder / "python"
    program.write_text(f'#!/bin/sh\nPYTHONPATH={folder}:$PYTHONPATH exec {sys.executable} "$@"\n')
    program.chmod(0o755)
    return str(program)


@pytest.mark.parametrize(
    ("torch", "said"),
    [
        ("raise ModuleNotFoundError(\"No module named 'torch'\")", "cannot import torch (ModuleNotFoundError"),
        (
            "__version__ = '2.7.1'\nclass version:\n    cuda = None\nclass cuda:\n    is_available = lambda: False",
            "has torch 2.7.1; distloop needs 2.8 or newer",
        ),
        (
            "__version__ = '2.8.0'\nclass version:\n    cuda = None\nclass cuda:\n    is_available = lambda: False",
            "sees no GPU. --device cpu runs",
        ),
    ],
)
def test_a_machine_that_cannot_run_them_is_told_why_in_one_message(parts: Path, torch: str, said: str) -> None:
    done = run(parts, "--device", "cuda", PYTHON=python_with(parts.parent, torch))
    assert done.returncode == 2, done.stdout + done.stderr
    assert said in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not (parts.parent / "out").exists()


def test_an_old_python_or_none_is_told_in_one_message(parts: Path) -> None:
    old = parts.parent / "python"
    old.write_text('#!/bin/sh\n[ "$1" = --version ] && echo Python 3.10.9\nexit 1\n')
    old.chmod(0o755)
    for python, said in ((str(old), "Python 3.10.9 is too old"), ("no-such-python", "there is no no-such-python here")):
        done = run(parts, PYTHON=python)
        assert (done.returncode, done.stdout, len(done.stderr.splitlines())) == (2, "", 1)
        assert said in done.stderr


def test_a_part_that_does_not_exist_is_refused_with_those_that_do(parts: Path) -> None:
    done = run(parts, "--only", "trainig")
    assert done.returncode == 2
    assert "no part 'trainig'; there are doctor, training, resume" in done.stderr


# ---- time and table --------------------------------------------------------------------------------------------------


def test_a_part_may_take_its_share_of_what_is_left_and_the_last_one_all_of_it() -> None:
    training, figures, profile = Part("training"), Part("figures"), Part("profile")
    assert share_of(training, [figures, profile], 1) == 20 / 50
    assert (
        share_of(training, [figures, profile], 3) == 0.55
    )  # beside the others, which take most of their time to start
    assert share_of(figures, [profile], 3) == 25 / 30
    assert share_of(Part("doctor"), [training, figures, profile], 3) == 8 / 58
    assert share_of(profile, [], 1) == 1


class Endless:
    """A stream of numbered lines; remembers the largest size that the file had between two of them."""

    def __init__(self, path: Path) -> None:
        self.path, self.lines, self.largest = path, 0, 0

    def read1(self, size: int) -> bytes:
        self.lines += 1
        self.largest = max(self.largest, self.path.stat().st_size)
        return b"%9d\n" % self.lines * 1000 if self.lines <= 200 else b""


def test_output_takes_no_more_than_its_room_while_it_comes_and_its_end_stays(tmp_path: Path) -> None:
    stream = Endless(tmp_path / "log")
    keep_end(stream, tmp_path / "log")
    assert 0 < stream.largest <= 2 * LOG_BYTES
    kept = (tmp_path / "log").read_bytes()
    assert len(kept) == LOG_BYTES
    assert kept == b"".join(b"%9d\n" % line * 1000 for line in range(181, 201))


@pytest.mark.parametrize(
    ("version", "enough"),
    [("2.8.0", True), ("2.8.0a0+cu130", True), ("2.14.1+cpu", True), ("3.0", True), ("2.7.1", False), ("?", False)],
)
def test_versions_of_torch_are_compared_as_numbers(version: str, enough: bool) -> None:
    assert new_enough(version) is enough


def test_the_table_folds_what_is_long() -> None:
    tests = [
        {"test": "t" * 130, "outcome": "failed", "why": "because " * 40, "figures": {"f" * 70: 0.123456789, "g": "x"}}
    ]
    part = {"state": "out of time", "why": "took more than 3 s", "seconds": 3.0, "tests": tests}
    machine = {"date": "today", "device": "cuda", "card": "A card", "driver": "NVRM " * 40}
    text = table({**machine, "parts": {"figures": part}})
    assert max(map(len, text.splitlines())) <= 120
    assert text.count("because") == 21  # reasons are cut at 300 characters
    assert "0.1235" in text
