"""A run that version 0.1.0 before the rooms began, and left in the middle of an epoch, goes on as it would have there.

tests/begun_before/run is its directory (step 29 of 69, epoch 2 of 3), expected/ what that version made of it.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from tests.tools.ranks import train

BEFORE = Path(__file__).resolve().parent.parent / "begun_before"
FINISHED = "runs/begun_before/checkpoints/step_00000069"
MEASURED = ("loss", "running_loss", "gradient_norm", "lr", "accuracy")


def this_computer() -> dict[str, str]:
    """What decides how sums are rounded."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    vendor = next(line.partition(":")[2].strip() for line in lines if line.startswith("vendor_id"))
    return {"capability": torch.backends.cpu.get_cpu_capability(), "vendor": vendor, "torch": torch.__version__}


def assert_same(found: Any, expected: Any, exactly: bool) -> None:
    """Nested dicts and lists with equal tensors: the same bits, or as near as another processor's rounding."""
    if isinstance(expected, torch.Tensor):
        torch.testing.assert_close(
            found, expected, **({"rtol": 0, "atol": 0} if exactly else {"rtol": 0.02, "atol": 1e-3})
        )
    elif isinstance(expected, dict):
        assert list(found) == list(expected)
        for key in expected:
            assert_same(found[key], expected[key], exactly)
    elif isinstance(expected, list):
        for one, other in zip(found, expected, strict=True):
            assert_same(one, other, exactly)
    else:
        assert found == expected


def rows_of(path: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return [{key: row[key] for key in ("kind", "step", "epoch", "attempt", *MEASURED) if key in row} for row in rows]


def test_a_run_begun_by_the_version_before_goes_on_to_the_same_bits(tmp_path: Path) -> None:
    shutil.copytree(BEFORE / "run", tmp_path / "runs" / "begun_before")
    shutil.copy(BEFORE / "run.yaml", tmp_path)
    done = train(tmp_path, ["--config", "run.yaml", "--device", "cpu", "--data.workers", "0"]).check()
    assert "continuing after step 29 of 69 (epoch 2, after 384 of its samples)" in done.output

    expected, found = BEFORE / "expected", tmp_path / FINISHED
    exactly = this_computer() == json.loads((expected / "computed_on.json").read_text())
    for name in ("model.safetensors", "averaged.safetensors"):
        assert_same(load_file(found / name), load_file(expected / name), exactly)
    optimizers = [torch.load(folder / "optimizer.pt", weights_only=True) for folder in (found, expected)]
    assert_same({key: optimizers[0][key] for key in optimizers[1]}, optimizers[1], exactly)  # its names are new
    rows, rows_then = rows_of(tmp_path / "runs/begun_before/metrics.jsonl"), rows_of(expected / "metrics.jsonl")
    assert [(row["kind"], row["step"], row["attempt"]) for row in rows] == [
        (row["kind"], row["step"], row["attempt"]) for row in rows_then
    ]
    for row, then in zip(rows, rows_then, strict=True):
        for name in set(MEASURED) & set(then):
            near = 0.0 if exactly else 0.05 + 0.02 * abs(then[name])
            assert abs(row[name] - then[name]) <= near, (then, row)
    state, state_then = (json.loads((folder / "state.json").read_text()) for folder in (found, expected))
    assert list(state) == list(state_then)
    assert (state["step"], state["averaged_steps"]) == (69, 69)
