"""What DistributedDataParallel complains of, in the words of distloop: with the parameters' names, and what to do."""

import re
import sys
import traceback
from typing import Any

UNFINISHED = "Expected to have finished reduction in the prior iteration"
TWICE = "Expected to mark a variable ready only once"
INDICES = re.compile(r"did not receive grad for rank (\d+): ([\d ]+)")
INDEX = re.compile(r"Parameter at index (\d+)")
MOST_NAMES = 6


def explained(error: BaseException) -> str | None:
    """The message for an error of DDP's that comes of the user's model; None for any other."""
    text = str(error)
    if type(error) is not RuntimeError or not text.startswith((UNFINISHED, TWICE)):
        return None
    names = _names(error)
    if text.startswith(TWICE):
        index = INDEX.search(text)
        which = _named(names, [int(index[1])]) if index else "A parameter"
        return (
            f"{which} got its gradient twice in one backward pass, which DistributedDataParallel does not support: by "
            "torch.utils.checkpoint with use_reentrant=True, or a part of the model that is used outside of forward(). "
            "Checkpoint with use_reentrant=False, or leave out --ddp.find-unused-parameters if nothing needs it."
        )
    found = INDICES.search(text)
    rank, which = ("", "Some parameters")
    if found:
        rank, which = f" on rank {found[1]}", _named(names, [int(word) for word in found[2].split()])
    return (
        f"{which} got no gradient in the backward pass before this step's{rank}: with several ranks each parameter "
        "needs one on each rank. Let the forward pass use them; or freeze them if they are not to be trained "
        "(requires_grad_(False) in the model's __init__, not later); or allow it: --ddp.find-unused-parameters "
        "(ddp.find_unused_parameters: true)."
    )


def in_short(names: list[str]) -> str:
    """The first of the names, and how many more there are."""
    more = f" and {len(names) - MOST_NAMES} more" if len(names) > MOST_NAMES else ""
    return ", ".join(names[:MOST_NAMES]) + more


def _named(names: list[str], indices: list[int]) -> str:
    return in_short([names[index] if index < len(names) else f"parameter {index}" for index in indices])


def _names(error: BaseException) -> list[str]:
    """The names of the parameters in DDP's order: its wrapper is a variable of a function that the error has left."""
    kind: Any = getattr(sys.modules.get("torch.nn.parallel"), "DistributedDataParallel", None)
    for frame, _ in traceback.walk_tb(error.__traceback__):
        for value in list(frame.f_locals.values()):
            if kind is not None and isinstance(value, kind):
                exchanged = _exchanged_by(value)
                return [name for name, one in value.module.named_parameters() if id(one) in exchanged]
    return []


def _exchanged_by(ddp: Any) -> set[int]:
    """The ids of the parameters that DDP numbers: those that required a gradient when it was made. Its reducer alone
    knows which; empty if it does not say so."""
    try:
        buckets = ddp.reducer._get_zeros_like_grad_buckets()
        return {id(parameter) for bucket in buckets for parameter in bucket.parameters()}
    except (AttributeError, RuntimeError):  # of another version of torch, or no memory for a gradient more
        return set()
