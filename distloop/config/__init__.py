"""The config: every setting of a run, read from a YAML file and the command line."""

from typing import TYPE_CHECKING

from distloop import hand_on

if TYPE_CHECKING:
    from distloop.config.help import settings_help
    from distloop.config.load import load_config
    from distloop.config.settings import (
        Batch,
        Checkpoint,
        Config,
        Data,
        Ddp,
        Log,
        Model,
        Optim,
        Schedule,
        Stop,
        Task,
        Tracking,
        Train,
        Validate,
    )
else:
    __getattr__ = hand_on(__name__, __file__)
