"""environment.json and git.diff: what an attempt was run with, without secrets."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any, NamedTuple

import distloop
from distloop.config.secrets import clean_command, clean_text
from distloop.ranks.environment import cpus_per_rank

GIT_SECONDS = 10.0  # for all that git is asked
MOST_CHANGES = 50  # changed files that are named
MOST_DIFF = 256 * 1024  # bytes
# Nothing that a repository or a user has set up is to run, colour or convert what git shows.
PLAIN_DIFF = ("diff", "HEAD", "--no-ext-diff", "--no-textconv", "--no-color")


class GitFacts(NamedTuple):
    """The code that is run, as far as git knows it."""

    folder: str | None = None
    """Of the repository."""
    commit: str | None = None
    changes: tuple[str, ...] = ()
    """Lines of git status --porcelain."""
    diff: str | None = None
    """What is not committed, without secrets; None where git does not say."""


def environment(world_size: int, git: GitFacts) -> dict[str, Any]:
    """Versions, git commit, topology and command of an attempt, as plain JSON and without secrets."""
    packages = ("torch", "torchvision", "accelerate", "numpy", "safetensors", "distloop")
    versions: dict[str, str | None] = {}
    for name in packages:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    return {
        "python": platform.python_version(),
        "versions": versions,
        "machine": platform.node(),
        "platform": platform.platform(),
        "cpus_per_rank": cpus_per_rank(os.environ),
        "world_size": world_size,
        "slurm_job": os.environ.get("SLURM_JOB_ID"),
        "git_folder": git.folder,
        "git_commit": git.commit,
        "git_changes": list(git.changes),
        "command": clean_command(sys.argv),
    }


def git_facts() -> GitFacts:
    """Of the current folder's repository, where the user's code is, else of the one that distloop is run from.

    Never raises; takes GIT_SECONDS at most.
    """
    until = time.monotonic() + GIT_SECONDS
    for start in (Path(), Path(distloop.__file__).resolve().parent):
        folder = _git(start, ("rev-parse", "--show-toplevel"), 4096, until)
        if folder:
            break
    else:
        return GitFacts()
    root = Path(folder.rstrip("\n"))
    commit = _git(root, ("rev-parse", "HEAD"), 4096, until)
    changes = _git(root, ("status", "--porcelain"), 64 * 1024, until) or ""
    diff = _git(root, PLAIN_DIFF, MOST_DIFF, until)
    return GitFacts(
        folder=clean_text(str(root)),
        commit=commit.strip() if commit else None,
        changes=tuple(clean_text(line) for line in changes.splitlines()[:MOST_CHANGES]),
        diff=None if diff is None else _cut(clean_text(_cut(diff, MOST_DIFF)), MOST_DIFF),
    )


def _git(folder: Path, arguments: tuple[str, ...], limit: int, until: float) -> str | None:
    """What git says, `limit` bytes of it and one more where there are more; None if it fails or takes too long."""
    try:
        git = subprocess.Popen(
            ("git", "-C", str(folder), *arguments),
            env={**os.environ, "GIT_OPTIONAL_LOCKS": "0"},  # it looks, and changes nothing
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # a group of its own, so that filters that it starts end with it
        )
    except OSError:
        return None
    assert git.stdout is not None
    timer = threading.Timer(max(0.0, until - time.monotonic()), _kill, [git])
    timer.start()
    try:
        said = git.stdout.read(limit + 1)
        if len(said) > limit:
            _kill(git)
        git.wait()
    finally:
        timer.cancel()
        git.stdout.close()
    return said.decode(errors="replace") if len(said) > limit or git.returncode == 0 else None


def _kill(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        with contextlib.suppress(OSError):
            os.killpg(process.pid, signal.SIGKILL)


def _cut(text: str, limit: int) -> str:
    """`text`, or as many of its lines as `limit` bytes hold, and one that says so."""
    if len(text.encode()) <= limit:
        return text
    note = f"… cut here: the changes are more than {limit // 1024} KiB\n"
    kept = text.encode()[: limit - len(note.encode())].decode(errors="ignore")
    return kept[: kept.rfind("\n") + 1] + note
