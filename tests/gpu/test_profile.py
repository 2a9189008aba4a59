"""Part "profile": the timeline of twenty steps, to look at in a browser, and the share in which the device waits."""

from __future__ import annotations

import gzip
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.gpu.conftest import Figures
from tests.tools.ranks import train, write_config

MODELS: dict[str, dict[str, Any]] = {
    "tiny CNN": {"data": {"name": "tests.gpu.speed:images", "args": {"shape": [1, 28, 28]}}},
    "ResNet-18, 32 px": {
        "data": {"name": "tests.gpu.speed:images", "args": {"shape": [3, 32, 32], "pad": 4}},
        "model": "tests.gpu.speed:resnet18",
        "precision": "bf16",
        "batch": {"global_size": 128},
    },
}


@pytest.mark.parametrize("name", MODELS)
def test_twenty_steps(tmp_path: Path, device: str, on_gpu: bool, out: Path | None, figures: Figures, name: str) -> None:
    settings: dict[str, Any] = {
        "model": "tests.gpu.speed:tiny_cnn",
        "task": "tests.gpu.lab:ProfiledClassification",
        "optim": {"name": "sgd", "lr": 1e-3},
        "log": {"every_steps": 1000},
        "validate": {"every_epochs": None, "every_steps": 1000},
        "train": {"epochs": None, "steps": 40},
        "device": device,
        **MODELS[name],
    }
    if not on_gpu:
        settings |= {"batch": {"global_size": 2}, "precision": "no"}
    train(tmp_path, ["--config", str(write_config(tmp_path, settings))]).check()
    with gzip.open(tmp_path / "trace.json.gz") as file:
        names = {event.get("name") for event in json.load(file)["traceEvents"]}
    assert "aten::convolution_backward" in names
    found = json.loads((tmp_path / "profile").read_text())
    if out is not None:
        shutil.copy(tmp_path / "trace.json.gz", out / f"trace_{name.split(',')[0].replace(' ', '_')}.json.gz")
    if on_gpu:
        assert found["events"] > 20
        figures["step_ms"] = round(found["seconds"] / 20 * 1000, 3)
        # The profiler slows the host: "busy_ms" beside the time of a step in the part "figures" is the true share.
        figures["busy_ms"] = round(found["busy_seconds"] / 20 * 1000, 3)
        figures["waits_for_host_while_profiled"] = f"{100 * (1 - found['busy_seconds'] / found['seconds']):.1f} %"
        figures["kernels_and_copies_a_step"] = round(found["events"] / 20)
