"""How long a save holds up training, beside accelerator.save_state and torch.distributed.checkpoint.async_save.

    python -m tests.bench.save_stall [--processes 2] [--rounds 5] [--folder DIR]

A model of 100 million parameters with its AdamW state (1.2 GB) is saved by each in turn, in one run. The stall is
the time from a common start until the last rank may go on; what a save still does by then is waited for before the
next. Prints medians over the rounds; the first one, in which the others make buffers, is shown but not counted. As in
a run, ours are made before: after the first step.
"""

from __future__ import annotations

import argparse
import logging
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.tools.ranks import clean_environment, free_port, rank_environment

LAYERS, WIDTH = 24, 2048  # 24 × (2048 × 2048 + 2048) = 100.7 million


def rank_main(processes: int, rounds: int, folder: Path) -> None:
    """One rank of the measurement; rank 0 prints."""
    import torch
    import torch.distributed as dist
    from accelerate import Accelerator
    from torch import nn
    from torch.distributed.checkpoint.state_dict_saver import async_save as distributed_async_save

    from distloop.config.settings import Checkpoint
    from distloop.ranks.stopping import listen
    from distloop.run.checkpoint import LoopState
    from distloop.run.saving import Saver

    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    accelerator = Accelerator(cpu=True)
    if processes == 1:
        dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())  # type: ignore[attr-defined]
    rank = accelerator.process_index
    bare_model = nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS)))
    inner = torch.optim.AdamW(bare_model.parameters(), fused=True)
    model, optimizer = accelerator.prepare(bare_model, inner)
    saver = Saver(folder / "ours", Checkpoint(), {}, listen(), lambda step, best: None, enabled=rank == 0)
    saver.rehearse({"model": bare_model, "optimizer": inner}, LoopState(0))  # as before the first step of a run
    accelerator.backward(model(torch.randn(1, WIDTH)).square().sum())
    optimizer.step()
    optimizer.zero_grad()
    saver.wait()  # for the buffers

    pending: list[Any] = []
    group: Any = dist.new_group(backend="gloo")  # its thread must not meet our collectives

    def ours(number: int) -> None:
        saver.save({"model": bare_model, "optimizer": inner}, LoopState(number), {})

    def save_state(number: int) -> None:
        accelerator.save_state(str(folder / f"accelerate-{number}"))

    def async_save(number: int) -> None:
        state = {"model": bare_model.state_dict(), "optimizer": inner.state_dict()}
        path = str(folder / f"distributed-{number}")
        pending.append(distributed_async_save(state, checkpoint_id=path, process_group=group))

    ways: dict[str, Callable[[int], None]] = {"distloop": ours, "save_state": save_state, "async_save": async_save}
    stalls: dict[str, list[float]] = {name: [] for name in ways}
    durable: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds + 1):
        for name, way in sorted(ways.items(), reverse=number % 2 == 0):
            dist.barrier()
            begun = time.perf_counter()
            way(number)
            seconds = torch.tensor(time.perf_counter() - begun)
            dist.all_reduce(seconds, dist.ReduceOp.MAX)
            stalls[name].append(float(seconds))
            saver.wait()
            while pending:
                pending.pop().result()
            dist.barrier()
            durable[name].append(time.perf_counter() - begun)
            if rank == 0:
                for old in (*folder.glob("accelerate-*"), *folder.glob("distributed-*")):
                    shutil.rmtree(old)
                os.sync()  # what one has left to the page cache is not the next one's to wait for
    if rank == 0:
        reference = statistics.median(stalls["distloop"][1:])
        for name in ways:
            stall = statistics.median(stalls[name][1:])
            ratios = [one / other for one, other in zip(stalls["distloop"][1:], stalls[name][1:], strict=True)]
            print(
                f"{name:10} stall {stall:.2f} s ({', '.join(f'{value:.2f}' for value in stalls[name][1:])}; first "
                f"{stalls[name][0]:.2f}), on the disk after {statistics.median(durable[name][1:]):.2f} s"
                + (f"; distloop / {name} = {statistics.median(ratios):.2f}" if name != "distloop" else "")
            )
        print(f"distloop waits {reference:.2f} s for a snapshot of 1.2 GB, {processes} process(es)")
    sys.stdout.flush()
    dist.barrier()
    os._exit(0)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder")
    parser.add_argument("--rank", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rank:
        rank_main(options.processes, options.rounds, Path(options.folder))
    port = free_port()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        command = [sys.executable, "-m", "tests.bench.save_stall", "--rank", "--folder", folder]
        command += ["--processes", str(options.processes), "--rounds", str(options.rounds)]
        started = [
            subprocess.Popen(command, env={**clean_environment(), **rank_environment(rank, options.processes, port)})
            for rank in range(options.processes)
        ]
        sys.exit(max(process.wait() for process in started))


if __name__ == "__main__":
    main()
