"""Where a run is, as a task sees it."""

from typing import Any, NamedTuple

from distloop.data.order import Plan


class Now(NamedTuple):
    """`self.now` of a task; before training, this default."""

    step: int = 0
    """The index of the step that is computed, from 0; in validation: how many steps are done."""
    epoch: int = 0
    """The epoch of that step, from 0; in a validation at the end of an epoch: how many epochs are done."""
    total_steps: int = 0
    """The steps of the whole run."""
    training: bool = False
    """Whether a step of training is computed; False in validation, as model.training."""


def tell(task: Any, now: Now) -> None:
    """Set `now` of a task, also of a frozen dataclass."""
    object.__setattr__(task, "now", now)


def now_at(step: int, plan: Plan, training: bool) -> Now:
    """Where a run with this plan is at `step`."""
    return Now(step, step // plan.steps_per_epoch, plan.total_steps, training)
