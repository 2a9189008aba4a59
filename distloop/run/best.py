"""Which validation is the best one, by one metric, in one direction; and since when there was no better one. Nothing
here imports torch."""

from __future__ import annotations

import math
from numbers import Real
from typing import TYPE_CHECKING, Any

from distloop.errors import UsageError
from distloop.run.metrics import is_metric

if TYPE_CHECKING:
    from distloop.config.settings import EarlyStop

Rule = tuple[str, str]  # (name of a metric, min | max)


def is_better(rule: Rule, new: Any, old: Any) -> bool:
    """True if `new` is a better value of the rule's metric than `old`. Any number is better than None, nan, infinity
    and values that are no numbers, which are never better. Of two equal values the old one stays the best."""
    if not _is_number(new):
        return False
    if not _is_number(old):
        return True
    return new > old if rule[1] == "max" else new < old


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and math.isfinite(value)


def rule_of(named: str) -> Rule:
    """("accuracy", "max") of "max accuracy"."""
    direction, metric = named.split()
    return metric, direction


class EarlyEnd:
    """Why a run is finished before its last step: since the loop says so, or since train.early_stop's number of
    validations brought no improvement. This is a function of the validations' metrics, which are the same on all ranks,
    and thus the same in a run that is continued."""

    def __init__(self, settings: EarlyStop | None, default: Rule) -> None:
        """`default`: the rule of the run's best validation."""
        self.said: str | None = None  # what run.finish() was given
        self.settings = settings
        self.rule = rule_of(settings.metric) if settings and settings.metric else default
        self.value: float | None = None  # of the last improvement
        self.step: int | None = None  # after which that came
        self.waited = 0  # validations since
        self.seen = 0  # the step of the last validation

    def update(self, step: int, metrics: dict[str, Any]) -> None:
        """Take up the validation after `step`, once: where its row could not be logged, it is done again."""
        if self.settings is None or step <= self.seen:
            return
        self.seen, new = step, metrics[self.rule[0]]
        enough = self.value is None or not _is_number(new) or abs(new - self.value) > self.settings.min_delta
        if enough and is_better(self.rule, new, self.value):
            self.value, self.step, self.waited = float(new), step, 0
        else:
            self.waited += 1

    @property
    def reason(self) -> str | None:
        """Why the run is finished; None: it goes on."""
        if self.said or self.settings is None or self.waited < self.settings.patience:
            return self.said
        validations = f"in {self.waited} validation{'' if self.waited == 1 else 's'}"
        if self.value is None:
            return f"{self.rule[0]} was no finite number {validations}"
        by = f" by more than {self.settings.min_delta:g}" if self.settings.min_delta else ""
        return f"no better {self.rule[0]} than {self.value:.4g} of step {self.step}{by} {validations}"

    @property
    def longer(self) -> str:
        """The setting with which a run that has ended early goes on."""
        return "--train.early-stop.patience N" if self.settings and not self.said else "--train.epochs N"

    def state(self) -> dict[str, Any]:
        """For state.json."""
        finished = {"finished": self.reason} if self.reason else {}
        if self.settings is None:
            return finished
        held = {"rule": list(self.rule), "value": self.value, "step": self.step}
        return {**finished, "early_stop": {**held, "waited": self.waited, "seen": self.seen}}

    def load(self, stored: dict[str, Any], same_config: bool) -> None:
        """Take up what state() gave for state.json. What waited for another metric, or is absent, begins anew; and with
        another config, as after --resume extend, the run is not finished by what was said before."""
        self.said = stored.get("finished") if same_config else None
        held = stored.get("early_stop") or {}
        if held.get("rule") == list(self.rule):
            self.value, self.step = held["value"], held["step"]
            self.waited, self.seen = held["waited"], held["seen"]


class Best:
    """The best validation row of a run so far."""

    def __init__(self, named: str | None, default: Rule) -> None:
        """`named`: checkpoint.best, such as "max accuracy"; None: `default`, the task's own rule."""
        self.rule: Rule = default
        self.is_named = named is not None
        if named is not None:
            self.rule = rule_of(named)
        self.row: dict[str, Any] | None = None
        self.early_end = EarlyEnd(None, self.rule)

    @property
    def step(self) -> int | None:
        """The step after which it was the best."""
        return self.row["step"] if self.row else None

    def check(self, metrics: dict[str, Any], samples: int = 0) -> None:
        """Raise UsageError when a validation has no such metric. `samples`: how many a whole one has, if these metrics
        may be of fewer."""
        best = "checkpoint.best" if self.is_named else f"the task's best = {self.rule!r}"
        for metric, where in ((self.rule[0], best), (self.early_end.rule[0], "train.early_stop.metric")):
            if metric in metrics:
                continue
            known = [name for name in metrics if is_metric(name)]
            message = (
                f"{where}: validation gives no {metric!r}, but {', '.join(known)}. Let summary() return it (what "
                "metrics() gives is handed to summary(), and not shown by itself), or name one of these."
            )
            if (some := metrics.get("samples", samples)) < samples:
                message += (
                    f" These are the metrics of {some} of {samples} samples, before training: if summary() leaves "
                    f'{metric} out for so few, let it give float("nan") there, which is never the best.'
                )
            raise UsageError(message)

    def update(self, step: int, metrics: dict[str, Any]) -> None:
        """Take up the validation after `step`; that before the first step, which no checkpoint has, is never the best.
        Raises UsageError when it has no such metric."""
        self.check(metrics)
        if step == 0:
            return
        metric, _ = self.rule
        if is_better(self.rule, metrics[metric], (self.row or {}).get(metric)):
            self.row = {"step": step, **metrics}
        self.early_end.update(step, metrics)
