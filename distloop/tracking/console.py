"""The console of rank 0: a live view on a terminal (live_view.py), plain lines in a log file."""

import os
import sys
from typing import TYPE_CHECKING, Any

from distloop.ranks.talking import say
from distloop.run.metrics import own_values
from distloop.tracking.progress import Progress, metrics_of, number_in
from distloop.tracking.wording import duration, encodable, number

if TYPE_CHECKING:
    from distloop.tracking.live_view import LiveView


LONGEST_LINE = 160  # characters, of a train row with values of the loop's own


class Console:
    """Prints lines and rows of metrics. Use it on rank 0 only.

    On a terminal the progress stands in a live view from the first line until close(); lines scroll above it.
    """

    def __init__(self, progress: Progress) -> None:
        self.progress = progress
        self.view: LiveView | None = None
        self.is_plain = not sys.stdout.isatty() or os.environ.get("TERM", "") in ("", "dumb", "unknown")

    def line(self, text: str) -> None:
        """Print a line."""
        say(encodable(text, sys.stdout.encoding))
        self._open_view()

    def log(self, row: dict[str, Any]) -> None:
        """Print a row of metrics, of kind train, epoch or validate. The live view shows train rows by itself."""
        self.progress.add(row)
        if row["kind"] != "train":
            verb = "trained" if row["kind"] == "epoch" else "validated"
            metrics = [f"{name} {number(value)}" for name, value in metrics_of(row).items()]
            epoch = f"epoch {row['epoch']}/{self.progress.epochs}"
            self.line(" · ".join([epoch, verb, f"step {row['step']}", *metrics]))
        elif self.is_plain:
            self.line(" · ".join(self._train_parts(row)))
        else:
            self._open_view()

    def link(self, url: str) -> None:
        """Show this address in the live view."""
        self.progress.url = url

    def close(self) -> None:
        """Remove the live view. Lines can still be printed."""
        view, self.view, self.is_plain = self.view, None, True
        if view:
            view.close()

    def _open_view(self) -> None:
        if not (self.view or self.is_plain):
            from distloop.tracking.live_view import LiveView  # it imports rich, which a log file does not need

            self.view = LiveView(self.progress)

    def _train_parts(self, row: dict[str, Any]) -> list[str]:
        """The parts of a train row's line, without those whose value the row lacks."""
        progress, left = self.progress, self.progress.seconds_left()
        values = {
            "running loss {}": number_in(row, "running_loss"),
            "lr {}": number_in(row, "lr", ".3g"),
            "{} samples/s": number_in(row, "samples_per_second"),
            "data wait {}": progress.data_wait(),
            "{} left": None if left is None else duration(left),
        }
        steps = [f"epoch {row['epoch']}/{progress.epochs}", f"step {row['step']}/{progress.total_steps}"]
        parts = steps + [form.format(value) for form, value in values.items() if value]
        for name in own_values(row):
            part = f"{name} {number_in(row, name)}"
            if len(" · ".join([*parts, part])) <= LONGEST_LINE:
                parts.append(part)
        return parts
