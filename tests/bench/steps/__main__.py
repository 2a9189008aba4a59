"""Time of a training step of distloop beside other loops that do the same work, interleaved: `make bench`.

    python -m tests.bench.steps [--processes 2] [--accumulation 4] [--model resnet18 --turn 5] [--rounds 40]
    python -m tests.bench.steps --model fashion --batch 128        a small CNN, also fed from a ready tensor

All contestants train one model on the same samples in the same order, one thread a process, without logging,
validation or saving, and end with the same parameters, which is checked. In each round, fresh processes of all of
them take turns of some steps, while the others stand still, so that what slows the machine for a second slows all of
them. A ratio is that of one round's CPU time to the hand-written loop's of that round; "by hand again" is the control.
Rounds go on until the 95 % interval of distloop's mean ratio is narrower than ±0.015, or until --rounds. Lightning and
Fabric take part where they are installed, timm where $TIMM_TRAIN is the train.py of its repository.
"""

from __future__ import annotations

import argparse
import dataclasses
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

FLOOR, CONTROL, READY = "by_hand", "by_hand again", "ready_tensor"
NARROW, FEWEST = 0.015, 10  # rounds: three that happen to agree say little
MEASURES = ("cpu", "wall")  # microseconds a step
SAME = {True: "yes", False: "NO", None: "(other data)"}


def contestants(model: str) -> list[str]:
    """Those that can run here; the floor first."""
    found = [FLOOR, CONTROL, "distloop_train", "accelerate_example"]
    if importlib.util.find_spec("lightning"):
        found += ["fabric", "lightning_trainer"]
    if importlib.util.find_spec("timm") and os.environ.get("TIMM_TRAIN"):
        found.append("timm_epoch")
    if model == "fashion":
        found.append(READY)
    return found


class Contestant:
    """The processes of one loop, which stand still but for their turns."""

    def __init__(self, name: str, job: Job) -> None:
        self.name = name
        module = f"tests.bench.steps.{name.split()[0]}"
        options = [f"--{key}={value}" for key, value in vars(job).items()]
        threads = {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "PYTHONHASHSEED": "0"}
        self.folder = tempfile.TemporaryDirectory()
        self.errors = Path(self.folder.name, "errors.txt")
        shared = {**clean_environment(), **threads, "BENCH_FOLDER": self.folder.name}
        shared |= {"TIMM_TRAIN": os.environ.get("TIMM_TRAIN", "")}
        port = free_port()
        places = [rank_environment(rank, job.processes, port) for rank in range(job.processes)]
        with self.errors.open("w") as errors:
            self.processes = [
                subprocess.Popen(
                    [sys.executable, "-m", module, *options],
                    cwd=Path(__file__).resolve().parents[3],
                    env={**shared, **(place if job.processes > 1 else {})},
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=errors,
                    text=True,
                )
                for place in places
            ]

    def turn(self) -> dict[str, Any]:
        """One turn: the measures, CPU time summed over the ranks, and a checksum of the parameters."""
        for process in self.processes:
            assert process.stdin is not None
            process.stdin.write("go on\n")
            process.stdin.flush()
        rows = [self._result(process) for process in self.processes]
        values = [[float(row[place]) for row in rows] for place in range(len(MEASURES))]
        return {"cpu": sum(values[0]), "wall": max(values[1]), "parameters": rows[0][2]}

    def _result(self, process: subprocess.Popen[str]) -> list[str]:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("RESULT"):
                return line.split()[1:]
        raise SystemExit(f"{self.name} failed:\n{self.errors.read_text()[-3000:]}")

    def end(self) -> None:
        for process in self.processes:
            process.kill()
            process.communicate()
        self.folder.cleanup()


def one_round(names: list[str], job: Job, turns: int, order: random.Random) -> dict[str, Any]:
    """Fresh processes of all contestants take turns; of each, the mean of its turns and the last checksum. The first
    turn is not counted: until it, processes start, and wait for each other's ranks."""
    contestants = {name: Contestant(name, job) for name in names}
    taken: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    try:
        for _ in range(turns + 1):
            for name in order.sample(names, len(names)):
                taken[name].append(contestants[name].turn())
    finally:
        for contestant in contestants.values():
            contestant.end()
    means = {name: {key: statistics.fmean(turn[key] for turn in taken[name][1:]) for key in MEASURES} for name in names}
    return {name: {**means[name], "parameters": taken[name][-1]["parameters"], "turns": taken[name]} for name in names}


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
        same = all(each[name]["parameters"] == each[FLOOR]["parameters"] for each in rounds)
        row: dict[str, Any] = {"loop": name, "same_parameters": None if name == READY else same}  # it has other data
        for key in MEASURES:
            values = ratios(rounds, name, key)
            row[key] = statistics.median(each[name][key] for each in rounds)
            row[f"{key}_ratio"] = statistics.median(values)
            row[f"{key}_range"] = [min(values), max(values)]
            row[f"{key}_interval"] = interval(values)
        rows.append(row)
    return rows


def show(rows: list[dict[str, Any]]) -> None:
    print(f"\n{'loop':20} {'CPU us':>8} {'ratio':>6} {'±95 %':>6} {'wall':>6}  same parameters")
    for row in rows:
        numbers = f"{row['cpu']:8.0f} {row['cpu_ratio']:6.3f} {row['cpu_interval']:6.3f}"
        print(f"{row['loop']:20} {numbers} {row['wall_ratio']:6.3f}  {SAME[row['same_parameters']]}")


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
    for field in dataclasses.fields(Job):
        parser.add_argument(f"--{field.name}", type=type(field.default), default=field.default)
    parser.add_argument("--turns", type=int, default=4, help="of each contestant in a round")
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--only", nargs="*", help="names of contestants beside the floor and its control")
    parser.add_argument("--out", type=Path, help="a folder for results.json and plot.png")
    options = parser.parse_args()
    job = Job(**{field.name: getattr(options, field.name) for field in dataclasses.fields(Job)})
    names = [name for name in contestants(job.model) if not options.only or name in (FLOOR, CONTROL, *options.only)]
    rounds: list[dict[str, Any]] = []
    for number in range(options.rounds):
        rounds.append(one_round(names, job, options.turns, random.Random(number)))
        half = interval(ratios(rounds, "distloop_train", "cpu")) if "distloop_train" in names else math.inf
        print(f"round {number + 1}: distloop {ratios(rounds, names[2], 'cpu')[-1]:.3f}, mean ±{half:.3f}", flush=True)
        if half < NARROW and len(rounds) >= FEWEST:
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
    if any(row["same_parameters"] is False for row in rows):
        sys.exit("Some loops ended with other parameters.")


if __name__ == "__main__":
    main()
