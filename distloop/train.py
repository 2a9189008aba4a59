"""Train a model: the textbook loop, on one process or many.

    accelerate launch distloop/train.py --config configs/digits.yaml
    python -m distloop.train --config configs/digits.yaml --optim.lr 0.01

What a step trains on is a function of the config alone: the order of the samples, their augmentation, the
learning rate and the gradient do not depend on the number of processes, on the accumulation, or on how
often the run was interrupted.
"""

import os
import sys
from pathlib import Path

if not __package__:
    # Run as a script: Python put this folder first on the path, where `import distloop` finds nothing.
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import functools
from contextlib import ExitStack, nullcontext
from typing import Any

from distloop.ranks import environment, leaving, stopping, talking

if __name__ == "__main__":
    stopping.listen()  # before the long imports: from here on a signal is a wish to stop, not the end
environment.adopt_slurm(os.environ)
environment.share_cpus(os.environ)  # before torch reads the thread count

import torch
from accelerate.utils import send_to_device

from distloop.config.load import load_config
from distloop.config.settings import Config
from distloop.data.datasets import fingerprint, load_data
from distloop.data.loader import example_batch, make_loader, offers_to_model
from distloop.data.order import FixedBatchSampler, MicroBatchSampler, Order, Plan, is_due
from distloop.data.seeding import seed_forward
from distloop.errors import RunFailed, UsageError
from distloop.ranks import meeting as rendezvous
from distloop.ranks.accelerator import build_accelerator
from distloop.ranks.agreement import Agreement
from distloop.ranks.roll_call import RollCall
from distloop.run import checkpoint
from distloop.run.accounts import TimeAccounts
from distloop.run.clock import Clock, peak_memory
from distloop.run.directory import open_run
from distloop.run.files import CHECKPOINTS, FAILURES, METRICS
from distloop.run.lock import RunLock
from distloop.run.saving import Saver
from distloop.run.status import RunStatus
from distloop.tracking.console import Console
from distloop.tracking.progress import Progress
from distloop.tracking.summary import describe, ending
from distloop.tracking.trackers import Trackers
from distloop.training.best import best_rule, better
from distloop.training.details import Details
from distloop.training.gradients import divide_by_weight, norm_and_clip, settle_buckets
from distloop.training.losses import LossSums
from distloop.training.models import build_model
from distloop.training.nonfinite import FiniteCheck
from distloop.training.optim import build_average, build_optimizer, check_schedule, lr_at, set_lr, update_average
from distloop.training.tasks import build_task, introduce
from distloop.training.validation import broadcast_buffers, validate


def train(config: Config, watch: stopping.Watch, roll_call: RollCall, attempt: ExitStack) -> None:
    """Train the config's run to its end, from its beginning or from where it was left.

    What has to be closed however the attempt ends is left with `attempt`.
    """
    # ---- who and what --------------------------------------------------------------------------------------
    accelerator, messages = build_accelerator(config, roll_call)
    here = roll_call.position  # where this rank is, for the case that it fails
    device, dtype = accelerator.device, getattr(torch, config.dtype)
    clock = Clock(device)
    rank, world_size, is_main = accelerator.process_index, accelerator.num_processes, accelerator.is_main_process
    torch.set_float32_matmul_precision(config.matmul_precision)
    torch.autograd.set_detect_anomaly(config.train.detect_anomaly)

    here.enter("loading the data set")
    source = load_data(config.data)
    task = build_task(config.task)
    example = send_to_device(example_batch(source, config.data, config.seed, dtype), device)
    here.enter("building the model")
    torch.manual_seed(config.seed)  # the initial weights
    bare_model = build_model(config.model, offers_to_model(example, source)).to(device, dtype)
    introduce(task, bare_model, example, source)
    plan = Plan(
        len(source.train), config.batch.global_size, world_size, config.batch.micro_size, config.batch.remainder
    )
    total_steps = config.train.steps or (config.train.epochs or 0) * plan.steps_per_epoch
    check_schedule(config.schedule, total_steps)
    optimizer = build_optimizer(bare_model, config.optim, device, config.precision)
    averaged = build_average(bare_model, config.optim.ema_decay)

    # ---- the run's directory: from the start, or from where it was left ------------------------------------
    here.enter("opening the run directory")
    lock = attempt.enter_context(RunLock())
    watch.each_poll.append(lock.beat)
    lock.before_leaving.append(lambda: roll_call.leave("its run directory was taken over"))
    status = attempt.enter_context(RunStatus(is_main, total_steps, roll_call.judge, lock.beat))
    start = talking.from_main(lambda: open_run(config, lock, status, world_size, fingerprint(source.train)), here)
    if start.finished:
        accelerator.print(
            f"{start.path} is finished; its metrics are in {start.path / METRICS}. "
            "--name NAME trains another run, --resume extend goes on with this one."
        )
        accelerator.end_training()
        return
    roll_call.keep_records(start.path / FAILURES, start.attempt)
    watch.each_poll.append(roll_call.write_record)
    status.start = start
    watch.before_leaving += [status.cut_off, roll_call.cut_off, lambda state, reason: lock.release()]
    roll_call.when_rank_0_is_lost = status.rank_0_is_lost
    accounts = attempt.enter_context(TimeAccounts(start, clock, world_size, is_main, lock.beat))
    watch.each_poll.append(accounts.write_now_and_then)

    def waiting() -> int:  # rank 0 is at work, although the others wait for it
        here.enter(here.phase)
        return watch.wish

    trackers = Trackers(start, config.tracking, is_main, lock.beat, waiting)
    if is_main:
        watch.look_for(start.path, config.stop, os.environ)
    agreement = Agreement(watch, world_size, rendezvous.group_timeout(config.ddp))

    # ---- prepared by Accelerate ----------------------------------------------------------------------------
    here.enter("preparing the model")
    if config.compile:
        bare_model.compile()
    model, optimizer = accelerator.prepare(bare_model, optimizer)
    scaler = accelerator.scaler
    if scaler is None:
        optimizer = optimizer.optimizer  # the wrapper serves fp16's scaler only, and costs 0.15 ms a step
    if world_size > 1:
        size = min(plan.micro_batch_size, plan.samples)
        batch = send_to_device(example_batch(source, config.data, config.seed, dtype, size), device)
        settle_buckets(model, bare_model, task, batch, accelerator.backward)

    # ---- what a checkpoint holds; after this, nothing knows whether the run was interrupted ----------------
    state: dict[str, Any] = {"step": 0, "epoch_sums": (0.0, 0.0), "best": None, "skipped_steps": 0, "scaler": None}
    if start.checkpoint:
        state = checkpoint.load(start.checkpoint, bare_model, optimizer, averaged)
    elif start.weights:
        checkpoint.load_weights(start.weights, bare_model)
    if scaler is not None and state["scaler"]:
        scaler.load_state_dict(state["scaler"])
    step, best, skipped_steps = state["step"], state["best"], state["skipped_steps"]

    order = Order(plan.samples, config.seed)
    train_sampler = MicroBatchSampler(order, plan, rank, step, total_steps)
    validation_sampler = FixedBatchSampler(len(source.validation), config.validate.batch_size, rank, world_size)
    make = functools.partial(make_loader, config.data, source, task, config.seed, device, dtype)
    train_loader = make(source.train, train_sampler)
    validation_loader = make(source.validation, validation_sampler, persistent=True)
    # Prepared only for the autocast of mixed precision.
    validated = bare_model if averaged is None else accelerator.prepare_model(averaged.module, evaluation_mode=True)

    details = Details(task, source, config.data, config.seed)
    rule = best_rule(config.checkpoint.best, task)
    status.best, status.best_rule = best, rule
    parameters = [parameter for parameter in bare_model.parameters() if parameter.requires_grad]
    metrics: dict[str, Any] = {}
    stop: str | None = None
    losses = LossSums(device, state["epoch_sums"])
    finite = FiniteCheck(config.train.on_nonfinite, bare_model, optimizer, scaler, plan, order, rank)
    folder = start.path / CHECKPOINTS
    saver = Saver(folder, config.checkpoint, start.identity, watch, status.update, is_main, lock.beat)
    here.enter("starting W&B")
    shown = (start.path.name, start.attempt, start.step, total_steps, plan.steps_per_epoch, rule, best)
    console = Console(Progress(*shown, lambda: status.step)) if is_main else None
    said = talking.from_main(lambda: trackers.begin(console), here)
    trackers.say(*messages, *start.messages, *describe(config, start, plan, bare_model, accelerator, total_steps))
    trackers.say(*said)

    # ==== THE LOOP ==========================================================================================
    with trackers, saver, roll_call:  # which says at once who failed, before a save that is under way is waited for
        batches = clock.waiting(train_loader)  # one iterator through all epochs: loader workers start once
        model.train()
        while step < total_steps and not stop:
            epoch, start_position, stop_position = plan.span(step)
            samples = stop_position - start_position  # of the global batch
            lr = lr_at(step, total_steps, config.optim.lr, config.schedule)
            set_lr(optimizer, lr)

            here.start_step(step + 1)
            losses.start_step()
            finite.start_step()
            window = plan.window(step, rank)
            for micro_step, (first, last) in enumerate(window):
                here.enter("loading a batch")
                batch = next(batches)
                seed_forward(config.seed, step, micro_step * world_size + rank, device)
                # Ranks exchange gradients once a step, in the backward pass of its last micro-batch.
                with nullcontext() if micro_step + 1 == len(window) else accelerator.no_sync(model):
                    here.enter("forward pass")
                    outputs = task.forward(model, batch)
                    here.enter("loss computation")  # sums over the micro-batch
                    loss, weight = task.loss(outputs, batch)
                    if first == last:  # the short last step of an epoch may have no sample for this rank
                        loss, weight = loss * 0, weight * 0
                    here.enter("backward pass")  # DDP takes the mean over the ranks, we want their sum
                    accelerator.backward(loss * (world_size / samples))
                losses.add(loss, weight)

            if scaler is not None:
                accelerator.unscale_gradients(optimizer)
            if task.weight != "samples":
                divide_by_weight(bare_model, losses.step_weight, samples)
            gradient_norm = norm_and_clip(parameters, config.optim.clip_norm)
            losses.end_step(left_out=finite.end_step(step, gradient_norm, losses.step_losses))
            here.enter("parameter update")
            optimizer.step()
            optimizer.zero_grad()
            if averaged is not None:
                update_average(averaged, bare_model, config.optim.ema_decay or 0.0)
            skipped_steps += scaler is not None and optimizer.step_was_skipped
            step += 1
            clock.add(samples)

            # ---- when due: log, validate, checkpoint, stop -------------------------------------------------
            stop = agreement.reached()
            at_end = step == total_steps
            log_due = at_end or step % config.log.every_steps == 0
            validation_due = at_end or is_due(step, config.validate.every_steps, config.validate.every_epochs, plan)
            save_due = at_end or bool(stop) or is_due(step, config.checkpoint.every_steps, 1, plan)
            save_due = save_due or is_due(step, config.checkpoint.keep_every_steps or total_steps, None, plan)
            if log_due or validation_due or save_due or finite.full:
                left_out = finite.check()
                skipped_steps += len(left_out) if finite.skips else 0  # a scaler's are counted above
                trackers.say(*left_out)
            if log_due:
                mean, running_mean, _, memory = losses.read(peak_memory(device))
                measured = {"loss": mean, "running_loss": running_mean, "gradient_norm": float(gradient_norm)}
                known = {"lr": lr, "skipped_steps": skipped_steps, "memory_gib": memory}
                trackers.log("train", step, epoch, **measured, **known, **clock.read())
            if step % plan.steps_per_epoch == 0:
                trackers.log("epoch", step, epoch, loss=losses.read()[1])
                losses.start_epoch()
            if validation_due:
                here.enter("validation")
                with clock.on("validation"), watch.timed("validation"):
                    metrics = validate(validated, task, validation_loader, validation_sampler, here, details)
                    details.write(start.path, step, start.attempt)
                trackers.log("validate", step, epoch, **metrics)
                best, previous = better(rule, best, {"step": step, **metrics}), best
                save_due = save_due or best is not previous
            if save_due:
                here.enter("checkpoint")
                with clock.on("checkpoint"), watch.timed("snapshot"):
                    finite.check_parameters(step, parameters)
                    broadcast_buffers(bare_model, averaged)  # a rank that continues has rank 0's
                    state = {"epoch_sums": losses.read()[2], "best": best, "skipped_steps": skipped_steps}
                    state |= {"time": accounts.mark(), "scaler": scaler.state_dict() if scaler is not None else None}
                    saver.save(step, bare_model, averaged, optimizer, state)
        here.enter("finishing")
        if step < total_steps:
            status.stopped_by = stop
            trackers.say(f"stopping after step {step}: its checkpoint is being written")
        clock.switch("checkpoint")
        talking.from_main(saver.finish, here)
        clock.switch("start_up")
        if status.stopped_by == stopping.REASONS[stopping.SAVE_FAILED]:
            raise RunFailed(f"Stopped after step {step} (checkpoint.on_failure): a checkpoint could not be written.")
        if is_main:
            (start.path / stopping.STOP).unlink(missing_ok=True)
        status.end()
        state_at_end = "finished" if step == total_steps else "stopped"
        accounts.write(state_at_end)
        how = (start.path, step, total_steps, stop, best, metrics)
        talking.from_main(lambda: trackers.finish(state_at_end, *ending(*how)), here)
    agreement.close()
    if step < total_steps:
        stopping.end_launcher(stop, os.environ)
    accelerator.end_training()


def main(arguments: list[str] | None = None) -> int:
    """Train as the command line says; returns the exit code: 0 in order, 1 failed, 2 wrong usage."""
    watch = stopping.listen()
    talking.speak_clearly()
    roll_call = RollCall(watch)
    quiet = not talking.speaks(os.environ)  # every rank meets the same mistakes; one says them
    try:
        config = load_config(sys.argv[1:] if arguments is None else arguments, quiet)
    except SystemExit as error:  # --help, or a mistake on the command line
        if error.code:
            talking.let_others_speak(watch)
        raise
    except UsageError as error:
        return roll_call.judge(error).code
    try:
        with ExitStack() as attempt:
            train(config, watch, roll_call, attempt)
    except BaseException as error:
        return roll_call.judge(error).code
    finally:
        roll_call.close()
    return 0


if __name__ == "__main__":
    leaving.leave(main())
