"""environment.json and git.diff say with what code and command an attempt was run."""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

import distloop
from distloop.config.load import load_config
from distloop.run import provenance as module
from distloop.run.provenance import MOST_DIFF, GitFacts, environment, git_facts
from tests.tools.ranks import wait_until

TOKEN = "hf_0123456789abcdefghij"


def git(folder: Path, *arguments: str) -> str:
    who = ("-c", "user.name=x", "-c", "user.email=x@x")
    done = subprocess.run(("git", *who, *arguments), cwd=folder, check=True, capture_output=True, text=True)
    return done.stdout.strip()


def make_repository(folder: Path) -> Path:
    """A repository with one commit of code.py."""
    folder.mkdir(parents=True)
    git(folder, "init", "-q")
    (folder / "code.py").write_text("size = 1\n")
    git(folder, "add", ".")
    git(folder, "commit", "-q", "-m", "first")
    return folder


def be_in(folder: Path, package: Path, patch: pytest.MonkeyPatch) -> None:
    patch.chdir(folder)
    patch.setenv("GIT_CEILING_DIRECTORIES", str(folder.parent))
    patch.setattr(distloop, "__file__", str(package / "distloop" / "__init__.py"))


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = make_repository(tmp_path / "project")
    be_in(folder, tmp_path, monkeypatch)
    return folder


def test_the_command_is_recorded_without_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        sys, "argv", ["train.py", "--data.args.token", "abc", "--data.args", "{password: abc, size: 3}"]
    )
    facts = environment(2, GitFacts(commit="0" * 40), None)
    assert facts["command"] == ["train.py", "--data.args.token", "***", "--data.args", "{password: '***', size: 3}"]
    assert (facts["world_size"], facts["git_commit"]) == (2, "0" * 40)


def test_the_uncommitted_changes_of_the_whole_repository_are_recorded_without_secrets(
    repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (repository / "code.py").write_text(f"size = 2\nlogin('{TOKEN}')\n")
    (repository / "new.py").write_text("not in the diff\n")
    (repository / "sub").mkdir()
    monkeypatch.chdir(repository / "sub")
    facts = git_facts()
    assert facts.folder == str(repository)
    assert facts.commit == git(repository, "rev-parse", "HEAD")
    assert facts.changes == (" M code.py", "?? new.py")
    assert facts.diff is not None
    assert facts.diff.endswith("-size = 1\n+size = 2\n+login('***')\n")


def test_nothing_that_is_set_up_for_diffs_is_run_or_shown(repository: Path) -> None:
    ran = repository.parent / "ran"
    (repository / ".gitattributes").write_text("*.py diff=mine\n")
    for key, value in (
        ("diff.external", f"touch {ran}; true"),
        ("diff.mine.command", f"touch {ran}; true"),
        ("diff.mine.textconv", f"touch {ran}; cat"),
        ("color.ui", "always"),
    ):
        git(repository, "config", key, value)
    (repository / "code.py").write_text("size = 2\n")
    (repository / "picture.bin").write_bytes(bytes(range(256)) * 9)
    git(repository, "add", "-N", "picture.bin")
    diff = git_facts().diff
    assert diff is not None
    assert "\n-size = 1\n+size = 2\n" in diff
    assert "picture.bin differ" in diff
    assert "\x1b" not in diff
    assert not ran.exists()


@pytest.mark.parametrize("line", ["size = 2\n", "x" * 999 + "\n", "ü" * MOST_DIFF, f"login('{TOKEN}')\n"])
def test_a_large_diff_is_cut_between_lines_and_says_so(repository: Path, line: str) -> None:
    (repository / "code.py").write_text(line * (2 * MOST_DIFF // len(line)))
    diff = git_facts().diff
    assert diff is not None
    assert len(diff.encode()) <= MOST_DIFF
    assert diff.splitlines()[-1] == "… cut here: the changes are more than 256 KiB"
    assert set(diff.splitlines()[6:-1]) <= {f"+{line.strip()}", "+login('***')"}
    assert len(diff.encode()) > MOST_DIFF // 3 or "ü" in line


def test_masking_does_not_make_a_diff_too_large(repository: Path) -> None:
    (repository / "code.py").write_text("token: a\n" * (MOST_DIFF // 11))
    diff = git_facts().diff
    assert diff is not None
    assert "+token: ***\n" in diff
    assert len(diff.encode()) <= MOST_DIFF


def make_clone(folder: Path) -> Path:
    """A repository like distloop's own, with a change that is not committed."""
    make_repository(folder)
    (folder / "distloop").mkdir()
    (folder / "distloop" / "__init__.py").write_text("")
    git(folder, "add", ".")
    git(folder, "commit", "-q", "-m", "second")
    (folder / "distloop" / "__init__.py").write_text("changed = True\n")
    return folder


def test_in_a_folder_of_no_repository_only_the_commit_of_distloop_is_recorded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = make_clone(tmp_path / "package")
    (tmp_path / "elsewhere").mkdir()
    be_in(tmp_path / "elsewhere", package, monkeypatch)
    commit = git(package, "rev-parse", "HEAD")
    assert git_facts() == GitFacts(distloop_commit=commit)
    recorded = environment(1, git_facts(), None)
    assert (recorded["git_of"], recorded["git_commit"], recorded["distloop_commit"]) == (None, None, commit)


def test_in_a_project_its_own_commit_and_changes_are_recorded_and_the_commit_of_distloop(
    repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = make_clone(repository.parent / "package")
    be_in(repository, package, monkeypatch)
    (repository / "code.py").write_text("size = 2\n")
    facts = git_facts()
    assert (facts.folder, facts.commit) == (str(repository), git(repository, "rev-parse", "HEAD"))
    assert facts.distloop_commit == git(package, "rev-parse", "HEAD")
    assert "size = 2" in str(facts.diff)
    assert "changed" not in str(facts.diff)
    assert environment(1, facts, None)["git_of"] == "the folder where the run was started"


def test_in_a_clone_of_distloop_it_is_said_that_commit_and_changes_are_those_of_distloop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = make_clone(tmp_path / "package")
    be_in(package, package, monkeypatch)
    facts = git_facts()
    commit = git(package, "rev-parse", "HEAD")
    assert (facts.folder, facts.commit, facts.distloop_commit) == (str(package), commit, commit)
    assert "changed = True" in str(facts.diff)
    assert environment(1, facts, None)["git_of"] == "distloop itself"


def test_a_project_with_distloop_in_a_virtual_environment_is_not_taken_for_distloop(
    repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed = repository / ".venv" / "site-packages"
    (installed / "distloop").mkdir(parents=True)
    (installed / "distloop" / "__init__.py").write_text("")
    be_in(repository, installed, monkeypatch)
    facts = git_facts()
    assert (facts.folder, facts.distloop_commit) == (str(repository), None)
    assert environment(1, facts, None)["git_of"] == "the folder where the run was started"


def test_the_repository_is_that_of_the_start_whatever_folder_the_code_goes_to(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load_config(["--seed", "1"])
    other = make_repository(tmp_path / "other")
    monkeypatch.chdir(other)
    assert git_facts().folder == str(repository)


def test_the_version_of_distloop_is_recorded_where_it_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    assert environment(1, GitFacts(), None)["versions"]["distloop"] == distloop.__version__


def test_without_any_repository_or_git_there_is_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "elsewhere").mkdir()
    be_in(tmp_path / "elsewhere", tmp_path, monkeypatch)
    assert git_facts() == GitFacts()
    monkeypatch.setenv("PATH", str(tmp_path))
    assert git_facts() == GitFacts()


def test_a_repository_without_a_commit_has_no_diff(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "new").mkdir()
    git(tmp_path / "new", "init", "-q")
    be_in(tmp_path / "new", tmp_path, monkeypatch)
    assert git_facts() == GitFacts(folder=str(tmp_path / "new"))


@pytest.mark.parametrize("behaviour", ["sleep 1000", "sleep 1000 & wait", "sleep 1000 & exit 1", "yes"])
def test_a_git_that_does_not_end_is_ended_with_what_it_has_started(
    repository: Path, monkeypatch: pytest.MonkeyPatch, behaviour: str
) -> None:
    programs = repository.parent / "programs"
    programs.mkdir()
    fake = programs / "git"
    fake.write_text(f"#!/bin/sh\ncase $* in *diff*) {behaviour};; *rev-parse*) echo {repository};; esac\n")
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:/usr/bin:/bin")
    monkeypatch.setattr(module, "GIT_SECONDS", 1.0)
    monkeypatch.setenv("FROM_THIS_TEST", str(programs))
    begun = time.monotonic()
    facts = git_facts()
    assert time.monotonic() - begun < 60
    assert facts.folder == str(repository)
    assert (facts.diff is None) == ("sleep" in behaviour)
    wait_until(lambda: not started_here(str(programs)), "the end of all that git has started")


def started_here(mark: str) -> list[psutil.Process]:
    """The programs that run with FROM_THIS_TEST=mark."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):  # gone, or another user's
            if process.environ().get("FROM_THIS_TEST") == mark and process.pid != os.getpid():
                found.append(process)
    return found
