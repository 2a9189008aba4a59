"""Run directories for reports, written by hand: what training writes, with whatever a test wants to be odd."""

from __future__ import annotations

import base64
import json
import math
import shutil
from pathlib import Path
from typing import Any

from distloop.config.load import config_from_mapping, dump
from distloop.config.settings import Config

EVIL = "<script>alert('x')</script>"
# A red dot of one pixel.
PICTURE = (
    "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mP8z8BQDwAEhQGAhKmMIQAAAABJRU5Erk"
)
PICTURE += "Jggg=="


def write_figure(run: Path, step: int, name: str, content: bytes | None = None) -> str:
    """A picture of the loop; returns what its row says of the file."""
    file = f"figures/step_{step:08d}/{name}.png"
    (run / file).parent.mkdir(parents=True, exist_ok=True)
    (run / file).write_bytes(base64.b64decode(PICTURE.partition(",")[2]) if content is None else content)
    return file


def write_json(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def train_row(step: int, attempt: int = 1, **changes: Any) -> dict[str, Any]:
    row = {"kind": "train", "step": step, "epoch": 1 + step // 100, "attempt": attempt}
    row |= {
        "loss": math.exp(-step / 200),
        "running_loss": 1.1 * math.exp(-step / 200),
        "lr": 0.001 * (1 - step / 1000),
        "gradient_norm": 1.0 + step % 3,
    }
    row |= {"samples_per_second": 1000.0 + step % 7, "skipped_steps": 0, "data_seconds": 0.1, "compute_seconds": 1.0}
    return row | {"validation_seconds": 0.0, "checkpoint_seconds": 0.02, "memory_gib": [0.41, 0.42]} | changes


def write_rows(run: Path, rows: list[dict[str, Any]]) -> None:
    run.mkdir(parents=True, exist_ok=True)
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def validation_row(step: int, **metrics: float) -> dict[str, Any]:
    return {"kind": "validate", "step": step, "epoch": step // 100, "attempt": 1, **metrics, "samples": 60}


def full_run(run: Path, classes: int = 3, lr: float = 0.01, worse: float = 0.0) -> Path:
    """A run of two attempts, the second of which has failed, with everything that there can be."""
    rows: list[dict[str, Any]] = []
    for step in range(5, 405, 5):
        rows.append(train_row(step, attempt=1 if step <= 200 else 2, penalty=1 / step))
        if step % 100 == 0:
            rows.append(
                {"kind": "epoch", "step": step, "epoch": step // 100, "attempt": 1, "loss": math.exp(-step / 200)}
            )
            rows.append(validation_row(step, loss=1.2 * math.exp(-step / 200), accuracy=step / 500 - worse))
    rows.append({"kind": "figure", "step": 400, "name": EVIL, "file": write_figure(run, 400, "script")})
    write_rows(run, rows)
    best = validation_row(400, loss=0.16, accuracy=0.8 - worse)
    status = {"state": "failed", "step": 400, "total_steps": 1000, "best": best, "best_rule": ["accuracy", "max"]}
    status |= {
        "attempt": 2,
        "first_step": 200,
        "reason": f"rank 1: it broke {EVIL}",
        "written": "2026-01-02T03:04:05+00:00",
    }
    write_json(run / "status.json", status)
    config = config_from_mapping({"optim": {"lr": lr}, "data": {"args": {"shift": EVIL}}, "model": "mlp"}, "test")
    (run / "config.yaml").write_text(dump(config))
    environment = {"python": "3.11.7", "versions": {"torch": "2.8.0"}, "machine": EVIL, "world_size": 2}
    environment |= {"git_commit": "0123456789abcdef", "git_changes": [f" M {EVIL}"], "command": ["train.py", EVIL]}
    write_json(run / "environment.json", environment)
    (run / "git.diff").write_text(f"diff --git a/a.py b/a.py\n--- a/a.py\n+++ b/a.py\n@@ -1 +1 @@\n-old\n+{EVIL}\n")
    seconds = {"start_up": 4.0, "data": 10.0, "compute": 70.0, "validation": 8.0, "checkpoint": 2.0, "lost": 6.0}
    attempt = {"attempt": 1, "began": "2026-01-02T03:04:05+00:00", "world_size": 2, "device": "cpu", "first_step": 0}
    attempt |= {"step": 200, "state": "stopped", "seconds": seconds}
    write_json(run / "time.json", {"attempts": [attempt, attempt | {"attempt": 2, "first_step": 200, "step": 400}]})
    write_json(run / "validation.json", validation_detail(classes))
    failure = {"rank": 1, "node": "vm", "step": 401, "phase": "forward pass", "what": f"ValueError: {EVIL}"}
    write_json(run / "failures" / "attempt_0002.json", failure | {"traceback": f"Traceback …\n  {EVIL}\n"})
    change = {"after_attempt": 1, "after_step": 200, "changes": {"train.epochs": [5, EVIL]}}
    (run / "config_changes.jsonl").write_text(json.dumps(change) + '\n{"after_att')
    for step in (300, 400):
        write_json(run / "checkpoints" / f"step_{step:08d}" / "state.json", {"step": step})
    return run


def validation_detail(classes: int) -> dict[str, Any]:
    """validation.json in which each class is sometimes taken for the next one; the first has an evil name."""
    confusion = [[0] * classes for _ in range(classes)]
    for label in range(classes):
        confusion[label][label], confusion[label][(label + 1) % classes] = 20 - label % 5, label % 5
    names = [EVIL, *(f"class {label}" for label in range(1, classes))]
    per_class = [{"name": name, "samples": 20, "correct": 20 - label % 5} for label, name in enumerate(names)]
    wrong = {"index": 17, "label": 1, "predicted": 2, "confidence": 0.98, "picture": PICTURE}
    mistakes = [
        wrong,
        wrong | {"index": 18, "label": 0, "picture": None},
        wrong | {"picture": "http://127.0.0.1/x.png"},
    ]
    detail = {"step": 400, "attempt": 2, "samples": 20 * classes, "classes": names, "confusion": confusion}
    return detail | {"per_class": per_class, "mistakes": mistakes}


def small_run(run: Path, **optim: Any) -> Path:
    """A run that has just begun."""
    write_json(run / "status.json", {"state": "finished", "step": 0, "total_steps": 10, "attempt": 1})
    (run / "config.yaml").write_text(dump(config_from_mapping({"optim": optim}, "test") if optim else Config()))
    return run


def without(run: Path, other: Path, *names: str) -> Path:
    """A copy of the run without some of its files."""
    shutil.copytree(run, other)
    for name in names:
        path = other / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    return other
