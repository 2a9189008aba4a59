"""What logging costs: a run with its default logging beside one with W&B as well and one that logs next to nothing.

    python -m tests.bench.logging_cost [--rounds 5] [--steps 2000] [--width 8]

All train the same tiny CNN on digits in batches of 64, one process with one thread, in fresh processes, interleaved.
Prints for each the median over the rounds of the wall time and of the CPU time of a step, all steps together, and what
its other processes (W&B's) took of another core meanwhile. Of the two kinds of time the CPU time of the thread that
trains is the one that other programs on the machine disturb least.

Then what one row costs, measured around what train.py calls for it: that is the answer where the differences of the
above are smaller than their noise.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.tools.ranks import clean_environment

BATCH, WARM_UP, EVERY, TYPICAL_STEP = 64, 200, 20, 3000.0  # steps between two rows; us
MODES: dict[str, list[str]] = {
    "off": ["--log.every-steps", "1000000"],
    "default": [],
    "wandb": ["--tracking.wandb", "offline"],
}


class Costs:
    """What each call of some functions took: {name: [(seconds, seconds of this thread's CPU), …]}."""

    def __init__(self) -> None:
        self.spent: dict[str, list[tuple[float, float]]] = {}

    def around(self, owner: Any, attribute: str, name: Callable[..., str]) -> None:
        """Count what a method takes, under name(its arguments)."""
        function = getattr(owner, attribute)

        def measured(*arguments: Any, **named: Any) -> Any:
            begun = time.perf_counter(), time.thread_time()
            try:
                return function(*arguments, **named)
            finally:
                spent = time.perf_counter() - begun[0], time.thread_time() - begun[1]
                self.spent.setdefault(name(*arguments), []).append(spent)

        setattr(owner, attribute, measured)


def cpu_of_descendants() -> float:
    """Seconds of CPU that this process's children and theirs have taken, as far as they live."""
    parents, ticks = {}, {}
    for path in Path("/proc").iterdir():
        if path.name.isdecimal():
            try:
                fields = (path / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue  # ended meanwhile
            parents[int(path.name)] = int(fields[1])
            ticks[int(path.name)] = sum(map(int, fields[11:15]))
    family = {os.getpid()}
    while more := {process for process, parent in parents.items() if parent in family} - family:
        family |= more
    return sum(ticks[process] for process in family - {os.getpid()}) / os.sysconf("SC_CLK_TCK")


def run(mode: str, steps: int, width: int) -> dict[str, Any]:
    """Train in this process; what it took."""
    import torch

    torch.set_num_threads(1)
    from distloop.ranks.start import main
    from distloop.run.clock import Clock
    from distloop.run.metrics import MetricsFile
    from distloop.tasks import Classification
    from distloop.tracking.console import Console
    from distloop.tracking.trackers import Trackers
    from distloop.train import train
    from distloop.training.losses import LossSums
    from distloop.training.nonfinite import FiniteCheck

    marks: dict[int, tuple[float, float, float]] = {}
    forward, costs, seen = Classification.forward, Costs(), 0

    def counted(self: Any, model: Any, batch: Any) -> Any:
        nonlocal seen
        if model.training:
            if seen in (WARM_UP, steps - 1):
                marks[seen] = time.perf_counter(), time.thread_time(), cpu_of_descendants()
            seen += 1
        return forward(self, model, batch)

    Classification.forward = counted  # type: ignore[method-assign]
    costs.around(LossSums, "read", lambda *_: "read the losses")
    costs.around(FiniteCheck, "check", lambda *_: "read the finite check")
    costs.around(Clock, "read", lambda *_: "read the clock")
    costs.around(Trackers, "log", lambda _, kind, *others: f"log a row: {kind}")
    costs.around(MetricsFile, "log", lambda _, row: f"  of it metrics.jsonl: {row['kind']}")
    costs.around(Console, "log", lambda _, row: f"  of it console: {row['kind']}")
    often = str(10 * steps)
    arguments = ["--model.args.width", str(width), "--model.args.norm", "batch", "--optim", "sgd"]
    arguments += ["--train.steps", str(steps), "--batch.global-size", str(BATCH), "--tracking.no-report"]
    arguments += ["--validate.every-epochs", "None", "--validate.every-steps", often]
    arguments += ["--checkpoint.every-steps", often]
    code = main(train, [*arguments, *MODES[mode]])
    assert code == 0
    (begun, ended), count = (marks[WARM_UP], marks[steps - 1]), steps - 1 - WARM_UP
    wall, own, others = (after - before for before, after in zip(begun, ended, strict=True))
    return {"wall": wall / count * 1e6, "cpu": own / count * 1e6, "others": others / wall, "spent": costs.spent}


def measure(mode: str, steps: int, width: int) -> dict[str, Any]:
    """The same in a fresh process."""
    words = ["--mode", mode, "--steps", str(steps), "--width", str(width)]
    with tempfile.TemporaryDirectory() as folder, open(Path(folder) / "output", "w") as output:
        subprocess.run(
            [sys.executable, "-m", "tests.bench.logging_cost", *words, "--result", "result.json"],
            cwd=folder,
            env={**clean_environment(), "WANDB_SILENT": "true"},
            stdout=output,  # a file, as that of a job
            check=True,
        )
        return json.loads((Path(folder) / "result.json").read_text())


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--mode", choices=MODES)
    parser.add_argument("--result")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--width", type=int, default=8)
    options = parser.parse_args()
    if options.mode:
        Path(options.result).write_text(json.dumps(run(options.mode, options.steps, options.width)))
        sys.stdout.flush()
        os._exit(0)
    results: dict[str, list[dict[str, Any]]] = {mode: [] for mode in MODES}
    for number in range(options.rounds):
        order = list(MODES)
        for mode in order[number % len(order) :] + order[: number % len(order)]:
            results[mode].append(measure(mode, options.steps, options.width))
    report(results)


def report(results: dict[str, list[dict[str, Any]]]) -> None:
    """Print medians over the rounds, and ratios to the run of the same round that logs nothing."""

    def median(values: list[float]) -> float:
        return statistics.median(values)

    for mode, rounds in results.items():
        ratios = {
            kind: median([one[kind] / other[kind] for one, other in zip(rounds, results["off"], strict=True)])
            for kind in ("wall", "cpu")
        }
        numbers = {kind: median([one[kind] for one in rounds]) for kind in ("wall", "cpu", "others")}
        print(
            f"{mode:8} {numbers['wall']:6.0f} us a step (x {ratios['wall']:.3f}), {numbers['cpu']:6.0f} us of CPU "
            f"(x {ratios['cpu']:.3f}), other processes {numbers['others']:.1%} of a core"
        )
    for mode in ("default", "wandb"):
        print(f"\none row, {mode:8}    us (median)  us of CPU (mean)")
        total = [0.0, 0.0]
        for name in results[mode][0]["spent"]:
            walls, cpus = (
                [[1e6 * call[place] for call in one["spent"][name]] for one in results[mode]] for place in (0, 1)
            )
            wall, cpu = median([median(calls) for calls in walls]), median([statistics.mean(calls) for calls in cpus])
            what, _, kind = name.partition(": ")
            if kind in ("", "train"):
                print(f"  {what:20} {wall:8.1f} {cpu:16.1f}")
                if not what.startswith(" "):
                    total = [total[0] + wall, total[1] + cpu]
        shares = [value / (EVERY * TYPICAL_STEP) for value in total]
        own = total[1] / (EVERY * median([one["cpu"] for one in results[mode]]))
        print(
            f"  {'together':20} {total[0]:8.1f} {total[1]:16.1f}\n"
            f"  of {EVERY} steps of {TYPICAL_STEP / 1000:g} ms: {shares[0]:.2%}, of their CPU {shares[1]:.2%}; "
            f"of the CPU of as many of these steps {own:.2%}"
        )


if __name__ == "__main__":
    main()
