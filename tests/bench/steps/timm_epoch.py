"""timm's train_one_epoch(), which stands in train.py of its repository: $TIMM_TRAIN is the path of that file, of the
version that is installed. It reads the loss on each micro-batch; no norm."""

from __future__ import annotations

import importlib.util
import os
import types
from typing import Any

import torch
from torch import nn

from tests.bench.steps.job import Job, run, sgd, start_group


def train(job: Job) -> None:
    path = os.environ["TIMM_TRAIN"]
    spec = importlib.util.spec_from_file_location("timm_train", path)
    assert spec is not None, path
    assert spec.loader is not None, path
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    from timm.task import ClassificationTask

    start_group(job)
    device = torch.device("cpu")
    model = job.build()
    task = ClassificationTask(model, nn.CrossEntropyLoss(), device=device, verbose=False)
    if job.processes > 1:
        task.prepare_distributed()
    settings: dict[str, Any] = {"mixup_off_epoch": 0, "prefetcher": False, "grad_accum_steps": job.accumulation}
    settings |= {"channels_last": False, "clip_grad": None, "clip_mode": "norm", "synchronize_step": False}
    settings |= {"log_interval": 10**7, "save_images": False, "recovery_interval": 0, "sched_on_updates": False}
    settings |= {"distributed": job.processes > 1, "world_size": job.processes, "rank": job.rank}
    arguments = types.SimpleNamespace(**settings)
    module.train_one_epoch(0, model, job.loader(), sgd(model), arguments, task=task, device=device)


if __name__ == "__main__":
    run(train)
