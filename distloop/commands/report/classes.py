"""The sections of a classification: confusion matrix, classes, mistakes. Each function returns its section as HTML."""

from __future__ import annotations

import re
from typing import Any

import numpy as np

from distloop.commands.report.markup import folded, number_html, quiet, table, text
from distloop.commands.report.plots import cell_of, draw_matrix
from distloop.commands.report.read import Record
from distloop.commands.report.rows import Floats
from distloop.tracking.wording import UNKNOWN, percent

MOST_COUNTED = 20  # up to so many classes, the matrix shows counts
MOST_ROWS = 30  # of the table of classes; the others are folded
MOST_CONFUSIONS = 14
PICTURE = re.compile(r"data:image/(png|jpeg|webp|gif);base64,[A-Za-z0-9+/=\s]+")


def confusion(record: Record) -> str:
    """The confusion matrix, and the most frequent confusions."""
    if record.validation.problem:
        return quiet(_why_missing(record))
    detail = record.validation.value
    if detail.get("confusion") is None:
        return quiet("No confusion matrix was kept: there are too many classes.")
    matrix = _matrix(detail["confusion"])
    names = _names(detail, len(matrix))
    if len(matrix) <= MOST_COUNTED:
        picture, unit = _matrix_of_counts(matrix, names), "counts"
    else:
        picture, unit = draw_matrix(matrix), "shares of each label, as roots so that rare mistakes are seen"
        cell = cell_of(len(matrix))
        unit += f"; a point is the largest of {cell} × {cell} classes" if cell > 1 else ""
    return (
        f'<div class="beside"><div class="alone">{picture}</div><div><h3>Most frequent confusions</h3>'
        f"{_frequent(matrix, names)}</div></div>"
        f'<p class="note">Rows: labels; columns: predictions; {unit}. {_source(detail)}</p>'
    )


def per_class(record: Record) -> str:
    """The accuracy of each class, the worst first."""
    if record.validation.problem:
        return quiet(_why_missing(record))
    detail = record.validation.value
    classes = detail.get("per_class")
    if not classes:
        return quiet("validation.json has no numbers of single classes.")
    matrix = _matrix(detail["confusion"]) if detail.get("confusion") is not None else None
    names = _names(detail, len(classes))
    rows = []
    for index, each in enumerate(classes):
        samples, correct = each["samples"], each["correct"]
        wrong_answer = UNKNOWN
        if matrix is not None and index < len(matrix):
            mistakes_of_class = matrix[index].copy()
            mistakes_of_class[index] = 0
            times = int(mistakes_of_class.max())
            if times > 0:
                name_of_answer = text(names[int(mistakes_of_class.argmax())])
                wrong_answer = f"{name_of_answer} <span class=quiet>{number_html(times)}×</span>"
        name = each["name"] if each.get("name") is not None else names[index]
        accuracy = correct / samples if samples else None
        cells = [text(name), wrong_answer, number_html(samples), number_html(correct), percent(accuracy)]
        rows.append((accuracy if accuracy is not None else 2.0, cells))
    rows.sort(key=lambda row: row[0])
    cells_of_rows = [cells for _, cells in rows]
    titles = ["class", "most frequent wrong answer", "samples", "correct", "accuracy"]
    first = table(titles, cells_of_rows[:MOST_ROWS], left=2)
    rest = cells_of_rows[MOST_ROWS:]
    return first + (folded(f"{len(rest):,} more classes", table(titles, rest, left=2)) if rest else "")


def mistakes(record: Record) -> str:
    """The mistakes of which the model was most confident, with their pictures."""
    if record.validation.problem:
        return quiet(_why_missing(record))
    detail = record.validation.value
    wrong = detail.get("mistakes")
    if not wrong:
        return quiet("No mistake was made." if wrong == [] else "validation.json keeps no mistakes.")
    names = _names(detail, 0)
    return f'<div class="mistakes">{"".join(_mistake(each, names) for each in wrong)}</div>'


def _mistake(mistake: dict[str, Any], names: list[str]) -> str:
    def name(key: str) -> str:
        value = mistake.get(key)
        return text(names[value] if type(value) is int and 0 <= value < len(names) else value)

    picture = mistake.get("picture")
    html = '<div class="none">no picture</div>'
    if isinstance(picture, str) and PICTURE.fullmatch(picture):
        html = f'<img alt="sample {text(mistake.get("index"))}" src="{text(picture)}">'
    confidence = mistake.get("confidence")
    percentage = percent(confidence) if type(confidence) in (int, float) else UNKNOWN
    return (
        f"<figure>{html}<figcaption>{name('label')} <span>taken for</span> {name('predicted')}"
        f"<br><span>{percentage} · #{text(mistake.get('index'))}</span></figcaption></figure>"
    )


def _matrix_of_counts(matrix: Floats, names: list[str]) -> str:
    """A small confusion matrix as a table of counts."""
    totals = matrix.sum(axis=1)
    head = "".join(f"<th class=c><span>{text(name)}</span></th>" for name in names[: len(matrix)])
    rows = []
    for label, counts in enumerate(matrix):
        cells = []
        for prediction, count in enumerate(counts):
            if not count:
                cells.append('<td class="zero">·</td>')
                continue
            share = count / totals[label]
            colour, deep = ("blue", share) if label == prediction else ("red", share**0.5)
            tint = f"background:color-mix(in srgb,var(--{colour}) {8 + 62 * deep:.0f}%,transparent)"
            cells.append(f'<td style="{tint}">{count:,.0f}</td>')
        rows.append(f"<tr><th>{text(names[label])}</th>{''.join(cells)}</tr>")
    return (
        f'<div class="wide"><table class="matrix"><thead><tr><th></th>{head}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def _frequent(matrix: Floats, names: list[str]) -> str:
    """The table of the most frequent mistakes."""
    wrong = matrix.copy()
    np.fill_diagonal(wrong, 0)
    order = np.argsort(-wrong, axis=None, kind="stable")[:MOST_CONFUSIONS]
    pairs = [divmod(int(place), len(matrix)) for place in order if wrong.flat[place] > 0]
    if not pairs:
        return quiet("None: every answer was right.")
    rows = [
        [
            text(names[label]),
            text(names[prediction]),
            f"{wrong[label, prediction]:,.0f}",
            percent(wrong[label, prediction] / matrix[label].sum()),
        ]
        for label, prediction in pairs
    ]
    return table(["label", "taken for", "times", "of the label"], rows, left=2)


def _matrix(rows: Any) -> Floats:
    """The matrix, of shape [classes, classes]. Raises ValueError if it is not square, or has negative counts."""
    matrix = np.nan_to_num(np.array(rows, dtype=np.float64))
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1] or not matrix.size or matrix.min() < 0:
        raise ValueError("the confusion matrix is not square")
    return matrix


def _names(detail: dict[str, Any], classes: int) -> list[str]:
    """The names of the classes; a number for a class without a name."""
    given = detail.get("classes")
    names = [str(name) for name in given] if isinstance(given, list) else []
    return [*names, *(str(index) for index in range(len(names), classes))]


def _source(detail: dict[str, Any]) -> str:
    """A sentence that says which validation this is."""
    step, samples = number_html(detail.get("step")), number_html(detail.get("samples"))
    return f"The last validation, at step {step}, of {samples} samples."


def _why_missing(record: Record) -> str:
    """A sentence that says why there are no details of the validation."""
    if not record.metrics.validation and "no validation.json" in (record.validation.problem or ""):
        return "No validation yet."
    return f"{record.validation.problem} It is written for classification."
