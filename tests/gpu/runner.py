"""Run the parts of tests/gpu on this machine's card, each a process of its own with a limit of its own.

    bash tests/gpu/run.sh [--device cuda|cpu] [--only PART …] [--minutes M] [--out DIR]

A part that fails, crashes, hangs or misses a library keeps no other from running; it stands in the table and in
DIR/gpu_results.json, with the reason. The exit code is 0 if all passed, 1 if not, 2 if they cannot run here.
"""

import argparse
import json
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from tests.gpu.parts import Part, Running
from tests.gpu.report import machine, table

# The parts in their order, and their shares of the time; what one leaves over goes to those after it.
SHARES = {
    "doctor": 8,
    "training": 20,
    "resume": 15,
    "policies": 10,
    "start": 15,
    "syncs": 7,
    "figures": 25,
    "profile": 5,
}
ALONE = ("doctor", "figures", "profile")  # what these find is how fast something is
# On so many CPUs the others run all beside each other: most of their time is the starts of single-threaded processes.
CPUS_FOR_IT, SHARE_BESIDE = 12, 0.55
MINUTES = {"cuda": 5.0, "cpu": 15.0}


def run(
    parts: list[Part], arguments: argparse.Namespace, scratch: Path, write: Callable[[], None], stop: threading.Event
) -> None:
    """Run the parts to their ends or limits, or until `stop` is set. write() after each."""
    until = time.time() + 60 * arguments.minutes
    beside = len(SHARES) if len(os.sched_getaffinity(0)) >= CPUS_FOR_IT else 1
    waiting, running = list(parts), list[Running]()
    write()
    try:
        while (waiting or running) and not stop.wait(0.05):
            for one in [one for one in running if one.is_over()]:
                running.remove(one)
                one.end()
                write()
            if waiting and may_begin(waiting[0], running, beside):
                part, left = waiting.pop(0), until - time.time()
                file = arguments.parts / f"test_{part.name}.py"
                if not file.exists():
                    part.state, part.why = "missing", f"{file} is not there"
                elif left < 1:
                    part.why = f"the {arguments.minutes:g} minutes were over"
                else:
                    limit = left * share_of(part, [*waiting, *(one.part for one in running)], beside)
                    running.append(Running(part, file, arguments.device, arguments.out, scratch, limit))
    finally:
        for one in running:
            one.end(stopped=True)
    for part in waiting:
        part.why = "stopped before it began"
    write()


def may_begin(part: Part, running: list[Running], beside: int) -> bool:
    alone = part.name in ALONE or any(one.part.name in ALONE for one in running)
    return len(running) < (1 if alone else beside)


def share_of(part: Part, unfinished: list[Part], beside: int) -> float:
    """How much of the time that is left `part` may take at most; `unfinished`: the other parts."""
    if beside > 1 and part.name not in ALONE:
        return SHARE_BESIDE
    own = SHARES.get(part.name, 10)
    return own / (own + sum(SHARES.get(other.name, 10) for other in unfinished))


def read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="run.sh", description="Run the GPU parts and say what came of each.")
    parser.add_argument("--device", choices=MINUTES, default="cuda")
    parser.add_argument("--only", nargs="+", metavar="PART", help=f"some of {', '.join(SHARES)}")
    parser.add_argument("--minutes", type=float, help="for all parts together; default: 5 on a GPU, 15 on the CPU")
    parser.add_argument("--out", type=Path, default=Path("gpu_results"), metavar="DIR", help="default: gpu_results")
    parser.add_argument("--parts", type=Path, default=Path(__file__).parent, help=argparse.SUPPRESS)  # for tests
    arguments = parser.parse_args()
    arguments.out, arguments.parts = arguments.out.resolve(), arguments.parts.resolve()
    arguments.minutes = arguments.minutes or MINUTES[arguments.device]
    own = [path.stem.removeprefix("test_") for path in sorted(arguments.parts.glob("test_*.py"))]
    names = dict.fromkeys([*SHARES, *own])
    if unknown := [name for name in arguments.only or [] if name not in names]:
        parser.error(f"no part {unknown[0]!r}; there are {', '.join(names)}")
    arguments.names = [name for name in names if name in (arguments.only or SHARES)]
    return arguments


def main() -> int:
    arguments = read_arguments()
    facts = machine(arguments.device)
    arguments.out.mkdir(parents=True, exist_ok=True)
    parts = [Part(name) for name in arguments.names]
    path = arguments.out / "gpu_results.json"

    def write() -> None:
        results = {**facts, "minutes": arguments.minutes, "parts": {part.name: asdict(part) for part in parts}}
        aside = path.with_suffix(".new")
        aside.write_text(json.dumps(results, indent=1))
        aside.replace(path)

    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: stop.set())
    with tempfile.TemporaryDirectory(prefix="distloop-gpu-", ignore_cleanup_errors=True) as scratch:
        run(parts, arguments, Path(scratch), write, stop)
    print(table(json.loads(path.read_text())))
    print(f"\nAll of it: {path}. What each part printed: {arguments.out}/PART.log")
    return 0 if all(part.state in ("passed", "skipped") for part in parts) else 1


if __name__ == "__main__":
    packages = os.environ.pop("GPU_PACKAGES", None)  # the folder into which run.sh has installed the kit's wheels
    try:
        sys.exit(main())
    finally:
        if packages:
            shutil.rmtree(packages, ignore_errors=True)
