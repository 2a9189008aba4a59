"""environment.json, loop.py and git.diff: versions, code and command of an attempt, without secrets."""

import contextlib
import hashlib
import importlib.metadata
import os
import platform
import signal
import subprocess
import sys
import threading
import time
import types
from pathlib import Path
from typing import Any, NamedTuple

import distloop
from distloop.config.places import start_folder
from distloop.config.secrets import clean_command, clean_text
from distloop.ranks.environment import cpus_per_rank

GIT_SECONDS = 10.0  # for all calls of git
MOST_CHANGES = 50  # lines of git status
MOST_DIFF = 256 * 1024  # bytes
# Without the programs, colours and conversions that a repository or a user may have configured.
PLAIN_DIFF = ("diff", "HEAD", "--no-ext-diff", "--no-textconv", "--no-color")


class GitFacts(NamedTuple):
    """The version of the code, from git; without secrets. All but the last is of the repository in which the run was
    started; None where there is none."""

    folder: str | None = None
    commit: str | None = None
    changes: tuple[str, ...] = ()  # lines of git status --porcelain
    diff: str | None = None  # against the commit
    is_of_distloop: bool = False  # the run was started in a clone of distloop
    distloop_commit: str | None = None  # where distloop is a clone, and not installed from a package


class LoopSource(NamedTuple):
    """The file with the training loop."""

    path: str
    sha256: str  # in hexadecimal
    text: str  # without secrets

    @classmethod
    def of(cls, code: types.CodeType | None) -> "LoopSource | None":
        """Read the file that the code is from; None if there is none, as for a loop that is typed in."""
        if code is None:
            return None
        path = Path(code.co_filename)
        try:
            content = path.read_bytes()
        except OSError:
            return None
        text = clean_text(content.decode(errors="replace"))
        return cls(str(path.resolve()), hashlib.sha256(content).hexdigest(), text)

    @property
    def is_own(self) -> bool:
        """Whether it is distloop's own train.py."""
        return Path(self.path) == Path(distloop.__file__).resolve().parent / "train.py"


def environment(world_size: int, git: GitFacts, loop: LoopSource | None) -> dict[str, Any]:
    """Versions, git commit, topology and command of an attempt, as plain JSON and without secrets."""
    packages = ("torch", "torchvision", "accelerate", "numpy", "safetensors")
    versions: dict[str, str | None] = dict.fromkeys(packages)
    for name in packages:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    versions["distloop"] = distloop.__version__
    git_of = "distloop itself" if git.is_of_distloop else "the folder where the run was started"
    return {
        "python": platform.python_version(),
        "versions": versions,
        "machine": platform.node(),
        "platform": platform.platform(),
        "cpus_per_rank": cpus_per_rank(os.environ),
        "world_size": world_size,
        "slurm_job": os.environ.get("SLURM_JOB_ID"),
        "loop_file": loop and clean_text(loop.path),
        "loop_sha256": loop and loop.sha256,
        "distloop_commit": git.distloop_commit,
        "git_of": git_of if git.folder else None,
        "git_folder": git.folder,
        "git_commit": git.commit,
        "git_changes": list(git.changes),
        "command": clean_command(sys.argv),
    }


def git_facts() -> GitFacts:
    """Facts of the start folder's repository, and of the one that distloop is in. Takes GIT_SECONDS at most."""
    until = time.monotonic() + GIT_SECONDS
    package = Path(distloop.__file__).resolve().parent
    # Not in a repository that has distloop only in a virtual environment: there the file is not tracked.
    is_clone = bool(_git(package, ("ls-files", "__init__.py"), 4096, until))
    clone = _root(package, until) if is_clone else None
    distloop_commit = _commit(clone, until) if clone else None
    root = _root(Path(start_folder()), until)
    if root is None:
        return GitFacts(distloop_commit=distloop_commit)
    changes = _git(root, ("status", "--porcelain"), 64 * 1024, until) or ""
    diff = _git(root, PLAIN_DIFF, MOST_DIFF, until)
    return GitFacts(
        folder=clean_text(str(root)),
        commit=_commit(root, until),
        changes=tuple(clean_text(line) for line in changes.splitlines()[:MOST_CHANGES]),
        diff=None if diff is None else _cut(clean_text(_cut(diff, MOST_DIFF)), MOST_DIFF),
        is_of_distloop=root == clone,
        distloop_commit=distloop_commit,
    )


def _root(folder: Path, until: float) -> Path | None:
    """The root of the folder's repository."""
    root = _git(folder, ("rev-parse", "--show-toplevel"), 4096, until)
    return Path(root.rstrip("\n")) if root else None


def _commit(root: Path, until: float) -> str | None:
    commit = _git(root, ("rev-parse", "HEAD"), 4096, until)
    return commit.strip() if commit else None


def _git(folder: Path, arguments: tuple[str, ...], limit: int, until: float) -> str | None:
    """The output of git, cut after limit + 1 bytes; None if it fails or takes too long. Not by subprocess.run(): that
    reads without a limit, and at its time limit ends git but not the programs that git has started."""
    try:
        git = subprocess.Popen(
            ("git", "-C", str(folder), *arguments),
            env={**os.environ, "GIT_OPTIONAL_LOCKS": "0"},  # it changes nothing
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # a process group, so that its filters end with it
        )
    except OSError:
        return None
    timer = threading.Timer(max(0.0, until - time.monotonic()), _kill_group, [git.pid])
    timer.start()
    try:
        with git:  # waits for its end
            assert git.stdout is not None
            output = git.stdout.read(limit + 1)
            if len(output) > limit:
                _kill_group(git.pid)
    finally:
        timer.cancel()  # its number may soon be another process's
    return output.decode(errors="replace") if len(output) > limit or git.returncode == 0 else None


def _kill_group(leader: int) -> None:
    with contextlib.suppress(OSError):  # all have ended
        os.killpg(leader, signal.SIGKILL)


def _cut(text: str, limit: int) -> str:
    """`text`, or as many of its lines as fit into `limit` bytes, with a note."""
    if len(text.encode()) <= limit:
        return text
    note = f"… cut here: the changes are more than {limit // 1024} KiB\n"
    kept = text.encode()[: limit - len(note.encode())].decode(errors="ignore")
    return kept[: kept.rfind("\n") + 1] + note
