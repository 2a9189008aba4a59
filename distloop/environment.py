"""environment.json: what an attempt was run with, without secrets."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import subprocess
import sys
from typing import Any

from distloop.cluster import cpus_per_rank

SECRET = re.compile(r"(key|token|secret|passw|credential)", re.IGNORECASE)


def environment(world_size: int) -> dict[str, Any]:
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
        "git_commit": _git("rev-parse", "HEAD"),
        "git_changes": (_git("status", "--porcelain") or "").splitlines()[:50],
        "command": _without_secrets(sys.argv),
    }


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(("git", *arguments), capture_output=True, text=True, timeout=10, check=True)
        return done.stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def _without_secrets(command: list[str]) -> list[str]:
    """The command line with the values of anything that sounds like a key or password left out."""
    shown = []
    hide = False
    for word in command:
        flag, equals, _ = word.partition("=")
        shown.append("***" if hide else f"{flag}=***" if equals and SECRET.search(flag) else word)
        hide = word.startswith("-") and not equals and bool(SECRET.search(word))
    return shown
