"""The learning rate as a pure function of the step."""

import inspect
import math
from collections.abc import Callable
from typing import Any

from distloop.config.registry import import_callable
from distloop.config.settings import Config, Schedule
from distloop.errors import UsageError
from distloop.ranks.sums import describe, plain_number

Share = Callable[[int, int], Any]  # (step, total_steps) -> the share of the peak rate
MOST_TRIED = 1000  # steps of a schedule of the user's own that are tried before the first one


class LearningRate:
    """The learning rate of each step, a function of the step alone."""

    def __init__(self, config: Config, total_steps: int) -> None:
        """Raises UsageError for a schedule, or a group of parameters, that does not fit into so many steps."""
        check_schedule(config.schedule, total_steps)
        for group in config.optim.groups:
            if group.until_step is not None and group.until_step >= total_steps:
                raise UsageError(
                    f"optim.groups: the group '{group.match}' is frozen until step {group.until_step}, and the run has "
                    f"{total_steps} steps: it would never be trained. Lower until_step, write freeze: true, or take "
                    f"more steps: --train.steps {2 * group.until_step}."
                )
        self.total_steps, self.peak, self.schedule = total_steps, config.optim.lr, config.schedule
        self.share: Share | None = None
        if ":" in config.schedule.name:
            self.share = import_callable("schedule.name", config.schedule.name)
            _refuse_other_signature(self.share, config.schedule.name)
            for step in {*range(0, total_steps, max(1, total_steps // MOST_TRIED)), total_steps - 1}:
                if self(step) != self(step):
                    own = config.schedule.name
                    raise UsageError(
                        f"schedule.name = {own!r} gives two values for step {step}: let it depend on (step, "
                        "total_steps) alone, so that a run can be continued."
                    )

    def __call__(self, step: int) -> float:
        if self.share is None:
            return lr_at(step, self.total_steps, self.peak, self.schedule)
        value = self.share(step, self.total_steps)
        number = plain_number(value)
        if number is None or not 0 <= number < math.inf:
            what = describe(value) if number is None else f"number {number}"
            raise UsageError(
                f"schedule.name = {self.schedule.name!r} returned a {what} for step {step} of {self.total_steps}. Let "
                "it return the share of the peak rate (optim.lr) at that step, a number such as 0.5."
            )
        return self.peak * float(number)


def _refuse_other_signature(share: Share, name: str) -> None:
    try:
        signature = inspect.signature(share, follow_wrapped=False)  # a decorator may take other arguments
    except (ValueError, TypeError):  # a builtin without a signature
        return
    try:
        signature.bind(0, 1)
    except TypeError as error:
        raise UsageError(f"schedule.name = {name!r} is called as (step, total_steps): {error}.") from None


def lr_at(step: int, total_steps: int, peak: float, schedule: Schedule) -> float:
    """The learning rate of `step` (0 ≤ step < total_steps).

    Each schedule but one_cycle rises linearly over warmup_steps, and takes its course over the rest of the steps.
    Cosine: Loshchilov and Hutter 2017; one_cycle: Smith and Topin 2018, with PyTorch's factors (it rises from
    peak / 25, and falls to peak / 250000).
    """
    warmup = schedule.warmup_steps
    if schedule.name == "one_cycle":
        rise = warmup or max(1.0, 0.3 * total_steps - 1)
        if step < rise:
            return _cosine(peak / 25, peak, step / rise)
        return _cosine(peak, peak / 25e4, (step - rise) / max(1, total_steps - 1 - rise))
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, total_steps - warmup)
    final = peak * schedule.final_ratio
    match schedule.name:
        case "linear":
            return peak + (final - peak) * progress
        case "cosine":
            return _cosine(peak, final, progress)
        case "multi_step":
            return peak * schedule.gamma ** sum(step >= milestone for milestone in schedule.milestones)
        case "warmup_stable_decay":
            decay = schedule.decay_steps or min(total_steps - warmup, max(1, round(0.2 * total_steps)))
            return peak + (final - peak) * max(0.0, 1 - (total_steps - step) / decay)
        case _:
            return peak


def check_schedule(schedule: Schedule, total_steps: int) -> None:
    """Raises UsageError for a schedule that does not fit into the run."""
    for key, steps in (("warmup_steps", schedule.warmup_steps), ("decay_steps", schedule.decay_steps or 0)):
        if steps >= total_steps:
            raise UsageError(
                f"schedule.{key} = {steps} does not fit into a run of {total_steps} steps: lower it, or train longer."
            )
    if schedule.warmup_steps + (schedule.decay_steps or 0) > total_steps:
        raise UsageError(
            f"schedule.warmup_steps = {schedule.warmup_steps} and schedule.decay_steps = {schedule.decay_steps} do not "
            f"fit into a run of {total_steps} steps together."
        )


def _cosine(start: float, stop: float, progress: float) -> float:
    return stop + (start - stop) * (1 + math.cos(math.pi * min(1.0, progress))) / 2
