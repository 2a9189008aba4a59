"""What becomes of a run of which one rank fails: how long it goes on, and whether the right rank is named.

    python -m tests.bench.first_failure [--rounds 3] [--processes 4]

The same failures in distloop (launch/single_node.sh) and in a loop by hand on Accelerate, under the same elastic
launcher, interleaved. Seconds are from the failure to the end of the launcher, medians over the rounds; the limit
for a rank that hangs is the same. "named": the output says which rank was first, in the launcher's summary ("Root
Cause") or in distloop's line.
"""

from __future__ import annotations

import argparse
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.lab.failing import FAILING_STEP
from tests.tools import stage
from tests.tools.ranks import REPOSITORY, accelerate_launch, clean_environment, write_config

WAYS = ("raise", "kill", "os._exit", "segfault", "suspend", "loop")
LIMIT = 10


def by_hand() -> None:
    """A loop as Accelerate's examples have it, in which one rank fails in its fifth step."""
    import datetime

    import torch
    from accelerate import Accelerator, InitProcessGroupKwargs

    from tests.lab import stage as place

    limit = InitProcessGroupKwargs(timeout=datetime.timedelta(seconds=LIMIT))
    accelerator = Accelerator(cpu=True, kwargs_handlers=[limit])
    model = torch.nn.Linear(8, 1)
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.01))
    for step in range(1000):
        if step == FAILING_STEP:
            place.at("forward")
        accelerator.backward(model(torch.randn(4, 8)).square().mean())
        optimizer.step()
        optimizer.zero_grad()
    accelerator.end_training()


def fail(ours: bool, how: str, rank: int, processes: int) -> tuple[float, bool]:
    """(seconds from the failure to the end, whether the right rank was named) of one run."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        environment = {**clean_environment(), "ACCELERATE_USE_CPU": "true"}
        stage.fail(folder, "forward", how, rank=rank)
        if ours:
            code = "tests.lab.failing"
            config = {
                "data": {"name": f"{code}:points"},
                "model": {"name": "linear"},
                "task": {"name": f"{code}:Failing"},
                "batch": {"global_size": 16},
                "ddp": {"timeout_seconds": LIMIT},
                "train": {"epochs": 50},
            }
            environment["PROCESSES"] = str(processes)
            words = [str(REPOSITORY / "launch" / "single_node.sh"), "--config", str(write_config(folder, config))]
        else:
            words = [*accelerate_launch(processes, __file__), "--by-hand"]
        process = subprocess.run(
            words, cwd=folder, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False
        )
        seconds = time.time() - (folder / "stage" / f"forward.{rank}").stat().st_mtime
    first = re.search(
        rf"rank {rank} on \S+?,? .*(first|waiting|heard)" if ours else rf"Root Cause[^=]*?rank\s*: {rank} \(",
        process.stdout,
        re.DOTALL if not ours else 0,
    )
    return seconds, first is not None


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--processes", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--by-hand", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.by_hand:
        sys.path.insert(0, str(REPOSITORY))
        return by_hand()
    rank = options.processes - 2
    print(f"rank {rank} of {options.processes} fails; limit for one that hangs: {LIMIT} s")
    print(f"{'':<10}{'distloop':>10} {'named':<8}{'by hand':>10} named")
    for how in WAYS:
        found: dict[bool, list[tuple[float, bool]]] = {True: [], False: []}
        for _ in range(options.rounds):
            for ours in (True, False):
                found[ours].append(fail(ours, how, rank, options.processes))
        shown = [
            f"{statistics.median(seconds for seconds, _ in found[ours]):>8.1f} s "
            f"{sum(named for _, named in found[ours])}/{options.rounds:<6}"
            for ours in (True, False)
        ]
        print(f"{how:<10}{shown[0]}{shown[1]}", flush=True)
    return None


if __name__ == "__main__":
    main()
