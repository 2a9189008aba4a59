"""The lines of `distloop doctor`, and how they name ranks, nodes, sizes and times."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

OK, WARN, FAIL = "ok", "warn", "fail"

Facts = Sequence[Mapping[str, Any]]  # those of doctor_facts.py, by rank


class Line(NamedTuple):
    """One line of the table; `advice` says what to do where the verdict is not ok."""

    verdict: str
    check: str
    found: str
    advice: str = ""


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
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def spread(values: Sequence[Any]) -> dict[str, list[int]]:
    """The ranks that have each value, given by rank; the commonest value first."""
    groups: dict[str, list[int]] = {}
    for rank, value in enumerate(values):
        groups.setdefault(str(value), []).append(rank)
    return dict(sorted(groups.items(), key=lambda item: -len(item[1])))


def spread_text(facts: Facts, values: Sequence[Any]) -> str:
    """ "2.14 on ranks 0-2 on n1, n2; 2.13 on rank 3 on n2"."""
    return "; ".join(f"{value} on {where(facts, ranks)}" for value, ranks in spread(values).items())


def nodes_of(facts: Facts) -> dict[str, list[int]]:
    """The ranks of each node."""
    nodes: dict[str, list[int]] = {}
    for rank, fact in enumerate(facts):
        nodes.setdefault(fact["node"], []).append(rank)
    return nodes


def group(nodes: Mapping[str, list[int]], value: Callable[[list[int]], Any]) -> dict[Any, list[str]]:
    """The nodes that are alike in a value of their ranks."""
    groups: dict[Any, list[str]] = {}
    for node, ranks in nodes.items():
        groups.setdefault(value(ranks), []).append(node)
    return groups
