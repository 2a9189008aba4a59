"""The package's loop with fp16's gradient scaler on the CPU, where a user's config is refused."""

from __future__ import annotations

import dataclasses
import os

import torch
from accelerate import Accelerator

from distloop import train as loop
from distloop.config.settings import Config
from distloop.ranks import Ranks, build_accelerator


def with_scaler(config: Config, ranks: Ranks) -> Accelerator:
    """What build_accelerator() gives for a GPU. $SCALE: of the loss, at first; it doubles after each four steps."""
    accelerator = build_accelerator(dataclasses.replace(config, precision="no"), ranks)
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=float(os.environ["SCALE"]), growth_interval=4)
    accelerator.native_amp = True
    accelerator.state._mixed_precision = "fp16"
    return accelerator


loop.build_accelerator = with_scaler  # type: ignore[attr-defined]
train = loop.train
