"""Validate a run's weights again, or on other data: the run's own numbers, on any number of processes.

    distloop evaluate runs/digits
    distloop evaluate runs/digits/checkpoints/step_00000242 --data.root /other/data --device cpu
    accelerate launch --multi_gpu --num_processes 2 … distloop/evaluate.py runs/digits

A run's newest good checkpoint, or the one that is named. Settings come from the run's config.yaml and, over it, from
the command line, as in training.
"""

import dataclasses
import json
import os
import sys
from pathlib import Path
from typing import Any

from distloop.ranks import environment, stopping, talking

environment.adopt_slurm(os.environ)
environment.share_cpus(os.environ)  # before torch reads the thread count

import torch
from accelerate.utils import send_to_device

from distloop.config.load import load_config
from distloop.config.settings import Config
from distloop.data.datasets import load_data
from distloop.data.loader import example_batch, make_loader, offers_to_model
from distloop.data.order import FixedBatchSampler
from distloop.errors import UsageError
from distloop.ranks.accelerator import build_accelerator
from distloop.ranks.roll_call import RollCall
from distloop.run.checkpoint import AVERAGED, MODEL, DamagedCheckpoint, load_weights, newest_good, step_of, verify
from distloop.run.files import CHECKPOINTS, CONFIG
from distloop.tracking.wording import number
from distloop.training.models import build_model
from distloop.training.tasks import build_task, try_out
from distloop.training.validation import validate

USAGE = "usage: distloop evaluate RUN_OR_CHECKPOINT [--json] [--data.root DIR] [any setting of the run] …"


def evaluate(path: Path, config: Config, roll_call: RollCall) -> dict[str, Any]:
    """The task's summary over the validation data, with `samples` and the checkpoint's `step`. Collective.

    Averaged weights are taken where the run validated them.
    """
    roll_call.position.enter("meeting the other ranks")
    accelerator, _ = build_accelerator(config, roll_call)
    roll_call.position.enter("loading data and weights")
    device, dtype = accelerator.device, getattr(torch, config.dtype)
    torch.set_float32_matmul_precision(config.matmul_precision)
    checkpoint = talking.from_main(lambda: checkpoint_of(path))
    source = load_data(config.data)
    task = build_task(config.task)
    example = send_to_device(example_batch(source, config.data, config.seed, dtype), device)
    bare_model = build_model(config.model, offers_to_model(example, source)).to(device, dtype)
    try_out(task, bare_model, example, source)
    averaged = config.optim.ema_decay is not None and (checkpoint / AVERAGED).exists()
    load_weights(checkpoint / (AVERAGED if averaged else MODEL), bare_model)
    if config.compile:
        bare_model.compile()
    model = accelerator.prepare_model(bare_model, evaluation_mode=True)  # for the autocast of mixed precision

    rank, world_size = accelerator.process_index, accelerator.num_processes
    sampler = FixedBatchSampler(len(source.validation), config.validate.batch_size, rank, world_size)
    loader = make_loader(config.data, source, task, config.seed, device, dtype, source.validation, sampler)
    metrics = validate(model, task, loader, sampler, roll_call.position)
    accelerator.end_training()
    return {"step": step_of(checkpoint), **metrics}


def checkpoint_of(path: Path) -> Path:
    """The verified checkpoint that is meant: this one, or the newest good one of a run. Raises UsageError."""
    if (path / MODEL).exists():
        try:
            verify(path)
        except DamagedCheckpoint as damage:
            raise UsageError(f"{path}: {damage}") from None
        return path
    newest, passed_over = newest_good(path / CHECKPOINTS)
    if newest is None:
        raise UsageError("".join([f"{path} holds no checkpoint.", *(f"\n  {line}" for line in passed_over)]))
    return newest


def config_of(path: Path, arguments: list[str], quiet: bool) -> Config:
    """The config of the run to which `path` belongs, with what the command line changes. Raises UsageError."""
    files = [folder / CONFIG for folder in (path, *path.absolute().parents[:2]) if (folder / CONFIG).exists()]
    if not path.is_dir():
        raise UsageError(f"{path} is no folder: name a run's, or that of one of its checkpoints.")
    if not files and "--config" not in arguments:
        raise UsageError(f"{path} lies in no run's folder, where its {CONFIG} would be: give it with --config FILE.")
    config = load_config(arguments if "--config" in arguments else ["--config", str(files[0]), *arguments], quiet)
    # Weights come from the checkpoint.
    return dataclasses.replace(config, model=dataclasses.replace(config.model, pretrained=False))


def main(arguments: list[str] | None = None) -> int:
    """Evaluate as the command line says; returns the exit code: 0 in order, 1 failed, 2 wrong usage."""
    arguments = sys.argv[1:] if arguments is None else arguments
    speaks = talking.speaks(os.environ)
    if not arguments or arguments[0].startswith("-"):
        wants_help = arguments[:1] in (["--help"], ["-h"])
        if speaks:
            print(__doc__ if wants_help else USAGE, file=sys.stdout if wants_help else sys.stderr)
        talking.let_others_speak()
        return 0 if wants_help else 2
    roll_call = RollCall(stopping.WatchWithoutSaving())
    path, rest = Path(arguments[0]), [argument for argument in arguments[1:] if argument != "--json"]
    try:
        config = config_of(path, rest, not speaks)
        metrics = evaluate(path, config, roll_call)
    except BaseException as error:
        if isinstance(error, SystemExit) and not roll_call.position.marks:  # a mistake on the command line
            talking.let_others_speak()
            return int(error.code or 0)
        return roll_call.judge(error).code
    finally:
        roll_call.close()
    if int(os.environ.get("RANK", 0)) == 0:
        if "--json" in arguments:
            print(json.dumps(metrics))
        else:
            shown = " · ".join(f"{name} {number(metrics[name])}" for name in metrics if name not in ("step", "samples"))
            print(f"{path} · step {metrics['step']} · {shown}  ({metrics['samples']} samples)")
    return 0
