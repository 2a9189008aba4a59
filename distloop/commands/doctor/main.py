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

from distloop.commands.doctor.lines import FAIL, OK, WARN, Line, nodes_of
from distloop.errors import RunFailed, UsageError
from distloop.ranks import environment, stopping, talking
from distloop.ranks.roll_call import RollCall

COLOURS = {OK: "32", WARN: "33", FAIL: "31"}


class Report:
    """The lines so far, shown once: when all is done, or when the process has to end before that."""

    def __init__(self, as_json: bool) -> None:
        self.as_json, self.is_shown = as_json, os.environ.get("RANK", "0") == "0"
        self.lines: list[Line] = []
        self.about: dict[str, Any] = {}  # for scripts, beside the lines
        self._showing = threading.Lock()

    @property
    def verdict(self) -> str:
        return max((line.verdict for line in self.lines), key=(OK, WARN, FAIL).index, default=OK)

    def cut_off(self, state: str, reason: str) -> None:
        """The process ends at once, without its main thread."""
        self.lines.append(Line(FAIL, "ranks", reason))
        self.show()

    def show(self) -> None:
        """Print the table, unless it has been or is another rank's."""
        with self._showing:
            if self.is_shown:
                talking.say(self._json() if self.as_json else self._table(sys.stdout.isatty()))
            self.is_shown = False

    def _json(self) -> str:
        lines = [line._asdict() for line in self.lines]
        return json.dumps({"verdict": self.verdict, **self.about, "lines": lines}, indent=1)

    def _table(self, colours: bool) -> str:
        shown = []
        width = max(len(line.check) for line in self.lines)
        indent = " " * (8 + width + 2)
        for line in self.lines:
            verdict = f"{line.verdict:<4}"
            if colours and "NO_COLOR" not in os.environ:
                verdict = f"\033[{COLOURS[line.verdict]}m{verdict}\033[0m"
            found = line.found.replace("\n", f"\n{indent}")
            shown.append(f"  {verdict}  {line.check:<{width}}  {found}")
            shown += [
                f"{indent}-> {text}" if not at else f"{indent}   {text}"
                for at, text in enumerate(line.advice.splitlines())
            ]
        counts = {verdict: sum(line.verdict == verdict for line in self.lines) for verdict in (FAIL, WARN, OK)}
        count = ", ".join(f"{number} {verdict}" for verdict, number in counts.items() if number)
        return "\n".join([*shown, f"distloop doctor: {self.verdict} ({count})"])


def examine(options: argparse.Namespace, given: dict[str, str], roll_call: RollCall, report: Report) -> int:
    """Do all checks, and show them on rank 0; returns the exit code, the same on all ranks. Collective."""
    here = roll_call.position
    here.enter("importing torch")
    import torch.distributed as dist

    from distloop.commands.doctor import measure as together
    from distloop.commands.doctor.checks import check_facts
    from distloop.commands.doctor.facts import find_facts
    from distloop.config.settings import Ddp
    from distloop.ranks import launch_guards
    from distloop.ranks import meeting as rendezvous

    here.enter("looking around")
    facts = find_facts(given, options.runs_dir, options.device, options.expect_world)
    for variable in facts["unknown_interfaces"]:
        os.environ.pop(variable)  # ranks would not find each other; it is said below
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if any(name not in os.environ for name in launch_guards.RANK_VARIABLES):
        rank, world_size = 0, 1  # what is missing is said below
    report.is_shown = rank == 0
    limits = Ddp(join_seconds=options.join_seconds, timeout_seconds=options.check_seconds)
    apart = ""
    if world_size > 1:
        here.enter("meeting the other ranks")
        try:
            rendezvous.start_group(os.environ, limits, None, roll_call)
        except (UsageError, RunFailed) as error:
            if rank:
                raise
            report.lines.append(Line(FAIL, "ranks", str(error), advice_on_address(os.environ)))
            rank, world_size, apart = 0, 1, "no group: not measured"

    ranks = together.Ranks(here, rank, world_size)
    everyone = ranks.gather("looking around", lambda: facts)
    report.about = {"world_size": world_size, "nodes": list(nodes_of(everyone)), "ranks": everyone}
    report.lines += check_facts(everyone)
    answers = together.share_runs_dir(ranks, options.runs_dir, options.check_seconds / 2)
    report.lines += together.runs_dir(everyone, answers)

    # All ranks decide alike. Two ranks on one GPU would end in an error of NCCL's.
    gpus = {(fact["host"], fact["gpu"]["uuid"]) for fact in everyone if fact["gpu"]}
    device = "cuda" if len(gpus) == world_size else "cpu"
    seconds = ranks.gather("matrix product", lambda: together.matrix_product_seconds(device))
    report.lines += together.slowest_rank(everyone, seconds, device)
    if world_size > 1:
        group = dist.new_group(backend="nccl" if device == "cuda" else "gloo", timeout=rendezvous.group_timeout(limits))
        times = ranks.gather("all-reduce", lambda: together.all_reduce_seconds(device, group))
        report.lines += together.all_reduce(everyone, times, device)
    else:
        report.lines.append(Line(OK, "all-reduce", apart or "one process: nothing to reduce"))

    report.show()
    # Only now: a launcher ends all ranks when the first one fails.
    return ranks.gather("finishing", lambda: int(report.verdict == FAIL))[0]


def advice_on_address(environ: Mapping[str, str]) -> str:
    """What to do when ranks do not find each other."""
    address = environ.get("MASTER_ADDR", "")
    several = environ.get("LOCAL_WORLD_SIZE", environ["WORLD_SIZE"]) != environ["WORLD_SIZE"]
    if several and (address == "localhost" or address.startswith("127.")):
        return f"MASTER_ADDR={address} means another machine on each node: give the name or address of rank 0's."
    return ""


def parse(arguments: list[str], quiet: bool) -> argparse.Namespace:
    """The options. Leaves with SystemExit: 0 for --help, 2 for a mistake, said unless `quiet`."""
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
    given = dict(os.environ)  # as it was before what follows has put it in order
    try:
        environment.adopt_slurm(os.environ)
        environment.share_cpus(os.environ)  # before torch reads the thread count
        options = parse(sys.argv[1:] if arguments is None else arguments, not talking.speaks(os.environ))
    except SystemExit as error:
        if error.code:
            talking.let_others_speak()
        raise
    except UsageError as error:
        talking.say(f"distloop: {error}", sys.stderr)
        return 2
    roll_call = RollCall(stopping.WatchWithoutSaving())
    roll_call.limit_name = "--check-seconds"
    report = Report(options.json)
    roll_call.watch.before_leaving.append(report.cut_off)
    try:
        return examine(options, given, roll_call, report)
    except KeyboardInterrupt:  # a second Ctrl-C
        report.cut_off("failed", "interrupted from the keyboard")
        return 130
    except BaseException as error:
        report.lines.append(Line(FAIL, "ranks", roll_call.report_failure(error).reason))
        report.show()
        return 1
    finally:
        roll_call.close()
