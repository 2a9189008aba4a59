"""The parts of a checkpoint: the modules, optimizers and other objects that a loop saves and loads, by name.

A module's weights go to NAME.safetensors, also an average's, whose count of steps goes to state.json; the state of a
GradScaler goes there, too. What a module's get_extra_state() gives goes to NAME.extra.pt. That of an optimizer, and of
any other object with state_dict(), goes to NAME.pt.
"""

import dataclasses
import io
import pickle
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.optim.swa_utils import AveragedModel

from distloop.config.settings import Config
from distloop.data.bad_samples import BadSamples
from distloop.errors import UsageError
from distloop.run.best import EarlyEnd
from distloop.run.checkpoint import (
    EXTRA,
    STATE,
    LoopState,
    Weights,
    load_weights,
    read_manifest,
    read_plain,
    weights_of,
)
from distloop.run.files import Start, read_json
from distloop.run.initial_weights import load_initial_weights
from distloop.run.module_state import check_tensors, make_whole, tensors_and_extra
from distloop.run.optimizer_state import groups_of, kept_in_groups, kind_of, load_optimizer

Parts = Mapping[str, Any]
EXTRA_STATE = "get_extra_state()"
TASK = "task"  # the part that is the run's task
TAKEN = {
    *(field.name for field in dataclasses.fields(LoopState)),
    "time",
    "finished",
    "bad_samples",
    "early_stop",
}  # of state.json


def check_parts(parts: Parts) -> list[str]:
    """Refuse, before the first step, what could not be loaded again. Raises UsageError. Returns lines on what may be a
    mistake."""
    held = names_of_parameters(parts)
    for name, part in existing(parts):
        if not re.fullmatch(r"[a-z][a-z0-9_]*", name) or {name, f"{name}_steps"} & TAKEN:
            raise UsageError(
                f"parts: {name!r} cannot be a name: use small letters, digits and _, and no key of {STATE}."
            )
        if isinstance(part, LRScheduler):
            raise UsageError(
                f"parts: {name} is a learning-rate scheduler of PyTorch, whose rate would not come back: compute the "
                "rate from the step, as learning_rate(step) does."
            )
        if isinstance(part, Optimizer):
            if any(id(parameter) not in held for group in part.param_groups for parameter in group["params"]):
                raise UsageError(
                    f"parts: {name} updates parameters of a module that is not among the parts "
                    f"({', '.join(parts)}): they would not be saved. Add the module."
                )
        elif not hasattr(part, "state_dict") or not hasattr(part, "load_state_dict"):
            raise UsageError(
                f"parts: {name} is a {type(part).__name__}, which has no state_dict() and load_state_dict()."
            )
        elif isinstance(part, nn.Module):
            module = without_average(part)
            check_tensors(f"parts: {name}.", module)
            check_plain(name, tensors_and_extra(module)[1], EXTRA_STATE)
        elif not isinstance(part, torch.amp.GradScaler):
            check_plain(name, part.state_dict())
    return _left_out(parts, held)


def check_plain(name: str, state: Any, method: str = "state_dict()") -> None:
    """Refuse an object's state, which `method` gave, that could be saved and not be read again. Raises UsageError."""
    file = io.BytesIO()
    try:
        torch.save(state, file)
        torch.load(io.BytesIO(file.getvalue()), map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, pickle.PicklingError, AttributeError, TypeError) as error:
        raise UsageError(
            f"parts: {name}.{method} is not plain data (numbers, text, lists, dicts, tensors), so that it "
            f"could not be read again{_what_is_not_plain(error)}."
        ) from None


def _what_is_not_plain(error: Exception) -> str:
    """What torch's error says of the value; "" if it names none."""
    found = re.search(r"GLOBAL ([\w.]+)|(Can't pickle .+)", str(error))
    return f": it holds {found[1]}" if found and found[1] else f": {found[2]}" if found else ""


def _left_out(parts: Parts, names: Mapping[int, str]) -> list[str]:
    """A line for each module of which optimizers update some parameters that require a gradient, and not all. (Of a
    frozen teacher and an average they update none.)"""
    optimizers = [part for _, part in existing(parts) if isinstance(part, Optimizer)]
    updated = {id(p) for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}
    lines = []
    for _, part in existing(parts):
        if isinstance(part, nn.Module):
            trained = [parameter for parameter in part.parameters() if parameter.requires_grad]
            left_out = [names[id(parameter)] for parameter in trained if id(parameter) not in updated]
            if left_out and len(left_out) < len(trained):
                more = f" and {len(left_out) - 3} more" if len(left_out) > 3 else ""
                which = ", ".join(left_out[:3]) + more
                lines.append(f"distloop: WARNING: no optimizer updates {which}, although they require a gradient")
    return lines


def existing(parts: Parts) -> Iterator[tuple[str, Any]]:
    """The parts that are not None; of a module inside DDP, the module."""
    for name, part in parts.items():
        if part is not None:
            yield name, part.module if isinstance(part, DistributedDataParallel) else part


def names_of_parameters(parts: Parts) -> dict[int, str]:
    """The name of each parameter of the modules among the parts, such as "model.0.weight", by its id."""
    modules = [(name, part) for name, part in existing(parts) if isinstance(part, nn.Module)]
    return {id(p): f"{part}.{name}" for part, module in reversed(modules) for name, p in module.named_parameters()}


def without_average(module: nn.Module) -> nn.Module:
    """The module with the averaged weights, of an average; else the module itself."""
    return module.module if isinstance(module, AveragedModel) else module


def contents_of(parts: Parts, buffers: Any) -> tuple[dict[str, Weights], dict[str, Any], dict[str, Any]]:
    """Copies of all parts: the weights of modules; the state of optimizers and others; what belongs to state.json."""
    weights: dict[str, Weights] = {}
    others: dict[str, Any] = {}
    state: dict[str, Any] = {"scaler": None, "averaged_steps": 0}
    names = names_of_parameters(parts)
    for name, part in existing(parts):
        if isinstance(part, nn.Module):
            weights[name] = weights_of(without_average(part), buffers.copy, f"{name}/")
            if extra := tensors_and_extra(without_average(part))[1]:
                check_plain(name, extra, EXTRA_STATE)  # at each save, as below
                others[f"{name}{EXTRA.removesuffix('.pt')}"] = buffers.copy_tree((name, EXTRA), extra)
            if isinstance(part, AveragedModel):
                state[f"{name}_steps"] = int(part.n_averaged)
        elif isinstance(part, torch.amp.GradScaler):
            state[name] = part.state_dict()
        else:
            others[name] = buffers.copy_tree(name, part.state_dict())
            if isinstance(part, Optimizer):
                others[name] |= {"kind": kind_of(part), "parameters": groups_of(part, names)}
                others[name] |= {"kept_in_groups": kept_in_groups(part)}
            else:
                check_plain(name, others[name])  # at each save: a number may have become NumPy's
    return weights, others, state


def load_start(
    start: Start,
    parts: Parts,
    bad_samples: BadSamples | None = None,
    early_end: EarlyEnd | None = None,
    config: Config | None = None,
) -> LoopState:
    """Load the checkpoint or the weights from which an attempt starts, which samples were left out, and whether the
    loop had finished early, if the process was killed before status.json said so. Returns the loop's state. The start's
    messages get lines on weights that do not fit, with init_fit."""
    config = config or Config()
    if start.checkpoint:
        stored = read_json(start.checkpoint / STATE)
        start.messages.extend(load_parts(start.checkpoint, parts, stored))
        if bad_samples is not None:
            bad_samples.load(stored)
        if early_end is not None:
            trained_with = read_manifest(start.checkpoint)["config_sha256"]
            early_end.load(stored, trained_with == start.identity["config_sha256"])
        return LoopState(
            stored["step"],
            tuple(stored["epoch_sums"]),
            stored["best"],
            stored["skipped_steps"],
            stored.get("unvalidated", False),
        )
    if start.weights:
        if (model := dict(existing(parts)).get("model")) is None:
            raise UsageError(f"init_from: this loop has no part named model, but {', '.join(parts)}.")
        make_whole(model)
        start.messages.extend(load_initial_weights(start.weights, model, config.init_fit))
    return LoopState(unvalidated=config.validate.at_start)


def load_parts(path: Path, parts: Parts, state: Mapping[str, Any]) -> list[str]:
    """Copy a verified checkpoint, the directory `path` with the contents `state` of state.json, into the parts, in
    place. Raises UsageError for parts that do not fit. An average that the checkpoint lacks begins anew; so does the
    state of a task without trained parameters, of which the returned lines tell."""
    lines: list[str] = []
    files = {name.split(".")[0] for name in read_manifest(path)["files"] if name != STATE}
    if unknown := sorted(files - set(parts)):
        raise UsageError(
            f"{path} holds {', '.join(unknown)}, which this loop does not load: its parts are "
            f"{', '.join(parts)}. Name it, as None if the loop does without, or use --name OTHER."
        )
    if TASK in files and parts[TASK] is None:
        raise UsageError(
            f"{path} holds the state of a task, and this task has none to continue: its class has other code than when "
            "the run began. Give it the methods state_dict() and load_state_dict() again, or use --name OTHER."
        )
    if TASK in files and isinstance(parts[TASK], nn.Module) != (path / f"{TASK}.safetensors").exists():
        raise UsageError(
            f"{path} holds the state of another task: one of the two is a torch.nn.Module, and the other is not. Use "
            "--name OTHER."
        )
    for name, part in existing(parts):
        if isinstance(part, torch.amp.GradScaler):
            if state.get(name):
                part.load_state_dict(state[name])
        elif name not in files:
            if name == TASK and not (isinstance(part, nn.Module) and any(p.requires_grad for p in part.parameters())):
                lines.append(f"distloop: WARNING: {path} does not hold the task's state, which begins anew")
            elif not isinstance(part, AveragedModel):
                held = ", ".join(sorted(files))
                raise UsageError(f"{path} does not hold {name}, which this loop loads, but {held}. Use --name OTHER.")
        elif isinstance(part, nn.Module):
            make_whole(without_average(part))  # a forward pass may have made others
            load_weights(path / f"{name}.safetensors", without_average(part))
            if isinstance(part, AveragedModel):
                part.n_averaged.fill_(state[f"{name}_steps"])
        elif isinstance(part, Optimizer):
            load_optimizer(path / f"{name}.pt", part, names_of_parameters(parts))
        else:
            part.load_state_dict(read_plain(path / f"{name}.pt"))
    return lines


def load_task(path: Path, part: Any, averaged: bool) -> None:
    """Load the state of a task from the verified checkpoint in `path`, to validate. `part`: the task, or None. Raises
    UsageError if its trained parameters are not there; another state that the checkpoint lacks begins anew."""
    if isinstance(part, nn.Module):
        file = path / f"averaged_{TASK}.safetensors"
        file = file if averaged and file.exists() else path / f"{TASK}.safetensors"
        if file.exists():
            make_whole(part)
            load_weights(file, part)
        elif any(parameter.requires_grad for parameter in part.parameters()):
            raise UsageError(f"{path} holds no {file.name}, the parameters of the task, which the loss needs.")
    elif part is not None and (path / f"{TASK}.pt").exists():
        part.load_state_dict(read_plain(path / f"{TASK}.pt"))
