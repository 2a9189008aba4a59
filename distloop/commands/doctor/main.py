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
import io
import json
import os
import sys
import threading
from collections.abc import Mapping
from typing import Any

from distloop.commands.doctor.results import FAIL, OK, WARN, Result, judge, nodes_of
from distloop.commands.tables import Entry, entries
from distloop.config.places import absolute, check_place
from distloop.errors import RunFailed, UsageError
from distloop.ranks import stopping, talking
from distloop.ranks.attempt_base import AttemptBase
from distloop.ranks.environment import prepare_environment
from distloop.ranks.roll_call import RollCall

STYLES = {OK: "green", WARN: "yellow", FAIL: "red"}


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
                counts = collections.Counter(result.verdict for result in self.results)
                summary = ", ".join(f"{counts[verdict]} {verdict}" for verdict in (FAIL, WARN, OK) if counts[verdict])
                talking.say(f"{entries(map(entry, self.results))}\ndistloop doctor: {self.verdict} ({summary})")
            self.is_due = False


def entry(result: Result) -> Entry:
    """The result as a row of the table."""
    head = [(f"{result.verdict:<4}", STYLES[result.verdict]), (f"  {result.check}", "")]
    advice = "-> " + result.advice.replace("\n", "\n   ") if result.advice else ""
    if result.check == "launch":  # its advice is the right command
        return Entry(head, result.found, advice)
    return Entry(head, f"{result.found}\n{advice}".rstrip())


def examine(options: argparse.Namespace, given: dict[str, str], roll_call: RollCall, report: Report) -> int:
    """Run all checks and print the results on rank 0. Returns the exit code, the same on all ranks. Collective."""
    here = roll_call.position
    here.enter("importing torch")
    import torch.distributed as dist

    from distloop.commands.doctor import measure
    from distloop.commands.doctor.checks import CHECKS, MEASUREMENTS
    from distloop.commands.doctor.facts import find_facts
    from distloop.config.settings import Ddp
    from distloop.ranks import launch_guards, meeting

    here.enter("looking around")
    own_facts = find_facts(given, options.runs_dir, options.device, options.expect_world)
    for variable in own_facts["unknown_interfaces"]:
        os.environ.pop(variable)  # ranks would not find each other; a check reports it
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if any(name not in os.environ for name in launch_guards.RANK_VARIABLES):
        rank, world_size = 0, 1  # a check reports what is missing
    report.is_due = rank == 0
    limits = Ddp(join_seconds=options.join_seconds, timeout_seconds=options.check_seconds)
    not_measured = "one process: nothing to reduce"
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
    facts = gather("looking around", lambda: own_facts)
    report.facts = {"world_size": world_size, "nodes": list(nodes_of(facts)), "ranks": facts}
    report.results += judge(CHECKS, facts)

    def add(check: str, key: str, values: list[Any]) -> None:
        """Add what the ranks have measured to their facts, and what the check says about it to the results."""
        for fact, value in zip(facts, values, strict=True):
            fact[key] = value
        report.results += judge({check: MEASUREMENTS[check]}, facts)

    add("run directory", "runs_dir", measure.share_runs_dir(gather, rank, options.runs_dir, options.check_seconds / 2))
    # All ranks choose the same device. Two ranks on one GPU would end in an error of NCCL.
    gpus = {(fact["host"], fact["gpu"]["uuid"]) for fact in facts if fact["gpu"]}
    device = "cuda" if len(gpus) == world_size else "cpu"
    for fact in facts:
        fact["measured_on"] = device
    add("speed", "product_seconds", gather("matrix product", lambda: measure.matrix_product_seconds(device)))
    if options.pictures:
        add("pictures", "pictures", gather("loading pictures", lambda: measure.picture_seconds(options.pictures)))
    if world_size > 1:
        group = dist.new_group(backend="nccl" if device == "cuda" else "gloo", timeout=meeting.group_timeout(limits))
        add("all-reduce", "all_reduce", gather("all-reduce", lambda: measure.all_reduce_seconds(device, group)))
    else:
        report.results.append(Result(OK, "all-reduce", not_measured))
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

    def place(option: str, text: str) -> str:
        try:
            check_place(option, text)
        except UsageError as error:
            raise argparse.ArgumentTypeError(str(error)) from None
        return str(absolute(text))

    seconds: dict[str, Any] = {"type": positive, "metavar": "S"}
    parser = argparse.ArgumentParser(prog="distloop doctor", description=(__doc__ or "").partition("\n")[0])
    add = parser.add_argument
    folder = functools.partial(functools.partial, place)
    add("--runs-dir", type=folder("--runs-dir"), default="runs", metavar="DIR", help="of run directories (%(default)s)")
    add(
        "--pictures", type=folder("--pictures"), metavar="DIR", help="measure decoders on the pictures of data.root DIR"
    )
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="what a run would compute on")
    add("--expect-world", type=positive, metavar="N", help="how many ranks there should be")
    add("--join-seconds", default=120, **seconds, help="limit of the wait for all ranks (%(default)s)")
    add("--check-seconds", default=60, **seconds, help="limit of the wait for one rank (%(default)s)")
    add("--json", action="store_true", help="for scripts: all that each rank found, too")
    nowhere = io.StringIO() if quiet else None
    with contextlib.redirect_stdout(nowhere or sys.stdout), contextlib.redirect_stderr(nowhere or sys.stderr):
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
