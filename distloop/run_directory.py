"""A run and its directory: what is started, continued, refused or moved aside, and what is recorded of it."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from distloop.checkpoint import clean, newest_good, published_in, read_manifest, step_of, sync, weights_file
from distloop.cluster import cpus_per_rank, say
from distloop.config import FIXED_KEYS, Config, differences, is_one_of, training_hash
from distloop.config_load import config_from_mapping, dump, read_yaml
from distloop.errors import UsageError
from distloop.failures import Verdict
from distloop.lock import RunLock
from distloop.tracking.metrics_file import set_rows_aside

CONFIG, STATUS, METRICS = "config.yaml", "status.json", "metrics.jsonl"
SECRET = re.compile(r"(key|token|secret|passw|credential)", re.IGNORECASE)


class Start(NamedTuple):
    """How an attempt begins."""

    path: Path
    attempt: int
    checkpoint: Path | None
    """To continue from."""
    weights: Path | None
    """To begin from, with --init-from."""
    step: int
    """How many steps are done."""
    finished: bool
    messages: list[str]
    identity: dict[str, Any]
    """What the run trains, as it stands in the manifest of each checkpoint."""


def path_of(config: Config) -> Path:
    """The run's directory."""
    return Path(config.runs_dir) / str(config.name)


def open_run(config: Config, lock: RunLock, world_size: int, dataset: dict[str, Any], total_steps: int) -> Start:
    """Create, or find and continue, the run's directory; rank 0 only. `dataset`: the training data's fingerprint.

    Order of resuming: a run of this name is continued from its newest good checkpoint; a finished one is
    left as it is; --resume never moves it aside first. Nothing is changed before the lock is held. Raises
    UsageError when the directory is in use, belongs to a run that trains differently, or cannot be written.
    """
    path = path_of(config)
    messages: list[str] = []
    fresh = config.resume == "never" or not published_in(path / "checkpoints")
    weights = weights_file(config.init_from) if fresh and config.init_from else None
    try:
        if path.exists():
            if config.resume != "never" and _is_finished(path, config):
                status = _read_json(path / STATUS)
                return Start(path, int(status["attempt"]), None, None, int(status["step"]), True, messages, {})
            messages += _acquire(lock, path)
            if config.resume == "never":
                aside = _place_aside(path)
                inside = _relative(weights, path)
                lock.move(path, aside)
                messages.append(f"the previous run was moved to {aside}")
                if inside is not None:
                    weights = aside / inside
        for folder in ("checkpoints", "failures"):
            (path / folder).mkdir(parents=True, exist_ok=True)
        if lock.path is None:
            messages += _acquire(lock, path)
        if weights:
            messages.append(f"starting from the weights in {weights}")
        clean(path / "checkpoints")
        for leftover in (path / "failures").glob("*rank*"):  # of an attempt that was killed
            leftover.unlink(missing_ok=True)
        status = _read_json(path / STATUS)
        # A run that has saved nothing has nothing that another config would train differently.
        begun = bool(published_in(path / "checkpoints")) and (path / CONFIG).exists()
        changes = _changes(path, config) if begun else {}
        checkpoint, passed_over = newest_good(path / "checkpoints")
        if passed_over and checkpoint is None:  # nothing that a killed save could leave behind
            raise UsageError(
                f"None of the checkpoints in {path} is whole:\n"
                + "".join(f"  {line}\n" for line in passed_over)
                + "Bring back the files, or use --resume never to move the run aside and start anew."
            )
        messages += [f"passed over a damaged checkpoint: {line}" for line in passed_over]
        step = step_of(checkpoint) if checkpoint else 0
        if step > total_steps:
            raise UsageError(f"{path} is already at step {step}; it cannot end at step {total_steps}. Train longer.")
        if checkpoint:
            changes.update(_changes_of_data(path, read_manifest(checkpoint)["dataset"], dataset, config))
        redone = set_rows_aside(path / METRICS, step)
        if redone:
            messages.append(f"metrics after step {step}, {redone} of them, were set aside: these steps are done again")
        attempt = int(status.get("attempt", 0)) + 1
        identity = {"config_sha256": training_hash(config), "dataset": dataset}
        start = Start(path, attempt, checkpoint, weights, step, False, messages, identity)
        # First: an extended run is not finished any more.
        RunStatus(start, True, total_steps, owned=lock.beat).update(step, status.get("best"))
        if changes:
            record = {"after_attempt": attempt - 1, "after_step": step, "changes": changes}
            with open(path / "config_changes.jsonl", "a") as file:
                file.write(json.dumps(record) + "\n")
        write_text(path / CONFIG, dump(config))
        write_text(path / "environment.json", json.dumps(environment(world_size), indent=1) + "\n")
    except OSError as error:
        raise UsageError(
            f"The run directory {path.resolve()} cannot be written: {error.strerror or error}. "
            "Choose another with --runs-dir."
        ) from None
    return start


class RunStatus:
    """Keeps status.json: written by rank 0 when the run starts, has saved and ends, however it ends."""

    def __init__(
        self,
        start: Start,
        enabled: bool,
        total_steps: int,
        judge: Callable[[BaseException], Verdict] | None = None,
        owned: Callable[[], None] = lambda: None,
    ) -> None:
        self.start, self.enabled, self.total_steps = start, enabled, total_steps
        self.judge, self.owned = judge, owned
        self.step = start.step
        self.best: dict[str, Any] | None = None
        self.best_rule: tuple[str, str] | None = None
        self.stopped_by: str | None = None
        self.closed = False

    def __enter__(self) -> RunStatus:
        return self

    def update(self, step: int, best: dict[str, Any] | None) -> None:
        """The run has been saved at `step`; `best`: the best validation row so far."""
        self.step, self.best = step, best
        if not self.closed:  # a save goes on when Ctrl-C has ended the rest
            self._write("running", None)

    def cut_off(self, state: str, reason: str) -> None:
        """The process ends at once, without its main thread."""
        if not self.closed:
            self._write(state, f"{reason}, without saving" if state == "stopped" else reason)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if error is not None and self.judge is not None:
            verdict = self.judge(error)  # of all ranks: this one's error may be a consequence
            self.closed = True
            self._write("stopped" if isinstance(error, KeyboardInterrupt) else "failed", verdict.reason)
            return
        self.closed = True
        if self.stopped_by:
            self._write("stopped", self.stopped_by)
        else:
            self._write("finished", "all steps are done")

    def _write(self, state: str, reason: str | None) -> None:
        if not self.enabled:
            return
        self.owned()
        status = {
            "state": state,
            "step": self.step,
            "total_steps": self.total_steps,
            "best": self.best,
            "best_rule": self.best_rule,
            "attempt": self.start.attempt,
            "first_step": self.start.step,  # of this attempt
            "reason": reason,
            "slurm_job": os.environ.get("SLURM_JOB_ID"),
            "slurm_restart": int(os.environ.get("SLURM_RESTART_COUNT", 0)),
            "written": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        }
        try:
            write_text(self.start.path / STATUS, json.dumps(status, indent=1) + "\n")
        except OSError as error:  # the disk is full: no reason to end
            say(f"distloop: WARNING: {STATUS} cannot be written ({error.strerror}): {state}")


def write_text(path: Path, text: str) -> None:
    """Write a small file so that a reader sees the old or the new one, never a part."""
    aside = path.with_name(f".{path.name}.writing")
    aside.write_text(text)
    sync(aside)
    aside.replace(path)


def environment(world_size: int) -> dict[str, Any]:
    """Versions, git commit, topology and command of an attempt, as plain JSON and without secrets."""
    packages = ("torch", "torchvision", "accelerate", "numpy", "safetensors", "distloop")
    versions: dict[str, str | None] = {}
    for name in packages:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    return {
        "python": platform.python_version(),
        "versions": versions,
        "machine": platform.node(),
        "platform": platform.platform(),
        "cpus_per_rank": cpus_per_rank(os.environ),
        "world_size": world_size,
        "slurm_job": os.environ.get("SLURM_JOB_ID"),
        "git_commit": _git("rev-parse", "HEAD"),
        "git_changes": (_git("status", "--porcelain") or "").splitlines()[:50],
        "command": _without_secrets(sys.argv),
    }


def _acquire(lock: RunLock, path: Path) -> list[str]:
    message = lock.acquire(path)
    return [message] if message else []


def _is_finished(path: Path, config: Config) -> bool:
    """Whether the run is finished, as this config has it. Raises UsageError for a config that trains differently."""
    if _read_json(path / STATUS).get("state") != "finished":
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
        changed = differences(config_from_mapping(read_yaml(path / CONFIG), str(path / CONFIG)), config)
    except UsageError as error:
        raise UsageError(f"The run in {path} has a config that this version does not read: {error}") from None
    if not changed:
        return {}
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


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        return {}
    except ValueError:
        return {}  # damaged: the checkpoints say how far the run is


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(("git", *arguments), capture_output=True, text=True, timeout=10, check=True)
        return done.stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def _without_secrets(command: list[str]) -> list[str]:
    """The command line with the values of anything that sounds like a key or password left out."""
    shown = []
    hide = False
    for word in command:
        flag, equals, _ = word.partition("=")
        shown.append("***" if hide else f"{flag}=***" if equals and SECRET.search(flag) else word)
        hide = word.startswith("-") and not equals and bool(SECRET.search(word))
    return shown
