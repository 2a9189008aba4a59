"""Check machines, devices and network before a big job, alone or under any launcher.

    distloop doctor
    accelerate launch --multi_gpu --num_processes 8 … distloop/doctor.py --expect-world 8
    srun python -m distloop.doctor --runs-dir /shared/runs

All ranks look around and measure; rank 0 prints a table with a verdict (ok, warn, fail) for each line and what to
do. Exit code 0: no line fails, 1: one does, 2: wrong usage.
"""

import argparse
import contextlib
import io
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
        self.as_json, self.is_due = as_json, os.environ.get("RANK", "0") == "0"
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
            if self.is_due:
                talking.say(self._json() if self.as_json else self._table(sys.stdout.isatty()))
            self.is_due = False

    def _json(self) -> str:
        results = [result._asdict() for result in self.results]
        return json.dumps({"verdict": self.verdict, **self.facts, "lines": results}, indent=1)

    def _table(self, colours: bool) -> str:
        lines = []
        width = max(len(result.check) for result in self.results)
        indent = " " * (8 + width + 2)
        for result in self.results:
            verdict = f"{result.verdict:<4}"
            if colours and "NO_COLOR" not in os.environ:
                verdict = f"\033[{COLOURS[result.verdict]}m{verdict}\033[0m"
            finding = result.found.replace("\n", f"\n{indent}")
            lines.append(f"  {verdict}  {result.check:<{width}}  {finding}")
            lines += [
                f"{indent}{'  ' if index else '->'} {text}" for index, text in enumerate(result.advice.splitlines())
            ]
        counts = {verdict: sum(result.verdict == verdict for result in self.results) for verdict in (FAIL, WARN, OK)}
        summary = ", ".join(f"{count} {verdict}" for verdict, count in counts.items() if count)
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

    ranks = measure.Ranks(here, rank, world_size)
    facts_of_ranks = ranks.gather("looking around", lambda: facts)
    report.facts = {"world_size": world_size, "nodes": list(nodes_of(facts_of_ranks)), "ranks": facts_of_ranks}
    report.results += check_facts(facts_of_ranks)
    answers = measure.share_runs_dir(ranks, options.runs_dir, options.check_seconds / 2)
    report.results += measure.runs_dir(facts_of_ranks, answers)

    # All ranks choose the same device. Two ranks on one GPU would end in an error of NCCL.
    gpus = {(fact["host"], fact["gpu"]["uuid"]) for fact in facts_of_ranks if fact["gpu"]}
    device = "cuda" if len(gpus) == world_size else "cpu"
    seconds = ranks.gather("matrix product", lambda: measure.matrix_product_seconds(device))
    report.results += measure.slowest_rank(facts_of_ranks, seconds, device)
    if world_size > 1:
        group = dist.new_group(backend="nccl" if device == "cuda" else "gloo", timeout=meeting.group_timeout(limits))
        times = ranks.gather("all-reduce", lambda: measure.all_reduce_seconds(device, group))
        report.results += measure.all_reduce(facts_of_ranks, times, device)
    else:
        report.results.append(Result(OK, "all-reduce", not_measured or "one process: nothing to reduce"))

    report.show()
    # The exit code comes last: a launcher ends all ranks when the first one fails.
    return ranks.gather("finishing", lambda: int(report.verdict == FAIL))[0]


def advice_on_address(environ: Mapping[str, str]) -> str:
    """Advice for ranks that do not find each other."""
    address = environ.get("MASTER_ADDR", "")
    several = environ.get("LOCAL_WORLD_SIZE", environ["WORLD_SIZE"]) != environ["WORLD_SIZE"]
    if several and (address == "localhost" or address.startswith("127.")):
        return f"MASTER_ADDR={address} means another machine on each node: give the name or address of rank 0's."
    return ""


def parse(arguments: list[str], quiet: bool) -> argparse.Namespace:
    """The options. Raises SystemExit: 0 for --help, 2 for a mistake; with `quiet` nothing is printed."""
    parser = argparse.ArgumentParser(prog="distloop doctor", description=(__doc__ or "").partition("\n")[0])

    def positive(text: str) -> int:
        if not text.isdecimal() or int(text) == 0:
            raise argparse.ArgumentTypeError(f"{text!r} is not a positive whole number")
        return int(text)

    parser.add_argument("--runs-dir", default="runs", metavar="DIR", help="folder of run directories (%(default)s)")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="what a run would compute on")
    parser.add_argument("--expect-world", type=positive, metavar="N", help="how many ranks there should be")
    parser.add_argument(
        "--join-seconds", type=positive, default=120, metavar="S", help="limit of the wait for all ranks (%(default)s)"
    )
    parser.add_argument(
        "--check-seconds", type=positive, default=60, metavar="S", help="limit of the wait for one rank (%(default)s)"
    )
    parser.add_argument("--json", action="store_true", help="for scripts: all that each rank found, too")
    nowhere = io.StringIO()
    with contextlib.ExitStack() as silence:
        if quiet:
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
