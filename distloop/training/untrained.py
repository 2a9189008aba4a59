"""Parameters that nothing would train: those that get no gradient, and those of a task."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from distloop.errors import UsageError
from distloop.ranks.ddp_words import in_short
from distloop.training.tasks import Task

HOLDERS = (nn.Module, Tensor, dict, list, tuple)  # in these a task may have parameters


def unused_parameters(model: nn.Module, parameters: Iterable[nn.Parameter] | None = None) -> list[str]:
    """After a backward pass: the names of the model's parameters, or of these of them, that require a gradient and got
    none."""
    bare = model.module if isinstance(model, DistributedDataParallel) else model
    among = set(map(id, bare.parameters() if parameters is None else parameters))
    return [n for n, p in bare.named_parameters() if p.requires_grad and p.grad is None and id(p) in among]


def refuse_unused_parameters(
    model: nn.Module, parameters: Iterable[nn.Parameter], when: str, step: int | None = None
) -> None:
    """After a backward pass of `model`: raise UsageError if it is DDP's and its `parameters` lack gradients that DDP
    waits for on this rank. It would hang, or complain in the next forward pass. `when`: such as "in step", before the
    number of the step."""
    if not isinstance(model, DistributedDataParallel) or model.find_unused_parameters or model.static_graph:
        return
    parameters = list(parameters)
    if any(parameter.grad is None and parameter.requires_grad for parameter in parameters):
        when = when if step is None else f"{when} {step}"  # only now: each step comes by here
        raise UsageError(
            f"{in_short(unused_parameters(model, parameters))} got no gradient {when} on rank {dist.get_rank()}: the "
            "forward pass left them out. With several ranks each parameter needs one on each rank. Let the forward "
            "pass use them; or freeze them if they are not to be trained (requires_grad_(False)); or allow it, at some "
            "cost for each step: --ddp.find-unused-parameters (ddp.find_unused_parameters: true)."
        )


def say_unused(names: list[str]) -> str:
    """A line on parameters without a gradient, for a single rank, which goes on."""
    return (
        f"WARNING: {in_short(names)} got no gradient in the first step: the forward pass left them out, and they "
        "stay as they are. Freeze them if that is meant (requires_grad_(False)); several ranks would refuse them, "
        "unless with --ddp.find-unused-parameters (ddp.find_unused_parameters: true)."
    )


def refuse_parameters_of_task(task: Task) -> None:
    """Raise UsageError if the task holds parameters that require a gradient, and that are not those of a task that is a
    module: in an attribute of its own or of its class, also in a list, tuple or dict there."""
    names: list[str] = []
    attributes = {name: value for kind in reversed(type(task).__mro__) for name, value in vars(kind).items()}
    for name, value in (attributes | vars(task)).items():
        if not (isinstance(task, nn.Module) and name in ("_parameters", "_modules", "_buffers")):
            names += _trained_in(name, value) if isinstance(value, HOLDERS) else []
    if names:
        raise UsageError(
            f"The task {type(task).__name__} has parameters of its own ({in_short(names)}), which nothing would train, "
            "save or compare between ranks. Make the task an nn.Module as well, class YourTask(distloop.tasks.Task, "
            "torch.nn.Module), and give it the parameters as attributes in __init__, lists of them as nn.ParameterList "
            "or nn.ModuleList. If they are not to be trained, as a teacher's, freeze them: requires_grad_(False)."
        )


def _trained_in(name: str, value: Any) -> Iterator[str]:
    seen: set[int] = set()  # a graph of lists and dicts may lead back to where it began
    waiting = [iter([(name, value)])]  # not by recursion: it may be deep
    while waiting:
        name, value = next(waiting[-1], ("", None))
        if value is None:
            waiting.pop()
        elif isinstance(value, nn.Module):
            yield from (f"{name}.{inner}" for inner, parameter in value.named_parameters() if parameter.requires_grad)
        elif isinstance(value, Tensor):
            yield from [name] if value.requires_grad else []
        elif id(value) not in seen:
            seen.add(id(value))
            waiting.append(_held_by(name, value))


def _held_by(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    items = value.items() if isinstance(value, dict) else enumerate(value)
    return ((f"{name}[{key!r}]", inner) for key, inner in items if isinstance(inner, HOLDERS))


def refuse_unused_in_task(task: Task) -> None:
    """After a backward pass: raise UsageError for parameters of a task that got no gradient, or a sparse one."""
    for name, parameter in task.as_module.named_parameters():
        if parameter.grad is not None and parameter.grad.is_sparse:
            raise UsageError(
                f"The gradient of the task's {name} is sparse, and ranks exchange whole ones: leave out sparse=True."
            )
    if names := unused_parameters(task.as_module):
        raise UsageError(
            f"The task's {in_short(names)} got no gradient in the rehearsal: its methods left them out. Let loss() use "
            "them; or freeze them if they are not to be trained (requires_grad_(False))."
        )


def refuse_untrained_task(task: Task, parts: Mapping[str, Any]) -> list[str]:
    """Raise UsageError for parameters of a task that no optimizer among the parts updates, as of a copied loop. Returns
    lines on a state that no checkpoint would hold."""
    optimizers = [part for part in parts.values() if isinstance(part, torch.optim.Optimizer)]
    updated = {id(p) for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}
    trained = [name for name, p in task.as_module.named_parameters() if p.requires_grad and id(p) not in updated]
    if trained:
        raise UsageError(
            f"This loop does not train the task's {in_short(trained)}: give it to build_optimizer(…, task.as_module), "
            'exchange_gradients(task), norm_and_clip(…) and the parts ("task": task.as_part), as train.py does.'
        )
    if task.as_part is None or "task" in parts:
        return []
    return ['distloop: WARNING: no checkpoint of this loop holds the task\'s state: add "task": task.as_part to parts']
