"""The section "Figures": the newest of each of the pictures that the loop has logged."""

import base64
from pathlib import Path
from typing import Any

from distloop.commands.report.read import Record
from distloop.commands.report.sections import NothingToShowError
from distloop.run.figures import FILE

MOST_BYTES = 8_000_000  # of all pictures together
MOST_NAMED = 20  # of those that are not shown
PNG = b"\x89PNG\r\n\x1a\n"


def figures(record: Record) -> dict[str, Any]:
    """The variables of figures.html."""
    rows = record.metrics.figures
    if not rows:
        raise NothingToShowError("The loop has logged no picture.")
    shown, left_out, room = [], [], MOST_BYTES
    for name, row in reversed(rows.items()):  # the newest first
        png = _read(record.run.path, row.get("file"), room)
        if png is None:
            left_out.append(name)
            continue
        room -= len(png)
        width = int.from_bytes(png[16:20], "big")  # where a PNG has it
        shown.append((name, row["step"], width, base64.b64encode(png).decode()))
    shown.sort(key=lambda each: (-each[1], each[0]))
    if len(left_out) > MOST_NAMED:
        left_out[MOST_NAMED:] = [f"and {len(left_out) - MOST_NAMED} more"]
    return {"figures": shown, "left_out": left_out}


def _read(run: Path, file: Any, room: int) -> bytes | None:
    """A PNG of the run, of at most `room` bytes; None if there is none."""
    if not isinstance(file, str) or not FILE.fullmatch(file):
        return None
    try:
        path = run / file
        if not path.is_file():
            return None
        with open(path, "rb") as opened:
            content = opened.read(room + 1)
    except OSError:
        return None
    return content if content.startswith(PNG) and len(content) <= room else None
