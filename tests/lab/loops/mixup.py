"""Train a model with mixup: train.py, and a handful of changed lines.

    accelerate launch mixup.py --config configs/digits.yaml --own.alpha 0.4

Mixup (Zhang et al. 2018, "mixup: Beyond empirical risk minimization") trains on mixtures of two samples, and on the
same mixture of their losses. Which samples are mixed depends on the micro-batch, as dropout does.
"""

from contextlib import nullcontext

from distloop.ranks.start import prepare_process, start

if __name__ == "__main__":
    # before torch is imported: ranks from Slurm, CPU threads, signals that only ask for a stop
    prepare_process(copied_from="0.1.0")

import torch
from torch.distributions import Beta

from distloop.config import Config
from distloop.data import Plan, TrainBatches, load_data
from distloop.ranks import Ranks, build_accelerator
from distloop.run import Best, LoopState, open_run, peak_memory
from distloop.tracking import Trackers
from distloop.training import (
    Average,
    FiniteCheck,
    LearningRate,
    LossSums,
    Validation,
    broadcast_buffers,
    build_model,
    build_optimizer,
    build_task,
    divide_by_weight,
    due_after,
    exchange_gradients,
    leave_out_frozen,
    norm_and_clip,
    offered_to_task,
    rehearse,
    set_lr,
)

OWN = {"alpha": 0.2}  # the loop's own settings: --own.alpha 0.4


def train(config: Config, ranks: Ranks) -> None:
    """Train the config's run to its end, from its beginning or from where it was left."""
    # ---- what is trained ---------------------------------------------------------------------------------------
    accelerator = build_accelerator(config, ranks)  # the processes meet here
    device = accelerator.device
    data = load_data(config.data, config.seed)
    task = build_task(config.task, config.seed)
    bare_model = build_model(config, data, task, device, ranks.position)  # the same initial weights on all ranks
    optimizer = build_optimizer(bare_model, config.optim, device, config.precision, task.as_module)
    average = Average(bare_model, config.optim.ema_decay, task)  # of the weights; empty without a decay
    plan = Plan.of(config, len(data.train), ranks)  # which samples make up each step, and which of them are this rank's
    learning_rate = LearningRate(config, plan.total_steps)
    beta = Beta(config.own["alpha"], config.own["alpha"])  # the share of the first sample in a mixture
    best = Best(config.checkpoint.best, task.best)  # the best validation so far, and by which metric it is

    # run opens and locks the run directory; trackers: console, metrics.jsonl, W&B. They close in the reverse order:
    # ranks names the rank that failed first, trackers tell W&B, run waits for the last save and gives up the lock.
    with open_run(config, ranks, plan, data, device, best) as run, Trackers(run, config, ranks) as trackers, ranks:
        if run.is_finished:
            return

        # ---- prepared by Accelerate ----------------------------------------------------------------------------
        model, optimizer = accelerator.prepare(bare_model, optimizer)  # DDP around the model, mixed precision
        scaler = accelerator.scaler  # of fp16; else None
        if scaler is None:
            optimizer = optimizer.optimizer  # Accelerate's wrapper serves the scaler only, and costs 0.15 ms a step
        task_model = offered_to_task(model, bare_model)  # calls model; names are those of bare_model
        validated_model = average.prepared(accelerator, bare_model)  # the averaged one, if there is one
        validate = Validation(config, validated_model, average.task, data, run, ranks, trackers)
        batches = TrainBatches(config, data, task, plan, device, run.start.step, ranks.position, run.clock.waiting)

        # ---- what a checkpoint holds; after this, nothing knows whether the run was interrupted ----------------
        parts = {"model": bare_model, "averaged": average.averaged, "optimizer": optimizer, "scaler": scaler}
        parts |= {"task": task.as_part, "averaged_task": average.averaged_task}  # of a task with a state; else None
        # All that comes is done once, on one batch, and nothing of it stays: mistakes end the run here, not in an hour.
        rehearse(accelerator, model, task, batches, validate, parts, run)
        state = run.load(parts)  # the run's newest whole checkpoint, else --init-from, else the initial weights
        step, stop_reason, metrics = state.step, run.stop_reason, {}
        parameters = [p for p in (*bare_model.parameters(), *task.as_module.parameters()) if p.requires_grad]
        losses = LossSums(device, state.epoch_sums)
        finite = FiniteCheck(config.train.on_nonfinite, model, optimizer, scaler, plan, state.skipped_steps, task)
        trackers.begin(bare_model, device, optimizer=optimizer)
        if state.unvalidated:  # its validation failed in an attempt before, or is that at the start of the run
            metrics, stop_reason = validate(step, parts, state), run.stop_reason

        # ==== THE LOOP ==========================================================================================
        model.train()
        while step < plan.total_steps and stop_reason is None:
            lr = learning_rate(step)
            set_lr(optimizer, lr)
            losses.begin_step()
            finite.begin_step()
            for micro in batches.of_step(step):  # this rank's share of the step; random generators are seeded for each
                # Ranks exchange gradients once a step, in the backward pass of its last micro-batch.
                with nullcontext() if micro.is_last else accelerator.no_sync(model):
                    inputs, labels = micro.batch
                    share, order = float(beta.sample()), torch.randperm(len(labels), device=device)
                    mixed = share * inputs + (1 - share) * inputs[order]
                    outputs = task.forward(task_model, (mixed, labels))  # forward pass
                    loss, weight, *sums = task.loss(outputs, (mixed, labels))  # loss computation: sums
                    loss = share * loss + (1 - share) * task.loss(outputs, (mixed, labels[order]))[0]
                    accelerator.backward(loss * micro.scale)  # backward pass; scale: processes / samples of the step
                losses.add(loss, weight, micro.is_empty, micro.samples, *sums)

            exchange_gradients(task)  # of a task with parameters of its own, as DDP does for the model's
            accelerator.unscale_gradients(optimizer)  # of fp16; else nothing
            if task.weight != "samples":  # tokens, pixels: how many they were is known only now
                divide_by_weight(model, losses.step_weight, plan.sample_count(step), task)
            leave_out_frozen(optimizer, step)  # groups that are frozen until a later step
            gradient_norm = norm_and_clip(parameters, config.optim.clip_norm)  # the norm before clipping
            left_out = finite.before_update(step, gradient_norm, losses.step_losses)  # a flag, on the device
            losses.end_step(left_out)
            optimizer.step()  # parameter update, but for what the flag leaves out
            optimizer.zero_grad()
            average.update(bare_model)
            finite.after_update(optimizer)
            step += 1

            # ---- when due: stop, log, validate, checkpoint -----------------------------------------------------
            stop_reason = run.end_step(step)  # None until all ranks have agreed to stop; no step waits for that
            due = due_after(step, plan, config, stop_reason)
            if not (due.anything or finite.is_full):
                continue  # most steps end here, on all ranks alike, and do not wait for the device
            trackers.say(*finite.check())  # steps that were left out; RunFailed on all ranks if on_nonfinite says so
            means = losses.read(memory_gib=peak_memory(device))  # over all ranks
            if due.log:
                gradient = {"gradient_norm": float(gradient_norm), "lr": lr, "skipped_steps": finite.skipped_steps}
                trackers.log("train", step, **means, **gradient, **run.clock.read())
            if due.end_of_epoch:
                trackers.log("epoch", step, loss=means["running_loss"])
                losses.begin_epoch()
            if due.validation:  # all ranks share the work, with rank 0's buffers; logs the row, updates best
                state = LoopState(step, losses.epoch_sums, best.row, finite.skipped_steps)  # saved if that fails
                metrics, stop_reason = validate(step, parts, state), run.stop_reason  # train.early_stop may end it
            if due.save or stop_reason or best.step == step:
                with run.phase("checkpoint"):
                    finite.check_parameters(step, parameters)
                    broadcast_buffers(bare_model, average.module, task, average.task)  # all go on with rank 0's
                    run.save(parts, LoopState(step, losses.epoch_sums, best.row, finite.skipped_steps))

        if step < plan.total_steps:
            trackers.say(f"stopping after step {step}: its checkpoint is being written")
        run.end(step, stop_reason)  # waits for the last checkpoint
        trackers.end(step, stop_reason, metrics)  # says what came out, and ends report and W&B


if __name__ == "__main__":
    start(train, own=OWN)
