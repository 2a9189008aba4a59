"""The size of micro-batches that batch.micro_size: auto has found: recorded, and what to set where it does not fit."""

from distloop.config.settings import Config
from distloop.data.order import Plan, accumulation_steps
from distloop.errors import UsageError
from distloop.run.directory import record_config
from distloop.run.files import CONFIG, Start


def record_found(start: Start, config: Config) -> None:
    """Write config.yaml with start.micro_size, which was found; rank 0 only. Raises UsageError if that fails."""
    try:
        record_config(start, config)
    except OSError as error:
        raise UsageError(f"{start.path / CONFIG} cannot be written: {error.strerror or error}.") from None


def refuse_unfound(start: Start, plan: Plan) -> None:
    """Raise UsageError if steps are to come, and nobody has found the size of their micro-batches."""
    if not plan.is_divided and start.step < plan.total_steps:
        raise UsageError(
            "batch.micro_size: auto is found by rehearse(…), which this loop does not call. Call it, as train.py "
            "does, or give a number: --batch.micro-size 32"
        )


def advice(config: Config, plan: Plan, phase: str) -> str:
    """What to set once memory has run out in this phase."""
    if "validation" in phase:
        size = config.validate.batch_size
        return f"set --validate.batch-size {max(1, size // 2)}, and the same command goes on; {size} did not fit"
    share, size = plan.global_batch_size // plan.world_size, plan.micro_batch_size
    if size == 1:
        return "a micro-batch is a single sample already: make samples or model smaller, or set --model.checkpointing"
    return (
        f"set --batch.micro-size {share // accumulation_steps(share, size - 1)}, and the same command goes on; {size} "
        "samples at once did not fit. A step trains on the same global batch"
    )
