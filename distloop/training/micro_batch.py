"""batch.micro_size: auto finds the largest micro-batch that fits into memory, on all ranks, before the first step."""

import gc
from collections.abc import Sequence
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from distloop.data.look import first_training_batch
from distloop.data.order import Plan
from distloop.data.seeding import generators_restored
from distloop.errors import UsageError
from distloop.ranks.ddp_words import in_short
from distloop.ranks.out_of_memory import is_out_of_memory
from distloop.ranks.sums import sum_over_ranks
from distloop.run.attempt import Attempt
from distloop.run.micro_size import record_found
from distloop.run.parts import Parts, existing
from distloop.training.classification import Classification
from distloop.training.one_pass import rehearsing, state_put_back, try_training
from distloop.training.putting_back import put_back
from distloop.training.tasks import Task

RESERVE = 0.05  # of the device's memory: other batches may need more, and memory gets into pieces


def settle_micro_size(
    accelerator: Accelerator, model: nn.Module, task: Task, modules: Sequence[nn.Module], parts: Parts, run: Attempt
) -> None:
    """With batch.micro_size: auto, and no size found by an attempt before: find it, record it, and divide the plan by
    it, before a loader takes batches.

    The whole share of a rank is tried first, then, by bisection, the sizes that divide it. A trial is this rank's first
    micro-batch: forward and backward pass, update, and both passes again beside the state that the optimizer has then;
    a part of the memory of a GPU stays free meanwhile, and a copy of the model. Nothing of it stays. A size that does
    not fit on one rank fits on none. No trial exchanges anything between ranks, since one of them may fail in it; they
    compare notes after each. Raises UsageError if a single sample does not fit. Collective.

    `model`: not in DDP. `modules`: all whose state a trial may change.
    """
    plan, ranks = run.plan, run.ranks
    if plan.is_divided:
        return
    if run.start.micro_size is not None:
        plan.divide(run.start.micro_size)
        return
    share = plan.global_batch_size // plan.world_size
    sizes = [size for size in range(1, share + 1) if share % size == 0]
    failures: list[tuple[int, int]] = []  # sizes that did not fit, each with the number of ranks
    fits, fails, place = -1, len(sizes), len(sizes) - 1
    while fails - fits > 1:
        plan.divide(sizes[place])
        failed = not _fits(accelerator, model, task, modules, parts, run)
        ranks.position.enter("comparing the ranks")
        if failed_ranks := int(sum_over_ranks(failed=failed)["failed"]):
            fails = place
            failures.append((sizes[place], failed_ranks))
        else:
            fits = place
        place = (fits + fails) // 2
    if fits < 0:
        raise UsageError(
            f"batch.micro_size: auto: not even one sample at once fits into the memory of {failures[-1][1]} of "
            f"{plan.world_size} ranks, beside model, gradients and optimizer. Make samples or model smaller, or set "
            "--model.checkpointing."
        )
    plan.divide(sizes[fits])
    run.start = run.start._replace(micro_size=sizes[fits])
    if not run.start.changes:  # else run.load() records them, once the checkpoint is loaded
        ranks.from_main(lambda: record_found(run.start, run.config))
    ranks.messages.append(f"batch.micro_size: auto: {sizes[fits]}, {_found_by(failures, accelerator.device, plan)}")


def _found_by(failures: Sequence[tuple[int, int]], device: torch.device, plan: Plan) -> str:
    """`failures`: the sizes that did not fit, each with the number of ranks."""
    if failures:
        size, count = min(failures)
        return f"since {size} samples at once ran out of memory on {count} of {plan.world_size} ranks"
    unsure = "; a CPU does not say when memory runs out" if device.type == "cpu" else ""
    return f"a rank's whole share, which fits into memory{unsure}"


def _fits(
    accelerator: Accelerator, model: nn.Module, task: Task, modules: Sequence[nn.Module], parts: Parts, run: Attempt
) -> bool:
    """True unless this rank runs out of memory with micro-batches as the plan has them now."""
    device, fits = accelerator.device, True
    wrapped = [part for _, part in existing(parts) if isinstance(part, torch.optim.Optimizer)]
    optimizers: list[Any] = [getattr(one, "optimizer", one) for one in wrapped]  # without Accelerate's wrapper
    held = [*optimizers, *(inner for one in optimizers for inner in getattr(one, "optimizers", ()))]
    keep_created = bool(run.start.checkpoint or run.start.weights)
    with (
        generators_restored(),
        state_put_back(task),
        put_back(*modules, task, *held, keep_created=keep_created),
        rehearsing(task, run.ranks.position, f"a step in micro-batches of {run.plan.micro_batch_size} samples"),
    ):
        try:
            with torch.compiler.set_stance("force_eager"):  # not compiled for shapes of which most are not trained
                _try_step(accelerator, model, task, optimizers, run)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            fits = False  # what the step has computed is let go with the error
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)  # rows have the peak of the run
    return fits


def _try_step(accelerator: Accelerator, model: nn.Module, task: Task, optimizers: Sequence[Any], run: Attempt) -> None:
    reserve = _reserved(accelerator.device)
    batch = first_training_batch(run.config, run.source, run.plan, run.start.step, accelerator.device)
    try_training(accelerator, model, model, task, batch, None, run.config.seed)
    for parameter in (*model.parameters(), *task.as_module.parameters()):
        if parameter.grad is not None:
            parameter.grad.zero_()  # the update is of no use, and should not make numbers infinite
    for optimizer in optimizers:
        optimizer.step()
        if run.plan.accumulation == 1:  # else gradients are there while the next micro-batch is computed
            optimizer.zero_grad()
    try_training(accelerator, model, model, task, batch, None, run.config.seed)
    del reserve  # not before


def _reserved(device: torch.device) -> torch.Tensor | None:
    """Memory that a trial does without, for as long as this is held."""
    if device.type != "cuda":
        return None
    return torch.empty(int(RESERVE * torch.cuda.mem_get_info(device)[1]), dtype=torch.uint8, device=device)


def depends_on_size(model: nn.Module, task: Task, compares_samples: bool, plan: Plan) -> list[str]:
    """A line that names why results depend on the size of a micro-batch, which was found; none if they do not.
    `compares_samples`: the loss of samples is another one beside others."""
    norms = [name or "the model" for name, module in model.named_modules() if isinstance(module, _BatchNorm)]
    drops = [name or "the model" for name, module in model.named_modules() if _drops_out(module)]
    reasons = []
    if norms:
        reasons.append(f"BatchNorm ({in_short(norms)}) normalises over a micro-batch")
    if drops:
        reasons.append(f"dropout ({in_short(drops)}) draws for a micro-batch")
    if type(task).augment_batch not in (Task.augment_batch, Classification.augment_batch):
        reasons.append(f"{type(task).__name__}.augment_batch() is given a micro-batch")
    elif getattr(task, "_mixup", 0) or getattr(task, "_cutmix", 0):
        reasons.append("mixup and cutmix mix samples of a micro-batch")
    if compares_samples:
        reasons.append(f"{type(task).__name__}.loss() compares the samples of a micro-batch with each other")
    if not reasons:
        return []
    size = plan.micro_batch_size
    return [
        f"results depend on the size of a micro-batch: {'; '.join(reasons)}. "
        f"--batch.micro-size {size} trains the same where another size would be found"
    ]


def _drops_out(module: nn.Module) -> bool:
    """True for dropout of any kind that is on, also inside attention and recurrent layers."""
    share = getattr(module, "p", 0) if isinstance(module, _DropoutNd) or type(module).__name__ in DROPS else 0
    if isinstance(module, (nn.MultiheadAttention, nn.RNNBase)):
        share = module.dropout
    return isinstance(share, (int, float)) and share > 0


DROPS = ("StochasticDepth", "DropBlock2d", "DropPath")  # of torchvision, and as others name it
