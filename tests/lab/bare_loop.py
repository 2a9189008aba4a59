"""The loop as a copy from before DDP's model was given to FiniteCheck and divide_by_weight: it gives the bare one."""

from __future__ import annotations

from typing import Any

import distloop.train
from distloop.training import FiniteCheck


def train(config: Any, ranks: Any) -> None:
    def bare(policy: Any, model: Any, *more: Any) -> FiniteCheck:
        return FiniteCheck(policy, getattr(model, "module", model), *more)

    vars(distloop.train)["FiniteCheck"] = bare  # in a process of its own
    distloop.train.train(config, ranks)
