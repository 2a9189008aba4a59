"""What makes a file a launcher's target: prepare_process() before torch is imported, start(train) at its end."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, NoReturn

from distloop.errors import UsageError
from distloop.ranks import stopping
from distloop.ranks.environment import prepare_environment
from distloop.ranks.leaving import leave
from distloop.ranks.ranks import Ranks
from distloop.ranks.talking import let_others_speak, speak_clearly, speaks

if TYPE_CHECKING:  # the config's libraries are imported once this process listens to signals
    from distloop.config.settings import Config


def prepare_process() -> None:
    """Get the process ready before the long imports, in the main thread.

    From here on a signal is a wish to stop, not the end. Under `srun` the variables that torch reads are set, and
    where several ranks share a machine each gets its share of the CPUs: torch reads the thread count when it is
    imported. Leaves with code 2 when Slurm's variables make no sense.
    """
    stopping.listen()
    prepare_environment()


def start(train: Callable[[Config, Ranks], None]) -> NoReturn:
    """Train as the command line says, and leave the process with the exit code."""
    leave(main(train, sys.argv[1:]))


def main(train: Callable[[Config, Ranks], None], arguments: list[str]) -> int:
    """Train as the command line says; returns the exit code: 0 in order, 1 failed, 2 wrong usage."""
    from distloop.config.load import load_config

    watch = stopping.listen()
    speak_clearly()
    ranks = Ranks(watch, train.__code__)
    quiet = not speaks(os.environ)  # every rank meets the same mistakes; one says them
    try:
        config = load_config(arguments, quiet)
    except SystemExit as error:  # --help, or a mistake on the command line
        if error.code:
            let_others_speak(watch)
        raise
    except UsageError as error:
        return ranks.report_failure(error).code
    return ranks.exit_code(lambda: train(config, ranks))
