"""A short loop that logs numbers and pictures of its own: its train() for distloop.ranks.start.main.

$OWN_MISTAKE names what it does wrong in its third step.
"""

from __future__ import annotations

import os

import numpy as np
import torch

from distloop.config import Config
from distloop.data import Plan, TrainBatches, load_data
from distloop.ranks import Ranks, build_accelerator, sum_over_ranks
from distloop.run import Best, LoopState, open_run
from distloop.tracking import Trackers
from distloop.training import LossSums, Validation, build_model, build_optimizer, build_task, due_after
from tests.lab import stopping

SHADE = 5  # the picture of step n is of this grey times n


def train(config: Config, ranks: Ranks) -> None:
    stopping.REHEARSED = 0  # this loop has no rehearsal
    accelerator = build_accelerator(config, ranks)
    device = accelerator.device
    data, task = load_data(config.data, config.seed), build_task(config.task, config.seed)
    bare_model = build_model(config, data, task, device)
    optimizer = build_optimizer(bare_model, config.optim, device, config.precision)
    plan = Plan.of(config, len(data.train), ranks)
    best = Best(config.checkpoint.best, task.best)
    with open_run(config, ranks, plan, data, device, best) as run, Trackers(run, config, ranks) as trackers, ranks:
        if run.is_finished:
            return
        model, optimizer = accelerator.prepare(bare_model, optimizer)
        parts = {"model": bare_model, "averaged": None, "optimizer": optimizer.optimizer, "scaler": None}
        state = run.load(parts)
        step, stop_reason, metrics = state.step, None, {}
        batches = TrainBatches(config, data, task, plan, device, step, ranks.position, run.clock.waiting)
        validate = Validation(config, bare_model, task, data, run, ranks)
        losses = LossSums(device, state.epoch_sums)
        trackers.begin(bare_model, device)
        model.train()
        while step < plan.total_steps and stop_reason is None:
            losses.begin_step()
            samples = 0
            for micro in batches.of_step(step):
                outputs = task.forward(model, micro.batch)
                loss, weight = task.loss(outputs, micro.batch)
                accelerator.backward(loss * micro.scale)
                losses.add(loss, weight, micro.is_empty)
                samples += len(outputs)
            losses.end_step()
            optimizer.step()
            optimizer.zero_grad()
            step += 1
            stop_reason = run.end_step(step)
            due = due_after(step, plan, config, stop_reason)
            if not due.anything:
                continue
            means = losses.read()
            if due.log:
                sums = sum_over_ranks(samples=samples, thirds=torch.tensor(1 / 3), rank=np.float32(ranks.rank))
                own = {"temperature": torch.tensor(0.5) / step, "rates": [np.float64(0.1), 0.01 * step]}
                trackers.log("train", step, **means, **sums, **own, is_even=step % 2 == 0, who=ranks.rank)
                if step == 3:
                    make_mistake(os.environ.get("OWN_MISTAKE", ""), ranks, trackers)
            if due.end_of_epoch:
                trackers.log("epoch", step, loss=means["running_loss"], share=step / plan.total_steps)
                losses.begin_epoch()
            if due.validation:
                metrics = validate(step)
                trackers.log("validate", step, **metrics, extra=float(step))
                before = run.clock.totals()
                trackers.figure("shade", step, np.full((20, 30), SHADE * step, np.uint8))
                after = run.clock.totals()
                assert not ranks.is_main or after["validation"] > before["validation"]
                if ranks.is_main:  # the others would draw it for nobody
                    from matplotlib.figure import Figure

                    drawn = Figure(figsize=(2, 1))
                    drawn.add_subplot().plot([0, step])
                    trackers.figure("drawn", step, drawn)
                best.update(step, metrics)
            if due.save:
                run.save(parts, LoopState(step, losses.epoch_sums, best.row))
        run.end(step, stop_reason)
        trackers.end(step, stop_reason, metrics)


def make_mistake(what: str, ranks: Ranks, trackers: Trackers) -> None:
    if what == "names":
        sum_over_ranks(**({"one": 1} if ranks.rank else {"other": 1}))
    if what == "number of names":
        sum_over_ranks(**({"one": 1, "two": 2} if ranks.rank else {"one": 1}))
    if what == "sum":
        sum_over_ranks(table=torch.zeros(2))
    if what == "value":
        trackers.log("train", 3, table=torch.zeros(2))
    if what == "key":
        trackers.log("train", 3, epoch=7)
    if what == "kind":
        trackers.log("test", 3, loss=1.0)
    if what == "picture":
        trackers.figure("sound", 3, np.zeros(8))
