"""Groups of parameters that an optimizer updates with settings of their own: rate, decay, the step they begin at."""

import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from distloop.config.optim_settings import Group, Optim
from distloop.errors import UsageError, suggest

NORMS = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)
# The blocks of torchvision's models, by class: a parameter's name begins with one. What stands before the first block
# is layer 0, and what follows the last one, such as the head, is the last layer.
BLOCKS = {
    "ResNet": re.compile(r"layer\d+\.\d+\."),
    "ConvNeXt": re.compile(r"features\.(?:[13579]\.\d+|[2468])\."),  # even: what shrinks pictures
    "SwinTransformer": re.compile(r"features\.(?:[13579]\.\d+|[2468])\."),
    "VisionTransformer": re.compile(r"encoder\.layers\.encoder_layer_\d+\."),
}
DEFAULT = Group(match="")


class Member(NamedTuple):
    """A parameter in its group."""

    name: str
    parameter: nn.Parameter
    group: Group
    label: str
    """The pattern of its group; "default" for what matches none."""
    lr_scale: float
    weight_decay: float
    is_vector: bool
    """Of a norm, a bias or another vector: without decay."""


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """The parameters in two groups: those with weight decay; norms, biases and other vectors, which have none."""
    return groups_of_members(list(members(model, Optim(weight_decay=weight_decay))))


def named_parameters(model: nn.Module, task: nn.Module | None = None) -> Iterator[tuple[str, nn.Parameter]]:
    """The model's parameters by name, and those of a task that is a module, as task.NAME."""
    yield from model.named_parameters()
    if task is not None:
        yield from task.named_parameters(prefix="task")


def members(model: nn.Module, config: Optim, task: nn.Module | None = None) -> Iterator[Member]:
    """Each parameter that may be trained, in its group. A tied weight counts once, by its first name. Raises UsageError
    for patterns that match nothing."""
    vectors, layers = _vectors(model), layers_of(model, config.layer_decay)
    if task is not None:
        vectors |= _vectors(task)
    for name, parameter in named_parameters(model, task):
        group, label = group_of(name, config.groups)
        decay = config.weight_decay if group.weight_decay is None else group.weight_decay
        is_vector = parameter in vectors
        scale = group.lr_scale * layers.get(name, 1.0)
        yield Member(name, parameter, group, label, scale, 0.0 if is_vector else decay, is_vector)


def _vectors(model: nn.Module) -> set[nn.Parameter]:
    """The parameters without decay: those of norms, biases and other vectors."""
    first: dict[nn.Parameter, bool] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):  # a tied weight is that of the first module that has it
            first.setdefault(parameter, parameter.ndim < 2 or isinstance(module, NORMS))
    return {parameter for parameter, is_vector in first.items() if is_vector}


def group_of(name: str, groups: Sequence[Group]) -> tuple[Group, str]:
    """The first group whose pattern is found in the parameter's name, and the pattern."""
    for group in groups:
        if re.search(group.match, name):
            return group, group.match
    return DEFAULT, "default"


def check_patterns(model: nn.Module, groups: Sequence[Group], task: nn.Module | None = None) -> None:
    """Raise UsageError for a pattern that is no regular expression, or that is the first to match no parameter."""
    names = [name for name, _ in named_parameters(model, task)]
    for place, group in enumerate(groups):
        key = f"optim.groups[{place}].match = '{group.match}'"
        try:
            matched = [name for name in names if re.search(group.match, name)]
        except re.error as error:
            raise UsageError(f"{key} is no regular expression: {error}.") from None
        if not matched:
            raise UsageError(
                f"{key} matches no parameter of the model.{suggest(group.match, names)} All names: --optim.show "
                "--optim.groups '[]'"
            )
        others = (group.until_step, group.optimizer, group.weight_decay)
        if group.freeze and (group.lr_scale != 1 or any(value is not None for value in others)):
            raise UsageError(
                f"{key} has freeze: true, so that nothing trains its parameters: leave out lr_scale, weight_decay, "
                "until_step and optimizer, or freeze."
            )
        before = [other.match for other in groups[:place] if all(re.search(other.match, name) for name in matched)]
        if before:
            raise UsageError(
                f"{key} matches only parameters that belong to an earlier group ('{before[0]}'): the first match "
                "counts. Put the narrower pattern first."
            )


def layers_of(model: nn.Module, decay: float | None) -> dict[str, float]:
    """The factor of each parameter's rate by layer: decay for each layer that stands between it and the last one.
    (Clark et al. 2020, "ELECTRA"; Bao et al. 2021, "BEiT".) Raises UsageError for a model of unknown blocks."""
    if decay is None:
        return {}
    pattern = BLOCKS.get(type(model).__name__)
    if pattern is None:
        raise UsageError(
            f"optim.layer_decay = {decay:g}: the blocks of {type(model).__name__} are not known, only those of "
            f"torchvision's {', '.join(BLOCKS)}. Give the rates of its parts in optim.groups."
        )
    depths: dict[str, int] = {}
    layers: dict[str, int] = {}  # the block's name -> its place
    for name, _ in model.named_parameters():
        if found := pattern.match(name):
            depths[name] = layers.setdefault(found[0], len(layers) + 1)
        else:
            depths[name] = -1 if layers else 0
    last = len(layers) + 1
    return {name: decay ** (last - (last if depth < 0 else depth)) for name, depth in depths.items()}


def freeze(model: nn.Module, groups: Sequence[Group], task: nn.Module | None = None) -> None:
    """Freeze the parameters of groups with `freeze`: they get no gradient, and ranks exchange none. BatchNorms all of
    whose parameters are frozen keep their statistics, and normalise with them."""
    for name, parameter in named_parameters(model, task):
        if group_of(name, groups)[0].freeze:
            parameter.requires_grad_(False)
    if any(group.freeze for group in groups):
        for module in (model,) if task is None else (model, task):
            _keep_frozen_statistics(module)


def _keep_frozen_statistics(module: nn.Module, above: bool = False) -> None:
    """Let the BatchNorms whose parameters are all frozen keep their statistics; one without parameters, if those of the
    module around it are. `above`: whether these are frozen."""
    parameters = list(module.parameters())
    is_frozen = not any(parameter.requires_grad for parameter in parameters) if parameters else above
    if isinstance(module, nn.modules.batchnorm._NormBase) and is_frozen:
        module.register_forward_pre_hook(_keep_statistics)
    for child in module.children():
        _keep_frozen_statistics(child, is_frozen)


def _keep_statistics(module: nn.Module, _: Any) -> None:
    module.training = False  # model.train() sets it anew


def groups_of_members(found: Sequence[Member]) -> list[dict]:
    """The optimizer's groups: parameters that are trained alike, those with weight decay before those without."""
    groups: dict[tuple, dict] = {}
    for member in found:
        if not member.parameter.requires_grad:
            continue
        key = (member.is_vector, member.label, member.lr_scale, member.weight_decay, member.group.until_step)
        groups.setdefault(key, {"params": [], "weight_decay": member.weight_decay} | _extras(member))
        groups[key]["params"].append(member.parameter)
    return [groups[key] for key in sorted(groups, key=lambda key: key[0])]  # otherwise as they come in the model


def _extras(member: Member) -> dict[str, Any]:
    """What a group holds beside torch's own settings; nothing where it is not asked for."""
    extras: dict[str, Any] = {} if member.label == "default" else {"name": member.label}
    if member.lr_scale != 1:
        extras["lr_scale"] = member.lr_scale
    if member.group.until_step:
        extras["until_step"] = member.group.until_step
    return extras


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Give each parameter group this learning rate, times its own lr_scale."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"] if "lr_scale" in group else lr


def leave_out_frozen(optimizer: torch.optim.Optimizer, step: int) -> None:
    """Before the norm and the update of `step`: remove the gradients of groups that are frozen until a later step, so
    that their moments begin then. Ranks have exchanged them, since DDP knows no steps."""
    for group in frozen_at(optimizer, step):
        for parameter in group["params"]:
            parameter.grad = None


def frozen_at(optimizer: torch.optim.Optimizer, step: int) -> list[dict[str, Any]]:
    """The optimizer's groups that are frozen until a step after `step`, counted from 0."""
    return [group for group in optimizer.param_groups if group.get("until_step", 0) > step]
