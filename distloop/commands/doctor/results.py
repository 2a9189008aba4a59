"""The result of a check of `distloop doctor`, and how results name ranks and nodes."""

import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

OK, WARN, FAIL = "ok", "warn", "fail"

Facts = Sequence[Mapping[str, Any]]  # what find_facts of facts.py returns on each rank, by rank
Key = TypeVar("Key")
Value = TypeVar("Value")


class Result(NamedTuple):
    """The result of one check: a line of the table, an object in the JSON."""

    verdict: str
    check: str
    found: str
    """A sentence for people."""
    advice: str = ""
    """What to do; empty if the verdict is ok."""


def warn_if(is_bad: bool, check: str, finding: str, advice: str) -> Result:
    """A result with the verdict warn and the advice, or with the verdict ok."""
    return Result(WARN, check, finding, advice) if is_bad else Result(OK, check, finding)


def ranks_text(ranks: Iterable[int]) -> str:
    """ "rank 3", or "ranks 0-2, 5"."""
    numbers = sorted(ranks)
    spans = itertools.groupby(enumerate(numbers), lambda pair: pair[1] - pair[0])  # consecutive numbers
    texts = []
    for _, pairs in spans:
        first, *_, last = [number for _, number in pairs] * 2
        texts.append(f"{first}-{last}" if last > first else f"{first}")
    return f"rank{'s' if len(numbers) > 1 else ''} {', '.join(texts)}"


def where(facts: Facts, ranks: Iterable[int]) -> str:
    """ "ranks 2-3 on n2"."""
    ranks = list(ranks)
    return f"{ranks_text(ranks)} on {names_text(list(dict.fromkeys(facts[rank]['node'] for rank in ranks)))}"


def names_text(names: Sequence[str]) -> str:
    """ "n1, n2, n3, n4 and 2 more"."""
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def spread_text(facts: Facts, values: Sequence[Any]) -> str:
    """ "2.14 on ranks 0-2 on n1, n2; 2.13 on rank 3 on n2"; "" if all ranks have the same value."""
    groups = ranks_by_value(values)
    return "; ".join(f"{value} on {where(facts, groups[value])}" for value in groups) if len(groups) > 1 else ""


def ranks_by_value(values: Sequence[Any]) -> dict[str, list[int]]:
    """value -> the ranks that have it, the commonest value first. `values` are given by rank."""
    groups = group((str(value), rank) for rank, value in enumerate(values))
    return dict(sorted(groups.items(), key=lambda item: -len(item[1])))


def nodes_of(facts: Facts) -> dict[str, list[int]]:
    """node -> its ranks."""
    return group((fact["node"], rank) for rank, fact in enumerate(facts))


def group(pairs: Iterable[tuple[Key, Value]]) -> dict[Key, list[Value]]:
    """key -> the values that come with it."""
    groups: dict[Key, list[Value]] = {}
    for key, value in pairs:
        groups.setdefault(key, []).append(value)
    return groups
