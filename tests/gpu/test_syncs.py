"""Part "syncs": between two logging steps the host does not wait for the device."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.gpu.conftest import Figures
from tests.tools.ranks import train, write_config

SETTINGS: dict[str, Any] = {
    "data": "tests.gpu.data:packed_digits",
    "model": {"name": "cnn", "args": {"width": 8, "norm": "batch", "dropout": 0.2}},
    "task": "tests.gpu.lab:WatchedClassification",
    "train": {"epochs": None, "steps": 20},
    "log": {"every_steps": 1000},
    "validate": {"every_epochs": None, "every_steps": 1000},
    "checkpoint": {"every_steps": 1000},
}
TOKENS = {
    "data": {
        "name": "tests.lab.user_code:lines",
        "collate": "tests.lab.user_code:pad",
        "args": {"samples": 640},
        "workers": 0,
    },
    "model": "tests.lab.user_code:LanguageModel",
    "task": "tests.gpu.lab:WatchedNextLetter",
    "batch": {"global_size": 16},
}


def places(folder: Path, device: str, changes: dict[str, Any]) -> dict[str, int]:
    """The lines at which the host waits in ten steps, and how often."""
    config = write_config(folder, {**SETTINGS, "device": device, **changes})
    train(folder, ["--config", str(config)]).check()
    found = json.loads((folder / "syncs").read_text())
    # The average counts its steps on the host, on a GPU, too: reading that waits for nothing.
    return {place: times for place, times in found.items() if device == "cuda" or "averaged.n_averaged" not in place}


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({}, id="float32"),
        pytest.param({"precision": "bf16"}, id="bf16"),
        pytest.param({"train": {"steps": 20, "on_nonfinite": "skip"}}, id="skip"),
        pytest.param({"optim": {"name": "adamw", "clip_norm": 1.0, "ema_decay": 0.99}}, id="clipped, averaged"),
        pytest.param({"optim": {"name": "sgd", "lr": 0.01}}, id="sgd"),
        pytest.param({"batch": {"global_size": 64, "micro_size": 16}}, id="accumulated"),
        pytest.param({"data": {"name": "tests.gpu.data:packed_digits", "workers": 2}}, id="workers"),
        pytest.param(TOKENS, id="weights that vary"),
        pytest.param({**TOKENS, "train": {"steps": 20, "on_nonfinite": "skip"}}, id="weights that vary, skip"),
    ],
)
def test_no_step_off_the_logging_steps_waits_for_the_device(
    tmp_path: Path, device: str, figures: Figures, changes: dict[str, Any]
) -> None:
    found = places(tmp_path, device, changes)
    figures["host_syncs"] = sum(found.values())
    assert not found


def test_a_task_that_reads_its_loss_is_found(tmp_path: Path, device: str) -> None:
    found = places(tmp_path, device, {"task": "tests.gpu.lab:ReadingClassification"})
    assert sum(found.values()) == 10, found


@pytest.mark.usefixtures("gpu_only")
def test_fp16_waits_for_its_scaler_alone(tmp_path: Path, device: str, figures: Figures) -> None:
    found = places(tmp_path, device, {"precision": "fp16"})
    figures["host_syncs_in_ten_steps"] = sum(found.values())
    figures["where"] = ", ".join(found)
    assert all("optimizer.step()" in place for place in found)
