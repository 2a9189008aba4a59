"""Time of a training step of distloop beside other loops that do the same work, interleaved: `make bench`.

    python -m tests.bench.steps [--processes 2] [--accumulation 4] [--model resnet18] [--steps 600] [--rounds 40]

All contestants train one model on the same samples in the same order, one thread a process, without logging,
validation or saving, and end with the same parameters, which is checked. Each round runs each of them in fresh
processes. A ratio is that of one round's CPU time to the hand-written loop's of that round; "by hand again" is the
control. Rounds go on until the 95 % interval of distloop's mean ratio is narrower than ±0.015, or until --rounds.
Lightning and Fabric take part where they are installed, timm where $TIMM_TRAIN is the train.py of its repository.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from tests.bench.steps.job import Job
from tests.tools.ranks import clean_environment, free_port, rank_environment

FLOOR, CONTROL = "by_hand", "by_hand again"
NARROW = 0.015
MEASURES = ("cpu", "wall", "quiet_cpu")  # microseconds a step; quiet: of the least disturbed two fifths of the steps


def contestants() -> list[str]:
    """Those that can run here; the floor first."""
    found = [FLOOR, CONTROL, "distloop_train", "accelerate_example"]
    if importlib.util.find_spec("lightning"):
        found += ["fabric", "lightning_trainer"]
    if importlib.util.find_spec("timm") and os.environ.get("TIMM_TRAIN"):
        found.append("timm_epoch")
    return found


def measure(name: str, job: Job) -> dict[str, Any]:
    """One run in fresh processes: the measures, CPU time summed over the ranks, and a checksum of the parameters."""
    module = f"tests.bench.steps.{name.split()[0]}"
    options = [f"--{key}={getattr(job, key)}" for key in ("model", "steps", "processes", "accumulation", "batch")]
    root = Path(__file__).resolve().parents[3]
    threads = {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "PYTHONHASHSEED": "0"}
    port = free_port()
    with tempfile.TemporaryDirectory() as folder:
        shared = {**clean_environment(), **threads, "BENCH_FOLDER": folder}
        shared |= {"TIMM_TRAIN": os.environ.get("TIMM_TRAIN", "")}
        places = [rank_environment(rank, job.processes, port) for rank in range(job.processes)]
        started = [
            subprocess.Popen(
                [sys.executable, "-m", module, *options],
                cwd=root,
                env={**shared, **(place if job.processes > 1 else {})},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for place in places
        ]
        outputs = [process.communicate() for process in started]
    rows = [line.split()[1:] for output, _ in outputs for line in output.splitlines() if line.startswith("RESULT")]
    if len(rows) != job.processes:
        raise SystemExit(f"{name} failed:\n" + "\n".join(error[-3000:] for _, error in outputs))
    values = [[float(row[place]) for row in rows] for place in range(len(MEASURES))]
    return {"cpu": sum(values[0]), "wall": max(values[1]), "quiet_cpu": sum(values[2]), "parameters": rows[0][3]}


def interval(values: list[float]) -> float:
    """Half of the 95 % interval of the mean; infinite for fewer than three values."""
    if len(values) < 3:
        return math.inf
    students_t = {2: 4.30, 3: 3.18, 4: 2.78, 5: 2.57, 6: 2.45, 7: 2.36, 8: 2.31, 9: 2.26}.get(len(values) - 1, 2.1)
    return students_t * statistics.stdev(values) / math.sqrt(len(values))


def ratios(rounds: list[dict[str, Any]], name: str, measure: str) -> list[float]:
    """Of each round: a contestant's measure by the floor's."""
    return [each[name][measure] / each[FLOOR][measure] for each in rounds]


def table(rounds: list[dict[str, Any]], names: list[str]) -> list[dict[str, Any]]:
    """A row for each contestant: the median of each measure in microseconds, and of its ratio with its range."""
    rows = []
    for name in names:
        row: dict[str, Any] = {"loop": name, "same_parameters": True}
        row["same_parameters"] = all(each[name]["parameters"] == each[FLOOR]["parameters"] for each in rounds)
        for key in MEASURES:
            values = ratios(rounds, name, key)
            row[key] = statistics.median(each[name][key] for each in rounds)
            row[f"{key}_ratio"] = statistics.median(values)
            row[f"{key}_range"] = [min(values), max(values)]
            row[f"{key}_interval"] = interval(values)
        rows.append(row)
    return rows


def show(rows: list[dict[str, Any]]) -> None:
    print(f"\n{'loop':20} {'CPU us':>8} {'ratio':>6} {'±95 %':>6} {'quiet':>6} {'wall':>6}  same parameters")
    for row in rows:
        numbers = f"{row['cpu']:8.0f} {row['cpu_ratio']:6.3f} {row['cpu_interval']:6.3f} {row['quiet_cpu_ratio']:6.3f}"
        print(f"{row['loop']:20} {numbers} {row['wall_ratio']:6.3f}  {'yes' if row['same_parameters'] else 'NO'}")


def plot(rows: list[dict[str, Any]], path: Path, title: str) -> None:
    """The ratios as bars with their intervals."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 0.5 * len(rows) + 1.2))
    names = [row["loop"] for row in rows]
    errors = [0.0 if math.isinf(row["cpu_interval"]) else row["cpu_interval"] for row in rows]
    axes.barh(names, [row["cpu_ratio"] for row in rows], xerr=errors)
    axes.axvline(1.0, color="black", linewidth=0.8)
    axes.invert_yaxis()
    axes.set_xlabel("CPU time of a step, by hand = 1")
    axes.set_title(title)
    figure.savefig(path, bbox_inches="tight")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for key, value in {"model": "tiny", "steps": 600, "processes": 1, "accumulation": 1, "batch": 64}.items():
        parser.add_argument(f"--{key}", type=type(value), default=value)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--only", nargs="*", help="names of contestants beside the floor and its control")
    parser.add_argument("--out", type=Path, help="a folder for results.json and plot.png")
    options = parser.parse_args()
    job = Job(options.model, options.steps, options.processes, options.accumulation, options.batch)
    names = [name for name in contestants() if not options.only or name in (FLOOR, CONTROL, *options.only)]
    rounds: list[dict[str, Any]] = []
    for number in range(options.rounds):
        order = random.Random(number).sample(names, len(names))
        rounds.append({name: measure(name, job) for name in order})
        half = interval(ratios(rounds, "distloop_train", "cpu")) if "distloop_train" in names else math.inf
        print(f"round {number + 1}: distloop {ratios(rounds, names[2], 'cpu')[-1]:.3f}, mean ±{half:.3f}", flush=True)
        if half < NARROW:
            break
    rows = table(rounds, names)
    show(rows)
    if half >= NARROW:
        print(f"The interval is wider than ±{NARROW} after {len(rounds)} rounds.")
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        machine = {"cpu": platform.processor() or platform.machine(), "cores": os.cpu_count()}
        machine |= {"python": platform.python_version(), "torch": torch.__version__}
        result = {"job": vars(job), "machine": machine, "rows": rows, "rounds": rounds}
        (options.out / "results.json").write_text(json.dumps(result, indent=1, default=str))
        what = f"{job.model}, batch {job.batch}, {job.processes} process{'es' * (job.processes > 1)}"
        plot(rows, options.out / "plot.png", f"{what}, accumulation {job.accumulation}")
    if not all(row["same_parameters"] for row in rows):
        sys.exit("Some loops ended with other parameters.")


if __name__ == "__main__":
    main()
