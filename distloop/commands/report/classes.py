"""The sections of a classification: confusion matrix, classes, mistakes. Each function returns a template's data."""

import re
from typing import Any

import numpy as np

from distloop.commands.report.plots import cell_of, draw_matrix
from distloop.commands.report.read import Record
from distloop.commands.report.rows import Floats
from distloop.commands.report.sections import NothingToShowError

MOST_COUNTED = 20  # up to so many classes, the matrix shows counts
MOST_ROWS = 30  # of the table of classes; the others are folded
MOST_CONFUSIONS = 14
PICTURE = re.compile(r"data:image/(png|jpeg|webp|gif);base64,[A-Za-z0-9+/=\s]+")


def confusion(record: Record) -> dict[str, Any]:
    """The confusion matrix, and the most frequent confusions."""
    detail = _detail(record)
    if detail.get("confusion") is None:
        raise NothingToShowError("No confusion matrix was kept: there are too many classes.")
    matrix = _matrix(detail["confusion"])
    is_small = len(matrix) <= MOST_COUNTED
    return {
        "counts": _cells(matrix) if is_small else None,
        "svg": None if is_small else draw_matrix(matrix),
        "cell": cell_of(len(matrix)),
        "names": _names(detail, len(matrix)),
        "confusions": _most_frequent(matrix),
        "detail": detail,
    }


def per_class(record: Record) -> dict[str, Any]:
    """The accuracy of each class, the worst first."""
    detail = _detail(record)
    classes = detail.get("per_class")
    if not classes:
        raise NothingToShowError("validation.json has no numbers of single classes.")
    accuracies = [each["correct"] / each["samples"] if each["samples"] else None for each in classes]
    order = sorted(range(len(classes)), key=lambda label: (accuracies[label] is None, accuracies[label]))
    return {
        "classes": classes,
        "accuracies": accuracies,
        "first": order[:MOST_ROWS],
        "rest": order[MOST_ROWS:],
        "names": _names(detail, len(classes)),
        "mistakes": _mistakes(_matrix(detail["confusion"])) if detail.get("confusion") is not None else (),
    }


def mistakes(record: Record) -> dict[str, Any]:
    """The mistakes of which the model was most confident, with their pictures."""
    detail = _detail(record)
    wrong = detail.get("mistakes")
    if not wrong:
        raise NothingToShowError("No mistake was made." if wrong == [] else "validation.json keeps no mistakes.")
    return {"mistakes": wrong, "names": _names(detail), "is_picture": PICTURE.fullmatch}


def _cells(matrix: Floats) -> list[list[tuple[float, str, float]]]:
    """(count, colour, its strength in percent) of each cell: stronger for a larger share of the label's samples."""
    shares = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    diagonal = np.eye(len(matrix), dtype=bool)
    strengths = 8 + 62 * np.where(diagonal, shares, np.sqrt(shares))
    colours = np.where(diagonal, "blue", "red")
    return [list(zip(*row, strict=True)) for row in zip(matrix.tolist(), colours, strengths, strict=True)]


def _most_frequent(matrix: Floats) -> list[tuple[int, int, float, float]]:
    """(label, prediction, times, share of the label's samples) of the most frequent mistakes."""
    wrong, totals = _mistakes(matrix), matrix.sum(axis=1)
    order = np.argsort(-wrong, axis=None, kind="stable")[:MOST_CONFUSIONS]
    cells = [divmod(int(place), len(matrix)) for place in order if wrong.flat[place] > 0]
    return [(label, other, wrong[label, other], wrong[label, other] / totals[label]) for label, other in cells]


def _matrix(rows: Any) -> Floats:
    """The matrix, of shape [classes, classes]. Raises ValueError if it is not square, or has negative counts."""
    matrix = np.nan_to_num(np.array(rows, dtype=np.float64))
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1] or not matrix.size or matrix.min() < 0:
        raise ValueError("the confusion matrix is not square")
    return matrix


def _mistakes(matrix: Floats) -> Floats:
    """The matrix without the right answers."""
    return matrix * (1 - np.eye(len(matrix)))


def _names(detail: dict[str, Any], classes: int = 0) -> dict[int, str]:
    """label -> name; its number for a class without a name."""
    given = detail.get("classes")
    names = map(str, given if isinstance(given, list) else [])
    return {label: str(label) for label in range(classes)} | dict(enumerate(names))


def _detail(record: Record) -> dict[str, Any]:
    """The content of validation.json. Raises NothingToShowError if there is none."""
    problem = record.validation.problem
    if problem and "no validation.json" in problem and not record.metrics.validation:
        raise NothingToShowError("No validation yet.")
    if problem:
        raise NothingToShowError(f"{problem} It is written for classification.")
    return record.validation.value
