"""Time from the command to the first step, and to the end, beside an earlier distloop and Accelerate's bare example.

    git worktree add --detach /tmp/before 32d6ab8
    python -m tests.bench.start_time [--before /tmp/before] [--processes 2] [--rounds 5] [--python] [--make]

All start as fresh processes, interleaved: by `accelerate launch`; with --python without it; with --make by `make train`
of the digits, which is installed before. The clock sits in the forward pass of the model, so that all that comes before
the first step counts, and the rehearsal, too. Prints medians over the rounds of the wall time and of the CPU time of
all processes, the launcher's among them, and their ratios. The run has one epoch (--make: all 20), a validation, a
save and a report.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import psutil

from tests.tools.ranks import REPOSITORY, accelerate_launch, clean_environment

EXAMPLE = Path(__file__).with_name("start_example.py")
CLOCK = re.compile(r'\{"clock": ([\d.]+), "pass": (\d+)\}')
STEPS = 22  # of an epoch of the digits


class Times(NamedTuple):
    """Seconds from the command on: wall time and CPU time, to the first step and to the end."""

    first_wall: float
    first_cpu: float
    end_wall: float
    end_cpu: float


def words_of(contestant: str, tree: Path, options: argparse.Namespace, folder: Path) -> list[str]:
    """The command of a contestant."""
    runs = str(folder / "runs")
    if options.make:
        return ["make", "-o", ".venv/installed", "-C", str(tree), "train", f"ARGS=--runs-dir {runs}"]
    if contestant == "accelerate":
        script, arguments = folder / EXAMPLE.name, [str(STEPS)]
    else:
        script = tree / "distloop" / "train.py"
        arguments = ["--config", str(tree / "configs" / "digits.yaml"), "--train.epochs", "1", "--runs-dir", runs]
        arguments += ["--model", f"{EXAMPLE.stem}:Clocked", "--model.args", "{}"]
    starter = [sys.executable, str(script)] if options.python else accelerate_launch(options.processes, str(script))
    return [*starter, *arguments]


def cpu_seconds(process: psutil.Process) -> float:
    """CPU time of the process, its descendants, and those of them that have ended."""
    total = 0.0
    for one in (process, *process.children(recursive=True)):
        with contextlib.suppress(psutil.Error):  # it has ended meanwhile
            total += sum(one.cpu_times()[:4])
    return total


def measure(contestant: str, tree: Path, options: argparse.Namespace) -> Times:
    """One start in fresh processes. Raises SystemExit with its output if it fails."""
    before = {"accelerate": 0}.get(contestant, 1 if options.processes == 1 else 2)  # passes of the rehearsal
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shutil.copy(EXAMPLE, folder)
        environment = {**clean_environment(), "PYTHONPATH": str(folder), "CUDA_VISIBLE_DEVICES": ""}
        if options.processes > 1:
            environment["ACCELERATE_USE_CPU"] = "true"
        begun, first = time.time(), (0.0, 0.0)
        started = subprocess.Popen(
            words_of(contestant, tree, options, folder),
            cwd=folder,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        tree_of_processes, lines, clocks = psutil.Process(started.pid), [], 0
        assert started.stdout is not None
        for line in started.stdout:
            lines.append(line)
            for clock, number in CLOCK.findall(line):  # in a line of another rank's, perhaps
                clocks += int(number) == before + 1
                if int(number) == before + 1 and clocks == options.processes:  # the last rank
                    first = float(clock) - begun, cpu_seconds(tree_of_processes)
        _, status, usage = os.wait4(started.pid, 0)
        end = time.time() - begun, usage.ru_utime + usage.ru_stime
        if status != 0 or not (first[0] or options.make):
            raise SystemExit(f"{contestant} failed:\n{''.join(lines)}")
        return Times(*first, *end)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--before", type=Path, help="a folder with an earlier distloop")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--python", action="store_true", help="without a launcher")
    parser.add_argument("--make", action="store_true", help="make train, without Accelerate's example")
    options = parser.parse_args()
    trees = {"now": REPOSITORY} | ({"before": options.before.resolve()} if options.before else {})
    contestants = list(trees) + ([] if options.make else ["accelerate"])
    found: dict[str, list[Times]] = {name: [] for name in contestants}
    for number in range(options.rounds + 1):  # the first one, which fills the disk's cache, is not counted
        for name in contestants if number % 2 else reversed(contestants):
            times = measure(name, trees.get(name, REPOSITORY), options)
            if number:
                found[name].append(times)
    for name, all_times in found.items():
        print(f"{name:24}{in_words(statistics.median(values) for values in zip(*all_times, strict=True))}")
    for other in contestants[1:]:
        pairs = list(zip(found["now"], found[other], strict=True))
        ratios = (statistics.median(one[place] / (two[place] or 1) for one, two in pairs) for place in range(4))
        print(f"{'now / ' + other:24}{in_words(ratios)}")


def in_words(values: Iterable[float]) -> str:
    return "first step {:6.2f}, CPU {:6.2f} · end {:6.2f}, CPU {:6.2f}".format(*values)


if __name__ == "__main__":
    main()
