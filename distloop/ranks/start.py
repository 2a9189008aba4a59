"""The start of a training process: prepare_process() before torch is imported, then start(train)."""

from __future__ import annotations

import gc
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
    """Receive signals, and set the variables that torch reads when it is imported. Call it in the main thread.
    From now on a signal asks for a stop and does not end the process. Under `srun`, ranks come from Slurm's variables;
    ranks that share a machine share its CPUs. Leaves with code 2 if Slurm's variables make no sense."""
    stopping.listen()
    prepare_environment()
    gc.disable()  # until start(): what is imported stays, and to look for garbage in it takes a fifth of the start


def start(train: Callable[[Config, Ranks], None]) -> NoReturn:
    """Call `train` with the command line's config, and leave the process with the exit code."""
    leave(main(train, sys.argv[1:]))


def main(train: Callable[[Config, Ranks], None], arguments: list[str]) -> int:
    """Call `train` with the config that `arguments` give; returns the exit code: 0 in order, 1 failed, 2 misuse."""
    from distloop.config.load import load_config

    watch = stopping.listen()
    speak_clearly()
    ranks = Ranks(watch, train.__code__)
    try:
        config = load_config(arguments, quiet=not speaks(os.environ))  # all ranks meet the same mistakes; one prints
    except SystemExit as error:  # --help, or a mistake on the command line
        if error.code:
            let_others_speak(watch)
        raise
    except UsageError as error:
        return ranks.report_failure(error).code
    gc.freeze()  # nor does it hold up a step later
    gc.enable()
    return ranks.exit_code(lambda: train(config, ranks))
