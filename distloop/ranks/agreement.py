"""One decision of all ranks whether to stop, without a step that waits for it."""

import datetime
import time
from typing import Any

from distloop.ranks.stopping import StopReason, Watch

AGREE_SECONDS = 0.25  # between two exchanges, if steps are shorter: a stop comes half a second later at most
MOST_STEPS_BETWEEN = 32
SMOOTHING = 0.2  # the weight of the latest interval in the pace


class Agreement:
    """Ranks exchange their wishes to stop over gloo, beside the training. An exchange that begins after one step is
    read some steps later, when it is done, so that no step waits. It also carries that number of steps, which depends
    on the pace: the time that a step takes, with its share of validations and saves."""

    def __init__(self, watch: Watch, world_size: int, timeout: datetime.timedelta) -> None:
        self.watch = watch
        self.interval = self.steps_left = 1
        self.since: float | None = None  # by a clock that stands still in validations and saves
        self.exchanged, self.pace = time.monotonic(), 1.0  # seconds a step; what comes in is not known at first
        self.exchange: Any = None  # of torch.distributed
        self.words: Any = None  # int64 [2]: a StopReason or 0, and the interval
        self.group: Any = None  # None: a single process
        if world_size > 1:
            import torch.distributed as dist

            self.group = dist.new_group(backend="gloo", timeout=timeout)  # not in the queue of a GPU's collectives

    def reached(self) -> StopReason | None:
        """Why all ranks stop now; None: go on. Call it after each step."""
        if self.watch.signals.taken:
            self.watch.arm()
        if self.group is None and self.watch.wish is not None:
            return self.watch.wish
        self.steps_left -= 1
        if self.steps_left:
            return None
        now = time.monotonic() - self.watch.between_steps
        step_seconds = 1.0 if self.since is None else (now - self.since) / self.interval
        self.watch.took("steps", (2 * self.interval + 1) * step_seconds)
        latest, self.exchanged = (time.monotonic() - self.exchanged) / self.interval, time.monotonic()
        self.pace = (1 - SMOOTHING) * self.pace + SMOOTHING * latest
        self.since = now
        interval = max(1, min(MOST_STEPS_BETWEEN, int(AGREE_SECONDS / max(self.pace, 1e-6))))
        if self.group is None:
            self.interval = self.steps_left = interval
            return None
        agreed = self._exchange(interval)
        self.steps_left = self.interval
        return StopReason(agreed) if agreed else None

    def _exchange(self, interval: int) -> int:
        """Read the last exchange, which sets the interval, and begin the next; returns a StopReason, or 0."""
        import torch
        import torch.distributed as dist

        agreed = 0
        if self.exchange is not None:
            self.exchange.wait()
            agreed, self.interval = self.words.tolist()
        self.words = torch.tensor([self.watch.wish or 0, interval])
        self.exchange = dist.all_reduce(self.words, dist.ReduceOp.MAX, group=self.group, async_op=True)
        return agreed

    def close(self) -> None:
        """Wait for the last exchange; its answer is not needed any more."""
        if self.exchange is not None:
            self.exchange.wait()
