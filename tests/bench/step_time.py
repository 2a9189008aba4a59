"""Time of a training step beside a loop written by hand in plain PyTorch, interleaved.

    python -m tests.bench.step_time [--processes 2] [--rounds 5] [--steps 600]

Both train the same tiny CNN on the same digits in batches of 64 per process, one thread per process, without
logging, validation or saving; the data, the augmentation and the optimizer are the same. Prints the median time of
a step over the rounds, for each loop, and their ratio.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings

from tests.tools.ranks import clean_environment, free_port, rank_environment

BATCH, WARM_UP = 64, 100


def ours(steps: int, processes: int) -> list[float]:
    """The times at which distloop's loop begins its forward passes."""
    from distloop.ranks.start import main
    from distloop.tasks import Classification
    from distloop.train import train

    times: list[float] = []
    forward = Classification.forward

    def timed(self, model, batch):
        times.append(time.perf_counter())
        return forward(self, model, batch)

    Classification.forward = timed  # type: ignore[method-assign]
    often = str(10 * steps)
    arguments = ["--model.args.width", "8", "--model.args.norm", "batch", "--optim", "sgd", "--train.steps", str(steps)]
    arguments += ["--batch.global-size", str(BATCH * processes), "--log.every-steps", often]
    arguments += ["--validate.every-steps", often, "--checkpoint.every-steps", often, "--tracking.no-report"]
    main(train, arguments)
    before = 1 if processes == 1 else 3  # a sample's, and DDP's two, before training
    return times[before : before + steps]


def by_hand(steps: int, processes: int) -> list[float]:
    """The same for a loop written by hand, with DDP by hand."""
    import torch
    from torch.nn import functional

    from distloop.data.datasets import digits
    from distloop.training.models import cnn

    data = digits().train
    model: torch.nn.Module = cnn((1, 8, 8), 10, width=8, norm="batch")
    if processes > 1:
        warnings.simplefilter("ignore", FutureWarning)  # of the argument below
        torch.distributed.init_process_group("gloo")
        model = torch.nn.parallel.DistributedDataParallel(model, broadcast_buffers=False)  # as ours
    optimizer = torch.optim.SGD(model.parameters(), lr=3e-3, momentum=0.9, weight_decay=0.05, fused=True)
    rank = int(os.environ.get("RANK", 0))
    times: list[float] = []
    import numpy as np

    generator = np.random.default_rng(rank)
    while len(times) < steps:
        permutation = generator.permutation(len(data))
        for start in range(0, len(data) - BATCH + 1, BATCH):
            indices = permutation[start : start + BATCH]
            images, targets = data.batch(indices, generator.random((BATCH, 3)))
            inputs = (images.float() / 255 - 0.305) / 0.376
            times.append(time.perf_counter())
            loss = functional.cross_entropy(model(inputs), targets)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    return times


def measure(loop: str, steps: int, processes: int) -> float:
    """The median time of a step in fresh processes, in microseconds."""
    port = free_port()
    with tempfile.TemporaryDirectory() as folder:
        started = [
            subprocess.Popen(
                [
                    sys.executable,
                    "-m",
                    "tests.bench.step_time",
                    "--loop",
                    loop,
                    "--steps",
                    str(steps),
                    "--processes",
                    str(processes),
                ],
                cwd=folder,
                env={**clean_environment(), **rank_environment(rank, processes, port)},
                stdout=subprocess.PIPE,
                text=True,
            )
            for rank in range(processes)
        ]
        outputs = [process.communicate()[0] for process in started]
    return float(outputs[0].splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--loop", choices=["ours", "by_hand"])
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=600)
    options = parser.parse_args()
    if options.loop:
        import torch

        torch.set_num_threads(1)
        times = (ours if options.loop == "ours" else by_hand)(options.steps, options.processes)
        gaps = [after - before for before, after in zip(times[WARM_UP:], times[WARM_UP + 1 :], strict=False)]
        print(statistics.median(gaps) * 1e6)
        sys.stdout.flush()
        os._exit(0)
    results: dict[str, list[float]] = {"by_hand": [], "ours": []}
    for number in range(options.rounds):
        for loop in sorted(results, reverse=number % 2 == 0):
            results[loop].append(measure(loop, options.steps, options.processes))
    for loop, values in results.items():
        print(f"{loop:8} {statistics.median(values):7.0f} us a step  ({', '.join(f'{value:.0f}' for value in values)})")
    pairs = zip(results["ours"], results["by_hand"], strict=True)
    print(f"ratio    {statistics.median(one / other for one, other in pairs):.3f}")


if __name__ == "__main__":
    main()
