"""How much CPU time and memory the report of a long run takes.

    python -m tests.bench.long_report [--rows 1000000] [--rounds 5]

The run has so many rows of training, and an epoch and a validation for each thousand of them: a million are 440 MB.
Each round is a fresh process. Prints medians over the rounds: seconds of CPU (user and system), peak memory, and the
size of the page.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.tools.ranks import REPOSITORY
from tests.tools.report_runs import full_run, train_row, validation_row

EPOCH = 1000  # steps


def write_long_run(run: Path, rows: int) -> None:
    full_run(run)
    with open(run / "metrics.jsonl", "w") as file:
        for step in range(1, rows + 1):
            file.write(json.dumps(train_row(step, epoch=1 + (step - 1) // EPOCH)) + "\n")
            if step % EPOCH == 0:
                epoch = {"kind": "epoch", "step": step, "epoch": step // EPOCH, "attempt": 1, "loss": EPOCH / step}
                file.write(json.dumps(epoch) + "\n")
                file.write(json.dumps(validation_row(step, loss=EPOCH / step, accuracy=1 - EPOCH / (step + 1))) + "\n")


def measure(run: Path) -> tuple[float, float, float]:
    """(seconds of CPU, peak memory in MB, size of the page in kB) of one report."""
    output = run / "report.html"
    words = [sys.executable, "-m", "distloop.commands.report", str(run), "--output", str(output)]
    process = subprocess.Popen(words, cwd=REPOSITORY, stdout=subprocess.DEVNULL)
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"the report failed with exit code {process.returncode}")
    return used.ru_utime + used.ru_stime, used.ru_maxrss / 1024, output.stat().st_size / 1000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="distloop-bench-") as folder:
        run = Path(folder) / "run"
        write_long_run(run, options.rows)
        size = (run / "metrics.jsonl").stat().st_size / 1e6
        rounds = [measure(run) for _ in range(options.rounds)]
        seconds, memory, page = (statistics.median(each) for each in zip(*rounds, strict=True))
        print(f"{options.rows:,} rows, {size:.0f} MB: {seconds:.1f} s of CPU, {memory:.0f} MB of memory, {page:.0f} kB")


if __name__ == "__main__":
    main()
