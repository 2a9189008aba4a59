"""The data sets of a run by their names: one to train on, and one or several to validate on."""

import re
from collections.abc import Mapping
from numbers import Integral
from typing import Any

from distloop.errors import UsageError

TRAIN, VALIDATION = "train", "validation"


def validation_sets(validation: Any) -> dict[str, Any]:
    """The validation sets by their names, from a mapping of them; a single data set has the name "". A dict whose keys
    are numbers is a data set, and so is a mapping whose length is not the number of its keys, such as one of columns.
    Raises UsageError for other names than letters, digits, _ and -, and without any set."""
    if not isinstance(validation, Mapping) or len(validation) != len(validation.keys()):
        return {"": validation}
    if isinstance(next(iter(validation), None), Integral):
        return {"": validation}
    if not validation:
        raise UsageError('validation is an empty mapping: give a data set, or several as {"day": …, "night": …}.')
    for name in validation:
        if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9_-]+", name):
            raise UsageError(
                f"validation has a data set with the name {name!r}. Use letters, digits, _ and - alone: rows and "
                "curves carry it, as accuracy/night."
            )
    return dict(validation)


def halves(source: Any) -> dict[str, Any]:
    """All data sets of a DataSource: "train", "validation" and, for a mapping, "day validation", "night validation".
    Left out is one that is None, of a loop of the user's own that does not validate."""
    sets = {half_of(name): dataset for name, dataset in validation_sets(source.validation).items()}
    return {half: dataset for half, dataset in {TRAIN: source.train, **sets}.items() if dataset is not None}


def half_of(name: str) -> str:
    """The half that the validation set of this name is: "validation", or "night validation"."""
    return f"{name} {VALIDATION}".lstrip()


def word_of(half: str) -> str:
    """Which data it is, in words: "training", "validation" or "night validation"."""
    return "training" if half == TRAIN else half
