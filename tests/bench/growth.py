"""What grows with a run: with its rows, its samples, its parameters, its ranks.

    python -m tests.bench.growth [--rounds 3] [--parts rows samples parameters ranks] [--largest 1000]
                                 [--json FILE] [--plot FILE]

- rows (10^3 to 10^6) of metrics.jsonl: a start that sets 100 of them aside, `distloop status`, `distloop report`;
- samples (10^3 to 10^9): until the first batch of 256, at the beginning of an epoch and at 90 % of it;
- parameters (10^5 to 10^8) with AdamW: how long the second save holds training up, the checksums of a start, its load;
- ranks (1 to 16): the start and the steps of an MLP on digits with 64 samples a rank, of one of them.

Each measurement is made in fresh processes with one thread. Prints medians over the rounds: seconds, of CPU where other
programs on the machine would disturb them, and MB.
`--largest N` leaves out the sizes above N. Memory is the growth of the process's peak, of a command the whole peak.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from tests.bench.long_report import write_long_run
from tests.tools.ranks import REPOSITORY, clean_environment, free_port, rank_environment, write_config

SIZES = {
    "rows": [10**3, 10**4, 10**5, 10**6],
    "samples": [10**3, 10**4, 10**5, 10**6, 1_281_167, 10**7, 10**8, 10**9],
    "parameters": [10**5, 10**6, 10**7, 10**8],
    "ranks": [1, 2, 4, 8, 16],
}
BATCH, LAYERS, STEPS, ASIDE = 256, 24, 200, 100
Found = dict[str, float]


def peak() -> float:
    """The peak memory of this process so far, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def timed(function: Callable[[], Any], clock: Callable[[], float] = time.thread_time) -> tuple[float, Any]:
    """(seconds, what the function returned); by default of this thread's CPU."""
    begun = clock()
    value = function()
    return clock() - begun, value


def of_command(words: list[str]) -> tuple[float, float]:
    """(seconds of CPU, peak memory in MB) of a command."""
    process = subprocess.Popen(words, cwd=REPOSITORY, env=clean_environment(), stdout=subprocess.DEVNULL)
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{words} failed with exit code {process.returncode}")
    return used.ru_utime + used.ru_stime, used.ru_maxrss / 1024


# ---- one measurement, in a fresh process -----------------------------------------------------------------------------


def rows(size: int, folder: Path) -> Found:
    from distloop.run.set_aside import set_rows_aside

    run = folder / "run"
    write_long_run(run, size)
    before = peak()
    seconds, moved = timed(lambda: set_rows_aside(run / "metrics.jsonl", size - ASIDE), time.perf_counter)
    assert moved >= ASIDE, moved
    found = {"resume s": seconds, "resume MB": peak() - before}
    for name, command in (
        ("status", ["-m", "distloop.commands.cli", "status", str(run)]),
        ("report", ["-m", "distloop.commands.report", str(run), "--output", str(folder / "report.html")]),
    ):
        found[f"{name} s of CPU"], found[f"{name} MB"] = of_command([sys.executable, *command])
    return found


def samples(size: int, folder: Path) -> Found:
    import torch

    from distloop.config.settings import Config
    from distloop.data.datasets import DataSource
    from distloop.data.loader import TrainBatches
    from distloop.data.order import Plan
    from distloop.data.whole_batches import WholeBatches
    from distloop.ranks.places import Position

    class Numbers(WholeBatches):
        def __len__(self) -> int:
            return size

        def batch(self, indices: Any, random: Any) -> Any:
            chosen = torch.from_numpy(indices)
            return chosen[:, None].float(), chosen

    def first_batch(share: float) -> tuple[float, float]:
        source = DataSource(Numbers(), Numbers())
        before, begun = peak(), time.thread_time()
        plan = Plan(size, BATCH, total_steps=10**9)
        step = int(share * plan.steps_per_epoch)
        batches = TrainBatches(Config(), source, None, plan, torch.device("cpu"), step, Position())
        next(iter(batches.of_step(step)))
        return time.thread_time() - begun, peak() - before

    first_batch(0.0)  # imports, and a sampler for once
    (fresh, memory), (continued, more) = first_batch(0.0), first_batch(0.9)
    return {"fresh s of CPU": fresh, "at 90 % s of CPU": continued, "MB": max(memory, more)}


def parameters(size: int, folder: Path) -> Found:
    import torch

    from distloop.config.settings import Checkpoint
    from distloop.ranks.stopping import listen
    from distloop.run.checkpoint import STATE, LoopState, newest_good
    from distloop.run.files import read_json
    from distloop.run.parts import load_parts
    from distloop.run.saving import Saver

    torch.set_num_threads(1)
    width = max(1, round((size / LAYERS) ** 0.5))
    model = torch.nn.Sequential(*(torch.nn.Linear(width, width) for _ in range(LAYERS)))
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    model(torch.randn(1, width)).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    parts = {"model": model, "optimizer": optimizer}
    saver = Saver(folder, Checkpoint(), {}, listen(), lambda step, best: None, enabled=True)
    for step in (1, 2):  # the first one makes the buffers
        stall, _ = timed(partial(saver.save, parts, LoopState(step), {}))
        saver.wait()
    checksums, (path, _) = timed(lambda: newest_good(folder))
    load, _ = timed(lambda: load_parts(path, parts, read_json(path / STATE)))
    return {"stall s of CPU": stall, "checksums s of CPU": checksums, "load s of CPU": load}


def ranks(size: int, folder: Path) -> Found:
    never = 10**6
    config = {
        "data": "digits",
        "model": {"name": "mlp"},
        "batch": {"global_size": 64 * size},
        "train": {"steps": STEPS},
        "log": {"every_steps": never},
        "validate": {"every_epochs": None, "every_steps": never},
        "checkpoint": {"every_steps": never},
        "tracking": {"report": False},
    }
    words = [sys.executable, "-m", "tests.bench.growth", "--rank", "--config", str(write_config(folder, config))]
    port = free_port()
    processes = [
        subprocess.Popen(
            words,
            cwd=folder,
            env={**clean_environment(), **rank_environment(rank, size, port)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(size)
    ]
    outputs = [process.communicate()[0] for process in processes]
    if any(process.returncode for process in processes):
        raise SystemExit(f"training on {size} ranks failed:\n{outputs[0]}")
    found = [json.loads(output.splitlines()[-1]) for output in outputs]
    return {name: statistics.median(one[name] for one in found) for name in found[0]}


def one_rank(arguments: list[str]) -> Found:
    """Train, and look at this process's clock in each forward pass."""
    from distloop.ranks.start import main, prepare_process

    prepare_process()
    from distloop.tasks import Classification
    from distloop.train import train

    times: list[float] = []
    forward = Classification.forward

    def clocked(self: Any, model: Any, batch: Any) -> Any:
        times.append(time.process_time())
        return forward(self, model, batch)

    Classification.forward = clocked  # type: ignore[method-assign]
    if main(train, arguments):
        raise SystemExit(1)
    steady = times[-STEPS // 2 :]
    step = (steady[-1] - steady[0]) / (len(steady) - 1)
    return {"start s of CPU": times[0], "step ms of CPU": 1000 * step, "MB": peak()}


PARTS: dict[str, Callable[[int, Path], Found]] = {
    "rows": rows,
    "samples": samples,
    "parameters": parameters,
    "ranks": ranks,
}


# ---- all of them -----------------------------------------------------------------------------------------------------


def measure(part: str, size: int, rounds: int) -> Found:
    """The medians over the rounds."""
    found: list[Found] = []
    for _ in range(rounds):
        with tempfile.TemporaryDirectory(prefix="distloop-bench-") as folder:
            words = [sys.executable, "-m", "tests.bench.growth", "--one", part, str(size), folder]
            done = subprocess.run(words, cwd=REPOSITORY, env=clean_environment(), text=True, stdout=-1, check=True)
            found.append(json.loads(done.stdout.splitlines()[-1]))
    return {name: statistics.median(one[name] for one in found) for name in found[0]}


def draw(results: dict[str, dict[int, Found]], file: Path) -> None:
    """One plot for each part: seconds against its size, both in powers of ten."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(results), figsize=(4.2 * len(results), 3.4), layout="constrained", squeeze=False)
    for axis, (part, by_size) in zip(axes[0], results.items(), strict=True):
        for name in next(iter(by_size.values())):
            if not name.endswith("MB") and "MB " not in name:
                axis.plot(list(by_size), [found[name] for found in by_size.values()], marker="o", label=name)
        axis.set(xscale="log", yscale="log", xlabel=part)
        axis.grid(alpha=0.3)
        axis.legend(fontsize="small")
    figure.savefig(file, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--largest", type=int, default=10**12)
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--plot", type=Path, metavar="FILE")
    parser.add_argument("--rank", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rank:
        print(json.dumps(one_rank(options.rank)), flush=True)
        os._exit(0)
    if options.one:
        part, size, folder = options.one
        print(json.dumps(PARTS[part](int(size), Path(folder))), flush=True)
        os._exit(0)
    results: dict[str, dict[int, Found]] = {}
    for part in options.parts:
        for size in SIZES[part]:
            if size <= options.largest:
                found = measure(part, size, options.rounds)
                results.setdefault(part, {})[size] = found
                shown = " · ".join(f"{name} {value:.4g}" for name, value in found.items())
                print(f"{part:10} {size:>13,}  {shown}", flush=True)
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n")
    if options.plot:
        draw(results, options.plot)


if __name__ == "__main__":
    main()
