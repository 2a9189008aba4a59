"""distloop: its own train(), as a command line starts it."""

from __future__ import annotations

import os
import tempfile
from typing import Any

from tests.bench.steps.job import LEARNING_RATE, MOMENTUM, SEED, WEIGHT_DECAY, Job, run


def train(job: Job) -> None:
    import distloop.train
    from distloop.data import datasets
    from distloop.ranks.start import main
    from distloop.training import models
    from distloop.training.rehearsal import rehearse

    built: list[Any] = []

    def build(**offers: Any) -> Any:
        built.append(job.build())
        built[0].counts = False
        return built[0]

    def rehearse_uncounted(*arguments: Any) -> None:
        rehearse(*arguments)
        built[0].counts = True

    models.MODELS["cnn"] = build  # a built-in model and data: what distloop does for a user's own is not in the others
    datasets.DATASETS["digits"] = job.data
    distloop.train.rehearse = rehearse_uncounted  # type: ignore[attr-defined, assignment]
    settings = {
        "--model": "cnn",
        "--data": "digits",
        "--optim": "sgd",
        "--optim.lr": LEARNING_RATE,
        "--optim.momentum": MOMENTUM,
        "--optim.weight-decay": WEIGHT_DECAY,
        "--schedule": "constant",
        "--seed": SEED,
        "--batch.global-size": job.global_batch,
        "--batch.micro-size": job.batch // job.accumulation,
        "--train.steps": 10**6,
        "--log.every-steps": 10**7,
        "--validate.every-steps": 10**7,
        "--checkpoint.every-steps": 10**7,
        "--runs-dir": os.environ.get("BENCH_FOLDER") or tempfile.mkdtemp(),
    }
    words = [str(word) for setting in settings.items() for word in setting]
    main(distloop.train.train, [*words, "--tracking.no-report"])


if __name__ == "__main__":
    run(train)
