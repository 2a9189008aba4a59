"""The rehearsal: before the first step, all that a run does is done once on one batch, and nothing of it stays.

A step without its update, a validation and a save. So a mistake that would end the run after an epoch ends it here.
"""

import contextlib
import copy
import time
import types
from collections.abc import Iterator
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from distloop.data.batches import send
from distloop.data.loader import TrainBatches
from distloop.data.seeding import Place, generators_restored, seed_place
from distloop.errors import UsageError, add_note
from distloop.ranks.places import Position
from distloop.run.attempt import Attempt
from distloop.run.checkpoint import LoopState
from distloop.run.parts import Parts, existing
from distloop.training.averaging import adopt_buffers
from distloop.training.changed_rate import say_changed_rate
from distloop.training.named_sums import check_sums
from distloop.training.putting_back import put_back
from distloop.training.sparse import refuse_unforeseen_sparse
from distloop.training.task_model import TaskModel, refuse_bypass
from distloop.training.tasks import Task
from distloop.training.untrained import refuse_untrained_task, refuse_unused_in_task, refuse_unused_parameters
from distloop.training.validation import Validation
from distloop.training.weights import Weights

METHODS = ("augment_batch", "forward", "loss", "metrics", "guesses", "collect", "summary")  # as errors name them
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
    with (
        generators_restored(),
        _state_put_back(task),
        put_back(*modules, task, keep_created=bool(run.start.checkpoint or run.start.weights)),
    ):
        with _rehearsing(task, position, "loading the first batch"):
            (whole, half, twice), samples = batches.rehearsal()
        with _rehearsing(task, position, "a step of training"):
            _train(accelerator, model, bare_model, task, whole, samples if batches.counts_samples else None, seed)
        batches.tell_task(first, training=False)  # as the model is there
        with _rehearsing(task, position, "comparing the loss of some samples with that of the same ones twice"):
            _refuse_mean(bare_model, task, half, twice, seed, batches.device)
        with _rehearsing(task, position, "a save"):
            run.ranks.from_main(lambda: run.saver.rehearse(parts, LoopState(first)))
        try:
            with _rehearsing(task, position, "the first batch of validation"):
                run.best.check(validate.first_batch(), validate.sets[0].sampler.samples)
        except (ArithmeticError, ValueError, RuntimeError, AssertionError) as error:
            if _method(error, task) != "summary":
                raise
            run.ranks.messages.append(
                f"distloop: WARNING: task.summary() raises {type(error).__name__} ({error}) for the sums of one batch: "
                "if it does so for the whole validation, the run ends there"
            )
    for name, module in (("averaged", bare_model), ("averaged_task", task.as_module)):
        if (averaged := parts.get(name)) is not None:
            adopt_buffers(averaged.module, module)  # those that are kept, for the checkpoint that is loaded next
    run.clock.loop_began = time.perf_counter()  # the first row's samples per second are those of the loop


@contextlib.contextmanager
def _rehearsing(task: Task, position: Position, what: str) -> Iterator[None]:
    """Name what is rehearsed: as this rank's position, and in a note on an error of the user's code."""
    position.enter(f"in the rehearsal: {what}")
    try:
        yield
    except Exception as error:
        if not isinstance(error, UsageError):
            method = _method(error, task)
            position.phase += f", task.{method}()" if method else ""
            add_note(error, f"this is before the first step, {position.phase}: this start has trained nothing yet")
        raise


@contextlib.contextmanager
def _state_put_back(task: Task) -> Iterator[None]:
    """Afterwards a task that is no module has the state of before, also where objects of its own hold it."""
    if isinstance(task, nn.Module) or task.as_part is None:
        yield
        return
    before = copy.deepcopy(task.as_part.state_dict())
    yield
    task.as_part.load_state_dict(before)


def _method(error: BaseException, task: Task) -> str | None:
    """The method of the task that raised the error, directly or in what it calls."""
    trace: types.TracebackType | None = error.__traceback__
    while trace is not None:
        frame = trace.tb_frame
        if frame.f_code.co_name in METHODS and type(frame.f_locals.get("self")) is type(task):
            return frame.f_code.co_name
        trace = trace.tb_next
    return None


def _train(
    accelerator: Accelerator,
    model: nn.Module,
    bare_model: nn.Module,
    task: Task,
    batch: Any,
    samples: int | None,
    seed: int,
) -> None:
    """`samples`: which the weight of the loss must count; None: it counts something else."""
    device, held = accelerator.device, nn.ModuleDict({"model": bare_model, "task": task.as_module})
    known = {id(parameter) for parameter in held.parameters()}
    for number in range(2 if model is not bare_model else 1):
        offered: Any = TaskModel(model, bare_model)
        model.train()
        task.as_module.train()
        seed_place(Place.TRIAL, seed, device, number)
        try:
            augmented = task.augment_batch(send(batch, device))  # containers of its own: it may change them in place
            if augmented is None:
                raise UsageError(f"{type(task).__name__}.augment_batch() returned None. Let it return the batch.")
            outputs = task.forward(offered, augmented)
            result = task.loss(outputs, augmented)
        except Exception as error:
            if "'TaskModel' object" in str(error):  # is not subscriptable, not iterable, has no len()
                offered._missed.append("model[…]")
            if offered._missed:  # it comes of that
                refuse_bypass(type(task).__name__, offered)
            raise
        refuse_bypass(type(task).__name__, offered)
        _refuse_kept_model(task, bare_model)
        if late := [name for name, parameter in held.named_parameters() if id(parameter) not in known]:
            which = ", ".join(name.partition(".")[2] for name in late[:3])
            raise UsageError(
                f"The {late[0].partition('.')[0]} makes parameters in its first forward pass of training ({which}): no "
                "optimizer would update them. Make them in __init__(), or with lazy modules such as nn.LazyLinear."
            )
        loss, weight = _checked(task, result)
        if not loss.requires_grad:
            raise UsageError(
                f"{type(task).__name__}.loss() returned a loss without a gradient, from which nothing can be learned. "
                "Compute it of the model's outputs, without detach(), .item(), .numpy(), argmax() or torch.no_grad()."
            )
        weights = Weights()
        weights.check(weight, samples)
        weights.read()
        try:
            accelerator.backward(loss)
        finally:  # DDP fails in the backward pass
            refuse_unforeseen_sparse(bare_model)
        refuse_unused_parameters(model, bare_model.parameters(), "in the rehearsal")
        refuse_unused_in_task(task)


def _refuse_kept_model(task: Task, model: nn.Module) -> None:
    """Raise UsageError for a task that is a module, and has made the model a part of itself: its parameters would be
    divided by the weight twice, and saved as the task's."""
    of_model = set(map(id, model.parameters()))
    if names := [name for name, parameter in task.as_module.named_parameters() if id(parameter) in of_model]:
        raise UsageError(
            f"The task {type(task).__name__} keeps the model, or a part of it, as an attribute ({names[0]}), by which "
            "torch counts its parameters as the task's. Return what loss() needs of the model from forward(), or keep "
            f"the model in a tuple: self.{names[0].partition('.')[0]} = (model,)."
        )


def _checked(task: Task, result: Any) -> tuple[Tensor, Any]:
    """The loss and the weight that loss() returned, if all has the right form. Raises UsageError."""
    pair = result if isinstance(result, (tuple, list)) else (result,)
    if len(pair) not in (2, 3) or not isinstance(pair[0], Tensor) or pair[0].numel() != 1:
        found = " and ".join(
            f"a tensor of shape {list(each.shape)}" if isinstance(each, Tensor) else f"a {type(each).__name__}"
            for each in pair
        )
        raise UsageError(
            f"{type(task).__name__}.loss() returned {found}. Return two: a tensor, the sum of the losses over the "
            "batch (without .item()), and a number, of how many samples (or tokens) it is the sum: "
            '`cross_entropy(outputs, targets, reduction="sum"), len(targets)`. A third value, if any, is a dict of '
            "more sums by name."
        )
    if len(pair) == 3:
        check_sums(pair[2])
    return pair[0], pair[1]


def _refuse_mean(model: nn.Module, task: Task, half: Any, twice: Any, seed: int, device: torch.device) -> None:
    """Raise UsageError if the loss of some samples is also that of the same samples `twice`, in one batch, while its
    weight is not: a mean, by which the gradient would be divided twice; or if a metric is. In eval mode and with the
    same random numbers, so that dropout and BatchNorm change nothing. (Halves of a batch would not show means that are
    weighted by class, or that leave positions out.)"""
    if half is None or twice is None:
        return
    found, named, metrics = [], [], []
    model.eval()
    task.as_module.eval()
    try:
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):  # not compiled for two more shapes
            for batch in (half, twice):
                seed_place(Place.TRIAL, seed, device, 2)
                outputs = task.forward(model, batch)
                loss, weight = _checked(task, result := task.loss(outputs, batch))
                named.append(_numbers(result[2] if len(result) == 3 else {}))
                found.append((float(loss), float(weight)))
                with contextlib.suppress(Exception):  # of a task whose metrics need what only validation has
                    metrics.append(_numbers(task.metrics(outputs, batch)))
    except Exception:  # of a task that takes no training batch in eval mode, or no half: it says nothing of the loss
        return
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
        value, name = float(named[0][same[0]]), same[0]
        raise UsageError(
            f"{type(task).__name__}.loss() returns {name!r} = {value:.6g} for some samples, and the same for a batch "
            "that has each of them twice, where a sum would be twice as much. It is divided by the weights of the whole "
            f"step: return a sum, or the mean times the weight, {{{name!r}: value * len(targets)}} or the like."
        )
    if len(metrics) == 2 and weight_of_both > weight and (name := _mean_among(metrics[0], metrics[1])):
        value, both = (float(numbers[name].flatten()[0]) for numbers in metrics)
        raise UsageError(
            f"{type(task).__name__}.metrics() returns {name!r} = {value:.6g} for some samples, and {both:.6g} "
            "for a batch that has each of them twice, where a sum would be twice as much. Metrics are added over "
            "batches and ranks: return sums, and let summary(sums) divide them, by sums['samples'], "
            "sums['weight'] or a sum of your own."
        )


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
