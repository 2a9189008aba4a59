"""The `distloop` command: what it says of its commands, and of a word that is none."""

from __future__ import annotations

import sys
from pathlib import Path
from subprocess import CompletedProcess

import pytest

from distloop import __version__
from tests.tools.ranks import command


def distloop(folder: Path, *words: str) -> CompletedProcess[str]:
    return command([sys.executable, "-m", "distloop.commands.cli", *words], folder)


def test_help_has_a_line_for_each_command(tmp_path: Path) -> None:
    done = distloop(tmp_path, "--help")
    assert done.returncode == 0
    lines = [line.split()[0] for line in done.stdout.splitlines() if line.startswith("  ")]
    assert lines == ["init", "train", "evaluate", "sync", "status", "report", "doctor", "tokens", "pack", "copy"]


def test_the_version_is_said(tmp_path: Path) -> None:
    done = distloop(tmp_path, "--version")
    assert (done.returncode, done.stdout) == (0, f"distloop {__version__}\n")


@pytest.mark.parametrize(("words", "says"), [(["statsu"], "Did you mean 'status'?"), (["--config"], "--config")])
def test_a_word_that_is_no_command_is_wrong_usage_and_the_nearest_is_named(
    tmp_path: Path, words: list[str], says: str
) -> None:
    done = distloop(tmp_path, *words)
    assert done.returncode == 2
    assert f"there is no command '{words[0]}'" in done.stdout
    assert says in done.stdout


def test_without_a_command_the_usage_is_shown(tmp_path: Path) -> None:
    done = distloop(tmp_path)
    assert done.returncode == 2
    assert done.stdout.startswith("usage: distloop COMMAND")


def test_each_command_gets_its_own_arguments_and_its_exit_code_is_the_commands(tmp_path: Path) -> None:
    assert "usage: distloop status" in distloop(tmp_path, "status", "--help").stdout
    assert distloop(tmp_path, "status").returncode == 2  # there is no folder runs here
    assert distloop(tmp_path, "status", "--srot", "loss").returncode == 2
    assert distloop(tmp_path, "status", ".").returncode == 0
