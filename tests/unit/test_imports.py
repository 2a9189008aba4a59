"""What a run does not use it does not import."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from tests.tools.ranks import clean_environment, command, write_config

HEAVY = {"wandb", "matplotlib", "sklearn", "torchvision", "rich", "pandas", "torch._dynamo"}
SMALL = {"data": "tests.lab.points:points", "model": "linear", "task": "regression"}
ALL_OFF, ALL_ON = {"wandb": "off", "report": False}, {"wandb": "offline", "report": True}


def imported(folder: Path, settings: dict[str, Any], terminal: bool = False) -> set[str]:
    """The packages that a run of two steps imports into the process that trains."""
    config = write_config(folder, {"train": {"steps": 2}, "batch": {"global_size": 4}, **settings})
    words = [sys.executable, "-X", "importtime", "-m", "distloop.train", "--config", str(config)]
    ours, theirs = os.openpty() if terminal else os.pipe()
    with open(ours, "rb", buffering=0) as screen:
        process = subprocess.Popen(
            words,
            cwd=folder,
            env={**clean_environment(), "TERM": "xterm"},
            stdin=subprocess.DEVNULL,
            stdout=theirs,
            stderr=subprocess.PIPE,
            text=True,
        )
        os.close(theirs)
        threading.Thread(target=read_to_end, args=(screen,), daemon=True).start()
        said = process.communicate(timeout=120)[1]
    assert process.returncode == 0, said
    found = {line.rpartition("|")[2].strip() for line in said.splitlines() if line.startswith("import time:")}
    assert "torch" in found
    return found & HEAVY


def read_to_end(screen: Any) -> None:
    try:
        while screen.read(4096):
            pass
    except (OSError, ValueError):  # how a terminal ends
        pass


@pytest.mark.parametrize(
    ("settings", "used"),  # optimizers import dynamo
    [
        pytest.param(
            {"data": "tests.lab.user_code:digits_head", "model": "mlp", "tracking": ALL_OFF},
            {"torch._dynamo"},
            id="digits",  # without scikit-learn, whose data they are
        ),
        pytest.param({**SMALL, "tracking": ALL_OFF}, {"torch._dynamo"}, id="nothing"),
        # They are other processes' affair.
        pytest.param({**SMALL, "tracking": ALL_ON}, {"torch._dynamo"}, id="W&B and a report"),
    ],
)
def test_a_run_imports_only_the_heavy_packages_it_uses(
    tmp_path: Path, settings: dict[str, Any], used: set[str]
) -> None:
    assert imported(tmp_path, settings) <= used
    tracking = settings["tracking"]
    assert (tmp_path / "runs" / "run" / "report.html").exists() == tracking["report"]
    assert (tmp_path / "runs" / "run" / "wandb").exists() == (tracking["wandb"] != "off")


def test_rich_is_for_terminals(tmp_path: Path) -> None:
    found = imported(tmp_path, {**SMALL, "tracking": ALL_OFF}, terminal=True)
    assert "rich" in found
    assert found <= {"rich", "torch._dynamo"}


def test_help_and_the_config_do_not_import_torch(tmp_path: Path) -> None:
    program = "import sys, distloop.config.load; print(sorted({'torch', 'sklearn', 'rich'} & set(sys.modules)))"
    assert command([sys.executable, "-c", program], tmp_path).stdout.strip() == "[]"


def test_the_table_of_runs_does_not_import_the_libraries_of_the_config(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("optim: {lr: 0.1}\n")
    program = (
        "import sys; from pathlib import Path; from distloop.commands import ranking, status\n"
        "ranking.settings_that_differ([type('Run', (), {'path': Path()})])\n"
        "print(sorted({'torch', 'pydantic'} & set(sys.modules)))"
    )
    assert command([sys.executable, "-c", program], tmp_path).stdout.strip() == "[]"


def test_garbage_is_looked_for_in_what_the_loop_makes_and_not_in_what_is_imported(tmp_path: Path) -> None:
    program = (
        "import gc; from distloop.ranks.start import main, prepare_process\n"
        "prepare_process(); print(gc.isenabled())\n"
        "main(lambda config, ranks: print(gc.isenabled(), gc.get_freeze_count() > 10_000), ['--name', 'x'])"
    )
    assert command([sys.executable, "-c", program], tmp_path).stdout.split() == ["False", "True", "True"]
