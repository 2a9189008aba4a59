"""Train a model: the textbook loop, on one process or many.

    accelerate launch distloop/train.py --config configs/digits.yaml
    python -m distloop.train --config configs/digits.yaml --optim.lr 0.01

What a step trains on depends on the config alone: the order of the samples, their augmentation, the learning rate
and the gradient are the same for any number of processes, with or without accumulation, interrupted or not.
"""

import sys
from contextlib import nullcontext
from pathlib import Path

if not __package__:  # run as a script: Python put this folder first on the path, where `import distloop` finds nothing
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from distloop.ranks.start import prepare_process, start

if __name__ == "__main__":
    prepare_process()  # before torch is imported: ranks from Slurm, CPU threads, signals as wishes to stop

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
    norm_and_clip,
    set_lr,
    warm_up,
)


def train(config: Config, ranks: Ranks) -> None:
    """Train the config's run to its end, from its beginning or from where it was left."""
    # ---- what is trained ---------------------------------------------------------------------------------------
    accelerator = build_accelerator(config, ranks)  # the processes meet here
    device = accelerator.device
    data = load_data(config.data)
    task = build_task(config.task)
    bare_model = build_model(config, data, task, device)  # the same initial weights on all ranks
    optimizer = build_optimizer(bare_model, config.optim, device, config.precision)
    average = Average(bare_model, config.optim.ema_decay)  # of the weights; without a decay there is none
    plan = Plan.of(config, len(data.train), ranks)  # which samples make up each step, and which of them are this rank's
    learning_rate = LearningRate(config, plan.total_steps)
    best = Best(config.checkpoint.best, task.best)

    # The run directory is opened and locked here. Closed in the reverse order: the rank that failed first is named,
    # then W&B is told, then the last save is awaited, status.json written and the lock released.
    with open_run(config, ranks, plan, data, device, best) as run, Trackers(run, config, ranks) as trackers, ranks:
        if run.is_finished:
            return

        # ---- prepared by Accelerate ----------------------------------------------------------------------------
        model, optimizer = accelerator.prepare(bare_model, optimizer)  # DDP around the model, mixed precision
        scaler = accelerator.scaler  # of fp16; else None
        if scaler is None:
            optimizer = optimizer.optimizer  # Accelerate's wrapper serves the scaler only, and costs 0.15 ms a step
        warm_up(config, data, plan, task, model, bare_model, accelerator)

        # ---- what a checkpoint holds; after this, nothing knows whether the run was interrupted ----------------
        # The newest good checkpoint of the run, else --init-from, else the initial weights.
        parts = {"model": bare_model, "averaged": average.averaged, "optimizer": optimizer, "scaler": scaler}
        state = run.load(parts)
        step, stop, metrics = state.step, None, {}
        batches = TrainBatches(config, data, task, plan, device, step, ranks.position, run.clock.waiting)
        validated = accelerator.prepare_model(average.module, evaluation_mode=True) if average.module else bare_model
        validate = Validation(config, validated, task, data, run, ranks)
        parameters = [parameter for parameter in bare_model.parameters() if parameter.requires_grad]
        losses = LossSums(device, state.epoch_sums)
        finite = FiniteCheck(config.train.on_nonfinite, bare_model, optimizer, scaler, plan, state.skipped_steps)
        trackers.begin(bare_model, device)

        # ==== THE LOOP ==========================================================================================
        model.train()
        while step < plan.total_steps and not stop:
            lr = learning_rate(step)
            set_lr(optimizer, lr)
            losses.begin_step()
            finite.begin_step()
            for micro in batches.of_step(step):  # this rank's share of the step; dropout is seeded for each
                # Ranks exchange gradients once a step, in the backward pass of its last micro-batch.
                with nullcontext() if micro.is_last else accelerator.no_sync(model):
                    outputs = task.forward(model, micro.batch)  # forward pass
                    loss, weight = task.loss(outputs, micro.batch)  # loss computation: sums over the micro-batch
                    accelerator.backward(loss * micro.scale)  # backward pass
                losses.add(loss, weight, micro.is_empty)

            if scaler is not None:
                accelerator.unscale_gradients(optimizer)
            if task.weight != "samples":  # tokens, pixels: how many they were is known only now
                divide_by_weight(bare_model, losses.step_weight, plan.samples_of(step))
            gradient_norm = norm_and_clip(parameters, config.optim.clip_norm)
            left_out = finite.before_update(step, gradient_norm, losses.step_losses)
            losses.end_step(left_out)
            optimizer.step()  # parameter update
            optimizer.zero_grad()
            average.update(bare_model)
            finite.after_update(optimizer)
            step += 1

            # ---- when due: stop, log, validate, checkpoint -----------------------------------------------------
            stop = run.end_step(step)  # why all ranks stop now, once they have agreed; no step waits for the answer
            due = due_after(step, plan, config, stop)
            if not (due.anything or finite.is_full):
                continue  # most steps end here, and do not wait for the device
            trackers.say(*finite.check())  # names the steps that were left out; RunFailed on all ranks for a bad one
            mean = losses.read(peak_memory(device))  # over all ranks
            if due.log:
                means = {"loss": mean.loss, "running_loss": mean.running_loss, "gradient_norm": float(gradient_norm)}
                others = {"lr": lr, "skipped_steps": finite.skipped_steps, "memory_gib": mean.by_rank}
                trackers.log("train", step, **means, **others, **run.clock.read())
            if due.end_of_epoch:
                trackers.log("epoch", step, loss=mean.running_loss)
                losses.begin_epoch()
            if due.validation:
                with run.phase("validation"):
                    metrics = validate(step)
                trackers.log("validate", step, **metrics)
                best.update(step, metrics)
            if due.save or best.step == step:
                with run.phase("checkpoint"):
                    finite.check_parameters(step, parameters)
                    broadcast_buffers(bare_model, average.module)  # a rank that continues has rank 0's
                    run.save(parts, LoopState(step, losses.epoch_sums, best.row, finite.skipped_steps))

        if step < plan.total_steps:
            trackers.say(f"stopping after step {step}: its checkpoint is being written")
        run.end(step, stop)  # waits for the last checkpoint
        trackers.end(step, stop, metrics)  # says what came out, and ends report and W&B


if __name__ == "__main__":
    start(train)
