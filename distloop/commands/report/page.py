"""`distloop report`: the command, and the page around its sections."""

import argparse
import datetime
import gc
import sys
from pathlib import Path
from typing import Any

from markupsafe import Markup

from distloop import __version__
from distloop.commands.reading import is_run, runs_in
from distloop.commands.report import classes, compare, curve_plots, figures, overview, provenance, resources
from distloop.commands.report.plots import STYLE
from distloop.commands.report.read import read_record
from distloop.commands.report.sections import Section, environment
from distloop.errors import UsageError
from distloop.run.files import write_text

REPORT = "report.html"
TOP = Section("", "top.html", overview.overview)
SECTIONS = (
    Section("Curves", "plots.html", curve_plots.curves),
    Section("Figures", "figures.html", figures.figures),
    Section("Time", "time.html", resources.time_accounts),
    Section("Throughput and memory", "plots.html", resources.resources),
    Section("Confusion matrix", "confusion.html", classes.confusion),
    Section("Classes", "classes.html", classes.per_class),
    Section("Most confident mistakes", "mistakes.html", classes.mistakes),
    Section("Failures", "failures.html", provenance.failures),
    Section("Config", "config.html", provenance.config),
    Section("Config changes", "changes.html", provenance.changes),
    Section("Checkpoints", "checkpoints.html", provenance.checkpoints),
    Section("Environment", "environment.html", provenance.environment),
    Section("Uncommitted changes", "diff.html", provenance.diff),
)
TOP_OF_SEVERAL = Section("", "top_of_several.html", compare.overview)
SECTIONS_OF_SEVERAL = (
    Section("Ranking", "ranking.html", compare.ranking_table),
    Section("Curves", "plots.html", compare.curves),
    Section("Time", "time_of_several.html", compare.time_accounts),
)


def main(arguments: list[str] | None = None) -> int:
    """Write the report that the command line asks for; returns the exit code: 0 in order, 2 wrong usage."""
    parser = argparse.ArgumentParser(
        prog="distloop.commands.report",
        description="A run, or several beside each other, as one HTML file that needs no network. "
        "It can be written at any time, also while a run is running.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("runs", nargs="+", metavar="RUN", help="a run's directory, such as runs/digits")
    add("--output", metavar="FILE", help=f"where to write it (default: {REPORT} in the run, or here for several)")
    options = parser.parse_intermixed_args(arguments)
    gc.freeze()  # else what is imported is looked through for garbage again and again, while a million rows are read
    try:
        runs = _runs(options.runs)
        output = Path(options.output) if options.output else runs[0] / REPORT if len(runs) == 1 else Path(REPORT)
        if output.is_dir():
            raise UsageError(f"--output {output} is a directory: give a file, such as {output / REPORT}.")
        if not output.parent.is_dir():
            raise UsageError(f"--output {output}: there is no directory {output.parent}.")
        write_report(runs, output)
    except UsageError as error:
        print(f"distloop: {error}", file=sys.stderr)
        return 2
    print(f"report: {output}")
    return 0


def write_report(runs: list[Path], output: Path) -> None:
    """Write the report of one run or of several to `output`, whole or not at all. Raises UsageError if it cannot."""
    page = _page(runs)
    try:
        # ASCII is the same in every encoding, and characters that UTF-8 cannot encode (a broken name) do no harm.
        write_text(output, page.encode("ascii", "xmlcharrefreplace").decode())
    except OSError as error:
        reason = error.strerror or error
        raise UsageError(f"{output} cannot be written: {reason}. Choose another with --output.") from None


def _page(runs: list[Path]) -> str:
    variables: dict[str, Any]
    if len(runs) == 1:
        record = read_record(runs[0])
        variables = {"title": record.run.name, "state": record.run.state, "top": TOP.render(record)}
        variables["sections"] = [(section.title, *section.render(record)) for section in SECTIONS]
    else:
        comparison = compare.compare(runs)
        variables = {"title": f"{len(runs)} runs", "state": None, "top": TOP_OF_SEVERAL.render(comparison)}
        variables["sections"] = [(section.title, *section.render(comparison)) for section in SECTIONS_OF_SEVERAL]
    variables["style"] = Markup(STYLE.read_text(encoding="ascii"))
    variables["version"] = __version__
    variables["now"] = datetime.datetime.now().astimezone().strftime("%Y-%m-%d %H:%M:%S %Z")
    return environment().get_template("page.html").render(variables)


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
