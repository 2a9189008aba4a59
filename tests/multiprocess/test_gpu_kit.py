"""The kit for a machine with a GPU: alone, elsewhere, where there is only torch and no package index."""

from __future__ import annotations

import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from tests.tools.ranks import REPOSITORY, TIMEOUT, clean_environment, command

PARTS = ("doctor", "training")  # one that starts a fresh process, and one that trains, on most of what the kit has
LIMIT = 600


def packages_are_reachable() -> bool:
    """Whether pip gets a wheel of a few kilobytes here; no test may depend on that."""
    with tempfile.TemporaryDirectory() as folder:
        words = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--dest", folder, "iniconfig"]
        limits = {"PIP_RETRIES": "0", "PIP_DEFAULT_TIMEOUT": "15"}
        done = subprocess.run(words, env={**os.environ, **limits}, capture_output=True, check=False, timeout=TIMEOUT)
    return done.returncode == 0


def environment_with_only_torch(folder: Path) -> Path:
    """A new environment with pip and links to torch and what it needs; returns its Python."""
    subprocess.run([sys.executable, "-m", "venv", folder], check=True, timeout=TIMEOUT)
    [packages] = folder.glob("lib/python3.*/site-packages")
    waiting, found = ["torch"], set[str]()
    while waiting:
        name = waiting.pop()
        if name in found:
            continue
        found.add(name)
        package = importlib.metadata.distribution(name)
        for one in map(Requirement, package.requires or []):
            if one.marker is None or one.marker.evaluate({"extra": ""}):
                waiting.append(one.name)
        for top in {file.parts[0] for file in package.files or []} - {"..", "__pycache__"}:
            if not (packages / top).exists():
                (packages / top).symlink_to(Path(str(package.locate_file(top))))
    return folder / "bin" / "python"


@pytest.mark.long
@pytest.mark.timeout(3 * LIMIT)
def test_the_kit_is_enough_where_there_is_only_torch_and_no_package_index(tmp_path: Path) -> None:
    if not packages_are_reachable():
        pytest.skip("pip reaches no packages here, so that it cannot download those of the kit")
    python = environment_with_only_torch(tmp_path / "venv")
    has = command([str(python), "-m", "pip", "list", "--format=freeze"], tmp_path, {"PYTHONPATH": ""}).stdout
    assert "torch==" in has
    assert "numpy" not in has
    (tmp_path / "list.txt").write_text(has)
    words = ["--has", str(tmp_path / "list.txt"), "--out", str(tmp_path / "gpu-kit")]
    done = command([sys.executable, "-m", "tests.gpu.kit", *words], REPOSITORY)
    assert done.returncode == 0, done.stdout

    elsewhere, scratch, out = (tmp_path / name for name in ("else where", "scratch", "results"))
    shutil.move(tmp_path / "gpu-kit", elsewhere)
    scratch.mkdir()
    there = {"PYTHON": str(python), "PIP_NO_INDEX": "1", "TMPDIR": str(scratch), "HOME": str(scratch)}
    environment = {**clean_environment(), **there, "PATH": "/usr/bin:/bin"}
    del environment["PYTHONPATH"]  # the checkout's distloop
    words = ["bash", str(elsewhere / "tests" / "gpu" / "run.sh"), "--device", "cpu", "--only", *PARTS]
    words += ["--out", str(out)]
    ran = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=2 * LIMIT)
    logs = "".join(log.read_text() for log in out.glob("*.log"))
    assert ran.returncode == 0, ran.stdout + ran.stderr + logs
    found = json.loads((out / "gpu_results.json").read_text())["parts"]
    for part in PARTS:
        assert found[part]["state"] == "passed", ran.stdout
        assert "passed" in {test["outcome"] for test in found[part]["tests"]}
    assert list(scratch.glob("distloop-gpu*")) == [], "neither packages nor the tests' files are left"
    freeze = [str(python), "-m", "pip", "list", "--format=freeze"]
    assert command(freeze, tmp_path, {"PYTHONPATH": ""}).stdout == has, "its environment is as it was"
