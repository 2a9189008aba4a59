"""Rows of metrics.jsonl: read them while the file grows, and turn each into what W&B logs."""

import base64
import contextlib
import io
import json
import math
from pathlib import Path
from typing import Any

from distloop.run.figures import FILE
from distloop.run.files import VALIDATION, read_json

ROWS_AT_ONCE = 10_000
MOST_CLASSES = 50  # that get a curve each
MOST_NAMES = 20  # up to so many classes, the confusion matrix has names and counts


class RowReader:
    """Reads the rows of a file that is still being written, from row `first_row` (counted from 0) on."""

    def __init__(self, path: Path, first_row: int) -> None:
        """Raises FileNotFoundError."""
        self.file = open(path, "rb")  # noqa: SIM115 - open until the process ends
        for _ in range(first_row):
            self.file.readline()

    def read(self) -> list[dict[str, Any]]:
        """The next whole lines, at most ROWS_AT_ONCE. A damaged line is {}, so that row n stays row n."""
        rows: list[dict[str, Any]] = []
        while len(rows) < ROWS_AT_ONCE:
            start_of_line = self.file.tell()
            line = self.file.readline()
            if not line.endswith(b"\n"):  # the end of the file, or a line that is being written
                self.file.seek(start_of_line)
                break
            rows.append(parse_row(line))
        return rows


def parse_row(line: bytes) -> dict[str, Any]:
    """The JSON object in the line; {} if the line is damaged."""
    row = None
    with contextlib.suppress(ValueError):
        row = json.loads(line)
    return row if isinstance(row, dict) else {}


def as_logged(row: dict[str, Any], run: Path, redone_until: int) -> dict[str, Any]:
    """The values that W&B logs for a row of the run in the directory `run`, by W&B's names.

    A step up to `redone_until` is marked as redone, because W&B has its first row as well.
    """
    row = dict(row)
    kind, step, moment = row.pop("kind", "unknown"), row.pop("step", None), row.pop("time", None)
    logged = {"global_step": step} | {name: row.pop(name, None) for name in ("epoch", "attempt")}
    if isinstance(moment, (int, float)):
        logged["_timestamp"] = moment
    if isinstance(step, int) and step <= redone_until:
        logged["redone"] = 1
    if kind == "figure":
        with contextlib.suppress(Exception):  # its file is gone: only those of the last steps are kept
            logged |= figure_of(run, row)
        return logged
    for name, value in row.items():
        if isinstance(value, list) and all(each is None or isinstance(each, (int, float)) for each in value):
            prefix = "rank_" if name == "memory_gib" else ""
            logged |= {f"{kind}/{name}/{prefix}{index}": _nan_for_none(each) for index, each in enumerate(value)}
        else:
            logged[f"{kind}/{name}"] = _nan_for_none(value)
    if kind == "validate":
        with contextlib.suppress(Exception):  # without its pictures the row still has its numbers
            logged = media_of(run, step) | logged  # a metric of the task may be called mistakes
    return logged


def _nan_for_none(value: Any) -> Any:
    return math.nan if value is None else value


def figure_of(run: Path, row: dict[str, Any]) -> dict[str, Any]:
    """The picture of a figure row, by W&B's name. Raises what there is to raise if there is none."""
    import wandb

    if not FILE.fullmatch(row["file"]):
        raise ValueError(row["file"])
    return {f"figures/{row['name']}": wandb.Image(str(run / row["file"]))}


def media_of(run: Path, step: int) -> dict[str, Any]:
    """What to log for the validation at `step`, by W&B's names; {} if validation.json holds another validation."""
    details = read_json(run / VALIDATION)
    if details.get("step") != step:
        return {}
    import wandb
    from PIL import Image

    logged: dict[str, Any] = {}
    classes = details.get("per_class") or []
    for each in classes if len(classes) <= MOST_CLASSES else ():
        if each["samples"]:
            logged[f"class_accuracy/{each['name']}"] = each["correct"] / each["samples"]
    if details.get("confusion"):
        picture = confusion_picture(details)
        logged["validate/confusion_matrix"] = wandb.Image(picture, caption="rows: label, columns: prediction")
    names = [each["name"] for each in classes]
    mistakes = []
    for mistake in details.get("mistakes") or []:
        if mistake.get("picture"):
            label, predicted = (names[mistake[key]] for key in ("label", "predicted"))
            caption = f"{label}, predicted {predicted} ({mistake['confidence']:.0%})"
            png = io.BytesIO(base64.b64decode(mistake["picture"].partition(",")[2]))
            mistakes.append(wandb.Image(Image.open(png), caption=caption))
    if mistakes:
        logged["validate/mistakes"] = mistakes
    return logged


def confusion_picture(details: dict[str, Any]) -> Any:
    """The confusion matrix as RGBA pixels, [height, width, 4]. A cell's shade is its share of its row."""
    import numpy as np
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    counts = np.array(details["confusion"])
    shares = counts / np.maximum(1, counts.sum(1, keepdims=True))
    figure = Figure(figsize=(8, 8), layout="constrained")
    canvas, axes = FigureCanvasAgg(figure), figure.add_subplot(xlabel="prediction", ylabel="label")
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1, interpolation="nearest")
    if len(counts) <= MOST_NAMES:
        names = [each["name"] for each in details["per_class"]]
        axes.set_xticks(range(len(names)), names, rotation=90)
        axes.set_yticks(range(len(names)), names)
        for row, column in np.argwhere(counts):
            color = "white" if shares[row, column] > 0.5 else "black"
            axes.text(column, row, str(counts[row, column]), ha="center", va="center", color=color)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())
