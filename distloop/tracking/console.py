"""The console of rank 0: a progress bar on a terminal, plain lines in a file."""

from __future__ import annotations

import sys
import time
from typing import Any

from distloop.cluster import say


def number(value: Any) -> str:
    """A number as people read it: 0.9806, 1.2e-05, 12345; anything else (a list of a user's task) as it is."""
    if not isinstance(value, (int, float)):
        return str(value)
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def duration(seconds: float) -> str:
    """65 -> 1:05, 3700 -> 1:01:40."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


class Console:
    """Shows rows as they are logged. Use from rank 0 only."""

    def __init__(self, first_step: int, total_steps: int, epochs: int) -> None:
        self.first_step, self.total_steps, self.epochs = first_step, total_steps, epochs
        self.started = time.monotonic()
        self.progress: Any = None
        if sys.stdout.isatty():
            from rich.progress import BarColumn, Progress, TextColumn

            columns = (BarColumn(12), TextColumn("{task.percentage:>3.0f}%"), TextColumn("{task.description}"))
            self.progress = Progress(*columns, refresh_per_second=5, transient=True)
            self.task = self.progress.add_task("starting", total=total_steps, completed=first_step)
            self.progress.start()

    def line(self, text: str) -> None:
        """One line that stays."""
        if self.progress:
            self.progress.console.print(text, markup=False, highlight=False, soft_wrap=True)
        else:
            say(text)

    def log(self, row: dict[str, Any]) -> None:
        """Show one row of metrics."""
        step = row["step"]
        epoch = f"epoch {row['epoch']}/{self.epochs}"
        if row["kind"] == "train":
            left = (time.monotonic() - self.started) / (step - self.first_step) * (self.total_steps - step)
            loss, rate = f"running loss {number(row['running_loss'])}", f"{number(row['samples_per_second'])} samples/s"
            parts = [
                epoch,
                f"step {step}/{self.total_steps}",
                loss,
                f"lr {row['lr']:.3g}",
                rate,
                f"{duration(left)} left",
            ]
            if self.progress is None:
                self.line(" · ".join(parts))
                return
            # What a narrow terminal has no room for beside the bar, the least needed first.
            for part in (rate, f"lr {row['lr']:.3g}", epoch):
                if len(" · ".join(parts)) > self.progress.console.width - 20:
                    parts.remove(part)
            self.progress.update(self.task, completed=step, description=" · ".join(parts))
        else:
            names = [name for name in row if name not in ("kind", "step", "epoch", "attempt", "samples")]
            text = " · ".join(f"{name} {number(row[name])}" for name in names)
            self.line(f"{epoch} · {'trained' if row['kind'] == 'epoch' else 'validated'} · step {step} · {text}")

    def close(self) -> None:
        if self.progress:
            self.progress.stop()
            self.progress = None
