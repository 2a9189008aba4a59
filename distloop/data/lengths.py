"""The length of a data set is a promise: what to say where it is not kept."""

import traceback
from typing import Any

from distloop.data.halves import word_of
from distloop.errors import UsageError


def short(what: str, length: int, index: int, raises: str) -> UsageError:
    """The error for a sample that is not there. `what`: the data in words; `raises`: what loading it raises."""
    return UsageError(
        f"{what} have the length {length}, but sample {index} raises {raises}. Let __len__() return how many samples "
        "there are: each index below it must have one, on every rank and in every epoch."
    )


def in_words(error: Exception) -> str:
    """The error and the user's line that raised it: "IndexError: list index out of range (a.py, line 3)"."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "/distloop/data/" not in frame.filename]
    own = [frame for frame in frames if "site-packages" not in frame.filename] or frames
    where = f" ({own[-1].filename}, line {own[-1].lineno})" if own else ""
    return f"{type(error).__name__}{': ' if str(error) else ''}{error}{where}"


def refuse_other_length(half: str, dataset: Any, length: int) -> None:
    """Raise UsageError if this half of the data (halves.py) has another length than at the start."""
    if (now := len(dataset)) != length:
        raise UsageError(
            f"The {word_of(half)} data had {length} samples at the start, and have {now} now. The order of the samples "
            "follows from their number: let __len__() return the same all the time, and leave samples out before it."
        )
