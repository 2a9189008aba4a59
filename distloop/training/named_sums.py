"""The sums that a task's loss() may return by name, beside loss and weight: for rows, divided by the weight."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from distloop.errors import UsageError
from distloop.ranks.sums import describe, plain_number
from distloop.run.metrics import check_names

MARK = "loss(): "  # before such a name, among the sums of a validation: metrics() may not give it as well


def check_sums(sums: Any) -> None:
    """Raise UsageError unless these are a mapping of names, none of which a row has already, to numbers. The host
    waits for no device."""
    check_names("loss", sums)
    for name, value in sums.items():
        if isinstance(value, Tensor):
            is_number = value.numel() == 1 and not value.is_complex()
        else:
            is_number = plain_number(value) is not None
        if not is_number:
            raise UsageError(
                f"task.loss(): {name} is a {describe(value)}. Give a sum over the batch: a number, or a tensor of one "
                "element."
            )


def marked(sums: Mapping[str, Any], metrics: Mapping[str, Any]) -> dict[str, Any]:
    """The sums of a validation batch, under the names that they have among others. Raises UsageError."""
    check_sums(sums)
    if twice := [name for name in sums if name in metrics]:
        raise UsageError(
            f"task.loss() and task.metrics() both return {twice[0]!r}. Leave it out of metrics(): in validation the "
            "sums of loss() are added up as well, and summary(sums) gets both."
        )
    return {MARK + name: value.reshape(()) if isinstance(value, Tensor) else value for name, value in sums.items()}


def split(total: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Of a validation's sums: (all for summary(), under their own names; the means of those that loss() gave)."""
    named = {name.removeprefix(MARK): value for name, value in total.items() if name.startswith(MARK)}
    others = {name: value for name, value in total.items() if not name.startswith(MARK)}
    return others | named, {name: float(value.double() / total["weight"]) for name, value in named.items()}
