"""The lines at the start of an attempt (what it trains) and at its end (the results)."""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from distloop import __version__
from distloop.config.settings import Config
from distloop.data.order import Plan
from distloop.run.accounts import attempts, goodput, totals
from distloop.run.checkpoint import AVERAGED, MODEL, published_in, step_of
from distloop.run.files import CHECKPOINTS, METRICS, Start
from distloop.run.metrics import is_metric, samples_in
from distloop.tracking.wording import duration, number
from distloop.training.bf16 import advice_on_bf16
from distloop.training.compiling import in_words as speed_in_words
from distloop.training.optimizers import in_words as optimizer_in_words
from distloop.training.recomputing import in_words as recomputing_in_words


def describe(
    config: Config,
    start: Start,
    plan: Plan,
    model: nn.Module,
    device: torch.device,
    name: str,
    optimizer: torch.optim.Optimizer | None = None,
) -> list[str]:
    """The lines at the start of an attempt. `name`: the model's."""
    step, total_steps = start.step, plan.total_steps
    parameters = sum(parameter.numel() for parameter in model.parameters())
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    of_them = "" if trained == parameters else f", {trained:,} of them trained,"
    by = "" if optimizer is None else f" · {optimizer_in_words(optimizer)}"
    processes = f"{plan.world_size} process{'es' if plan.world_size > 1 else ''}"
    dropped = plan.samples - min(plan.samples, plan.steps_per_epoch * plan.global_batch_size)
    lines = [
        f"distloop {__version__} · {start.path} · attempt {start.attempt} · {processes} on {device.type}",
        f"{name} with {parameters:,} parameters{of_them} on {config.data.name}, {plan.samples:,} training samples{by}",
        f"global batch {plan.global_batch_size} = {processes} × {plan.accumulation} micro-batch"
        f"{'es' if plan.accumulation > 1 else ''} × {plan.micro_batch_size} samples · "
        f"{plan.steps_per_epoch} step{'s' if plan.steps_per_epoch > 1 else ''} an epoch"
        f"{f', {dropped} samples of it dropped' if dropped else ''} · {total_steps} steps in all",
        " · ".join(_settings_of_speed(config, model, plan.world_size)),
    ]
    lines += advice_on_bf16(config, model, device, step)
    if start.checkpoint:
        epoch, first, _ = plan.span(step) if step < total_steps else (total_steps // plan.steps_per_epoch, 0, 0)
        where = f"epoch {epoch + 1}" + (f", after {first:,} of its samples" if first else "")
        lines.append(f"continuing after step {step} of {total_steps} ({where}), from {start.checkpoint}")
    return lines


def _settings_of_speed(config: Config, model: nn.Module, world_size: int) -> list[str]:
    """What the config has switched on, and what not, of the settings that make steps faster or smaller."""
    texts = [config.dtype if config.precision == "no" else f"{config.dtype}, forward pass in {config.precision}"]
    texts += [*speed_in_words(config.model.channels_last, config.compile, model), recomputing_in_words(model)]
    if world_size > 1:
        switch = "on" if config.ddp.gradient_as_bucket_view else "off"
        texts.append(f"gradient_as_bucket_view {switch} (buckets of {config.ddp.bucket_cap_mb} MiB)")
    return texts


def ending(
    path: Path,
    step: int,
    total_steps: int,
    finished: bool,
    why: str | None,
    best: dict[str, Any] | None,
    last: dict[str, Any],
    longer: str = "--train.epochs N",
) -> list[str]:
    """The lines at the end of an attempt. `why` it ends before total_steps; `best`, `last`: validation rows; `longer`:
    the setting with which a finished run goes on."""
    if not finished:
        return [f"stopped after step {step} of {total_steps} ({why}), saved in {path}; the same command continues"]

    def values(row: dict[str, Any]) -> str:
        return " · ".join(f"{name} {number(row[name])}" for name in row if is_metric(name))

    lines = [f"finished: {path}"]
    if step < total_steps:
        lines.append(f"  after step {step} of {total_steps}: {why}")
    if last:
        lines.append(f"  last validation: {values(last)}  ({samples_in(last)})")
    if best:
        lines.append(f"  best validation: {values(best)}  (step {best['step']})")
    return [
        *lines,
        *_time(path),
        f"  metrics, one JSON object a line: {path / METRICS}",
        *_weights(path, best),
        f"  --name NAME trains another run, --resume extend {longer} goes on with this one",
    ]


def _time(path: Path) -> list[str]:
    count, seconds = len(attempts(path)), totals(path)
    share = goodput(seconds)
    if share is None:
        return []
    wall = sum(seconds.values())
    others = {name: value / wall for name, value in seconds.items() if name not in ("data", "compute")}
    rest = ", ".join(f"{name.replace('_', '-')} {value:.0%}" for name, value in others.items() if value >= 0.005)
    several = f" in {count} attempts" if count > 1 else ""
    return [f"  time: {duration(wall)}{several}, {share:.0%} of it in steps that counted ({rest})"]


def _weights(path: Path, best: dict[str, Any] | None) -> list[str]:
    """Where the weights of the newest and of the best checkpoint are."""
    published = published_in(path / CHECKPOINTS)
    marks = dict.fromkeys(published[-1:], "")
    marks |= {checkpoint: " (best)" for checkpoint in published if best and step_of(checkpoint) == best["step"]}
    files = {
        checkpoint: next(filter(Path.exists, (checkpoint / AVERAGED, checkpoint / MODEL)), checkpoint)
        for checkpoint in marks
    }
    return [f"  weights{mark}: {files[checkpoint]}" for checkpoint, mark in marks.items()]
