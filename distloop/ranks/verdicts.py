"""What is known of a rank that failed, and what is said of it: the first one's failure, not its consequences."""

from __future__ import annotations

import re
import sys
import time
import traceback
from typing import NamedTuple

from distloop.config.secrets import clean_text
from distloop.errors import RunFailed, UsageError
from distloop.ranks.places import Place

# Whose words a rank's error carries that has lost its peers.
CONSEQUENCE = re.compile(r"\b(gloo|nccl|c10d)\b|process ?group", re.IGNORECASE)
FROM_WORKER = "Caught "  # so begins what torch says of an error in a loader worker, before the worker's traceback


class Verdict(NamedTuple):
    """Why the run ends: the exit code of all ranks, a line for status.json, and what is shown."""

    code: int
    reason: str
    text: str


def describe_error(error: BaseException) -> tuple[str, str, str]:
    """(kind, what, traceback) of what a rank has met, without secrets; kind: mistake, known, failed or consequence."""
    if isinstance(error, UsageError):
        return "mistake", clean_text(str(error)), ""
    if isinstance(error, RunFailed):
        return "known", clean_text(str(error)), ""
    if isinstance(error, SystemExit):
        what = f"it left with sys.exit({error.code!r}) before the run was done"
    else:
        what = "".join(traceback.format_exception_only(error)).strip()
        if str(error).startswith(FROM_WORKER):
            name = f"{type(error).__name__}: "
            what = f"{name}{what.rsplit(name, 1)[-1]} (in a loader worker)"
    trace = "".join(traceback.format_exception(error))
    return ("consequence" if is_consequence(error) else "failed"), clean_text(what), clean_text(trace)


def is_consequence(error: BaseException) -> bool:
    """Whether this is what a rank meets when another one is gone."""
    distributed = sys.modules.get("torch.distributed")
    known = getattr(distributed, "DistError", ()) if distributed is not None else ()
    return bool(known and isinstance(error, known)) or (
        type(error) is RuntimeError
        and not str(error).startswith(FROM_WORKER)
        and CONSEQUENCE.search(str(error)) is not None
    )


def verdict(place: Place, kind: str, what: str, trace: str, own: Place, world_size: int) -> Verdict:
    """What is said of the rank that was first; `what`, with a rank that stands still: for how long.

    `what` and `trace` hold no secrets.
    """
    if kind in ("mistake", "known"):
        return Verdict(2 if kind == "mistake" else 1, what, f"\ndistloop: {what}")
    if world_size == 1:
        return Verdict(1, what, f"{trace}\ndistloop: failed {place.where}: {what}")
    first = f"{place}, {place.where}"
    headlines = {
        "failed": f"{first}, failed first: {what}",
        "absent": f"{place} came, and ended, or could not reach rank 0's port, before all knew each other",
        "gone": f"{place} was the first to end, without a word: "
        + ("it crashed in native code" if trace else "killed (out of memory, kill -9), or left by os._exit")
        + f". Last heard of {place.where}, {time.monotonic() - place.heard:.1f} s before; {own} is {own.where}",
        "silent": f"{first}, has not been heard of for {what}: it is suspended, or its machine hangs",
        "standing": f"{first}, has kept the others waiting for {what}",
        "behind": f"{first}, is behind the others, whose wait for it ended with: {what}",
        "consequence": f"the connections between the ranks broke, and none of them is known to have failed before; "
        f"{first}, says: {what}",
    }
    headline = headlines[kind].splitlines()[0]
    stack = "".join(f"  {line}\n" for line in trace.splitlines())
    text = f"\ndistloop: {headline}\n{stack}distloop: all {world_size} ranks end because of it"
    return Verdict(1, headline, text)
