"""The config's settings reach torch and Accelerate."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from tests.tools.ranks import command

# In a process of its own: it sets what holds for all of a process.
CODE = """
import json, sys, torch
from distloop.config.load import load_config
from distloop.ranks import Ranks, build_accelerator
from distloop.ranks.stopping import Watch
accelerator = build_accelerator(load_config(sys.argv[1:]), Ranks(Watch()))
handler = accelerator.ddp_handler
print(json.dumps([torch.get_float32_matmul_precision(), torch.is_anomaly_enabled(), accelerator.mixed_precision,
                  handler.find_unused_parameters, handler.broadcast_buffers]))
"""


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], ["highest", False, "no", False, False]),
        (
            [
                "--matmul-precision",
                "high",
                "--train.detect-anomaly",
                "--precision",
                "bf16",
                "--ddp.find-unused-parameters",
            ],
            ["high", True, "bf16", True, False],
        ),
    ],
)
def test_the_settings_of_the_process_are_the_configs(
    tmp_path: Path, arguments: list[str], expected: list[object]
) -> None:
    done = command([sys.executable, "-c", CODE, "--device", "cpu", *arguments], tmp_path)
    assert done.returncode == 0, done.stdout
    assert json.loads(done.stdout.splitlines()[-1]) == expected
