"""The rehearsal: before the first step, all that a run does is done once on one batch, and nothing of it stays.

A step without its update, a validation and a save. So a mistake that would end the run after an epoch ends it here.
"""

import contextlib
import time
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from distloop.data.loader import TrainBatches
from distloop.data.seeding import Place, generators_restored, seed_place
from distloop.errors import UsageError
from distloop.run.attempt import Attempt
from distloop.run.checkpoint import LoopState
from distloop.run.parts import Parts, existing
from distloop.training.averaging import adopt_buffers
from distloop.training.changed_rate import say_changed_rate
from distloop.training.micro_batch import depends_on_size, settle_micro_size
from distloop.training.one_pass import checked, method_of, rehearsing, state_put_back, try_training
from distloop.training.putting_back import put_back
from distloop.training.tasks import Task
from distloop.training.untrained import refuse_untrained_task
from distloop.training.validation import Validation

MOST_ELEMENTS = 64  # of a metric that is compared
NEARLY = 1e-3  # relative: losses that agree so far are the same up to rounding


def rehearse(
    accelerator: Accelerator,
    model: nn.Module,
    task: Task,
    batches: TrainBatches,
    validate: Validation,
    parts: Parts,
    run: Attempt,
) -> None:
    """Try all that the run does once, on one batch: train, validate, save. Nothing stays of it but loader processes and
    the order in which DDP adds gradients up; what objects of the user's own classes note, cannot be put back.

    DDP sorts its buckets, and with them the order of the sums, after the first backward pass: with several ranks two
    passes are done, so that a run that is continued rounds as one that was not interrupted.

    `model`: as prepared for training. Raises UsageError for what the run would meet later: a loss that is a mean, a
    metric that is missing, a state that cannot be saved. Other errors of the user's code get a note. Collective.
    """
    first, seed, position = run.start.step, run.config.seed, run.ranks.position
    if first >= run.plan.total_steps:
        return  # nothing is left to train
    say_changed_rate(run)
    bare_model = model.module if isinstance(model, DistributedDataParallel) else model
    modules = [bare_model, validate.model, *(part for _, part in existing(parts) if isinstance(part, nn.Module))]
    run.ranks.messages += refuse_untrained_task(task, parts)
    settle_micro_size(accelerator, bare_model, task, modules, parts, run)
    with (
        generators_restored(),
        state_put_back(task),
        put_back(*modules, task, keep_created=bool(run.start.checkpoint or run.start.weights)),
    ):
        with rehearsing(task, position, "loading the first batch"):
            (whole, half, twice), samples = batches.rehearsal()
        with rehearsing(task, position, "a step of training"):
            try_training(accelerator, model, bare_model, task, whole, samples if batches.counts_samples else None, seed)
        batches.tell_task(first, training=False)  # as the model is there
        with rehearsing(task, position, "comparing the loss of some samples with that of the same ones twice"):
            found = _refuse_mean(bare_model, task, half, twice, seed, batches.device)
            if run.config.batch.micro_size == "auto":
                run.ranks.messages += depends_on_size(bare_model, task, is_no_sum(*found) if found else False, run.plan)
        with rehearsing(task, position, "a save"):
            run.ranks.from_main(lambda: run.saver.rehearse(parts, LoopState(first)))
        try:
            with rehearsing(task, position, "the first batch of validation"):
                run.best.check(validate.first_batch(), validate.sets[0].sampler.samples)
        except (ArithmeticError, ValueError, RuntimeError, AssertionError) as error:
            if method_of(error, task) != "summary":
                raise
            run.ranks.messages.append(
                f"distloop: WARNING: task.summary() raises {type(error).__name__} ({error}) for the sums of one batch: "
                "if it does so for the whole validation, the run ends there"
            )
    for name, module in (("averaged", bare_model), ("averaged_task", task.as_module)):
        if (averaged := parts.get(name)) is not None:
            adopt_buffers(averaged.module, module)  # those that are kept, for the checkpoint that is loaded next
    run.clock.loop_began = time.perf_counter()  # the first row's samples per second are those of the loop


def _refuse_mean(
    model: nn.Module, task: Task, half: Any, twice: Any, seed: int, device: torch.device
) -> list[tuple[float, float]]:
    """The (loss, weight) of some samples, and those of the same samples `twice`, in one batch; [] if they do not pass.
    Raise UsageError if the loss is the same, while the weight is not: a mean, by which the gradient would be divided
    twice; or if a metric is. In eval mode and with the same random numbers, so that dropout and BatchNorm change
    nothing. (Halves of a batch would not show means that are weighted by class, or that leave positions out.)"""
    if half is None or twice is None:
        return []
    found, named, metrics = [], [], []
    model.eval()
    task.as_module.eval()
    try:
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):  # not compiled for two more shapes
            for batch in (half, twice):
                seed_place(Place.TRIAL, seed, device, 2)
                outputs = task.forward(model, batch)
                loss, weight = checked(task, result := task.loss(outputs, batch))
                named.append(_numbers(result[2] if len(result) == 3 else {}))
                found.append((float(loss), float(weight)))
                with contextlib.suppress(Exception):  # of a task whose metrics need what only validation has
                    metrics.append(_numbers(task.metrics(outputs, batch)))
    except Exception:  # of a task that takes no training batch in eval mode, or no half: it says nothing of the loss
        return []
    if is_mean(*found):
        (once, weight), (of_both, weight_of_both) = found
        raise UsageError(
            f"{type(task).__name__}.loss() returns a mean: {once:.6g} for some samples (weight {weight:g}), and "
            f"{of_both:.6g} for a batch that has each of them twice (weight {weight_of_both:g}), where a sum would be "
            f"{2 * once:.6g}. distloop divides by the weights of the whole step, so that the gradient would be too "
            'small. Return sums: `cross_entropy(outputs, targets, reduction="sum"), len(targets)`, or the like.'
        )
    (_, weight), (_, weight_of_both) = found
    if weight_of_both > weight and (same := _same_among(*named)):
        raise UsageError(
            f"{type(task).__name__}.loss() returns {same[0]!r} = {float(named[0][same[0]]):.6g} for some samples, and "
            "the same for a batch that has each of them twice, where a sum would be twice as much. It is divided by "
            f"the weights of the step: return a sum, as {{{same[0]!r}: value * len(targets)}} makes one of a mean."
        )
    if len(metrics) == 2 and weight_of_both > weight and (name := _mean_among(metrics[0], metrics[1])):
        value, both = (float(numbers[name].flatten()[0]) for numbers in metrics)
        raise UsageError(
            f"{type(task).__name__}.metrics() returns {name!r} = {value:.6g} for some samples, and {both:.6g} "
            "for a batch that has each of them twice, where a sum would be twice as much. Metrics are added over "
            "batches and ranks: return sums, and let summary(sums) divide them, by sums['samples'], "
            "sums['weight'] or a sum of your own."
        )
    return found


def _mean_among(once: dict[str, Tensor], twice: dict[str, Tensor]) -> str | None:
    """The name of a metric that is the same for some samples and for these twice, and not 0; None if there is none, or
    if a count that is the same, too, such as of batches, is there for summary() to divide by."""
    same = _same_among(once, twice)
    has_count = any(bool((once[name] == once[name].round()).all()) for name in same)
    return None if has_count or not same else same[0]


def _same_among(once: dict[str, Tensor], twice: dict[str, Tensor]) -> list[str]:
    """The names of the numbers that are the same in both, and not 0."""
    return [
        name
        for name, values in once.items()
        if name in twice
        and values.shape == twice[name].shape
        and torch.allclose(twice[name], values, rtol=NEARLY, atol=1e-8)
        and float(values.abs().max()) > 1e-8
    ]


def _numbers(metrics: Any) -> dict[str, Tensor]:
    """The metrics as tensors in float64, those of some elements at most."""
    values = {name: torch.as_tensor(value).double().cpu() for name, value in metrics.items()}
    return {name: value for name, value in values.items() if 0 < value.numel() <= MOST_ELEMENTS}


def is_mean(once: tuple[float, float], twice: tuple[float, float]) -> bool:
    """True if the (loss, weight) of some samples, and of the same samples twice, are those of a mean over the batch."""
    (loss, weight), (of_both, weight_of_both) = once, twice

    def near(value: float, other: float) -> bool:
        return abs(value - other) <= NEARLY * abs(other)

    return abs(loss) > 1e-8 and near(of_both, loss) and weight > 0 and near(weight_of_both, 2 * weight)


def is_no_sum(once: tuple[float, float], twice: tuple[float, float]) -> bool:
    """True if the loss of samples that are twice in a batch is not twice their loss, though the weight is: it compares
    the samples of a batch with each other."""
    (loss, weight), (of_both, weight_of_both) = once, twice
    doubled = abs(weight_of_both - 2 * weight) <= NEARLY * weight
    return doubled and abs(of_both - 2 * loss) > NEARLY * max(abs(of_both), abs(2 * loss))
