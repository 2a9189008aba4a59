"""What a run does not use it does not import."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.ranks import command, write_config

HEAVY = {"wandb", "matplotlib", "sklearn", "torchvision", "rich", "pandas", "torch._dynamo"}


@pytest.mark.parametrize(
    ("settings", "used"),  # scikit-learn imports rich, and pandas where it is there; optimizers import dynamo
    [
        ({"data": "tests.user_code:digits_head", "model": "mlp"}, {"sklearn", "rich", "pandas", "torch._dynamo"}),
        ({"data": "tests.small_code:points", "model": "linear", "task": "regression"}, {"torch._dynamo"}),
    ],
)
def test_a_run_imports_only_the_heavy_packages_it_uses(tmp_path: Path, settings: dict, used: set[str]) -> None:
    config = write_config(tmp_path, {**settings, "train": {"steps": 2}, "batch": {"global_size": 4}})
    done = command([sys.executable, "-X", "importtime", "-m", "distloop.train", "--config", str(config)], tmp_path)
    assert done.returncode == 0, done.stdout
    imported = {line.rpartition("|")[2].strip() for line in done.stdout.splitlines() if line.startswith("import time:")}
    assert "torch" in imported
    assert imported & HEAVY <= used


def test_help_and_the_config_do_not_import_torch(tmp_path: Path) -> None:
    program = "import sys, distloop.config_load; print(sorted({'torch', 'sklearn', 'rich'} & set(sys.modules)))"
    assert command([sys.executable, "-c", program], tmp_path).stdout.strip() == "[]"
