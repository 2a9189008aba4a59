"""Labels of a few bits: where a model has more classes than they can name, some have become others."""

import torch
from torch import Tensor

from distloop.errors import UsageError

SMALL = {torch.uint8: 256, torch.int8: 128, torch.bool: 2}  # how many classes a label of so few bits can name


def refuse_small(labels: Tensor, classes: int) -> None:
    """Raise UsageError if the model has more classes than labels of this dtype can name."""
    if labels.dtype in SMALL and classes > (most := SMALL[labels.dtype]):
        raise UsageError(
            f"Labels of {str(labels.dtype).removeprefix('torch.')} can name {most} classes only, and the model has "
            f"{classes}: larger labels have become other numbers. Make them int64 before they get their "
            "values: torch.tensor(labels, dtype=torch.int64)."
        )
