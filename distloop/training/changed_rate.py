"""What --resume extend does to the learning rate, in words."""

import contextlib

from distloop.run.attempt import Attempt
from distloop.run.directory import config_before
from distloop.training.schedules import LearningRate


def say_changed_rate(run: Attempt) -> None:
    """Add a line to the start's messages if the next step has another learning rate than the config of the attempt
    before gave it. Call it before the run is loaded, which records the new config."""
    if not (run.ranks.is_main and run.start.checkpoint and run.start.changes):
        return
    with contextlib.suppress(Exception):  # an old schedule of the user's own may be gone by now, or raise anything
        old, step, plan = config_before(run.path, run.config), run.start.step, run.plan
        old_total = old.train.steps or (old.train.epochs or 0) * plan.steps_per_epoch
        before = min(step, old_total - 1)  # a run that had taken all its steps has no rate for the next one
        rates = LearningRate(old, old_total)(before), LearningRate(run.config, plan.total_steps)(step)
        was, now = (f"{rate:.4g}" for rate in rates)
        if was != now:
            at = "" if before == step else f", that of step {before + 1},"
            run.start.messages.append(f"the learning rate at step {step + 1} goes from {was}{at} to {now}")
