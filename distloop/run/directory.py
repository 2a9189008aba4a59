"""Open a run directory: create it, continue its run, refuse that, or move the run aside; and record the start."""

import dataclasses
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from distloop.config.comparison import FIXED_KEYS, differences, is_one_of
from distloop.config.load import config_from_mapping, dump_without_secrets, read_yaml
from distloop.config.notes import refuse_without_effect
from distloop.config.references import recorded
from distloop.config.secrets import clean_mapping, unmask
from distloop.config.settings import Config, path_of
from distloop.data.fingerprint import is_other, likeness
from distloop.errors import UsageError
from distloop.run import files
from distloop.run.checkpoint import MANIFEST, STATE, clean, digest, newest_good, published_in, read_manifest, step_of
from distloop.run.files import Start, read_json, write_json, write_text
from distloop.run.initial_weights import weights_file
from distloop.run.lock import RunLock
from distloop.run.provenance import LoopSource, environment, git_facts
from distloop.run.same import digest_of_start
from distloop.run.set_aside import set_rows_aside
from distloop.run.status import RunStatus

TRAINED_ON = "samples that were trained on"


def open_directory(
    config: Config,
    lock: RunLock,
    status: RunStatus,
    world_size: int,
    identity: dict[str, Any],
    loop: LoopSource | None,
    sha256: Callable[[Path], str] = digest,
) -> Start:
    """Create, or find and continue, the run's directory; rank 0 only. `identity`: what the run trains (identity.py).
    `sha256`: gives that of a file. With --resume never a run of this name is moved aside, but not one that this Slurm
    job has begun itself before it was requeued. Else a finished run is left as it is, and another continues from its
    newest good checkpoint. Without one it begins, with --init-from from those weights. Changes nothing before it holds
    the lock. Raises UsageError if the directory is in use, has a run that trains differently, or cannot be written."""
    path = path_of(config)
    if config.resume == "never" and _is_restart(path):
        config = dataclasses.replace(config, resume="auto")
    fresh = config.resume == "never" or not published_in(path / files.CHECKPOINTS)
    if fresh and loop and loop.is_own:  # a loop of the user's may use them otherwise; a begun run goes on
        refuse_without_effect(config)
    weights = weights_file(config.init_from) if fresh and config.init_from else None
    try:
        if path.exists() and config.resume != "never" and _is_finished(path, config):
            before = read_json(path / files.STATUS)
            why = [str(before.get("reason"))]
            return Start(path, int(before["attempt"]), None, None, int(before["step"]), True, why, {})
        weights, messages = _own(path, config, lock, weights)
        before = read_json(path / files.STATUS)
        # A run without a checkpoint may have another config: no step of it is kept.
        begun = bool(published_in(path / files.CHECKPOINTS)) and (path / files.CONFIG).exists()
        changes: dict[str, Any] = dict(_changes(path, config)) if begun else {}
        if changes:
            lines = (f"{key} goes from {old!r} to {new!r}" for key, (old, new) in changes.items())
            messages.append(f"--resume extend: {', '.join(lines)}")
        checkpoint = _newest_checkpoint(path, status.total_steps, changes, messages, sha256)
        step = step_of(checkpoint) if checkpoint else 0
        if checkpoint:
            manifest = read_manifest(checkpoint)
            changes.update(_changes_of_data(path, manifest, identity, config, messages))
            changes.update(_changes_of_code(manifest, identity, messages))
            changes.update(_changes_of_loop(path, loop, messages))
        unvalidated = bool(checkpoint and read_json(checkpoint / STATE).get("unvalidated"))
        if redone := set_rows_aside(path / files.METRICS, step, is_validated=bool(checkpoint) and not unvalidated):
            messages.append(f"metrics after step {step}, {redone} of them, were set aside: these steps are done again")
        if unvalidated:
            messages.append(f"step {step} is not validated yet: its validation comes first")
        attempt = int(before.get("attempt", 0)) + 1
        loaded = checkpoint / MANIFEST if checkpoint else weights
        micro_size = _found_micro_size(path, config, messages) if begun else None
        known = digest_of_start(loaded) if loaded and world_size > 1 else ""
        start = Start(path, attempt, checkpoint, weights, step, False, messages, identity, changes, micro_size, known)
        status.begin(start, before.get("best"))  # first: an extended run is not finished any more
        if not changes:  # else once the checkpoint is loaded, which may not fit the changed config
            record_start(start, config, world_size, loop)
    except OSError as error:
        raise UsageError(
            f"The run directory {path.resolve()!s} cannot be written: {error.strerror or error}. "
            "Choose another with --runs-dir."
        ) from None
    return start


def _is_restart(path: Path) -> bool:
    """True if the run there was begun by this Slurm job, which was requeued since. Raises UsageError in a restart by an
    elastic launcher, where nothing says who has begun the run."""
    if restarts := int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)):
        raise UsageError(
            f"--resume never in restart {restarts} of the launcher would move aside what this launch has trained. "
            "Start again without --resume never: that continues the run."
        )
    if not int(os.environ.get("SLURM_RESTART_COUNT") or 0):
        return False
    return read_json(path / files.STATUS).get("slurm_job") == os.environ.get("SLURM_JOB_ID", "")


def _own(path: Path, config: Config, lock: RunLock, weights: Path | None) -> tuple[Path | None, list[str]]:
    """Lock the directory and clean it; with --resume never, move the run that it has aside. Returns where the
    --init-from weights are after that, and messages."""
    messages: list[str] = []
    if path.exists():
        messages += filter(None, [lock.acquire(path)])
        if config.resume == "never":
            number = 1
            while (aside := path.with_name(f"{path.name}.old-{number}")).exists():
                number += 1
            inside = path.resolve()  # before it is moved
            if weights is not None and weights.resolve().is_relative_to(inside):
                weights = aside / weights.resolve().relative_to(inside)
            lock.move(path, aside)
            messages.append(f"the previous run was moved to {aside}")
    for folder in (files.CHECKPOINTS, files.FAILURES):
        (path / folder).mkdir(parents=True, exist_ok=True)
    if lock.path is None:
        messages += filter(None, [lock.acquire(path)])
    if weights:
        messages.append(f"starting from the weights in {weights}")
    clean(path / files.CHECKPOINTS)
    for leftover in (path / files.FAILURES).glob("*rank*"):  # of an attempt that was killed
        leftover.unlink(missing_ok=True)
    return weights, messages


def _newest_checkpoint(
    path: Path, total_steps: int, changes: dict[str, Any], messages: list[str], sha256: Callable[[Path], str]
) -> Path | None:
    """The checkpoint to continue from. Raises UsageError if all are damaged, if the run is longer than the config, or
    if it has no step left that the `changes` could change."""
    checkpoint, passed_over = newest_good(path / files.CHECKPOINTS, sha256)
    if passed_over and checkpoint is None:  # not the result of a killed save
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
    if checkpoint and changes and step_of(checkpoint) == total_steps:
        raise UsageError(
            f"{path} has taken all its {total_steps} steps: with {', '.join(changes)} changed, none would be trained. "
            "Give it more steps, too: --train.epochs N."
        )
    return checkpoint


def record_start(start: Start, config: Config, world_size: int, loop: LoopSource | None) -> None:
    """Write config.yaml, environment.json, git.diff and loop.py of an attempt, and what it changes. Raises OSError."""
    path = start.path
    if start.changes:
        record = {"after_attempt": start.attempt - 1, "after_step": start.step, "changes": start.changes}
        with open(path / "config_changes.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
    record_config(start, config)
    git = git_facts()
    write_json(path / files.ENVIRONMENT, environment(world_size, git, loop))
    for name, text in ((files.GIT_DIFF, git.diff), (files.LOOP, loop and loop.text)):
        if text is not None:
            write_text(path / name, text)
        else:
            (path / name).unlink(missing_ok=True)  # an earlier attempt's


def record_config(start: Start, config: Config) -> None:
    """Write config.yaml, with the size that batch.micro_size: auto has found. Raises OSError."""
    # Without the two settings that belong to this start only: users start other attempts with this file.
    config = dataclasses.replace(config, expect_world=None, resume="auto")
    if config.batch.micro_size == "auto" and start.micro_size is not None:
        config = dataclasses.replace(config, batch=dataclasses.replace(config.batch, micro_size=start.micro_size))
    write_text(start.path / files.CONFIG, dump_without_secrets(config))


def _found_micro_size(path: Path, config: Config, messages: list[str]) -> int | None:
    """With batch.micro_size: auto, the size with which the begun run has trained so far. None: it had no limit."""
    before = config_before(path, config).batch.micro_size if config.batch.micro_size == "auto" else None
    if not isinstance(before, int):
        return None
    messages.append(f"batch.micro_size: auto: {before}, as in {path / files.CONFIG}")
    return before


def _is_finished(path: Path, config: Config) -> bool:
    """True if the run is finished with this config. Raises UsageError for a config that trains differently."""
    is_finished = read_json(path / files.STATUS).get("state") == "finished"
    return is_finished and not ((path / files.CONFIG).exists() and _changes(path, config))


def _changes_of_data(
    path: Path, manifest: dict[str, Any], identity: dict[str, Any], config: Config, messages: list[str]
) -> dict[str, Any]:
    """The difference of the training data, which a message says. Raises UsageError for one that --resume does not
    allow."""
    old, new = manifest["dataset"], identity["dataset"]
    if not is_other(old, new):
        return {}
    another_run = f"for a run of its own, with these weights: --name OTHER --init-from {path}"
    if old["samples"] != new["samples"]:
        raise UsageError(
            f"{path} was trained on {old['samples']} samples, the data has {new['samples']} now: its order would be "
            f"another, and no --resume goes on with it. Give it the data it had; or, {another_run}. If a random split "
            f"made them, its validation would have {TRAINED_ON}: let a split keep each sample on its side."
        )
    if config.resume == "extend":
        messages.append(
            f"distloop: WARNING: the training data have other contents than when step {manifest['step']} was trained. "
            f"--resume extend goes on; after a random split that is another one, validation has {TRAINED_ON}"
        )
        return {"dataset": (old, new)}
    code: list[str] = []
    _changes_of_code(manifest, identity, code)
    why = f" ({'; '.join(code)}: that may be why.)" if code else ""
    other = f"these {new['samples']} samples have other contents{_which(old, new)}"
    raise UsageError(
        f"{path} was trained on other data: {other}.{why} Give it the data it had; or, {another_run}. If you know that "
        "they are the same samples, only rounded or decoded otherwise, --resume extend goes on with them. After a "
        f"random split that was another one (sort the files, and seed it), validation would have {TRAINED_ON}."
    )


def _which(old: dict[str, Any], new: dict[str, Any]) -> str:
    """What the samples that were looked at show of the reason, if anything."""
    found = likeness(old.get("contents", {}), new.get("contents", {}))
    if found.in_other_order:
        return ", since they come in another order (sort what os.listdir() or a set gave)"
    return f" in {found.compared - found.same} of {found.compared} that were compared" if found.same else ""


def _changes_of_code(manifest: dict[str, Any], identity: dict[str, Any], messages: list[str]) -> dict[str, Any]:
    """The differences of versions and of the user's modules, which --resume allows: a message says each."""
    changes = {}
    for kind in ("versions", "sources"):
        before = manifest.get(kind, {})  # none in a checkpoint of an earlier version
        for name, new in identity[kind].items():
            if (old := before.get(name, new)) == new:
                continue
            changes[f"{kind}.{name}"] = (old, new)
            now = f"{name} {new} now, and {old}" if kind == "versions" else f"{name}.py has another source than"
            messages.append(f"{now} when step {manifest['step']} was trained")
    return changes


def _changes_of_loop(path: Path, loop: LoopSource | None, messages: list[str]) -> dict[str, Any]:
    """The difference of the loop's source, which --resume allows: a message says it, and the old source is kept."""
    before = read_json(path / files.ENVIRONMENT)
    old, new = before.get("loop_sha256"), loop and loop.sha256
    if old is None or old == new:
        return {}
    where, keeps = loop.path if loop else "without a file", ""
    if (path / files.LOOP).exists():
        kept = path / f"loop_until_attempt_{read_json(path / files.STATUS).get('attempt', 0):04d}.py"
        write_text(kept, (path / files.LOOP).read_text(encoding="utf-8"))
        keeps = f", which is kept in {kept}"
    messages.append(f"the loop ({where}) has another source than in the attempt before{keeps}")
    return {"loop_sha256": (old, new)}


def config_before(path: Path, config: Config) -> Config:
    """The config that is recorded in the run directory. In the place of each secret, which is recorded as ***, it has
    that of `config`. Raises UsageError if this version does not read it."""
    try:
        settings = unmask(clean_mapping(read_yaml(path / files.CONFIG)), recorded(config))
        return config_from_mapping(settings, str(path / files.CONFIG))
    except UsageError as error:
        raise UsageError(f"The run in {path} has a config that this version does not read: {error}") from None


def _changes(path: Path, config: Config) -> dict[str, tuple[Any, Any]]:
    """The settings that --resume extend changes. Raises UsageError for a change that --resume does not allow."""
    changed = differences(config_before(path, config), config)
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
    if fixed := [key for key in changed if is_one_of(key, FIXED_KEYS)]:
        raise UsageError(
            f"--resume extend: a run cannot be continued with another {', '.join(fixed)}, since its steps so far "
            f"would mean something else:\n{lines}\nUse --name OTHER or --resume never."
        )
    return changed
