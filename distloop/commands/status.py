"""`distloop status`: a table of runs, ranked by a metric on request.

On a terminal the table has colours and fits the width. In a pipe its lines are whole, with two or more spaces between
columns.
"""

import argparse
import dataclasses
import json
import os
import sys
from pathlib import Path
from typing import Any, NamedTuple

from distloop.commands import reading
from distloop.commands.ranking import Ranking, natural_order, rank
from distloop.commands.reading import Run, seconds_since
from distloop.errors import UsageError
from distloop.tracking.wording import UNKNOWN, age, number

STYLES = {"running": "green", "starting": "cyan", "stopped": "yellow", "failed": "red", "gone": "red", "damaged": "red"}
FOLDED = ("run", "differs")  # columns that a narrow terminal folds into several lines, where it cuts others
DIFFERS_WIDTH = 60
MOST_RANKS, MOST_LINES = 16, 8


class Column(NamedTuple):
    """A column of the table."""

    title: str
    cells: list[str]
    align_right: bool = False
    drop_order: int = 0
    """A narrow terminal drops columns in the order of this number; 0: the column is never dropped."""
    least_width: int = 1000
    """The width to which the column may be cut or folded."""

    @property
    def width(self) -> int:
        return max(map(len, [self.title, *self.cells]))


def main(arguments: list[str]) -> int:
    """Print what the command line asks for; returns the exit code: 0 in order, 2 wrong usage."""
    options = _parser().parse_args(arguments)
    folder = Path(options.runs_dir)
    try:
        single = reading.is_run(folder)
        runs = [reading.read_run(folder)] if single else _runs_in(folder)
        ranking = rank(runs, options.sort, options.reverse) if options.sort and runs else None
    except UsageError as error:
        print(f"distloop: {error}", file=sys.stderr)
        return 2
    runs = ranking.runs if ranking else runs
    try:
        if options.json:
            print(json.dumps([_as_json(run, index, ranking, single) for index, run in enumerate(runs)], indent=1))
        elif not runs:
            print(f"no runs in {folder.resolve()}")
        else:
            _print_table(columns(runs, ranking, with_reasons=not single), runs)
            if single:
                print("\n" + "\n".join(details(runs[0])))
        sys.stdout.flush()
    except BrokenPipeError:  # as in `distloop status | head`; Python would print the error again when it ends
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def columns(runs: list[Run], ranking: Ranking | None, with_reasons: bool = True) -> list[Column]:
    """The columns of the table. A column in which no run has a value is left out."""
    table = []
    if ranking:
        places = [ranking.place(index) for index in range(len(runs))]
        table.append(Column("#", [_text(place) for place in places], align_right=True))
    table.append(Column("run", [run.name for run in runs], least_width=20))
    table.append(Column("state", [run.state for run in runs]))
    if ranking:
        if ranking.is_metric:
            values = [f"{number(best[0])} @{best[1]}" if best else UNKNOWN for best in ranking.values]
            table.append(Column(ranking.by, values))
        table.append(Column("differs", list(map(_pairs, ranking.settings)), least_width=24))
    table.append(Column("step", list(map(_progress, runs)), align_right=True, drop_order=6 if ranking else 0))
    if not ranking or any(run.best_rule and run.best_rule[0] != ranking.by for run in runs):
        table.append(Column("best", list(map(_best, runs)), drop_order=4 if ranking else 0))
    table.append(Column("written", [age(seconds_since(run.written)) for run in runs], align_right=True, drop_order=5))
    table.append(Column("attempt", [_text(run.attempt) for run in runs], align_right=True, drop_order=3))
    table.append(Column("Slurm job", list(map(_job, runs)), drop_order=2))
    if with_reasons:
        reasons = [(run.reason or "").strip().partition("\n")[0] or UNKNOWN for run in runs]
        table.append(Column("reason", reasons, drop_order=1, least_width=30))
    required = ("run", "state", "step", "written", "attempt")
    return [column for column in table if column.title in required or set(column.cells) != {UNKNOWN}]


def fit(table: list[Column], width: int) -> dict[str, int]:
    """title -> width, for the columns that fit into a terminal of this width."""
    widths = {column.title: min(column.width, column.least_width) for column in table}
    for column in sorted(table, key=lambda column: column.drop_order):
        if column.drop_order and sum(widths.values()) + 2 * (len(widths) - 1) > width:
            del widths[column.title]
    spare = width - sum(widths.values()) - 2 * (len(widths) - 1)
    for column in table:
        if column.title in widths:
            growth = min(max(0, spare), column.width - widths[column.title])
            widths[column.title] += growth
            spare -= growth
    return widths


def details(run: Run) -> list[str]:
    """The lines about a single run below its row."""
    last, failure = reading.last_validation(run.path), reading.failure_of(run)
    steps = ", ".join(map(str, reading.checkpoint_steps(run.path)))
    metrics = [f"{name} {number(value)}" for name, value in reading.metrics_in(last or {}).items()]
    ranks = [f"{_place(rank)} · process {rank.get('pid')}" for rank in run.ranks[:MOST_RANKS]]
    others = len(run.ranks) - MOST_RANKS
    traceback = str(failure.get("traceback") or "").splitlines()[-MOST_LINES:] if failure else []
    lines = {
        "directory": [str(run.path)],
        "checkpoints": [f"step {steps}" if steps else "none"],
        "last validation": [f"step {last['step']} · {' · '.join(metrics)}"] if last else [],
        "this attempt": [f"began after step {run.first_step}"] if run.first_step else [],
        "ranks": [*ranks, *([f"and {others} more"] if others > 0 else [])],
        "reason": (run.reason or "").strip().splitlines()[:MOST_LINES],
        "failed first": [_place(failure), *traceback] if failure else [],
    }
    return [
        f"  {'' if index else title:<16}  {text}".rstrip()
        for title, texts in lines.items()
        for index, text in enumerate(texts)
    ]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="distloop status",
        description="A table of runs, or one run in detail. A run that says it is running, but whose process is not "
        "there, is shown as gone.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("runs_dir", nargs="?", default="runs", help="folder of run directories, or one (default: runs)")
    add("--sort", metavar="METRIC", help="rank by a validation metric, the best first, or by step, written or name")
    other_way = "the other way round, as for a metric not named loss or error of which less is better"
    add("--reverse", action="store_true", help=other_way)
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


def _print_table(table: list[Column], runs: list[Run]) -> None:
    if not sys.stdout.isatty():
        print("\n".join(plain_lines(table)))
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(highlight=False)
    styles = [STYLES.get(run.state, "") for run in runs]
    widths = fit(table, console.width)
    rich_table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="bold")
    columns = [column for column in table if column.title in widths]
    for column in columns:
        fold = column.title in FOLDED
        rich_table.add_column(
            Text(column.title),
            justify="right" if column.align_right else "left",
            width=widths[column.title],
            no_wrap=not fold,
            overflow="fold" if fold else "ellipsis",
        )
    for index, style in enumerate(styles):
        rich_table.add_row(*(Text(column.cells[index], style if column.title == "state" else "") for column in columns))
    console.print(rich_table)
    for column in table:
        if column.title == "reason" and column not in columns:  # it has no room beside the other columns
            console.print()
            for run, style, reason in zip(runs, styles, column.cells, strict=True):
                if reason != UNKNOWN:
                    line = Text.assemble((run.name, style), f": {reason}")
                    console.print(line, no_wrap=True, overflow="ellipsis")


def plain_lines(table: list[Column]) -> list[str]:
    """The table as lines, without trailing spaces."""
    padded = [
        [f"{cell:{'>' if column.align_right else '<'}{column.width}}" for cell in (column.title, *column.cells)]
        for column in table
    ]
    return ["  ".join(cells).rstrip() for cells in zip(*padded, strict=True)]


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
    """ "optim.lr=0.1 seed=2", cut to DIFFERS_WIDTH with an ellipsis."""
    pairs = [f"{key}={value}" for key, value in settings.items()]
    fitting = len(pairs)
    while len(" ".join(pairs[:fitting])) > DIFFERS_WIDTH:
        fitting -= 1
    return " ".join([*pairs[:fitting], *(["…"] if fitting < len(pairs) else [])]) or UNKNOWN


def _text(value: int | str | None) -> str:
    return UNKNOWN if value is None else str(value)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
