"""`distloop sync RUN [RUN …]`: upload to W&B what stayed offline or never arrived.

It uploads each row of metrics.jsonl that the server lacks, of all attempts and in order, under the run's own id; then
it ends the W&B run as the run has ended. If there is nothing to upload, nothing changes.
"""

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from distloop.commands.reading import is_run, read_run
from distloop.config.yaml_text import parse_yaml
from distloop.errors import UsageError
from distloop.ranks.stopping import STOP
from distloop.run.files import CONFIG
from distloop.tracking.wandb.mirror import only_mirror
from distloop.tracking.wandb.run import WandbRun
from distloop.tracking.wandb.session import WandbError

USAGE = "usage: distloop sync RUN [RUN …]     RUN: a run's directory, such as runs/digits"
STARTING_SECONDS = 60.0


def sync(path: Path) -> str:
    """Upload the rows of the run in `path` that W&B lacks; returns a line about it. Raises UsageError, WandbError."""
    if not is_run(path) or not (path / CONFIG).exists():
        raise UsageError(f"{path} is no run's directory: name one that holds {CONFIG}.")
    state = read_run(path).state
    if state in ("starting", "running"):
        raise UsageError(f"{path} is going on: wait for its end, or stop it (touch {path / STOP}).")
    with only_mirror(path, 0.0) as is_only:
        if not is_only:
            raise UsageError(f"{path} is being uploaded already, by its own run or another sync; wait for its end.")
        wandb_run = WandbRun(path, _settings(path), "online")
        with contextlib.redirect_stderr(wandb_run.output), _no_output_of_children():
            wandb_run.start(STARTING_SECONDS, or_offline=False)
            rows_before = wandb_run.next_row
            wandb_run.log_new_rows()
            problem = wandb_run.finish(state if state in ("finished", "stopped") else "failed")
    if problem:
        raise WandbError(problem)
    rows = wandb_run.next_row
    return f"{path}: {rows - rows_before} rows uploaded, {rows} in all: {wandb_run.state.get('url')}"


@contextlib.contextmanager
def _no_output_of_children() -> Iterator[None]:
    """Processes that wandb starts inside print nothing to this terminal."""
    terminal, devnull = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(devnull, 2)
    try:
        yield
    finally:
        os.dup2(terminal, 2)
        os.close(terminal)
        os.close(devnull)


def _settings(path: Path) -> dict[str, Any]:
    """The section `tracking` of the run's config."""
    try:
        config = parse_yaml((path / CONFIG).read_text(encoding="utf-8"))
    except (yaml.YAMLError, ValueError) as error:
        raise UsageError(f"{path / CONFIG} cannot be read: {' '.join(str(error).split())}") from None
    settings = config.get("tracking") if isinstance(config, dict) else None
    if not isinstance(settings, dict):
        raise UsageError(f"{path / CONFIG} is that of a version without W&B; add a section `tracking` to it.")
    return settings


def main(arguments: list[str] | None = None) -> int:
    """Sync the runs that the command line names; returns the exit code: 0 done, 1 not all of them, 2 wrong usage."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments[:1] in (["--help"], ["-h"]):
        print(f"{__doc__}\n{USAGE}")
        return 0
    if not arguments or any(argument.startswith("-") for argument in arguments):
        print(USAGE, file=sys.stderr)
        return 2
    code = 0
    for argument in arguments:
        try:
            print(sync(Path(argument)), flush=True)
        except UsageError as error:
            print(f"distloop: {error}", file=sys.stderr)
            return 2
        except WandbError as error:
            print(f"distloop: {argument} was not synced: {error}", file=sys.stderr)
            code = 1
    return code


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    os._exit(code)  # wandb's exit hooks may wait for a server
