"""What checks of `distloop doctor` find, and how they name ranks and nodes."""

import functools
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

OK, WARN, FAIL = "ok", "warn", "fail"

Fact = Mapping[
    str, Any
]  # of a rank: what find_facts of facts.py returns, and measurements under the keys of measure.py
Facts = Sequence[Fact]  # of all ranks, or of some
Key = TypeVar("Key")
Value = TypeVar("Value")


class Result(NamedTuple):
    """A result of a check: a row of the table, an object in the JSON."""

    verdict: str
    check: str
    """The name of the check; judge() fills it in."""
    found: str
    """A sentence for people."""
    advice: str = ""
    """What to do; empty if the verdict is ok."""


Check = Callable[[Facts], list[Result]]


def judge(checks: Mapping[str, Check], facts: Facts) -> list[Result]:
    """The results of all checks, which are given by name."""
    return [result._replace(check=name) for name, check in checks.items() for result in check(facts)]


ok = functools.partial(Result, OK, "")  # ok(found)
warn = functools.partial(Result, WARN, "")  # warn(found, advice)
fail = functools.partial(Result, FAIL, "")  # fail(found, advice)


def warn_if(is_bad: bool, found: str, advice: str) -> Result:
    """A warning with the advice, or ok."""
    return warn(found, advice) if is_bad else ok(found)


def where(facts: Facts) -> str:
    """ "ranks 2-3 on n2"."""
    return f"{ranks_text(fact['rank'] for fact in facts)} on {names_text(nodes_of(facts))}"


def ranks_text(ranks: Iterable[int]) -> str:
    """ "rank 3", or "ranks 0-2, 5"."""
    numbers = sorted(ranks)
    spans = itertools.groupby(enumerate(numbers), lambda pair: pair[1] - pair[0])  # consecutive numbers
    texts = []
    for _, pairs in spans:
        first, *_, last = [number for _, number in pairs] * 2
        texts.append(f"{first}-{last}" if last > first else f"{first}")
    return f"rank{'s' if len(numbers) > 1 else ''} {', '.join(texts)}"


def names_text(names: Iterable[str]) -> str:
    """ "n1, n2, n3, n4 and 2 more"."""
    names = list(names)
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def spread_text(facts: Facts, values: Iterable[Any]) -> str:
    """ "2.14 on ranks 0-2 on n1, n2; 2.13 on rank 3 on n2"; "" if all ranks have the same value."""
    groups = by_value(facts, values)
    return "; ".join(f"{text} on {where(ranks)}" for text, ranks in groups.items()) if len(groups) > 1 else ""


def by_value(facts: Facts, values: Iterable[Any]) -> dict[str, list[Fact]]:
    """value as text -> the ranks that have it, the commonest value first. `values` are given in the ranks' order."""
    groups = group(zip(map(str, values), facts, strict=True))
    return dict(sorted(groups.items(), key=lambda item: -len(item[1])))


def nodes_of(facts: Facts) -> dict[str, list[Fact]]:
    """node -> its ranks."""
    return group((fact["node"], fact) for fact in facts)


def group(pairs: Iterable[tuple[Key, Value]]) -> dict[Key, list[Value]]:
    """key -> the values that come with it."""
    groups: dict[Key, list[Value]] = {}
    for key, value in pairs:
        groups.setdefault(key, []).append(value)
    return groups
