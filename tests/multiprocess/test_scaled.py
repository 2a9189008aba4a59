"""fp16 with its gradient scaler, on the CPU: the whole loop, in which steps overflow and are left out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.tools import stage
from tests.tools.ranks import train, write_config
from tests.tools.records import losses, rows, status, weights

SETTINGS: dict[str, Any] = {
    "data": "digits",
    "model": "mlp",
    "task": "tests.lab.resuming:StoppedClassification",
    "optim": {"name": "adamw", "clip_norm": 1.0, "ema_decay": 0.9},
    "batch": {"global_size": 64, "micro_size": 16},
    "precision": "fp16",
    "device": "cpu",
    "train": {"steps": 24},
    "log": {"every_steps": 1},
    "checkpoint": {"every_steps": 30},
}
TOO_LARGE = {"SCALE": "1e8"}  # for fp16, whose largest number is 65504


def run_to_its_end(folder: Path, name: str, world_size: int) -> Path:
    config = ["--config", str(write_config(folder, SETTINGS)), "--name", name]
    train(folder, config, world_size, TOO_LARGE, loop="tests.lab.scaled").check()
    return folder / "runs" / name


def state_of(run: Path) -> dict[str, Any]:
    state = json.loads((max((run / "checkpoints").glob("step_*")) / "state.json").read_text())
    return {key: state[key] for key in ("step", "scaler", "skipped_steps", "averaged_steps")}


@pytest.mark.parametrize("world_size", [1, 2])
def test_steps_that_overflow_are_left_out_and_counted_and_a_resumed_run_has_the_same_bits(
    tmp_path: Path, world_size: int
) -> None:
    whole = run_to_its_end(tmp_path, "whole", world_size)
    left_out = [row["step"] for row in rows(whole, "train") if row["gradient_norm"] is None]  # infinity in JSON
    assert left_out[:2] == [1, 2]  # until the scale has become small enough
    assert len(left_out) < 16
    for row in rows(whole, "train"):
        assert row["skipped_steps"] == sum(step <= row["step"] for step in left_out)
        assert (row["gradient_norm"] or 0) < 10  # without the scale, which is above 1e5
    assert losses(whole)[-1] < losses(whole)[0]

    step_stopped_in = left_out[2] + 1
    calls = step_stopped_in * 4 // world_size  # micro-batches of a step; the rehearsal puts the task's count back
    stage.interrupt(tmp_path, "loss", calls)
    stopped = run_to_its_end(tmp_path, "stopped", world_size)
    assert (status(stopped)["state"], status(stopped)["step"] < 24) == ("stopped", True)
    assert state_of(stopped)["scaler"]["scale"] != float(TOO_LARGE["SCALE"])
    run_to_its_end(tmp_path, "stopped", world_size)
    assert state_of(stopped) == state_of(whole)
    assert losses(stopped) == losses(whole)
    for name, tensor in weights(whole).items():
        assert tensor.equal(weights(stopped)[name]), name
