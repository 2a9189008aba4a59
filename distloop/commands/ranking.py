"""Runs in an order: by a metric for a sweep, and what its runs differ in."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from distloop.commands.reading import Run, metrics_in, seconds_since, validation_rows
from distloop.errors import UsageError
from distloop.run.best import is_better
from distloop.run.files import CONFIG

LOWER_IS_BETTER = ("loss", "error")  # in the name of a metric; of others more is better


class Ranking(NamedTuple):
    """Runs in order, and what they were ordered by."""

    by: str
    direction: str
    """Of the best value of a run: min or max."""
    runs: list[Run]
    values: list[tuple[float, int] | None]
    """Of each run the best value and its step; None for one without the metric, and where `by` is no metric."""
    settings: list[dict[str, str]]
    """Of each run what not all have."""

    @property
    def is_metric(self) -> bool:
        return self.by not in OTHER_ORDERS

    def place(self, index: int) -> int | None:
        """Counted from 1; None for a run without the metric."""
        return None if self.is_metric and self.values[index] is None else index + 1


def natural_order(name: str) -> list[tuple[float, str]]:
    """A sorting key by which lr-2 comes before lr-10, and lr-0.01 and lr-1e-2 before lr-0.1."""
    parts = re.split(r"(\d+(?:\.\d+)?(?:e-?\d+)?)", name)
    return [(float(part), "") if part[:1].isdecimal() else (-1.0, part) for part in parts]


# Orders that are by no metric: the key, and whether the largest comes first.
OTHER_ORDERS: dict[str, tuple[Callable[[Run], Any], bool]] = {
    "step": (lambda run: run.step, True),
    "written": (lambda run: seconds_since(run.written), False),
    "name": (lambda run: natural_order(run.name), False),
}


def rank(runs: list[Run], by: str, reverse: bool = False) -> Ranking:
    """The runs in order, the best first and those without the metric last. Raises UsageError for an unknown metric.

    The direction is that of the runs' own best metric, if it is this one, else guessed from its name; then `reverse`
    corrects the guess. Otherwise it shows the worst first, still by the best value of each.
    """
    if by in OTHER_ORDERS:
        key, largest_first = OTHER_ORDERS[by]
        runs = _ordered(runs, list(map(key, runs)), largest_first != reverse)
        return Ranking(by, "max", runs, [None] * len(runs), settings_that_differ(runs))
    rules = {run.best_rule[0]: run.best_rule[1] for run in reversed(runs) if run.best_rule}
    guess = "min" if any(word in by.lower() for word in LOWER_IS_BETTER) != reverse else "max"
    direction = rules.get(by, guess)
    known = set(rules)
    values: dict[Path, tuple[float, int]] = {}
    for run in runs:
        for row in validation_rows(run.path):
            metrics = metrics_in(row)
            known.update(metrics)
            if by in metrics:
                best, _ = values.get(run.path, (None, 0))
                if is_better((by, direction), metrics[by], best):
                    values[run.path] = (metrics[by], row["step"])
    if by not in known:
        raise UsageError(f"--sort {by}: no run has such a metric. Known: {', '.join([*sorted(known), *OTHER_ORDERS])}.")
    largest_first = (direction == "max") != (reverse and by in rules)
    runs = _ordered(runs, [values[run.path][0] if run.path in values else None for run in runs], largest_first)
    return Ranking(by, direction, runs, [values.get(run.path) for run in runs], settings_that_differ(runs))


def settings_that_differ(runs: list[Run]) -> list[dict[str, str]]:
    """For each run those of its settings that not all of these runs have, as {"optim.lr": "0.1"}.

    Settings that make no difference to what is trained, such as the name, are left out.
    """
    from distloop.config.comparison import FREE_KEYS, is_one_of

    configs = [_settings(run.path / CONFIG) for run in runs]
    readable = [config for config in configs if config is not None]
    keys = [key for key in dict.fromkeys(key for config in readable for key in config) if not is_one_of(key, FREE_KEYS)]
    differing = []
    for key in keys:
        # Only arguments are absent where they are not given; another setting is one that a version did not know.
        having = readable if ".args." in key else [config for config in readable if key in config]
        if len({config.get(key) for config in having}) > 1:
            differing.append(key)
    return [{key: config[key] for key in differing if key in config} for config in (each or {} for each in configs)]


def _ordered(runs: list[Run], values: list[Any], largest_first: bool) -> list[Run]:
    """By value; those without one come last, and equal ones stay in their order."""
    pairs = list(zip(values, runs, strict=True))
    having = sorted((pair for pair in pairs if pair[0] is not None), key=lambda pair: pair[0], reverse=largest_first)
    return [run for _, run in having] + [run for value, run in pairs if value is None]


def _settings(path: Path) -> dict[str, str] | None:
    """A config file as {"optim.lr": "0.1", …}, each value as it is written; None if it cannot be read."""
    import yaml

    # Strings are all that is needed, and libyaml reads ten times as fast, where PyYAML has it.
    loader = getattr(yaml, "CBaseLoader", yaml.BaseLoader)
    try:
        settings = yaml.load(path.read_bytes(), Loader=loader)
    except (OSError, yaml.YAMLError):
        return None
    return dict(_flat(settings)) if isinstance(settings, dict) else None


def _flat(settings: dict[str, Any], before: str = "") -> Iterator[tuple[str, str]]:
    for name, value in settings.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{before}{name}.")
        else:
            yield f"{before}{name}", value if isinstance(value, str) else str(value).replace("'", "")
