"""What is due after a step."""

from typing import NamedTuple

from distloop.config.settings import Config
from distloop.data.order import Plan
from distloop.ranks.stopping import StopReason


class Due(NamedTuple):
    """What follows a step, in this order."""

    log: bool
    end_of_epoch: bool
    validation: bool
    save: bool

    @property
    def anything(self) -> bool:
        return any(self)


def due_after(step: int, plan: Plan, config: Config, stop: StopReason | None = None) -> Due:
    """What is due after `step` steps: all at the end of the run, a save before the run stops for the reason `stop`."""
    at_end = step == plan.total_steps
    validation, saving = config.validate, config.checkpoint

    between = validation.at_end == "also"

    def reaches(every_steps: int | None) -> bool:
        return every_steps is not None and step % every_steps == 0

    return Due(
        log=at_end or reaches(config.log.every_steps),
        end_of_epoch=step % plan.steps_per_epoch == 0,
        validation=at_end
        or (between and reaches(validation.every_steps or (validation.every_epochs or 1) * plan.steps_per_epoch)),
        save=at_end
        or stop is not None
        or reaches(saving.every_steps or plan.steps_per_epoch)
        or reaches(saving.keep_every_steps),
    )
