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
    optimizer.load_state_dict({"state": stored["state"], "param_groups": groups})
    for parameter, values in optimizer.state.items():
        for name, value in values.items():
            # Fused optimizers need moments with their parameter's memory format, such as channels_last.
            if isinstance(value, Tensor) and value.shape == parameter.shape and value.stride() != parameter.stride():
                values[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)
