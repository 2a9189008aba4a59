"""Which rank failed first, and the message about it: plain functions, without sockets, threads or clocks."""

import re
import sys
import traceback
from collections.abc import Collection, Sequence
from typing import NamedTuple

from distloop.config.secrets import clean_message
from distloop.errors import RunFailed, StoppedEarly, UsageError
from distloop.ranks.ddp_words import explained
from distloop.ranks.places import Place
from distloop.ranks.stopping import StopReason
from distloop.ranks.user_code import without_notes

SEARCH_SECONDS = 4.0  # if rank 0 hears of consequences only, it waits so long for their cause
STOP_SECONDS = 60.0  # once this rank is asked to stop: the longest that another one may be silent
ABSENT_SECONDS = 60.0  # rank 0 waits so long for the others to connect
IN_ORDER, INTERRUPTED = "in order", "interrupted from the keyboard"  # why a rank leaves on purpose
CONSEQUENCE = re.compile(r"\b(gloo|nccl|c10d)\b|process ?group", re.IGNORECASE)  # in the error of a rank without peers
FROM_WORKER = "Caught "  # torch's first word for an error in a loader worker; the worker's traceback follows


class End(NamedTuple):
    """What ended a rank, or keeps it from going on. The texts have no secrets.
    kind: failed, mistake (exit code 2), known (without traceback) or stopped (no failure, code 0): the rank's own
    error. consequence: its error says
    that another rank is gone. gone: its connection closed without a message. absent: it never connected. silent: no
    message for longer than the limit. standing: the others wait for it for longer than the limit. behind: the others'
    wait for it ended with an error."""

    place: Place
    kind: str
    what: str  # the error's message, or for how long the others have waited
    trace: str  # a traceback or stack


class Verdict(NamedTuple):
    """Why the run ends."""

    code: int  # the exit code of all ranks
    reason: str  # one line, for status.json
    text: str  # for standard error, printed once for all ranks


CODES = {"mistake": 2, "known": 1, "stopped": 0}  # the exit codes of the kinds that are printed as one message
BY_KEYBOARD = Verdict(130, f"{INTERRUPTED}, without saving", "")


def first_failure(
    places: Sequence[Place],
    ends: Sequence[End],
    now: float,
    limit: float,
    *,
    judge: int = 0,
    connected: Collection[int],
    first_heard: float = 0.0,
    listening_since: float | None = None,
    limit_name: str = "ddp.timeout_seconds",
    is_stopping: bool = False,
) -> End | None:
    """The end that is the cause of all others; None as long as that is open.
    `ends`: in the order in which they were heard, from `first_heard` on. `limit`: how many seconds a rank may keep
    the others waiting. `judge`: the rank that asks; 0 judges all ranks, another one rank 0 only. `connected`: the
    ranks it hears. `listening_since`: None once all ranks have connected. `is_stopping`: this rank is asked to stop.
    Times are those of time.monotonic()."""
    for end in ends:
        if end.kind != "consequence":
            return end
    if listening_since is not None and now - listening_since > ABSENT_SECONDS:
        return End(next(place for place in places[1:] if not place.pid), "absent", "", "")
    others = [place for place in places if place.rank in connected and not place.left]
    waited = f"{limit:.0f} s ({limit_name})"
    silence, silent = (STOP_SECONDS, f"{STOP_SECONDS:.0f} s, while the run is asked to stop")
    if not is_stopping or limit < STOP_SECONDS:
        silence, silent = limit, waited
    for place in others:
        if now - place.heard > silence:
            return End(place, "silent", silent, "")
    if judge:
        return None
    slow, fast = _slowest_and_fastest([places[0], *others])
    # Ranks that are all at the same place are at work (they compile, or validate), for which there is no limit.
    if slow.is_behind(fast) and min(now - slow.moved, now - fast.moved) > limit:
        return End(slow, "standing", waited, slow.stack)
    if not ends or now - first_heard <= SEARCH_SECONDS:
        return None
    slow, fast = _slowest_and_fastest([place for place in places if not place.left] or [ends[0].place])
    return End(slow, "behind", ends[0].what, slow.stack) if slow.is_behind(fast) else ends[0]


def _slowest_and_fastest(places: Sequence[Place]) -> tuple[Place, Place]:
    """A rank that is ahead of no other, and one that it is behind, if there is one (see Place.is_behind)."""
    slow = min(places, key=lambda place: (place.step, place.marks, place.line_number or sys.maxsize))
    return slow, max(places, key=lambda place: (place.step, place.marks, place.line_number))


def describe_error(error: BaseException) -> tuple[str, str, str]:
    """(kind, what, trace) of an End, for an error that a rank has met; not one of the kinds that others tell of it."""
    if isinstance(error, UsageError):
        return "mistake", clean_message(str(error)), ""
    if isinstance(error, RunFailed):
        return "known", clean_message(str(error)), ""
    if isinstance(error, StoppedEarly):
        return "stopped", clean_message(str(error)), ""
    if (message := explained(error)) is not None:
        return "mistake", clean_message(message), ""
    if isinstance(error, SystemExit):
        what = f"it left with sys.exit({error.code!r}) before the run was done"
    else:
        what = without_notes("".join(traceback.format_exception_only(error))).strip()
        if found := re.match(rf"{FROM_WORKER}(\w+) in", str(error)):
            name = f"{found[1]}: "  # the type that the worker met: torch cannot build each one again
            what = f"{name}{what.rsplit(name, 1)[-1]} (in a loader worker)"
    trace = "".join(traceback.format_exception(error))
    return ("consequence" if is_consequence(error) else "failed"), clean_message(what), clean_message(trace)


def is_consequence(error: BaseException) -> bool:
    """True for the errors that a rank meets when another one is gone."""
    if isinstance(error, getattr(sys.modules.get("torch.distributed"), "DistError", ())):
        return True
    text = str(error)
    return type(error) is RuntimeError and not text.startswith(FROM_WORKER) and bool(CONSEQUENCE.search(text))


def left_on_purpose(end: End, rank_0: Place) -> Verdict | None:
    """The verdict if this rank or rank 0 left on purpose; None if `end` is a failure."""
    place = end.place if end.place.left else rank_0
    if not place.left or place.left == IN_ORDER or end.kind not in ("gone", "consequence"):
        return None
    reason = StopReason.of(place.left)
    if reason is not None and reason.is_signal:
        text = f"{place} was asked to stop ({reason.text}) before the loop began: nothing was trained"
        return Verdict(0, place.left, f"\ndistloop: {text}; the same command starts again")
    return Verdict(130 if place.left == INTERRUPTED else 1, f"{place} left: {place.left}", "")


def verdict_on(end: End, own: Place, world_size: int, now: float) -> Verdict:
    """The verdict on the rank that failed first, in the words of the rank at `own`."""
    place, kind, what, trace = end
    if kind in CODES:
        return Verdict(CODES[kind], what, f"\ndistloop: {what}")
    if world_size == 1:
        return Verdict(1, what, f"{trace}\ndistloop: failed {place.where}: {what}")
    where = f"{place}, {place.where}"
    headlines = {
        "failed": f"{where}, failed first: {what}",
        "absent": f"{place} came, and ended, or could not reach rank 0's port, before all knew each other",
        "gone": f"{place} was the first to end, without a word: "
        + ("it crashed in native code" if trace else "killed (out of memory, kill -9), or left by os._exit")
        + f". Last heard of {place.where}, {now - place.heard:.1f} s before; {own} is {own.where}",
        "silent": f"{where}, has not been heard of for {what}: it is suspended, or its machine hangs",
        "standing": f"{where}, has kept the others waiting for {what}",
        "behind": f"{where}, is behind the others, whose wait for it ended with: {what}",
        "consequence": "the connections between the ranks broke, and none of them is known to have failed before; "
        f"{where}, says: {what}",
    }
    headline = headlines[kind].splitlines()[0]
    stack = "".join(f"  {line}\n" for line in trace.splitlines())
    text = f"\ndistloop: {headline}\n{stack}distloop: all {world_size} ranks end because of it"
    return Verdict(1, headline, text)
