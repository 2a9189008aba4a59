"""The config: every setting of a run, read from a YAML file and the command line."""

from typing import TYPE_CHECKING

from distloop import hand_on

if TYPE_CHECKING:
    from distloop.config.help import settings_help as settings_help
    from distloop.config.load import load_config as load_config
    from distloop.config.settings import Batch as Batch
    from distloop.config.settings import Checkpoint as Checkpoint
    from distloop.config.settings import Config as Config
    from distloop.config.settings import Data as Data
    from distloop.config.settings import Ddp as Ddp
    from distloop.config.settings import Log as Log
    from distloop.config.settings import Model as Model
    from distloop.config.settings import Optim as Optim
    from distloop.config.settings import Schedule as Schedule
    from distloop.config.settings import Stop as Stop
    from distloop.config.settings import Task as Task
    from distloop.config.settings import Tracking as Tracking
    from distloop.config.settings import Train as Train
    from distloop.config.settings import Validate as Validate
else:
    __getattr__ = hand_on(__name__, __file__)
