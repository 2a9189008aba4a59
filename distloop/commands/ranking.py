"""Rank runs, for example those of a sweep by a metric, and find the settings in which they differ."""

import collections
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from distloop.commands.reading import Run, metrics_in, seconds_since, validation_rows
from distloop.config.comparison import FREE_KEYS, dotted, is_one_of
from distloop.errors import UsageError
from distloop.run.best import is_better
from distloop.run.files import CONFIG

LOWER_IS_BETTER = ("loss", "error")  # a metric with such a word in its name; of other metrics higher is better


class Ranking(NamedTuple):
    """Runs in order, and the key of the order."""

    by: str
    """A metric, or one of OTHER_ORDERS."""
    direction: str
    """Which value of a run is its best: min or max."""
    runs: list[Run]
    values: list[tuple[float, int] | None]
    """By run (best value, its step); None for a run without the metric, and if `by` is not a metric."""
    settings: list[dict[str, str]]
    """By run the settings that differ between runs: {"optim.lr": "0.1"}."""

    @property
    def is_metric(self) -> bool:
        return self.by not in OTHER_ORDERS

    def place(self, index: int) -> int | None:
        """The place of run `index`, counted from 1; None for a run without the metric."""
        return None if self.is_metric and self.values[index] is None else index + 1


def natural_order(name: str) -> list[tuple[float, str]]:
    """A sorting key: lr-2 comes before lr-10, and lr-0.01 and lr-1e-2 before lr-0.1."""
    parts = re.split(r"(\d+(?:\.\d+)?(?:e-?\d+)?)", name)
    return [(float(part), "") if part[:1].isdecimal() else (-1.0, part) for part in parts]


# Orders by something other than a metric: name -> (sorting key, whether the largest comes first).
OTHER_ORDERS: dict[str, tuple[Callable[[Run], Any], bool]] = {
    "step": (lambda run: run.step, True),
    "written": (lambda run: seconds_since(run.written), False),
    "name": (lambda run: natural_order(run.name), False),
}


def rank(runs: list[Run], by: str, reverse: bool = False) -> Ranking:
    """The runs in order, the best first and those without the metric last. Raises UsageError for an unknown metric.

    The direction comes from the runs if `by` is the metric of their best_rule. Then `reverse` puts the worst run first,
    still by the best value of each. Otherwise the direction is guessed from the metric's name, and `reverse` corrects
    the guess.
    """
    if by in OTHER_ORDERS:
        key, largest_first = OTHER_ORDERS[by]
        runs = _ordered(runs, list(map(key, runs)), largest_first != reverse)
        return Ranking(by, "max", runs, [None] * len(runs), settings_that_differ(runs))
    rules = {run.best_rule[0]: run.best_rule[1] for run in reversed(runs) if run.best_rule}
    guess = "min" if any(word in by.lower() for word in LOWER_IS_BETTER) != reverse else "max"
    direction = rules.get(by, guess)
    metric_names = set(rules)
    values: dict[Path, tuple[float, int]] = {}
    for run in runs:
        for row in validation_rows(run.path):
            metrics = metrics_in(row)
            metric_names.update(metrics)
            if by in metrics and row["step"]:  # that before the first step has no checkpoint
                best, _ = values.get(run.path, (None, 0))
                if is_better((by, direction), metrics[by], best):
                    values[run.path] = (metrics[by], row["step"])
    if by not in metric_names:
        known = ", ".join([*sorted(metric_names), *OTHER_ORDERS])
        raise UsageError(f"--sort {by}: no run has such a metric. Known: {known}.")
    largest_first = (direction == "max") != (reverse and by in rules)
    runs = _ordered(runs, [values[run.path][0] if run.path in values else None for run in runs], largest_first)
    return Ranking(by, direction, runs, [values.get(run.path) for run in runs], settings_that_differ(runs))


def settings_that_differ(runs: list[Run]) -> list[dict[str, str]]:
    """By run its settings that differ, as {"optim.lr": "0.1"}; without those that do not change what is trained.

    First come those in which it differs from the runs of the same data, model and task: in a sweep they are what is
    tried out, and other runs in the folder differ in everything.
    """
    configs = [_settings(run.path / CONFIG) for run in runs]
    kinds: dict[tuple[str | None, ...], list[dict[str, str]]] = {}
    for config in configs:
        kinds.setdefault(_kind(config), []).append(config)
    differing = _keys_that_differ(configs)
    found = []
    for config in configs:
        keys = dict.fromkeys([*_keys_that_differ(kinds[_kind(config)]), *differing])
        found.append({key: config[key] for key in keys if key in config})
    return found


def _kind(config: dict[str, str]) -> tuple[str | None, ...]:
    return tuple(config.get(f"{section}.name") for section in ("data", "model", "task"))


def _keys_that_differ(configs: list[dict[str, str]]) -> list[str]:
    """The settings that differ between these configs, first those whose commonest value the fewest of them have."""
    values: dict[str, collections.Counter[str | None]] = {}
    for key in dict.fromkeys(key for config in configs for key in config):
        # An argument may be missing in a config. Any other setting is only missing if the version did not have it.
        having = [config for config in configs if key in config or (config and ".args." in key)]
        values[key] = collections.Counter(config.get(key) for config in having)
    differing = [key for key in values if len(values[key]) > 1 and not is_one_of(key, FREE_KEYS)]
    differing.sort(key=lambda key: max(values[key].values()))
    return differing


def _ordered(runs: list[Run], values: list[Any], largest_first: bool) -> list[Run]:
    """The runs sorted by value. Runs with None come last; runs with equal values keep their order."""
    having = [index for index, value in enumerate(values) if value is not None]
    having.sort(key=lambda index: values[index], reverse=largest_first)
    return [runs[index] for index in having] + [run for run, value in zip(runs, values, strict=True) if value is None]


def _settings(path: Path) -> dict[str, str]:
    """A config file as {"optim.lr": "0.1", …}, with each value as text; {} if the file cannot be read."""
    import yaml

    # Text is enough here. libyaml, where PyYAML has it, reads ten times as fast.
    loader = getattr(yaml, "CBaseLoader", yaml.BaseLoader)
    try:
        settings = yaml.load(path.read_bytes(), Loader=loader)
    except (OSError, yaml.YAMLError):
        return {}
    values = dotted(settings) if isinstance(settings, dict) else {}
    return {
        key: str(value).replace("'", "") if isinstance(value, list) else value
        for key, value in values.items()
        if value != {}
    }
