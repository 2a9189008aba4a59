"""A run and its directory: what is started, continued, refused or moved aside, and what is recorded of it."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from distloop.config.comparison import FIXED_KEYS, differences, is_one_of, training_hash
from distloop.config.load import config_from_mapping, dump_without_secrets, read_yaml
from distloop.config.secrets import clean_mapping, unmask
from distloop.config.settings import Config, path_of
from distloop.errors import UsageError
from distloop.run.checkpoint import clean, newest_good, published_in, read_manifest, step_of, weights_file
from distloop.run.files import (
    CHECKPOINTS,
    CONFIG,
    ENVIRONMENT,
    FAILURES,
    GIT_DIFF,
    METRICS,
    STATUS,
    Start,
    read_json,
    write_json,
    write_text,
)
from distloop.run.lock import RunLock
from distloop.run.metrics import set_rows_aside
from distloop.run.provenance import environment, git_facts
from distloop.run.status import RunStatus


def open_directory(config: Config, lock: RunLock, status: RunStatus, world_size: int, dataset: dict[str, Any]) -> Start:
    """Create, or find and continue, the run's directory; rank 0 only. `dataset`: the training data's fingerprint.

    Order of resuming:
    1. --resume never moves a run of this name aside.
    2. A finished run is left as it is.
    3. The run continues from its newest good checkpoint.
    4. Without one it begins, with --init-from from those weights.

    Nothing is changed before the lock is held; `status` is told when the attempt begins. Raises UsageError when the
    directory is in use, belongs to a run that trains differently, or cannot be written.
    """
    path = path_of(config)
    fresh = config.resume == "never" or not published_in(path / CHECKPOINTS)
    weights = weights_file(config.init_from) if fresh and config.init_from else None
    try:
        if path.exists() and config.resume != "never" and _is_finished(path, config):
            before = read_json(path / STATUS)
            return Start(path, int(before["attempt"]), None, None, int(before["step"]), True, [], {})
        weights, messages = _own(path, config, lock, weights)
        before = read_json(path / STATUS)
        # A run that has saved nothing has nothing that another config would train differently.
        begun = bool(published_in(path / CHECKPOINTS)) and (path / CONFIG).exists()
        changes: dict[str, Any] = dict(_changes(path, config)) if begun else {}
        checkpoint = _newest_checkpoint(path, status.total_steps, messages)
        step = step_of(checkpoint) if checkpoint else 0
        if checkpoint:
            changes.update(_changes_of_data(path, read_manifest(checkpoint)["dataset"], dataset, config))
        redone = set_rows_aside(path / METRICS, step)
        if redone:
            messages.append(f"metrics after step {step}, {redone} of them, were set aside: these steps are done again")
        identity = {"config_sha256": training_hash(config), "dataset": dataset}
        start = Start(path, int(before.get("attempt", 0)) + 1, checkpoint, weights, step, False, messages, identity)
        # First: an extended run is not finished any more.
        status.begin(start, before.get("best"))
        _record_start(start, config, changes, world_size)
    except OSError as error:
        raise UsageError(
            f"The run directory {path.resolve()} cannot be written: {error.strerror or error}. "
            "Choose another with --runs-dir."
        ) from None
    return start


def _own(path: Path, config: Config, lock: RunLock, weights: Path | None) -> tuple[Path | None, list[str]]:
    """Lock the directory and clean it, once the run of before is moved aside, if that is asked for.

    Returns where the --init-from weights are by then, and what to say.
    """
    messages: list[str] = []
    if path.exists():
        messages += _acquire(lock, path)
        if config.resume == "never":
            aside = _place_aside(path)
            inside = _relative(weights, path)
            lock.move(path, aside)
            messages.append(f"the previous run was moved to {aside}")
            if inside is not None:
                weights = aside / inside
    for folder in (CHECKPOINTS, FAILURES):
        (path / folder).mkdir(parents=True, exist_ok=True)
    if lock.path is None:
        messages += _acquire(lock, path)
    if weights:
        messages.append(f"starting from the weights in {weights}")
    clean(path / CHECKPOINTS)
    for leftover in (path / FAILURES).glob("*rank*"):  # of an attempt that was killed
        leftover.unlink(missing_ok=True)
    return weights, messages


def _newest_checkpoint(path: Path, total_steps: int, messages: list[str]) -> Path | None:
    """The checkpoint to continue from. Raises UsageError when none is whole, or the newest lies behind the end."""
    checkpoint, passed_over = newest_good(path / CHECKPOINTS)
    if passed_over and checkpoint is None:  # a killed save leaves no such thing behind
        raise UsageError(
            f"None of the checkpoints in {path} is whole:\n"
            + "".join(f"  {line}\n" for line in passed_over)
            + "Bring back the files, or use --resume never to move the run aside and start anew."
        )
    messages += [f"passed over a damaged checkpoint: {line}" for line in passed_over]
    if checkpoint and step_of(checkpoint) > total_steps:
        raise UsageError(
            f"{path} is already at step {step_of(checkpoint)}; it cannot end at step {total_steps}. Train longer."
        )
    return checkpoint


def _record_start(start: Start, config: Config, changes: dict[str, Any], world_size: int) -> None:
    """Write down with what the attempt starts."""
    path = start.path
    if changes:
        record = {"after_attempt": start.attempt - 1, "after_step": start.step, "changes": changes}
        with open(path / "config_changes.jsonl", "a") as file:
            file.write(json.dumps(record) + "\n")
    # Other attempts may start from this file, so that it leaves out what belongs to this start.
    write_text(path / CONFIG, dump_without_secrets(dataclasses.replace(config, expect_world=None, resume="auto")))
    git = git_facts()
    write_json(path / ENVIRONMENT, environment(world_size, git))
    if git.diff is None:
        (path / GIT_DIFF).unlink(missing_ok=True)  # an earlier attempt's
    else:
        write_text(path / GIT_DIFF, git.diff)


def _acquire(lock: RunLock, path: Path) -> list[str]:
    message = lock.acquire(path)
    return [message] if message else []


def _is_finished(path: Path, config: Config) -> bool:
    """Whether the run is finished, as this config has it. Raises UsageError for a config that trains differently."""
    if read_json(path / STATUS).get("state") != "finished":
        return False
    return not ((path / CONFIG).exists() and _changes(path, config))


def _changes_of_data(path: Path, old: dict[str, Any], new: dict[str, Any], config: Config) -> dict[str, Any]:
    """What differs in the training data. Raises UsageError for a run that is not extended."""
    if old == new:
        return {}
    what = (
        f"was trained on {old['samples']} samples, the data has {new['samples']} now: its order would be another."
        if old["samples"] != new["samples"]
        else f"was trained on other data: these {new['samples']} samples have other contents."
    )
    if config.resume == "extend" and old["samples"] == new["samples"]:
        return {"dataset": (old, new)}
    raise UsageError(f"{path} {what} Use --name OTHER or --resume never, or give it the data it had.")


def _changes(path: Path, config: Config) -> dict[str, tuple[Any, Any]]:
    """With what the run is extended; raises UsageError when it would train differently and may not be."""
    try:
        # A secret is another one, or not known, as the file has none: it is as it is given now.
        settings = unmask(clean_mapping(read_yaml(path / CONFIG)), dataclasses.asdict(config))
        changed = differences(config_from_mapping(settings, str(path / CONFIG)), config)
    except UsageError as error:
        raise UsageError(f"The run in {path} has a config that this version does not read: {error}") from None
    if not changed:
        return {}
    changed = {key: (clean_mapping(old, key), clean_mapping(new, key)) for key, (old, new) in changed.items()}
    lines = "\n".join(f"  {key}: {old!r} there, {new!r} now" for key, (old, new) in changed.items())
    if config.resume != "extend":
        raise UsageError(
            f"{path} holds a run that trains differently:\n{lines}\n"
            "Ways out: --name OTHER for a run of its own, --resume never to move the old one aside and start anew, "
            "--resume extend to continue it with the change recorded."
        )
    fixed = [key for key in changed if is_one_of(key, FIXED_KEYS)]
    if fixed:
        raise UsageError(
            f"--resume extend: a run cannot be continued with another {', '.join(fixed)}, since its steps so far "
            f"would mean something else:\n{lines}\nUse --name OTHER or --resume never."
        )
    return changed


def _relative(weights: Path | None, path: Path) -> Path | None:
    """Where in `path` the weights are, if they are."""
    if weights is None or not weights.resolve().is_relative_to(path.resolve()):
        return None
    return weights.resolve().relative_to(path.resolve())


def _place_aside(path: Path) -> Path:
    number = 1
    while (other := path.with_name(f"{path.name}.old-{number}")).exists():
        number += 1
    return other
