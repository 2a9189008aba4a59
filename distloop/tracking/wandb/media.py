"""What W&B shows of a validation besides its metrics: accuracy per class, confusion matrix, pictures of mistakes."""

import base64
import io
from pathlib import Path
from typing import Any

from distloop.run.files import VALIDATION, read_json

MOST_CLASSES = 50  # that get a curve each
MOST_NAMES = 20  # up to so many classes, the confusion matrix has names and counts


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
