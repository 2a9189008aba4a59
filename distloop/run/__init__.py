"""One run and its directory: checkpoints, metrics, status, lock."""

from typing import TYPE_CHECKING

from distloop import hand_on

if TYPE_CHECKING:
    from distloop.run.attempt import open_run as open_run
    from distloop.run.best import Best as Best
    from distloop.run.checkpoint import LoopState as LoopState
    from distloop.run.clock import peak_memory as peak_memory
else:
    __getattr__ = hand_on(__name__, __file__)
