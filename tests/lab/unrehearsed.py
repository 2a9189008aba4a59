"""The loop of distloop, with trial passes in the place of the rehearsal: DDP adds gradients up in the same order."""

from __future__ import annotations

import unittest.mock
from typing import Any

import distloop.train as loop
from distloop.config import Config
from distloop.ranks import Ranks
from distloop.training import trial_batches
from distloop.training.putting_back import put_back


def train(config: Config, ranks: Ranks) -> None:
    with unittest.mock.patch.object(loop, "rehearse", passes_alone):
        loop.train(config, ranks)


def passes_alone(accelerator: Any, model: Any, task: Any, batches: Any, validate: Any, parts: Any, run: Any) -> None:
    with put_back(parts["model"], task):
        for batch in trial_batches(run.config, run.source, run.plan, accelerator.device):
            accelerator.backward(task.loss(task.forward(model, batch), batch)[0])
