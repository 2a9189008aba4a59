"""What is due after a step, against the settings that say how often."""

from __future__ import annotations

import dataclasses

from hypothesis import given, settings
from hypothesis import strategies as st

from distloop.config.settings import Checkpoint, Config, Log, Train, Validate
from distloop.data.order import Plan
from distloop.ranks.stopping import StopReason
from distloop.training.due import Due, due_after

reproducible = settings(derandomize=True, deadline=None)
counts = st.integers(1, 12)
optional = st.none() | counts


@st.composite
def runs(draw: st.DrawFn) -> tuple[Plan, Config]:
    """Any run of 1 to 60 steps, and how often it logs, validates and saves."""
    plan = Plan(draw(st.integers(1, 20)), 1, total_steps=draw(st.integers(1, 60)))  # steps in an epoch: the samples
    epochs, steps = draw(st.sampled_from([(1, 0), (2, 0), (3, 0), (0, 1), (0, 4), (0, 7)]))
    config = Config(
        train=Train(epochs=None, steps=plan.total_steps),
        log=Log(every_steps=draw(counts)),
        validate=Validate(every_epochs=epochs or None, every_steps=steps or None),
        checkpoint=Checkpoint(every_steps=draw(optional), keep_every_steps=draw(optional)),
    )
    return plan, config


def due_steps(plan: Plan, config: Config, what: str) -> list[int]:
    """The steps of a run that goes on to its end, after which this is due."""
    return [step for step in range(1, plan.total_steps + 1) if getattr(due_after(step, plan, config), what)]


def multiples(interval: int, plan: Plan) -> list[int]:
    return list(range(interval, plan.total_steps + 1, interval))


@reproducible
@given(runs())
def test_each_thing_is_due_as_often_as_its_setting_says_and_at_the_end(run: tuple[Plan, Config]) -> None:
    plan, config = run
    saves = multiples(config.checkpoint.every_steps or plan.steps_per_epoch, plan)
    if config.checkpoint.keep_every_steps:
        saves += multiples(config.checkpoint.keep_every_steps, plan)
    validation = config.validate.every_steps or (config.validate.every_epochs or 0) * plan.steps_per_epoch
    end = {plan.total_steps}
    assert due_steps(plan, config, "log") == sorted({*multiples(config.log.every_steps, plan), *end})
    assert due_steps(plan, config, "validation") == sorted({*multiples(validation, plan), *end})
    assert due_steps(plan, config, "save") == sorted({*saves, *end})
    assert due_steps(plan, config, "end_of_epoch") == multiples(plan.steps_per_epoch, plan)


@reproducible
@given(runs(), st.sampled_from([None, *StopReason]))
def test_at_the_end_of_the_run_everything_is_due(run: tuple[Plan, Config], stop: StopReason | None) -> None:
    plan, config = run
    due = due_after(plan.total_steps, plan, config, stop)
    assert (due.log, due.validation, due.save) == (True, True, True)
    assert due.anything


@reproducible
@given(runs(), st.integers(1, 60), st.sampled_from(list(StopReason)))
def test_a_stop_makes_a_save_due_and_nothing_else(run: tuple[Plan, Config], step: int, stop: StopReason) -> None:
    plan, config = run
    assert due_after(step, plan, config, stop) == due_after(step, plan, config)._replace(save=True)


def test_without_keep_every_steps_nothing_is_saved_for_good() -> None:
    plan = Plan(10, 1, total_steps=40)
    rarely = Config(checkpoint=Checkpoint(every_steps=30, keep_every_steps=None))
    assert due_steps(plan, rarely, "save") == [30, 40]
    often = Config(checkpoint=Checkpoint(every_steps=30, keep_every_steps=20))
    assert due_steps(plan, often, "save") == [20, 30, 40]


def test_validation_counts_steps_where_given_and_else_epochs() -> None:
    plan = Plan(100, 10, total_steps=41)
    by_steps = Config(validate=Validate(every_epochs=None, every_steps=15))
    assert due_steps(plan, by_steps, "validation") == [15, 30, 41]
    assert due_steps(plan, Config(validate=Validate(every_epochs=2)), "validation") == [20, 40, 41]
    assert due_steps(plan, Config(), "validation") == [10, 20, 30, 40, 41]


@reproducible
@given(runs())
def test_with_at_end_only_nothing_is_validated_before_the_end(run: tuple[Plan, Config]) -> None:
    plan, config = run
    only = dataclasses.replace(config, validate=Validate(at_end="only"))
    assert due_steps(plan, only, "validation") == [plan.total_steps]
    for what in ("log", "end_of_epoch", "save"):
        assert due_steps(plan, only, what) == due_steps(plan, config, what)


def test_anything_is_due_where_one_thing_is() -> None:
    assert not Due(log=False, end_of_epoch=False, validation=False, save=False).anything
    for name in Due._fields:
        assert Due(*(other == name for other in Due._fields)).anything
