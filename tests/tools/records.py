"""Read what a run left behind."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file

from distloop.run.checkpoint import published_in, step_of


def run_of(folder: Path) -> Path:
    """The directory of the run that is started in `folder` and has no name of its own."""
    return folder / "runs" / "run"


def all_rows(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def rows(run: Path, kind: str) -> list[dict[str, Any]]:
    return [row for row in all_rows(run) if row["kind"] == kind]


def found(row: dict[str, Any]) -> dict[str, Any]:
    """What a row says of the training: without who wrote it when, how fast and with how much memory."""
    others = ("attempt", "time", "samples_per_second", "memory_gib")
    return {name: value for name, value in row.items() if name not in others and not name.endswith("_seconds")}


def losses(run: Path) -> list[float]:
    return [row["loss"] for row in rows(run, "train")]


def status(run: Path) -> dict[str, Any]:
    return json.loads((run / "status.json").read_text())


def steps_saved(run: Path) -> list[int]:
    """The steps of the checkpoints that are published."""
    return [step_of(path) for path in published_in(run / "checkpoints")]


def weights(run: Path) -> dict[str, torch.Tensor]:
    newest = max((run / "checkpoints").glob("step_*")) / "model.safetensors"
    found = {name: tensor.clone() for name, tensor in load_file(newest).items()}  # not a map of the file
    with safe_open(newest, "pt") as file:
        as_real = json.loads((file.metadata() or {}).get("as_real", "[]"))  # which have no dtype in the file
    return found | {name: torch.view_as_complex(found[name]) for name in as_real}


def largest_difference(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    assert one.keys() == other.keys()
    return max(float((one[name] - other[name]).abs().max()) for name in one)
