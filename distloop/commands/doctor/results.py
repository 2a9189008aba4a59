"""The result of a check of `distloop doctor`, and how results name ranks and nodes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

OK, WARN, FAIL = "ok", "warn", "fail"

Facts = Sequence[Mapping[str, Any]]  # what find_facts of facts.py returns on each rank, by rank


class Result(NamedTuple):
    """The result of one check: a line of the table, an object in the JSON."""

    verdict: str
    check: str
    found: str
    """A sentence for people."""
    advice: str = ""
    """What to do; empty if the verdict is ok."""


def ranks_text(ranks: Iterable[int]) -> str:
    """ "rank 3", or "ranks 0-2, 5"."""
    numbers = sorted(ranks)
    spans: list[list[int]] = []
    for number in numbers:
        if spans and number == spans[-1][1] + 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    text = ", ".join(f"{first}-{last}" if last > first else f"{first}" for first, last in spans)
    return f"rank{'s' if len(numbers) > 1 else ''} {text}"


def where(facts: Facts, ranks: Iterable[int]) -> str:
    """ "ranks 2-3 on n2"."""
    ranks = list(ranks)
    return f"{ranks_text(ranks)} on {names_text(list(dict.fromkeys(facts[rank]['node'] for rank in ranks)))}"


def names_text(names: Sequence[str]) -> str:
    """ "n1, n2, n3, n4 and 2 more"."""
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def ranks_by_value(values: Sequence[Any]) -> dict[str, list[int]]:
    """value -> the ranks that have it, the commonest value first. `values` are given by rank."""
    groups: dict[str, list[int]] = {}
    for rank, value in enumerate(values):
        groups.setdefault(str(value), []).append(rank)
    return dict(sorted(groups.items(), key=lambda item: -len(item[1])))


def spread_text(facts: Facts, values: Sequence[Any]) -> str:
    """ "2.14 on ranks 0-2 on n1, n2; 2.13 on rank 3 on n2"."""
    return "; ".join(f"{value} on {where(facts, ranks)}" for value, ranks in ranks_by_value(values).items())


def nodes_of(facts: Facts) -> dict[str, list[int]]:
    """node -> its ranks."""
    nodes: dict[str, list[int]] = {}
    for rank, fact in enumerate(facts):
        nodes.setdefault(fact["node"], []).append(rank)
    return nodes


def nodes_by(value: Callable[[list[int]], Any], nodes: Mapping[str, list[int]]) -> dict[Any, list[str]]:
    """value -> the nodes whose ranks have it."""
    groups: dict[Any, list[str]] = {}
    for node, ranks in nodes.items():
        groups.setdefault(value(ranks), []).append(node)
    return groups
