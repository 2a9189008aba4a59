"""`distloop sync RUN [RUN …]`: bring W&B up to date with a run directory: what stayed offline, or never arrived.

Each row of metrics.jsonl that the server does not have is uploaded, of all attempts and in order, under the run's own id;
then the W&B run is ended as the run has ended. Where there is nothing to upload, nothing changes.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from distloop.errors import UsageError
from distloop.run_files import CONFIG
from distloop.runs import is_run, read_run
from distloop.tracking.mirror import Mirror, MirrorError, alone
from distloop.yaml_text import parse_yaml

USAGE = "usage: distloop sync RUN [RUN …]     RUN: a run's directory, such as runs/digits"
STARTING_SECONDS = 60.0


def sync(path: Path) -> str:
    """Upload what W&B misses of the run in `path`; returns what to say. Raises UsageError, MirrorError."""
    if not is_run(path) or not (path / CONFIG).exists():
        raise UsageError(f"{path} is no run's directory: name one that holds {CONFIG}.")
    settings = parse_yaml((path / CONFIG).read_text()).get("tracking")
    if settings is None:
        raise UsageError(f"{path / CONFIG} is that of a version without W&B; add a section `tracking` to it.")
    state = read_run(path).state
    with alone(path, 0.0) as is_alone:
        if not is_alone:
            raise UsageError(f"{path} is being uploaded already, by its own run or another sync; wait for its end.")
        mirror = Mirror(path, settings)
        problem = mirror.start("online", STARTING_SECONDS)
        if problem:
            raise MirrorError(problem)
        before = mirror.next_row
        mirror.log_new_rows()
        problem = mirror.finish(state if state in ("finished", "stopped") else "failed")
    if problem:
        raise MirrorError(problem)
    return f"{path}: {mirror.next_row - before} rows uploaded, {mirror.next_row} in all: {mirror.state.get('url')}"


def main(arguments: list[str] | None = None) -> int:
    """Sync what the command line names; returns the exit code: 0 done, 1 not all of it, 2 wrong usage."""
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
        except MirrorError as error:
            print(f"distloop: {argument} was not synced: {error}", file=sys.stderr)
            code = 1
    return code


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    os._exit(code)  # wandb's own exit hooks may wait for a server
