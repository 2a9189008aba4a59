"""The package's loop, of which one rank gets a signal after one of its updates: STOP="SIGTERM 2 1" means that rank 1
gets SIGTERM after its second update in this start."""

from __future__ import annotations

import os
import signal
from typing import Any

from torch.optim.optimizer import register_optimizer_step_post_hook

from distloop import train as package
from distloop.config import Config
from distloop.ranks import Ranks


def train(config: Config, ranks: Ranks) -> None:
    if asked := os.environ.get("STOP"):
        name, update, rank = asked.split()
        updates = [0]

        def count(*_: Any) -> None:
            updates[0] += 1
            if updates[0] == int(update):
                os.kill(os.getpid(), signal.Signals[name])

        if int(os.environ.get("RANK", 0)) == int(rank):
            register_optimizer_step_post_hook(count)
    package.train(config, ranks)
