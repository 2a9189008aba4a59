"""Validate a run's weights again, or on other data, on any number of processes: the run's own numbers come out again.

    distloop evaluate runs/digits
    distloop evaluate runs/digits/checkpoints/step_00000242 --data.root /other/data --device cpu
    accelerate launch --multi_gpu --num_processes 2 … distloop/evaluate.py runs/digits

It takes the newest good checkpoint of a run, or the checkpoint that you name. Settings come from the run's
config.yaml; the command line changes them, as in training.
"""

import contextlib
import dataclasses
import json
import os
import sys
from pathlib import Path
from typing import Any

from distloop.config.load import load_config
from distloop.config.places import absolute
from distloop.config.settings import Config
from distloop.errors import UsageError
from distloop.ranks.environment import prepare_environment
from distloop.ranks.ranks import Ranks
from distloop.ranks.stopping import WatchWithoutSaving
from distloop.ranks.talking import let_others_speak, speaks
from distloop.run.files import CHECKPOINTS, CONFIG
from distloop.run.metrics import is_metric, samples_in
from distloop.tracking.wording import number

USAGE = "usage: distloop evaluate RUN_OR_CHECKPOINT [--json] [--data.root DIR] [any setting of the run] …"


def evaluate(path: Path, config: Config, ranks: Ranks) -> dict[str, Any]:
    """The task's summary over the validation data, with `samples` and the checkpoint's `step`. Collective.

    `path`: of a run or a checkpoint. If the run averages its weights, the averaged ones are validated, as by the run.
    """
    # Imported only now, since torch reads the thread count.
    from distloop.data.datasets import load_data
    from distloop.data.now import now_at, tell
    from distloop.data.order import Plan
    from distloop.ranks.accelerator import build_accelerator
    from distloop.run.checkpoint import AVERAGED, MODEL, load_weights, step_of
    from distloop.run.parts import load_task
    from distloop.training.builtin_tasks import build_task
    from distloop.training.models import build_model
    from distloop.training.validation import validate
    from distloop.training.validation_sets import in_one_row, load_sets

    ranks.position.enter("meeting the other ranks")
    accelerator = build_accelerator(config, ranks)
    ranks.position.enter("loading data and weights")
    checkpoint = ranks.from_main(lambda: checkpoint_of(path))
    source = load_data(config.data, config.seed)
    task = build_task(config.task, config.seed)
    bare_model = build_model(config, source, task, accelerator.device, ranks.position)
    averaged = config.optim.ema_decay is not None and (checkpoint / AVERAGED).exists()
    if not (weights := checkpoint / (AVERAGED if averaged else MODEL)).exists():
        raise UsageError(
            f"{checkpoint} holds no {weights.name}: its loop saves no part named model, which is validated."
        )
    load_weights(weights, bare_model)
    load_task(checkpoint, task.as_part, averaged)
    model = accelerator.prepare_model(bare_model, evaluation_mode=True)  # for the autocast of mixed precision

    with contextlib.suppress(UsageError):  # as in the run; of other data, training samples may be too few for a step
        plan = Plan(len(source.train), config.batch.global_size, remainder=config.batch.remainder)
        plan.total_steps = plan.steps_of(config)
        tell(task, now_at(step_of(checkpoint), plan, training=False))
    found = {
        each.suffix: validate(model, task, each.loader, each.sampler, ranks.position, seed=config.seed, half=each.half)
        for each in load_sets(config, source, task, accelerator.device, ranks.rank, ranks.world_size)
    }
    return {"step": step_of(checkpoint), **in_one_row(found)}


def checkpoint_of(path: Path) -> Path:
    """`path` if it is a checkpoint, else the newest good checkpoint of the run there. Raises UsageError."""
    from distloop.run.checkpoint import STATE, DamagedCheckpoint, newest_good, verify

    if (path / STATE).exists():
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
    """The config of the run to which `path` belongs, as the command line changes it. Raises UsageError."""
    files = [folder / CONFIG for folder in (path, *path.absolute().parents[:2]) if (folder / CONFIG).exists()]
    if not path.is_dir():
        raise UsageError(f"{path} is no folder: name a run's, or that of one of its checkpoints.")
    if not files and "--config" not in arguments:
        raise UsageError(f"{path} lies in no run's folder, where its {CONFIG} would be: give it with --config FILE.")
    arguments = arguments if "--config" in arguments else ["--config", str(files[0]), *arguments]
    config = load_config(arguments, quiet, unused=("name", "runs_dir", "tracking"))
    # Weights come from the checkpoint.
    return dataclasses.replace(config, model=dataclasses.replace(config.model, pretrained=False))


def main(arguments: list[str] | None = None) -> int:
    """Evaluate what the command line names; returns the exit code: 0 done, 1 failed, 2 wrong usage."""
    prepare_environment()
    arguments = sys.argv[1:] if arguments is None else arguments
    if not arguments or arguments[0].startswith("-"):
        wants_help = arguments[:1] in (["--help"], ["-h"])
        if speaks(os.environ):
            print(__doc__ if wants_help else USAGE, file=sys.stdout if wants_help else sys.stderr)
        let_others_speak()
        return 0 if wants_help else 2
    path, settings = absolute(arguments[0]), [argument for argument in arguments[1:] if argument != "--json"]
    ranks = Ranks(WatchWithoutSaving())
    try:
        config = config_of(path, settings, not speaks(os.environ))
    except UsageError as error:
        return ranks.report_failure(error).code
    return ranks.exit_code(lambda: show(path, evaluate(path, config, ranks), "--json" in arguments, ranks))


def show(path: Path, metrics: dict[str, Any], as_json: bool, ranks: Ranks) -> None:
    """Print the metrics, on rank 0."""
    if ranks.is_main and as_json:
        print(json.dumps(metrics))
    elif ranks.is_main:
        texts = [f"{name} {number(metrics[name])}" for name in metrics if is_metric(name)]
        print(f"{path} · step {metrics['step']} · {' · '.join(texts)}  ({samples_in(metrics)})")
