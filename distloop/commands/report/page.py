"""`distloop report`: the command, and the page around its sections."""

from __future__ import annotations

import argparse
import datetime
import html
import sys
from collections.abc import Callable
from pathlib import Path

from distloop import __version__
from distloop.commands.reading import is_run, runs_in
from distloop.commands.report import classes, compare, overview, provenance, resources, training
from distloop.commands.report.markup import quiet, section, text
from distloop.commands.report.read import Record, read_record
from distloop.commands.report.style import style_sheet
from distloop.errors import UsageError
from distloop.run.files import write_text

REPORT = "report.html"
POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"  # the page may load nothing
# What a damaged file may raise. The section then says so; the other sections are not affected.
DAMAGED = (TypeError, KeyError, ValueError, AttributeError, IndexError, OverflowError)
SECTIONS: tuple[tuple[str, Callable[[Record], str]], ...] = (
    ("Curves", training.curves),
    ("Time", resources.time_accounts),
    ("Throughput and memory", resources.resources),
    ("Confusion matrix", classes.confusion),
    ("Classes", classes.per_class),
    ("Most confident mistakes", classes.mistakes),
    ("Failures", provenance.failures),
    ("Config", provenance.config),
    ("Config changes", provenance.changes),
    ("Checkpoints", provenance.checkpoints),
    ("Environment", provenance.environment),
    ("Uncommitted changes", provenance.diff),
)


def main(arguments: list[str] | None = None) -> int:
    """Write the report that the command line asks for; returns the exit code: 0 in order, 2 wrong usage."""
    parser = argparse.ArgumentParser(
        prog="distloop.commands.report",
        description="A run, or several beside each other, as one HTML file that needs no network. "
        "It can be written at any time, also while a run is running.",
        allow_abbrev=False,
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="a run's directory, such as runs/digits")
    parser.add_argument(
        "--output", metavar="FILE", help=f"where to write it (default: {REPORT} in the run, or here for several)"
    )
    options = parser.parse_intermixed_args(arguments)
    try:
        runs = _runs(options.runs)
        output = Path(options.output) if options.output else runs[0] / REPORT if len(runs) == 1 else Path(REPORT)
        _check_output(output)
        write_report(runs, output)
    except UsageError as error:
        print(f"distloop: {error}", file=sys.stderr)
        return 2
    print(f"report: {output}")
    return 0


def write_report(runs: list[Path], output: Path) -> None:
    """Write the report of one run, or the comparison of several, to `output`: whole or not at all.

    Raises UsageError if the file cannot be written.
    """
    page = _page(runs)
    try:
        # ASCII is the same in every encoding, and characters that UTF-8 cannot encode (a broken name) do no harm.
        write_text(output, page.encode("ascii", "xmlcharrefreplace").decode())
    except OSError as error:
        raise UsageError(
            f"{output} cannot be written: {error.strerror or error}. Choose another with --output."
        ) from None


def _page(runs: list[Path]) -> str:
    if len(runs) == 1:
        record = read_record(runs[0])
        title = record.run.name
        body = _guarded(overview.overview, record, f"<h1>{text(title)}</h1>")
        body += "".join(section(name, _guarded(show, record)) for name, show in SECTIONS)
    else:
        title = f"{len(runs)} runs"
        body = compare.comparison(runs)
    now = datetime.datetime.now().astimezone().strftime("%Y-%m-%d %H:%M:%S %Z")
    return (
        '<!DOCTYPE html><html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{html.escape(title)} · distloop</title><style>{style_sheet()}</style></head>"
        f"<body><main>{body}<footer>distloop {__version__} · as of {text(now)}</footer></main></body></html>\n"
    )


def _guarded(show: Callable[[Record], str], record: Record, before: str = "") -> str:
    """What `show` returns; if a damaged file makes it fail, `before` and a sentence about that."""
    try:
        return show(record)
    except DAMAGED as error:
        return before + quiet(f"This cannot be shown: a file is damaged ({type(error).__name__}: {error}).")


def _runs(names: list[str]) -> list[Path]:
    """The run directories, each once. Raises UsageError for a path that is none."""
    runs: dict[Path, Path] = {}
    for name in names:
        path = Path(name)
        if not path.is_dir():
            raise UsageError(f"{name}: there is no such directory (looked for {path.resolve()}).")
        if not is_run(path):
            inside = sorted(run.name for run in runs_in(path))
            hint = f" It holds {len(inside)} runs: name them, as in {path / inside[0]} or {path}/*." if inside else ""
            raise UsageError(f"{name} is no run's directory.{hint}")
        runs.setdefault(path.resolve(), path)
    return list(runs.values())


def _check_output(output: Path) -> None:
    """Raise UsageError before the work if `output` cannot be a file."""
    if output.is_dir():
        raise UsageError(f"--output {output} is a directory: give a file, such as {output / REPORT}.")
    if not output.parent.is_dir():
        raise UsageError(f"--output {output}: there is no directory {output.parent}.")
