"""One forward and backward pass that is tried before the first step, and what it may not do."""

import contextlib
import copy
import types
from collections.abc import Iterator
from typing import Any

from accelerate import Accelerator
from torch import Tensor, nn

from distloop.data.batches import send
from distloop.data.seeding import Place, seed_place
from distloop.errors import UsageError, add_note
from distloop.ranks.places import Position
from distloop.training.named_sums import check_sums
from distloop.training.sparse import refuse_unforeseen_sparse
from distloop.training.task_model import TaskModel, refuse_bypass
from distloop.training.tasks import Task
from distloop.training.untrained import refuse_unused_in_task, refuse_unused_parameters
from distloop.training.weights import Weights

METHODS = ("augment_batch", "forward", "loss", "metrics", "guesses", "collect", "summary")  # as errors name them


@contextlib.contextmanager
def rehearsing(task: Task, position: Position, what: str) -> Iterator[None]:
    """Name what is rehearsed: as this rank's position, and in a note on an error of the user's code."""
    position.enter(f"in the rehearsal: {what}")
    try:
        yield
    except Exception as error:
        if not isinstance(error, UsageError):
            method = method_of(error, task)
            position.phase += f", task.{method}()" if method else ""
            add_note(error, f"this is before the first step, {position.phase}: this start has trained nothing yet")
        raise


@contextlib.contextmanager
def state_put_back(task: Task) -> Iterator[None]:
    """Afterwards a task that is no module has the state of before, also where objects of its own hold it."""
    if isinstance(task, nn.Module) or task.as_part is None:
        yield
        return
    before = copy.deepcopy(task.as_part.state_dict())
    yield
    task.as_part.load_state_dict(before)


def method_of(error: BaseException, task: Task) -> str | None:
    """The method of the task that raised the error, directly or in what it calls."""
    trace: types.TracebackType | None = error.__traceback__
    while trace is not None:
        frame = trace.tb_frame
        if frame.f_code.co_name in METHODS and type(frame.f_locals.get("self")) is type(task):
            return frame.f_code.co_name
        trace = trace.tb_next
    return None


def try_training(
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
        loss, weight = checked(task, result)
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


def checked(task: Task, result: Any) -> tuple[Tensor, Any]:
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
