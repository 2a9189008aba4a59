"""A task that notes what its launcher, or Slurm, gave to each rank."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from distloop.tasks import Classification

SEEN = ("CUDA_VISIBLE_DEVICES", "SLURMD_NODENAME", "SLURM_CPUS_PER_TASK", "OMP_NUM_THREADS", "WANDB_MODE")


class Noting(Classification):
    """Classification that leaves in NAME-RANK.json, in the working directory, what the rank sees in training."""

    def __init__(self, name: str = "rank") -> None:
        super().__init__()
        self.name = name

    def forward(self, model: nn.Module, batch: Any) -> Tensor:
        if model.training:
            seen: dict[str, Any] = {variable: os.environ.get(variable) for variable in SEEN}
            seen["detects_anomalies"] = torch.is_anomaly_enabled()
            Path(f"{self.name}-{os.environ.get('RANK', 0)}.json").write_text(json.dumps(seen))
        return super().forward(model, batch)
