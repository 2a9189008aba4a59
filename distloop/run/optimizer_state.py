"""The state of an optimizer in a checkpoint: whose it is, and what does not fit."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from distloop.errors import UsageError
from distloop.run.checkpoint import read_plain


def groups_of(optimizer: Optimizer, names: Mapping[int, str]) -> list[list[str]]:
    """The names of the parameters in each of the optimizer's groups."""
    return [[names[id(parameter)] for parameter in group["params"]] for group in optimizer.param_groups]


def kind_of(optimizer: Optimizer) -> str:
    """The optimizer's class, also inside Accelerate's wrapper; the classes of several, as one."""
    inner = getattr(optimizer, "optimizer", optimizer)
    return " and ".join(type(one).__name__ for one in getattr(inner, "optimizers", [inner]))


def kept_in_groups(optimizer: Optimizer) -> list[list[str]]:
    """Of each group, the settings that are not the optimizer's defaults. An optimizer may keep state there, such as the
    rate that Prodigy has found (Mishchenko and Defazio 2023)."""
    pairs = zip(optimizer.param_groups, _defaults(optimizer), strict=True)
    return [
        [name for name, value in defaults.items() if name in group and not _equal(group[name], value)]
        for group, defaults in pairs
    ]


def _defaults(optimizer: Optimizer) -> list[dict[str, Any]]:
    """For each group, the defaults of its optimizer, without those that the run sets by itself."""
    inner = getattr(optimizer, "optimizer", optimizer)
    return [
        {name: value for name, value in one.defaults.items() if name not in ("lr", "weight_decay")}
        for one in getattr(inner, "optimizers", [inner])
        for _ in one.param_groups
    ]


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) or isinstance(other, Tensor):
        return isinstance(one, Tensor) and isinstance(other, Tensor) and torch.equal(one, other)
    return bool(one == other)


def _groups_in_words(groups: list[dict[str, Any]]) -> str:
    """Such as "'^head' (2 parameters), default (4 parameters)"."""
    texts = []
    for group in groups:
        name, count = repr(group["name"]) if "name" in group else "default", len(group["params"])
        texts.append(f"{name} ({count} parameter{'' if count == 1 else 's'})")
    return ", ".join(texts)


def load_optimizer(path: Path, optimizer: Optimizer, names: Mapping[int, str]) -> None:
    """Copy the moments in `path` into the optimizer. Its hyperparameters stay those of the config. Raises UsageError
    for a file of another optimizer, or of other parameters or groups."""
    stored = read_plain(path)
    groups = optimizer.state_dict()["param_groups"]
    there, here = stored.get("parameters"), groups_of(optimizer, names)
    if (kind := stored.get("kind", kind_of(optimizer))) != kind_of(optimizer):
        raise UsageError(f"{path} belongs to another optimizer: {kind} there, {kind_of(optimizer)} here.")
    sizes = [len(group["params"]) for group in stored["param_groups"]]
    if there is not None and (changed := sorted({n for g in there for n in g} ^ {n for g in here for n in g})):
        more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
        raise UsageError(f"{path} belongs to other parameters: {', '.join(changed[:3])}{more} only there or only here.")
    if there is None and sum(sizes) != sum(map(len, here)):
        raise UsageError(f"{path} belongs to other parameters than this model's.")
    if sizes != [len(group) for group in here] or there not in (None, here):
        raise UsageError(
            f"{path} belongs to other groups of parameters (optim.groups, optim.layer_decay): "
            f"{_groups_in_words(stored['param_groups'])} there; {_groups_in_words(groups)} here, or in another order."
        )
    kept_there = stored.get("kept_in_groups", [[] for _ in groups])
    pairs = zip(groups, stored["param_groups"], kept_there, kept_in_groups(optimizer), strict=True)
    for group, old, kept, fresh in pairs:  # what this config gives, as `fresh`, stays
        group |= {name: old[name] for name in kept if name in group and name not in fresh}
    optimizer.load_state_dict({"state": stored["state"], "param_groups": groups})
    _keep_form(optimizer, stored["state"])


def _keep_form(optimizer: Optimizer, stored: Mapping[Any, Any]) -> None:
    """Give the loaded state the number formats of before, where load_state_dict() has taken those of the parameters,
    and their memory formats, such as channels_last, which fused optimizers need."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for place, values in stored.items():
        if not isinstance(place, int) or not isinstance(values, Mapping):
            continue  # what an optimizer of the user's notes for all parameters together
        parameter, loaded = parameters[place], optimizer.state[parameters[place]]
        for name, before in values.items():
            if not isinstance(before, Tensor) or not isinstance(value := loaded.get(name), Tensor):
                continue
            if value.dtype != before.dtype:
                loaded[name] = value = before.to(value.device, copy=True)
            if value.shape == parameter.shape and value.stride() != parameter.stride():
                loaded[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)
