"""The sections about what a run was, and what it left: config, environment, checkpoints, failures. Each is HTML."""

from __future__ import annotations

import json
import shlex
from typing import Any

from distloop.commands.report.markup import folded, number_html, pairs, quiet, table, text
from distloop.commands.report.read import LONGEST_TEXT, Part, Record
from distloop.config.comparison import dotted, flatten
from distloop.config.settings import Config
from distloop.tracking.wording import UNKNOWN, file_size

KEYS_OF_ONE_RUN = ("config", "name", "runs_dir")  # each run has its own; they are no change
MOST_LINES = 6000  # of a diff


def config(record: Record) -> str:
    """The settings that differ from their defaults, and all settings, folded."""
    if record.config.problem:
        return quiet(record.config.problem)
    settings, defaults = dotted(record.config.value), dotted(as_yaml(flatten(Config())))
    rows = [
        [f"<code>{text(key)}</code>", _value(value), _value(defaults[key]) if key in defaults else UNKNOWN]
        for key, value in settings.items()
        if key not in KEYS_OF_ONE_RUN and value != defaults.get(key)
    ]
    html = table(["setting", "here", "default"], rows, left=3) if rows else quiet("All settings have their defaults.")
    everything = "\n".join(f"{key}: {_word(value)}" for key, value in settings.items())
    return html + folded(f"All {len(settings)} settings", f'<pre class="wrap">{text(everything)}</pre>')


def changes(record: Record) -> str:
    """The changes of settings with which the run was extended."""
    if record.changes.problem:
        is_missing = record.changes.problem.startswith("There is no")
        return quiet(record.changes.problem + (" The config never changed." if is_missing else ""))
    rows = []
    for change in record.changes.value:
        for key, pair in change["changes"].items():
            old, new = pair if isinstance(pair, list) and len(pair) == 2 else (None, pair)
            when = f"attempt {number_html(change.get('after_attempt'))}, step {number_html(change.get('after_step'))}"
            rows.append([when, f"<code>{text(key)}</code>", _value(old), _value(new)])
    return table(["after", "setting", "old", "new"], rows, left=4) if rows else quiet("The config never changed.")


def environment(record: Record) -> str:
    """Versions, machine and command."""
    if record.environment.problem:
        return quiet(record.environment.problem)
    others = dict(record.environment.value)
    command, versions = others.pop("command", None), others.pop("versions", None)
    changed = others.pop("git_changes", None)
    rows = [(key.replace("_", " "), text(_word(value))) for key, value in others.items() if value is not None]
    if isinstance(versions, dict):
        rows.insert(0, ("versions", " · ".join(f"{text(k)} {text(v)}" for k, v in versions.items() if v)))
    if changed:
        rows.append(("git changes", "<br>".join(f"<code>{text(line)}</code>" for line in changed)))
    words = " ".join(shlex.quote(str(word)) for word in command) if isinstance(command, list) else None
    html = f'<h3 style="margin-top:16px">Command</h3><pre class="wrap">{text(words)}</pre>' if words else ""
    return pairs(rows) + html


def diff(record: Record) -> str:
    """The uncommitted changes, folded."""
    if record.diff.problem:
        return quiet(record.diff.problem)
    content = record.diff.value
    if not content.strip():
        return quiet("There were no uncommitted changes.")
    lines = content[:LONGEST_TEXT].splitlines()
    html = "\n".join(map(_diff_line, lines[:MOST_LINES]))
    cut = quiet("The rest is in git.diff.") if len(content) > LONGEST_TEXT or len(lines) > MOST_LINES else ""
    added = sum(line.startswith("+") and not line.startswith("+++") for line in lines)
    removed = sum(line.startswith("-") and not line.startswith("---") for line in lines)
    title = f"{len(content.splitlines()):,} lines: {added:,} added, {removed:,} removed"
    return folded(title, f"<pre>{html}</pre>{cut}")


def checkpoints(record: Record) -> str:
    """The table of checkpoints."""
    if not record.checkpoints:
        return quiet("There is no checkpoint.")
    best = (record.run.best or {}).get("step")
    rows = []
    for saved in reversed(record.checkpoints):
        roles = ["last"] if saved is record.checkpoints[-1] else []
        roles += ["best"] if saved.step == best else []
        written = saved.written.astimezone().strftime("%Y-%m-%d %H:%M:%S")
        cells = [number_html(saved.step), ", ".join(roles), written, number_html(saved.files), file_size(saved.size)]
        rows.append(cells)
    total = file_size(sum(saved.size for saved in record.checkpoints))
    return table(["step", "", "written", "files", "size"], rows, left=3) + f'<p class="note">{total} in all.</p>'


def failures(record: Record) -> str:
    """The attempts that failed: where and why, with the traceback folded."""
    if not record.failures:
        return quiet("No attempt has failed.")
    return "".join(_failure(name, part) for name, part in record.failures)


def as_yaml(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings as a YAML file holds them: with lists in the place of tuples."""
    return json.loads(json.dumps(settings))


def _failure(name: str, part: Part) -> str:
    if part.problem:
        return quiet(part.problem)
    failure = part.value
    attempt = name.removeprefix("attempt_").removesuffix(".json").lstrip("0")
    place = f"rank {number_html(failure.get('rank'))} on {text(failure.get('node'))}"
    where = f"step {number_html(failure.get('step'))}, {text(failure.get('phase'))}"
    keys = ("rank", "node", "step", "phase", "what", "traceback", "others", "ranks")  # the others are under "More"
    more = [(key.replace("_", " "), _value(value)) for key, value in failure.items() if key not in keys]
    headline = str(failure.get("what") or failure.get("reason") or "").strip()
    trace = str(failure.get("traceback") or "")[-LONGEST_TEXT:]
    return (
        f"<h3>Attempt {text(attempt)}: {place}, {where}</h3>"
        f'<p class="reason" style="--c:var(--red)">{text(headline)}</p>'
        + (folded("Traceback", f"<pre>{text(trace.strip())}</pre>") if trace.strip() else "")
        + (folded("More", pairs(more)) if more else "")
    )


def _diff_line(line: str) -> str:
    for start, kind in (("+++", "file"), ("---", "file"), ("diff ", "file"), ("@@", "at"), ("+", "add"), ("-", "del")):
        if line.startswith(start):
            return f'<span class="{kind}">{text(line)}</span>'
    return text(line)


def _value(value: Any) -> str:
    return f"<code>{text(_word(value))}</code>"


def _word(value: Any) -> str:
    """A value as a config file has it."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
