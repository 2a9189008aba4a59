"""Check machines, devices and network before a big job, alone or under any launcher.

    distloop doctor
    accelerate launch --multi_gpu --num_processes 8 … distloop/doctor.py --expect-world 8
    srun python -m distloop.doctor --runs-dir /shared/runs

All ranks check and measure; rank 0 prints a table: for each check a verdict (ok, warn, fail), what was found, what to
do. Exit code 0: no check fails, 1: one does, 2: wrong usage.
"""

import argparse
import collections
import contextlib
import functools
import json
import os
import sys
import threading
from collections.abc import Mapping
from typing import Any

from distloop.commands.doctor.results import FAIL, OK, WARN, Result, nodes_of
from distloop.errors import RunFailed, UsageError
from distloop.ranks import stopping, talking
from distloop.ranks.attempt_base import AttemptBase
from distloop.ranks.environment import prepare_environment
from distloop.ranks.roll_call import RollCall

COLOURS = {OK: "32", WARN: "33", FAIL: "31"}


class Report(AttemptBase):
    """The results so far. They are printed once: at the end, or when the process must end before that."""

    def __init__(self, as_json: bool) -> None:
        self.as_json = as_json
        self.is_due = os.environ.get("RANK", "0") == "0"  # on rank 0, until they are printed
        self.results: list[Result] = []
        self.facts: dict[str, Any] = {}  # the JSON has them beside the results
        self._printing = threading.Lock()

    @property
    def verdict(self) -> str:
        return max((result.verdict for result in self.results), key=(OK, WARN, FAIL).index, default=OK)

    def cut_off(self, state: str, reason: str) -> None:
        """Print the results now: the process ends without its main thread."""
        self.results.append(Result(FAIL, "ranks", reason))
        self.show()

    def show(self) -> None:
        """Print the results, on rank 0 and only once."""
        with self._printing:
            if self.is_due and self.as_json:
                results = [result._asdict() for result in self.results]
                talking.say(json.dumps({"verdict": self.verdict, **self.facts, "lines": results}, indent=1))
            elif self.is_due:
                talking.say(self._table(sys.stdout.isatty() and "NO_COLOR" not in os.environ))
            self.is_due = False

    def _table(self, in_colour: bool) -> str:
        lines = []
        width = max(len(result.check) for result in self.results)
        indent = "\n" + " " * (8 + width + 2)
        for verdict, check, finding, advice in self.results:
            before, after = (f"\033[{COLOURS[verdict]}m", "\033[0m") if in_colour else ("", "")
            finding += "\n-> " + advice.replace("\n", "\n   ") if advice else ""
            lines.append(f"  {before}{verdict:<4}{after}  {check:<{width}}  " + finding.replace("\n", indent))
        counts = collections.Counter(result.verdict for result in self.results)
        summary = ", ".join(f"{counts[verdict]} {verdict}" for verdict in (FAIL, WARN, OK) if counts[verdict])
        return "\n".join([*lines, f"distloop doctor: {self.verdict} ({summary})"])


def examine(options: argparse.Namespace, given: dict[str, str], roll_call: RollCall, report: Report) -> int:
    """Run all checks and print the results on rank 0. Returns the exit code, the same on all ranks. Collective."""
    here = roll_call.position
    here.enter("importing torch")
    import torch.distributed as dist

    from distloop.commands.doctor import measure
    from distloop.commands.doctor.checks import check_facts
    from distloop.commands.doctor.facts import find_facts
    from distloop.config.settings import Ddp
    from distloop.ranks import launch_guards, meeting

    here.enter("looking around")
    facts = find_facts(given, options.runs_dir, options.device, options.expect_world)
    for variable in facts["unknown_interfaces"]:
        os.environ.pop(variable)  # ranks would not find each other; a check reports it
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if any(name not in os.environ for name in launch_guards.RANK_VARIABLES):
        rank, world_size = 0, 1  # a check reports what is missing
    report.is_due = rank == 0
    limits = Ddp(join_seconds=options.join_seconds, timeout_seconds=options.check_seconds)
    not_measured = ""
    if world_size > 1:
        here.enter("meeting the other ranks")
        try:
            meeting.start_group(os.environ, limits, None, roll_call)
        except (UsageError, RunFailed) as error:
            if rank:
                raise
            report.results.append(Result(FAIL, "ranks", str(error), advice_on_address(os.environ)))
            rank, world_size, not_measured = 0, 1, "no group: not measured"

    gather = functools.partial(measure.gather, here, world_size)
    facts_of_ranks = gather("looking around", lambda: facts)
    report.facts = {"world_size": world_size, "nodes": list(nodes_of(facts_of_ranks)), "ranks": facts_of_ranks}
    report.results += check_facts(facts_of_ranks)
    answers = measure.share_runs_dir(gather, rank, options.runs_dir, options.check_seconds / 2)
    report.results += measure.runs_dir(facts_of_ranks, answers)

    # All ranks choose the same device. Two ranks on one GPU would end in an error of NCCL.
    gpus = {(fact["host"], fact["gpu"]["uuid"]) for fact in facts_of_ranks if fact["gpu"]}
    device = "cuda" if len(gpus) == world_size else "cpu"
    seconds = gather("matrix product", lambda: measure.matrix_product_seconds(device))
    report.results += measure.slowest_rank(facts_of_ranks, seconds, device)
    if world_size > 1:
        group = dist.new_group(backend="nccl" if device == "cuda" else "gloo", timeout=meeting.group_timeout(limits))
        times = gather("all-reduce", lambda: measure.all_reduce_seconds(device, group))
        report.results += measure.all_reduce(facts_of_ranks, times, device)
    else:
        report.results.append(Result(OK, "all-reduce", not_measured or "one process: nothing to reduce"))

    report.show()
    # The exit code comes last: a launcher ends all ranks when the first one fails.
    return gather("finishing", lambda: int(report.verdict == FAIL))[0]


def advice_on_address(environ: Mapping[str, str]) -> str:
    """Advice for ranks that do not find each other."""
    address = environ.get("MASTER_ADDR", "")
    several = environ.get("LOCAL_WORLD_SIZE", environ["WORLD_SIZE"]) != environ["WORLD_SIZE"]
    if several and (address == "localhost" or address.startswith("127.")):
        return f"MASTER_ADDR={address} means another machine on each node: give the name or address of rank 0's."
    return ""


def parse(arguments: list[str], quiet: bool) -> argparse.Namespace:
    """The options. Raises SystemExit: 0 for --help, 2 for a mistake; with `quiet` nothing is printed."""

    def positive(text: str) -> int:
        if not text.isdecimal() or int(text) == 0:
            raise argparse.ArgumentTypeError(f"{text!r} is not a positive whole number")
        return int(text)

    seconds: dict[str, Any] = {"type": positive, "metavar": "S"}
    parser = argparse.ArgumentParser(prog="distloop doctor", description=(__doc__ or "").partition("\n")[0])
    add = parser.add_argument
    add("--runs-dir", default="runs", metavar="DIR", help="folder of run directories (%(default)s)")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="what a run would compute on")
    add("--expect-world", type=positive, metavar="N", help="how many ranks there should be")
    add("--join-seconds", default=120, **seconds, help="limit of the wait for all ranks (%(default)s)")
    add("--check-seconds", default=60, **seconds, help="limit of the wait for one rank (%(default)s)")
    add("--json", action="store_true", help="for scripts: all that each rank found, too")
    with contextlib.ExitStack() as silence:
        if quiet:
            nowhere = silence.enter_context(open(os.devnull, "w"))
            silence.enter_context(contextlib.redirect_stdout(nowhere))
            silence.enter_context(contextlib.redirect_stderr(nowhere))
        return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Check as the command line says; returns the exit code: 0 nothing fails, 1 something does, 2 wrong usage."""
    given = dict(os.environ)
    prepare_environment()
    try:
        options = parse(sys.argv[1:] if arguments is None else arguments, not talking.speaks(os.environ))
    except SystemExit as error:
        if error.code:
            talking.let_others_speak()
        raise
    roll_call = RollCall(stopping.WatchWithoutSaving())
    roll_call.limit_name = "--check-seconds"
    report = Report(options.json)
    roll_call.watch.attempt = report
    try:
        return examine(options, given, roll_call, report)
    except KeyboardInterrupt:  # a second Ctrl-C
        report.cut_off("failed", "interrupted from the keyboard")
        return 130
    except BaseException as error:
        report.results.append(Result(FAIL, "ranks", roll_call.report_failure(error).reason))
        report.show()
        return 1
    finally:
        roll_call.close()
