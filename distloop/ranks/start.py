"""The start of a training process: prepare_process() before torch is imported, then start(train)."""

from __future__ import annotations

import contextlib
import gc
import os
import sys
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NoReturn, TypeAlias

from distloop import __version__
from distloop.config.places import remember_start
from distloop.errors import UsageError
from distloop.ranks import stopping
from distloop.ranks.environment import prepare_environment
from distloop.ranks.leaving import leave
from distloop.ranks.ranks import Ranks
from distloop.ranks.talking import speak_clearly, speaks

if TYPE_CHECKING:  # the config's libraries are imported once this process listens to signals
    from distloop.config.settings import Config

    Train: TypeAlias = Callable[[Config, Ranks], None]

CALL = """
from distloop.ranks.start import prepare_process, start

if __name__ == "__main__":
    prepare_process()
"""

_copied_from: str | None = None  # global, since it is the process's: "" or a version, once it is prepared


def prepare_process(copied_from: str = "") -> None:
    """Receive signals, and set the variables that torch reads when it is imported. Call it in the main thread, before
    all else.
    From now on a signal asks for a stop and does not end the process. Under `srun`, ranks come from Slurm's variables;
    ranks that share a machine share its CPUs. Leaves with code 2 if Slurm's variables make no sense.
    `copied_from`: the version of distloop whose loop the file is a copy of."""
    global _copied_from
    _copied_from = copied_from
    if copied_from not in ("", __version__):
        sys.excepthook = _explain_missing_name
    stopping.listen()
    with contextlib.suppress(UsageError):  # load_config() says it
        remember_start()
    prepare_environment()
    gc.disable()  # until start(): what is imported stays, and to look for garbage in it takes a fifth of the start


def start(train: Train, own: Mapping[str, Any] | None = None) -> NoReturn:
    """Call `train` with the command line's config, and leave the process with the exit code. `own`: the loop's own
    settings with their defaults; `--own.alpha 0.2` sets one, config.own["alpha"] reads it."""
    problem = None
    if _copied_from is None:
        prepare_process()
        problem = f"{train.__code__.co_filename} does not call prepare_process(). Before it imports torch, add\n{CALL}"
    leave(main(train, sys.argv[1:], own, problem))


def main(train: Train, arguments: list[str], own: Mapping[str, Any] | None = None, problem: str | None = None) -> int:
    """Call `train` with the config that `arguments` give; returns the exit code: 0 in order, 1 failed, 2 misuse.
    `own`: as for start(). `problem`: a mistake that forbids to train."""
    from distloop.config.load import load_config
    from distloop.config.settings import path_of

    watch = stopping.listen()
    speak_clearly()
    ranks = Ranks(watch, train.__code__)
    try:
        if problem is not None:
            raise UsageError(problem)
        config = load_config(arguments, not speaks(os.environ), own or {}, notes=ranks.messages)
    except UsageError as error:
        return ranks.report_failure(error).code
    if config.resume != "never" and os.environ.get("RANK", "0") == "0":
        ranks.digests.begin(path_of(config) / "checkpoints")
    ranks.names = {f"{key}.name": getattr(config, key).name for key in ("data", "model", "task")}
    if _copied_from not in (None, "", __version__):
        ranks.note = f"{train.__code__.co_filename} {_difference()}"
        ranks.messages.append(ranks.note)
    gc.freeze()  # nor does it hold up a step later
    gc.enable()
    return ranks.exit_code(lambda: train(config, ranks))


def _difference() -> str:
    return (
        f"is a copy of the loop of distloop {_copied_from}, and this is distloop {__version__}: "
        "CHANGELOG.md says what copies have to change."
    )


def _explain_missing_name(kind: type[BaseException], error: BaseException, trace: Any) -> None:
    """The sys.excepthook of a copy of another version, while it imports."""
    if not isinstance(error, ImportError) or not (error.name or "").startswith("distloop"):
        sys.__excepthook__(kind, error, trace)
        return
    if speaks(os.environ):
        print(f"distloop: {error.msg}. {sys.argv[0]} {_difference()}", file=sys.stderr)
    leave(2)
