"""Parameter groups, the optimizer, weight averaging, and the learning rate as a pure function of the step."""

import itertools
import math

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from distloop.config.settings import Config, Optim, Schedule
from distloop.errors import UsageError

NORMS = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """The parameters in two groups: those with weight decay; norms, biases and other vectors, which have none."""
    decays: dict[nn.Parameter, bool] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            if parameter.requires_grad:  # a tied weight counts once, in the first module that has it
                decays.setdefault(parameter, parameter.ndim >= 2 and not isinstance(module, NORMS))
    groups = [([p for p in decays if decays[p]], weight_decay), ([p for p in decays if not decays[p]], 0.0)]
    return [{"params": parameters, "weight_decay": decay} for parameters, decay in groups if parameters]


def build_optimizer(
    model: nn.Module | list[dict], config: Optim, device: torch.device, precision: str
) -> torch.optim.Optimizer:
    """The optimizer that the config names, for a model or for groups that parameter_groups() made. Raises UsageError if
    there are no parameters to train, or if their gradients are sparse and it cannot take these."""
    groups = parameter_groups(model, config.weight_decay) if isinstance(model, nn.Module) else model
    if not groups:
        raise UsageError(
            "The model has no parameters that require a gradient: there is nothing to train. If its layers are in a "
            "list or dict, make that an nn.ModuleList or nn.ModuleDict: PyTorch does not see them otherwise."
        )
    # Fused: one pass over the parameters instead of one operation each. Not with fp16, where the fused optimizers
    # leave a step out by themselves, so that nobody could count it. None: PyTorch chooses; False is its slowest way.
    # Fused ones take no complex parameters and no sparse gradients.
    is_plain = all(parameter.is_floating_point() for group in groups for parameter in group["params"])
    if isinstance(model, nn.Module) and (sparse := sparse_gradients(model)):
        check_sparse(sparse[0], config, device)
        is_plain = False
    fused = (is_plain and device.type in ("cpu", "cuda") and precision != "fp16") or None
    if config.name == "sgd":
        return torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum, nesterov=config.nesterov, fused=fused)
    kind = torch.optim.AdamW if config.name == "adamw" else torch.optim.Adam
    return kind(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=fused)


def sparse_gradients(model: nn.Module) -> list[str]:
    """The names of the parameters whose gradients are sparse tensors: embeddings with sparse=True."""
    kinds = (nn.Embedding, nn.EmbeddingBag)
    modules = [(name, module) for name, module in model.named_modules() if isinstance(module, kinds)]
    names = [name for name, module in modules if module.sparse and module.weight.requires_grad]
    return [f"{name}.weight" if name else "weight" for name in names]


def check_sparse(name: str, config: Optim, device: torch.device) -> None:
    """Raise UsageError unless the config's optimizer and the device can take the sparse gradient of `name`."""
    if config.name == "sgd" and not config.momentum and not config.weight_decay:
        if device.type == "cpu" or not (dist.is_initialized() and dist.get_world_size() > 1):
            return
        problem, way_out = "GPUs do not exchange sparse gradients", "Train on one GPU"
    else:
        settings = f" with momentum {config.momentum:g} and weight decay {config.weight_decay:g}"
        problem = f"optim.name = {config.name!r}{settings if config.name == 'sgd' else ''} cannot take it"
        way_out = "Use --optim.name sgd --optim.momentum 0 --optim.weight-decay 0"
    raise UsageError(
        f"The gradient of the model's {name} is sparse (its embedding has sparse=True), and {problem}. {way_out}, or "
        "leave out sparse=True: the updates are then those of whole tensors."
    )


def refuse_unforeseen_sparse(model: nn.Module) -> None:
    """After a backward pass, also one that DDP has not ended: raise UsageError for sparse gradients of other parameters
    than those of sparse_gradients()."""
    modules = [module for module in model.modules() if isinstance(module, (nn.Embedding, nn.EmbeddingBag))]
    known = {id(parameter) for module in modules if module.sparse for parameter in module.parameters()}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None and parameter.grad.is_sparse and id(parameter) not in known:
            raise UsageError(
                f"The gradient of the model's {name} is sparse, and it is no weight of a torch.nn.Embedding with "
                "sparse=True, by which the optimizer is chosen: neither that nor DistributedDataParallel can take it. "
                "Leave out sparse=True (or sparse_grad=True) where forward() looks it up: the updates are then those "
                "of whole tensors."
            )


class Average:
    """An exponential moving average of a model's parameters and buffers; without a decay there is none."""

    def __init__(self, model: nn.Module, decay: float | None) -> None:
        self.decay = decay
        if decay is not None:
            _detach_made_weights(model)
        self.averaged = None if decay is None else AveragedModel(model, use_buffers=True)

    @property
    def module(self) -> nn.Module | None:
        """A model with the averaged weights."""
        return None if self.averaged is None else self.averaged.module

    def update(self, model: nn.Module) -> None:
        """Add the model's weights after a step."""
        if self.averaged is not None and self.decay is not None:
            update_average(self.averaged, model, self.decay)


def _detach_made_weights(model: nn.Module) -> None:
    """Attributes with a history of gradients cannot be copied: weight_norm() keeps one, which each pass makes anew."""
    for module in model.modules():
        for name, value in vars(module).items():
            if isinstance(value, Tensor) and not value.is_leaf:
                vars(module)[name] = value.detach()


def adopt_buffers(averaged: nn.Module, model: nn.Module) -> None:
    """Give the average the buffers that the model has made in a forward pass, such as a cached mask."""
    for other, module in zip(averaged.modules(), model.modules(), strict=True):
        for name, buffer in module._buffers.items():
            if buffer is not None and other._buffers.get(name) is None:
                other.register_buffer(name, buffer.clone(), name not in module._non_persistent_buffers_set)


@torch.no_grad()
def update_average(averaged: AveragedModel, model: nn.Module, decay: float) -> None:
    """Update the average after a step. The first time it becomes a copy of the model.

    The decay rises to `decay` over the first steps, as (1 + n) / (10 + n), so that a short run's average does not stay
    near the initial weights (TensorFlow's ExponentialMovingAverage). The count stays on the host, so that the host
    does not wait for a GPU as in AveragedModel.update_parameters.
    """
    steps = int(averaged.n_averaged)
    keep = min(decay, (1 + steps) / (10 + steps)) if steps else 0.0
    targets: list[Tensor] = []
    values: list[Tensor] = []
    memory: set[int] = set()  # where targets lie
    aside: list[tuple[Tensor, Tensor]] = []  # a view of memory that is a target already, and its own copy to compute in
    buffers = list(model.buffers())
    if len(buffers) != len(list(averaged.module.buffers())):
        adopt_buffers(averaged.module, model)
    averages = itertools.chain(averaged.module.parameters(), averaged.module.buffers())
    for average, value in zip(averages, itertools.chain(model.parameters(), buffers), strict=True):
        if keep and (average.is_floating_point() or average.is_complex()):
            target = average
            if average.layout == torch.strided:
                place = average.untyped_storage().data_ptr()
                if place in memory:  # in place, what they share would be updated twice
                    target = average.clone()
                    aside.append((average, target))
                memory.add(place)
            targets.append(target)
            values.append(value)
        else:  # such as BatchNorm's counters
            average.copy_(value)
    if targets:
        torch._foreach_mul_(targets, keep)  # not lerp: an attention mask's -inf stays what it is
        torch._foreach_add_(targets, values, alpha=1 - keep)
    for average, updated in aside:
        average.copy_(updated)
    averaged.n_averaged += 1


class LearningRate:
    """The learning rate of each step, a function of the step alone."""

    def __init__(self, config: Config, total_steps: int) -> None:
        """Raises UsageError for a schedule that does not fit into so many steps."""
        check_schedule(config.schedule, total_steps)
        self.total_steps, self.peak, self.schedule = total_steps, config.optim.lr, config.schedule

    def __call__(self, step: int) -> float:
        return lr_at(step, self.total_steps, self.peak, self.schedule)


def lr_at(step: int, total_steps: int, peak: float, schedule: Schedule) -> float:
    """The learning rate of `step` (0 ≤ step < total_steps).

    Each schedule but one_cycle rises linearly over warmup_steps, and takes its course over the rest of the steps.
    Cosine: Loshchilov and Hutter 2017; one_cycle: Smith and Topin 2018, with PyTorch's factors (it rises from
    peak / 25, and falls to peak / 250000).
    """
    warmup = schedule.warmup_steps
    if schedule.name == "one_cycle":
        rise = warmup or max(1.0, 0.3 * total_steps - 1)
        if step < rise:
            return _cosine(peak / 25, peak, step / rise)
        return _cosine(peak, peak / 25e4, (step - rise) / max(1, total_steps - 1 - rise))
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, total_steps - warmup)
    final = peak * schedule.final_ratio
    match schedule.name:
        case "linear":
            return peak + (final - peak) * progress
        case "cosine":
            return _cosine(peak, final, progress)
        case "multi_step":
            return peak * schedule.gamma ** sum(step >= milestone for milestone in schedule.milestones)
        case "warmup_stable_decay":
            decay = schedule.decay_steps or min(total_steps - warmup, max(1, round(0.2 * total_steps)))
            return peak + (final - peak) * max(0.0, 1 - (total_steps - step) / decay)
        case _:
            return peak


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Give all parameter groups this learning rate."""
    for group in optimizer.param_groups:
        group["lr"] = lr


def check_schedule(schedule: Schedule, total_steps: int) -> None:
    """Raises UsageError for a schedule that does not fit into the run."""
    for key, steps in (("warmup_steps", schedule.warmup_steps), ("decay_steps", schedule.decay_steps or 0)):
        if steps >= total_steps:
            raise UsageError(
                f"schedule.{key} = {steps} does not fit into a run of {total_steps} steps: lower it, or train longer."
            )
    if schedule.warmup_steps + (schedule.decay_steps or 0) > total_steps:
        raise UsageError(
            f"schedule.warmup_steps = {schedule.warmup_steps} and schedule.decay_steps = {schedule.decay_steps} do not "
            f"fit into a run of {total_steps} steps together."
        )


def _cosine(start: float, stop: float, progress: float) -> float:
    return stop + (start - stop) * (1 + math.cos(math.pi * min(1.0, progress))) / 2
