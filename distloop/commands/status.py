"""`distloop status`: a table of runs, ranked by a metric on request; below a single run its details."""

import argparse
import dataclasses
import json
import os
import sys
from pathlib import Path
from typing import Any

from distloop.commands import reading
from distloop.commands.ranking import Ranking, natural_order, rank
from distloop.commands.reading import Run, seconds_since
from distloop.commands.tables import Column, Entry, entries, printable, table
from distloop.errors import UsageError
from distloop.tracking.wording import UNKNOWN, age, encodable, number

STYLES = {"running": "green", "starting": "cyan", "stopped": "yellow", "failed": "red", "gone": "red", "damaged": "red"}
DIFFERS_WIDTH = 60  # characters on a terminal
MOST_RANKS, MOST_LINES = 16, 8
HELP = """\
A table of runs, or one run in detail.

  state    running, finished, stopped (to be continued), failed, starting;
           gone: status.json says running, but its process is not there;
           damaged: status.json cannot be read
  step     how many steps are done, of all; saved ones if it is not running
  best     the best validation so far @ the step after which it was
  written  when status.json was: at the start, the last save or the end
  differs  (with --sort) the settings in which the runs differ, without those
           that do not change what is trained
"""
REVERSE = """\
turn the order round: the worst run first. If no run says whether more or less of METRIC is better, less is taken for
better where its name has loss or error in it, and more for all others; --reverse then says that it is not so"""


def main(arguments: list[str]) -> int:
    """Print what the command line asks for; returns the exit code: 0 in order, 2 wrong usage."""
    options = _parser().parse_args(arguments)
    folder = Path(options.runs_dir)
    try:
        single = reading.is_run(folder)
        runs = [reading.read_run(folder)] if single else _runs_in(folder)
        ranking = rank(runs, options.sort, options.reverse) if options.sort and runs else None
    except UsageError as error:
        print(f"distloop: {printable(str(error))}", file=sys.stderr)
        return 2
    runs = ranking.runs if ranking else runs
    if options.json:
        text = json.dumps([_as_json(run, index, ranking, single) for index, run in enumerate(runs)], indent=1)
    elif not runs:
        text = f"no runs in {printable(str(folder.resolve()))}"
    else:
        text, without_room = table(columns(runs, ranking, with_reasons=not single))
        below = details(runs[0]) if single else _below(runs, without_room)
        text += f"\n\n{below}" if below else ""
    try:
        print(encodable(text, sys.stdout.encoding), flush=True)
    except BrokenPipeError:  # as in `distloop status | head`; Python would print the error again when it ends
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def columns(runs: list[Run], ranking: Ranking | None, with_reasons: bool = True) -> list[Column]:
    """The columns of the table. A column in which no run has a value is left out."""
    shown = []
    if ranking:
        places = [_text(ranking.place(index)) for index in range(len(runs))]
        shown.append(Column("#", places, align_right=True))
    shown.append(Column("run", [run.name for run in runs], least_width=20, overflow="fold"))
    styles = [STYLES.get(run.state, "") for run in runs]
    shown.append(Column("state", [run.state for run in runs], styles, least_width=8))
    if ranking:
        if ranking.is_metric:
            values = [f"{number(best[0])} @{best[1]}" if best else UNKNOWN for best in ranking.values]
            shown.append(Column(ranking.by, values, least_width=16, overflow="fold"))
        differs = list(map(_pairs, ranking.settings))
        shown.append(Column("differs", differs, drop_order=7, least_width=20, overflow="fold"))
    order = 6 if ranking else 0
    shown.append(Column("step", list(map(_progress, runs)), align_right=True, drop_order=order, least_width=20))
    if not ranking or any(run.best_rule and run.best_rule[0] != ranking.by for run in runs):
        shown.append(Column("best", list(map(_best, runs)), drop_order=4 if ranking else 6))
    shown.append(Column("written", [age(seconds_since(run.written)) for run in runs], align_right=True, drop_order=5))
    shown.append(Column("attempt", [_text(run.attempt) for run in runs], align_right=True, drop_order=3))
    shown.append(Column("Slurm job", list(map(_job, runs)), drop_order=2))
    if with_reasons:
        reasons = [(run.reason or "").strip().partition("\n")[0] or UNKNOWN for run in runs]
        shown.append(Column("reason", reasons, drop_order=1, overflow="fill"))
    required = ("run", "state", "step", "written", "attempt")
    return [column for column in shown if column.title in required or set(column.cells) != {UNKNOWN}]


def _below(runs: list[Run], without_room: list[Column]) -> str:
    """The settings and reasons for which the table has no room."""
    texts = [column.cells for column in without_room if column.overflow != "cut"]
    lines = ["\n".join(cells[index] for cells in texts if cells[index] != UNKNOWN) for index in range(len(runs))]
    heads = [[(run.name, STYLES.get(run.state, ""))] for run in runs]
    return entries(map(Entry, heads, lines))


def details(run: Run) -> str:
    """What the table does not show of a single run."""
    last, failure = reading.last_validation(run.path), reading.failure_of(run)
    steps = reading.checkpoint_steps(run.path)
    metrics = [f"{name} {number(value)}" for name, value in reading.metrics_in(last or {}).items()]
    ranks = [f"{_place(rank)} · process {rank.get('pid')}" for rank in run.ranks[:MOST_RANKS]]
    others = len(run.ranks) - MOST_RANKS
    traceback = str(failure.get("traceback") or "").splitlines()[-MOST_LINES:] if failure else []
    goes_on = f"goes on after step {steps[-1]}" if steps else "begins it again"
    lines = {
        "directory": [str(run.path)],
        "reason": (run.reason or "").strip().splitlines()[:MOST_LINES],
        "failed first": [_place(failure), *traceback] if failure else [],
        "checkpoints": [f"step {', '.join(map(str, steps))}" if steps else "none"],
        "to continue": [f"the same command {goes_on}"] if run.state in ("stopped", "failed", "gone") else [],
        "last validation": [f"step {last['step']} · {' · '.join(metrics)}"] if last else [],
        "this attempt": [f"began after step {run.first_step}"] if run.first_step else [],
        "ranks" if run.state == "running" else "ranks were": [*ranks, *([f"and {others} more"] if others > 0 else [])],
    }
    return entries(Entry([(title, "")], "\n".join(texts)) for title, texts in lines.items())


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="distloop status",
        description=HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("runs_dir", nargs="?", default="runs", help="folder of run directories, or one (default: runs)")
    add("--sort", metavar="METRIC", help="rank by a validation metric, the best first, or by step, written or name")
    add("--reverse", action="store_true", help=REVERSE)
    add("--json", action="store_true", help="the same as JSON")
    return parser


def _runs_in(folder: Path) -> list[Run]:
    try:
        return sorted(reading.runs_in(folder), key=lambda run: natural_order(run.name))
    except FileNotFoundError:
        hint = "" if folder.is_absolute() else f" (looked for {folder.absolute()})"
        raise UsageError(f"{folder}: there is no such folder{hint}. Give the one that holds your runs.") from None
    except NotADirectoryError:
        raise UsageError(f"{folder} is a file. Give the folder that holds your runs, or a run's own.") from None
    except OSError as error:
        raise UsageError(f"{folder} cannot be read: {error.strerror}.") from None


def _as_json(run: Run, index: int, ranking: Ranking | None, detailed: bool) -> dict[str, Any]:
    content = {**dataclasses.asdict(run), "path": str(run.path), "seconds_since_written": seconds_since(run.written)}
    if ranking:
        value, step = ranking.values[index] or (None, None)
        content |= {"place": ranking.place(index), "differs": ranking.settings[index]}
        if ranking.is_metric:
            content |= {"sorted_by": ranking.by, "direction": ranking.direction, "value": value, "value_step": step}
    if detailed:
        steps, last = reading.checkpoint_steps(run.path), reading.last_validation(run.path)
        content |= {"checkpoints": steps, "last_validation": last, "failure": reading.failure_of(run)}
    return content


def _place(rank: dict[str, Any]) -> str:
    return f"rank {rank.get('rank')} on {rank.get('node')} · step {rank.get('step')} · {rank.get('phase')}"


def _progress(run: Run) -> str:
    percent = f" {100 * run.step // run.total_steps}%" if run.step is not None and run.total_steps else ""
    return f"{_text(run.step)}/{_text(run.total_steps)}{percent}"


def _best(run: Run) -> str:
    metric = run.best_rule[0] if run.best_rule else ""
    if run.best is None or metric not in run.best:
        return UNKNOWN
    return f"{metric} {number(run.best[metric])} @{_text(run.best.get('step'))}"


def _job(run: Run) -> str:
    return _text(run.slurm_job) + (f" restart {run.slurm_restart}" if run.slurm_job and run.slurm_restart else "")


def _pairs(settings: dict[str, str]) -> str:
    """ "optim.lr=0.1 seed=2"; on a terminal those that have room in DIFFERS_WIDTH, and an ellipsis."""
    pairs = [f"{key}={value}" for key, value in settings.items()]
    fitting = len(pairs)
    while sys.stdout.isatty() and len(" ".join(pairs[:fitting])) > DIFFERS_WIDTH:
        fitting -= 1
    return " ".join([*pairs[:fitting], *(["…"] if fitting < len(pairs) else [])]) or UNKNOWN


def _text(value: int | str | None) -> str:
    return UNKNOWN if value is None else str(value)
