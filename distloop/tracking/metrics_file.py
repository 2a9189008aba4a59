"""metrics.jsonl: one row per line, flushed as it is written; a run has one over all its attempts."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any


class MetricsFile:
    """Appends rows to a file."""

    def __init__(self, path: Path) -> None:
        self.file = open(path, "a")  # noqa: SIM115 - open as long as the run

    def log(self, row: dict[str, Any]) -> None:
        """Write one row. Numbers that JSON does not have (nan, inf) become null."""
        clean = {key: None if isinstance(v, float) and not math.isfinite(v) else v for key, v in row.items()}
        self.file.write(json.dumps(clean) + "\n")
        self.file.flush()

    def close(self) -> None:
        self.file.close()


def set_rows_aside(path: Path, step: int) -> int:
    """Move rows of later steps than `step` to metrics.set_aside.jsonl beside it; returns how many.

    An attempt does these steps again. A last line that was torn by a crash goes with them.
    """
    if not path.exists():
        return 0
    kept: list[str] = []
    aside: list[str] = []
    for line in path.read_text().splitlines():
        try:
            (kept if json.loads(line)["step"] <= step else aside).append(line)
        except (ValueError, KeyError, TypeError):
            aside.append(line)
    if aside:
        with open(path.with_name("metrics.set_aside.jsonl"), "a") as file:
            file.writelines(line + "\n" for line in aside)
        replacement = path.with_name(f".{path.name}.writing")
        replacement.write_text("".join(line + "\n" for line in kept))
        replacement.replace(path)
    return len(aside)
