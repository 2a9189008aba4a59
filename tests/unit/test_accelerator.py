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
                  handler.find_unused_parameters, handler.broadcast_buffers,
                  handler.gradient_as_bucket_view, handler.bucket_cap_mb]))
"""


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], ["highest", False, "no", False, False, False, 25]),
        (
            [
                "--matmul-precision",
                "high",
                "--train.detect-anomaly",
                "--precision",
                "bf16",
                "--ddp.find-unused-parameters",
                "--ddp.gradient-as-bucket-view",
                "--ddp.bucket-cap-mb",
                "5",
            ],
            ["high", True, "bf16", True, False, True, 5],
        ),
    ],
)
def test_the_settings_of_the_process_are_the_configs(
    tmp_path: Path, arguments: list[str], expected: list[object]
) -> None:
    done = command([sys.executable, "-c", CODE, "--device", "cpu", *arguments], tmp_path)
    assert done.returncode == 0, done.stdout
    assert json.loads(done.stdout.splitlines()[-1]) == expected


# Accelerate gives LOCAL_RANK to DDP as the device's number, and here it is asked what it got.
TASK_THAT_SEES_ONE_DEVICE = """
import os, sys, types, torch
from distloop.config.load import load_config
from distloop.ranks import Ranks, accelerator, launch_guards
from distloop.ranks.stopping import Watch
chosen = []

def prepared(local_rank):
    print("Accelerate", local_rank)
    return types.SimpleNamespace(num_processes=4)

torch.cuda.is_available, torch.cuda.device_count, torch.cuda.set_device = lambda: True, lambda: 1, chosen.append
accelerator.start_group = lambda environ, ddp, gpu, roll_call: print("group", environ["LOCAL_RANK"], chosen, gpu)
accelerator.Accelerator = lambda **_: prepared(os.environ["LOCAL_RANK"])
accelerator.build_accelerator(load_config(sys.argv[1:]), Ranks(Watch()))
print("afterwards", os.environ["LOCAL_RANK"])
"""


def test_a_task_that_sees_one_device_uses_it_and_stays_the_rank_of_its_machine_that_it_is(tmp_path: Path) -> None:
    ranks = {"RANK": "3", "LOCAL_RANK": "3", "WORLD_SIZE": "4", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    words = [sys.executable, "-c", TASK_THAT_SEES_ONE_DEVICE, "--device", "cuda"]
    done = command(words, tmp_path, {**ranks, "LOCAL_WORLD_SIZE": "4"})
    # If all ranks of the machine were its first afterwards, each would print what one of them says for all.
    assert done.stdout.splitlines() == ["group 3 [0] 0", "Accelerate 0", "afterwards 3"]
