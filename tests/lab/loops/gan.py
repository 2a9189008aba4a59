"""Train a GAN on small images: train.py with two networks, two optimizers, two learning rates and two losses.

    python gan.py --config configs/digits.yaml --train.epochs 200 --schedule constant --optim.betas 0.5 0.999

A generative adversarial network (Goodfellow et al. 2014): the generator makes images of noise, and the discriminator
learns to tell them from those of the data set. Both take a step at once.
"""

import math
from contextlib import nullcontext

from distloop.ranks.start import prepare_process, start

if __name__ == "__main__":
    # before torch is imported: ranks from Slurm, CPU threads, signals that only ask for a stop
    prepare_process(copied_from="0.1.0")

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import softplus

from distloop.config import Config
from distloop.data import Plan, TrainBatches, load_data
from distloop.errors import UsageError
from distloop.ranks import Ranks, build_accelerator
from distloop.run import Best, LoopState, open_run, peak_memory
from distloop.tracking import Trackers
from distloop.training import (
    Average,
    FiniteCheck,
    LearningRate,
    LossSums,
    broadcast_buffers,
    build_optimizer,
    due_after,
    norm_and_clip,
    set_lr,
    trial_batches,
)

# The loop's own settings: how many random numbers an image is made of, the networks' width, and the discriminator's
# learning rate as a multiple of optim.lr, which is the generator's.
OWN = {"noise": 32, "hidden": 256, "discriminator_rate": 2.0}


class Gan(nn.Module):
    """Both networks in one module, so that DDP exchanges the gradients of both after one backward pass."""

    def __init__(self, noise: int, hidden: int, shape: tuple[int, ...]) -> None:
        """`shape`: of an image, [channels, height, width]."""
        super().__init__()
        self.noise, self.shape, pixels = noise, shape, math.prod(shape)
        layers: list[nn.Module] = [nn.Linear(noise, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU()]
        self.generator = nn.Sequential(*layers, nn.Linear(hidden, pixels))
        layers = [nn.Linear(pixels, hidden), nn.LeakyReLU(0.2), nn.Linear(hidden, hidden), nn.LeakyReLU(0.2)]
        self.discriminator = nn.Sequential(*layers, nn.Linear(hidden, 1))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """The losses of the generator and of the discriminator for images [batch, …], summed over the batch. Each has
        a gradient in the parameters of its own network only."""
        real = images.flatten(1)
        generated = self.generator(torch.randn(len(real), self.noise, device=real.device, dtype=real.dtype))
        of_real, of_generated = self.discriminator(torch.cat([real, generated.detach()])).chunk(2)
        fixed = {name: parameter.detach() for name, parameter in self.discriminator.named_parameters()}
        to_fool = functional_call(self.discriminator, fixed, (generated,))
        return softplus(-to_fool).sum(), softplus(-of_real).sum() + softplus(of_generated).sum()

    @torch.no_grad()
    def picture(self, generator: nn.Module) -> Tensor:
        """Sixteen images side by side, [channels, height, 16 × width], made of the same noise each time."""
        noise = torch.randn(16, self.noise, generator=torch.Generator().manual_seed(0))
        images = generator(noise.to(next(generator.parameters()))).view(16, *self.shape)
        images = (images - images.min()) / (images.max() - images.min())
        return images.permute(1, 2, 0, 3).flatten(2)


def train(config: Config, ranks: Ranks) -> None:
    """Train the config's run to its end, from its beginning or from where it was left."""
    # ---- what is trained ---------------------------------------------------------------------------------------
    accelerator = build_accelerator(config, ranks)  # the processes meet here
    device = accelerator.device
    if config.precision == "fp16":
        raise UsageError("precision = 'fp16': this loop has no place for a gradient scaler. Use bf16.")
    data = load_data(config.data, config.seed)
    torch.manual_seed(config.seed)  # the same initial weights on all ranks
    bare_model = Gan(config.own["noise"], config.own["hidden"], tuple(data.train[0][0].shape))
    bare_model = bare_model.to(device, getattr(torch, config.dtype))
    generator_optimizer = build_optimizer(bare_model.generator, config.optim, device, config.precision)
    discriminator_optimizer = build_optimizer(bare_model.discriminator, config.optim, device, config.precision)
    average = Average(bare_model.generator, config.optim.ema_decay)  # of the weights; empty without a decay
    plan = Plan.of(config, len(data.train), ranks)  # which samples make up each step, and which of them are this rank's
    learning_rate = LearningRate(config, plan.total_steps)
    best = Best(None, ("loss", "min"))  # never updated: no loss of a GAN says which step is the best

    # run opens and locks the run directory; trackers: console, metrics.jsonl, W&B. They close in the reverse order:
    # ranks names the rank that failed first, trackers tell W&B, run waits for the last save and gives up the lock.
    with open_run(config, ranks, plan, data, device, best) as run, Trackers(run, config, ranks) as trackers, ranks:
        if run.is_finished:
            return

        # ---- prepared by Accelerate ----------------------------------------------------------------------------
        model = accelerator.prepare(bare_model)  # DDP around the model, mixed precision
        batches = TrainBatches(config, data, None, plan, device, run.start.step, ranks.position, run.clock.waiting)

        # ---- what a checkpoint holds; after this, nothing knows whether the run was interrupted ----------------
        parts = {
            "generator": bare_model.generator,
            "averaged_generator": average.averaged,
            "discriminator": bare_model.discriminator,
            "generator_optimizer": generator_optimizer,
            "discriminator_optimizer": discriminator_optimizer,
        }
        # Two trial passes, of which nothing stays: DDP adds gradients up in its final order from the first step on.
        for batch in trial_batches(config, data, plan, device, model):
            accelerator.backward(sum(model(batch[0])))
        state = run.load(parts)  # the run's newest whole checkpoint, else --init-from, else the initial weights
        step, stop_reason = state.step, run.stop_reason
        parameters = [p for p in bare_model.parameters() if p.requires_grad]
        losses = LossSums(device, state.epoch_sums)
        discriminator_losses = LossSums(device)
        optimizers = [generator_optimizer, discriminator_optimizer]
        finite = FiniteCheck(config.train.on_nonfinite, model, optimizers, None, plan, state.skipped_steps)
        trackers.begin(bare_model, device, "gan")

        # ==== THE LOOP ==========================================================================================
        model.train()
        while step < plan.total_steps and stop_reason is None:
            lr = learning_rate(step)
            set_lr(generator_optimizer, lr)
            set_lr(discriminator_optimizer, lr * config.own["discriminator_rate"])
            losses.begin_step()
            discriminator_losses.begin_step()
            finite.begin_step()
            for micro in batches.of_step(step):  # this rank's share of the step; random generators are seeded for each
                # Ranks exchange gradients once a step, in the backward pass of its last micro-batch.
                with nullcontext() if micro.is_last else accelerator.no_sync(model):
                    images, _ = micro.batch
                    generator_loss, discriminator_loss = model(images)  # forward passes, loss computation
                    loss = generator_loss + discriminator_loss
                    accelerator.backward(loss * micro.scale)  # backward pass; scale: processes / samples of the step
                losses.add(loss, len(images), micro.is_empty)
                discriminator_losses.add(discriminator_loss, len(images), micro.is_empty)

            gradient_norm = norm_and_clip(parameters, config.optim.clip_norm)  # the norm before clipping
            left_out = finite.before_update(step, gradient_norm, losses.step_losses)  # a flag, on the device
            losses.end_step(left_out)
            for optimizer in optimizers:
                optimizer.step()  # parameter update, but for what the flag leaves out
                optimizer.zero_grad()
            average.update(bare_model.generator)
            step += 1

            # ---- when due: stop, log, validate, checkpoint -----------------------------------------------------
            stop_reason = run.end_step(step)  # None until all ranks have agreed to stop; no step waits for that
            due = due_after(step, plan, config, stop_reason)
            if not (due.anything or finite.is_full):
                continue  # most steps end here, on all ranks alike, and do not wait for the device
            left_out_steps = finite.check()  # in words; RunFailed on all ranks if on_nonfinite says so
            trackers.say(*left_out_steps)
            means = losses.read(memory_gib=peak_memory(device))  # over all ranks
            if due.log:
                gradient = {"gradient_norm": float(gradient_norm), "lr": lr, "skipped_steps": finite.skipped_steps}
                own = {"discriminator_loss": discriminator_losses.read()["loss"]}
                trackers.log("train", step, **means, **gradient, **own, **run.clock.read())
            if due.end_of_epoch:
                trackers.log("epoch", step, loss=means["running_loss"])
                trackers.figure("generated", step, bare_model.picture(average.module or bare_model.generator))
                losses.begin_epoch()
            if due.save or stop_reason:
                with run.phase("checkpoint"):
                    finite.check_parameters(step, parameters)
                    broadcast_buffers(bare_model, average.module)  # all go on with rank 0's
                    run.save(parts, LoopState(step, losses.epoch_sums, best.row, finite.skipped_steps))

        if step < plan.total_steps:
            trackers.say(f"stopping after step {step}: its checkpoint is being written")
        run.end(step, stop_reason)  # waits for the last checkpoint
        trackers.end(step, stop_reason, {})  # says what came out, and ends report and W&B


if __name__ == "__main__":
    start(train, own=OWN)
