"""Tasks and data as users have them, that tell a test what a rank on the cluster sees, or come to grief there."""

from __future__ import annotations

import ctypes
import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from distloop.training.tasks import Classification, Regression

SEEN = ("CUDA_VISIBLE_DEVICES", "SLURMD_NODENAME", "SLURM_CPUS_PER_TASK", "OMP_NUM_THREADS", "WANDB_MODE")


class Noting(Classification):
    """Classification that notes the rank's environment in NAME-RANK.json in the working directory."""

    def __init__(self, name: str) -> None:
        super().__init__()
        seen = {variable: os.environ.get(variable) for variable in SEEN}
        Path(f"{name}-{os.environ.get('RANK', 0)}.json").write_text(json.dumps(seen))


def stored(root: str) -> tuple[TensorDataset, TensorDataset]:
    """The points in points.pt in the folder `root`, whose name is left in the working directory."""
    inputs, targets = torch.load(Path(root) / "points.pt")
    Path(f"root-{os.environ['SLURM_JOB_ID']}").write_text(root)
    return TensorDataset(inputs, targets), TensorDataset(inputs, targets)


class Failing(Regression):
    """Regression that ends badly on rank 1, in step 5 or so. The file `failing` is written right before."""

    def __init__(self, how: str) -> None:
        self.how = how
        self.calls = 0

    def forward(self, model: nn.Module, batch: Any) -> Tensor:
        self.calls += model.training
        if self.calls == 7 and os.environ.get("RANK") == "1":
            time.sleep(1)  # rank 0 is told four times a second where this one is
            Path("failing").touch()
            fail(self.how)
        return super().forward(model, batch)


def fail(how: str) -> None:
    if how == "raises":
        raise ValueError("the fifth step is too much")
    if how == "is killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "exits with 0":
        os._exit(0)
    if how == "crashes":
        ctypes.string_at(0)
    if how == "is suspended":
        os.kill(os.getpid(), signal.SIGSTOP)
    time.sleep(1)  # a signal is on its way
