"""A validation that fails loses nothing: rank 0 saves its step, marked as one that is not validated yet."""

import contextlib
import dataclasses
from collections.abc import Iterator

import torch
from torch import nn

from distloop.config.secrets import clean_message
from distloop.run.attempt import Attempt
from distloop.run.checkpoint import LoopState
from distloop.run.parts import Parts, existing
from distloop.run.saving import reason_of

TO_NOTICE_SECONDS = 20.0  # rank 0 notices between two batches, or as its wait for a rank that is gone ends


@contextlib.contextmanager
def saved_if_it_fails(run: Attempt, parts: Parts, state: LoopState) -> Iterator[None]:
    """Where the block fails, on any rank, rank 0 begins to save the parts and the loop's state before the error goes
    on: no collective is possible then, and a checkpoint holds rank 0's state. run closes once it is written."""
    watch = run.ranks.watch
    if run.ranks.is_main:
        watch.grace_seconds = TO_NOTICE_SECONDS
    try:
        yield
    except BaseException as error:
        verdict = run.ranks.roll_call.verdict
        interrupted = isinstance(error, KeyboardInterrupt) or (verdict is not None and verdict.code == 130)
        if run.ranks.is_main and not interrupted:
            _save(run, parts, state)
        raise
    watch.grace_seconds = 0.0


def _save(run: Attempt, parts: Parts, state: LoopState) -> None:
    watch = run.ranks.watch
    watch.grace_seconds = float(run.config.ddp.timeout_seconds)
    try:
        run.clock.switch("checkpoint")
        if not _are_finite(parts):
            watch.say(f"step {state.step} is not saved: the parameters are not finite after it")
            return
        run.save(parts, dataclasses.replace(state, unvalidated=True))
    except Exception as error:  # such as one of a GPU that has failed: the first error is the one to tell
        watch.say(f"WARNING: step {state.step} could not be saved: {clean_message(reason_of(error))}")


def _are_finite(parts: Parts) -> bool:
    parameters = [p for _, part in existing(parts) if isinstance(part, nn.Module) for p in part.parameters()]
    return bool(torch.nn.utils.get_total_norm(parameters, float("inf")).isfinite())
