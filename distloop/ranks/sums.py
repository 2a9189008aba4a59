"""Sums of a loop's own values over all ranks."""

import zlib
from typing import Any

from distloop.errors import UsageError

BLOCK = 16  # values; ranks that disagree about a few of them still exchange the same number, and learn of it


def sum_over_ranks(**values: Any) -> dict[str, float]:
    """The sum of each value over all ranks, in float64 and the same on all of them, in one exchange. Collective: all
    ranks give the same names in the same order. Waits for the device. A mean is one sum divided by another.

    `values`: numbers, of Python or NumPy, or tensors of no dimension on any device. Raises UsageError for others, and
    on all ranks if their names differ.
    """
    import torch
    import torch.distributed as dist

    own = [_number(name, value) for name, value in values.items()]
    if not (dist.is_initialized() and dist.get_world_size() > 1):
        return dict(zip(values, own, strict=True))
    checksum = float(zlib.crc32("\n".join(values).encode()))
    row = [checksum, *own]
    row += [0.0] * (-len(row) % BLOCK)
    # On the CPU: distloop's groups have gloo there beside any other backend, and MPS has no float64.
    rows = [torch.zeros(len(row), dtype=torch.float64) for _ in range(dist.get_world_size())]
    dist.all_gather(rows, torch.tensor(row, dtype=torch.float64))
    by_rank = torch.stack(rows).tolist()
    if any(each[0] != checksum for each in by_rank):
        raise UsageError(
            "sum_over_ranks(): ranks give values of other names, or in another order. Let all give the same ones; "
            f"rank {dist.get_rank()} gives {', '.join(values) or 'none'}."
        )
    return {name: sum(each[place] for each in by_rank) for place, name in enumerate(values, start=1)}


def plain_number(value: Any) -> bool | int | float | None:
    """The value as Python's own bool, int or float, from one of NumPy or a tensor of no dimension, whose device is
    waited for; None for what is no number."""
    if getattr(value, "ndim", None) == 0 and hasattr(value, "item"):  # also NumPy's float64, which is a float
        value = value.item()
    return value if isinstance(value, (bool, int, float)) else None


def describe(value: Any) -> str:
    """What a value is that is no number: "Tensor of shape [2]"."""
    return type(value).__name__ + (f" of shape {list(value.shape)}" if hasattr(value, "shape") else "")


def _number(name: str, value: Any) -> float:
    if (number := plain_number(value)) is None:
        raise UsageError(
            f"sum_over_ranks(): {name} is a {describe(value)}; it takes numbers, and tensors of no dimension."
        )
    return float(number)
