"""The package's loop on the CPU, in ranks that believe to have GPUs: $GPUS names each rank's, or is "none" there."""

from __future__ import annotations

import os

import torch

from distloop.ranks import launch_guards
from distloop.train import train as train

gpu = os.environ["GPUS"].split()[int(os.environ["RANK"])]
launch_guards.gpu_of = lambda number: None if gpu == "none" else gpu
if "NO_GROUP" in os.environ:  # the group, which would fail with NCCL's words on a GPU

    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("Duplicate GPU detected")

    torch.distributed.init_process_group = fail
