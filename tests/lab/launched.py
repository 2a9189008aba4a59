"""A task that notes what its launcher gave it, and one of a user with a mistake in it."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from distloop.training.tasks import Classification


class Noting(Classification):
    """Classification that leaves a file rank-N with what the rank was given in the working directory."""

    def forward(self, model: nn.Module, batch: Any) -> Tensor:
        if model.training:
            seen = {"threads": os.environ["OMP_NUM_THREADS"], "detects_anomalies": torch.is_anomaly_enabled()}
            Path(f"rank-{os.environ.get('RANK', 0)}").write_text(json.dumps(seen))
        return super().forward(model, batch)
