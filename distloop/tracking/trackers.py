"""Console, metrics.jsonl, figures, W&B and report of a run, behind one interface: begin, log, say, end."""

from __future__ import annotations

import contextlib
import os
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from distloop.config.settings import Config
from distloop.data.advice import advice
from distloop.ranks.ranks import Ranks
from distloop.ranks.stopping import StopReason
from distloop.run.attempt import Attempt
from distloop.run.figures import Figures
from distloop.run.files import METRICS
from distloop.run.metrics import MetricsFile, check_row, plain_values
from distloop.tracking.console import Console
from distloop.tracking.progress import Progress
from distloop.tracking.summary import describe, ending
from distloop.tracking.wandb.process import WandbProcess, own_python, wandb_mode

REPORT_SECONDS = 60.0
SILENT_SECONDS = 5.0  # then it is said that the report is what the end waits for
STOPPED_SECONDS = 15.0  # for W&B when the run is stopped: those who stopped it may not wait long, and it continues
FAILED_SECONDS = 8.0  # less than ranks wait for each other after a failure


class Trackers:
    """All trackers of rank 0; on the other ranks they do nothing. Use as a context around the loop.

    W&B starts at once, in a process of its own that reads metrics.jsonl, while the run is prepared.
    """

    def __init__(self, run: Attempt, config: Config, ranks: Ranks) -> None:
        self.run, self.config, self.ranks = run, config, ranks
        starts = ranks.is_main and not run.is_finished
        mode = wandb_mode(config.tracking, os.environ) if starts else None
        self.wandb = WandbProcess(run.path, config.tracking, mode) if mode else None
        self.file: MetricsFile | None = None
        self.figures: Figures | None = None
        self.console: Console | None = None

    def begin(
        self,
        model: nn.Module,
        device: torch.device,
        name: str | None = None,
        optimizer: torch.optim.Optimizer | None = None,
    ) -> None:
        """Before the loop: wait until W&B has started, then print what is trained, on what and by what. Collective.
        `name`: the model's; None: config.model.name."""
        start, plan, best = self.run.start, self.run.plan, self.run.best
        self.ranks.position.enter("starting W&B")
        if self.ranks.is_main:
            progress = Progress(
                name=start.path.name,
                attempt=start.attempt,
                first_step=start.step,
                total_steps=plan.total_steps,
                steps_per_epoch=plan.steps_per_epoch,
                best_rule=best.rule,
                best=best.row,
                saved_step=lambda: self.run.status.step,
            )
            self.console = Console(progress)
            self.file = MetricsFile(start.path / METRICS, self.run.check_ownership)
            self.figures = Figures(start.path, start.step, self.run.check_ownership)
        wandb = self.ranks.from_main(self._wandb_started)
        lines = describe(self.config, start, plan, model, device, name or self.config.model.name, optimizer)
        self.say(*self.ranks.messages, *start.messages, *lines, *wandb)

    def log(self, kind: str, step: int, /, **values: Any) -> None:
        """Log a row. `kind`: train, epoch or validate. `step`: how many steps are done. `values`: also the loop's own:
        numbers, of Python or NumPy, tensors of no dimension, lists of them. Rank 0's are logged: add them up over the
        ranks with sum_over_ranks(). Raises UsageError for others, and for a name that every row has."""
        check_row(kind, values)
        if self.file is None or self.console is None:
            return
        row = self._begin_row(kind, step) | plain_values(f"trackers.log({kind!r}, …)", values)
        self.file.log(row)
        self.console.log(row)

    def figure(self, name: str, step: int, picture: Any) -> None:
        """Show rank 0's picture, of at most 2000 pixels a side, beside the rows of `step`: in report and W&B, and as
        figures/step_…/NAME.png for the last 20 steps with pictures, of at most 16 each. `picture`: a figure of
        matplotlib, which the caller closes, an image of PIL, or an array or tensor [height, width],
        [height, width, 3 or 4] or [1 or 3, height, width], of uint8 or floats from 0 to 1. Raises UsageError for
        others; where drawing or writing fails, it is said in a line."""
        if self.file is None or self.figures is None:
            return
        with self.run.clock.on("validation"):  # not a part of a step
            file = self.figures.write(name, step, picture)
        if file is not None:
            self.file.log(self._begin_row("figure", step) | {"name": name, "file": file})

    def _begin_row(self, kind: str, step: int) -> dict[str, Any]:
        epoch = (step - 1) // self.run.plan.steps_per_epoch + 1
        keys = {"kind": kind, "step": step, "epoch": epoch, "attempt": self.run.start.attempt}
        return {**keys, "time": round(time.time(), 3)}

    def say(self, *lines: str) -> None:
        """Print lines."""
        if self.console:
            for line in lines:
                self.console.line(line)

    def end(self, step: int, stop: StopReason | None, metrics: dict[str, Any]) -> None:
        """Print how the attempt ends, write the report of a finished run, end W&B. Collective.
        `stop`: why the run stops. `metrics`: the last validation."""
        self.ranks.from_main(lambda: self._end(step, stop, metrics))

    def _end(self, step: int, stop: StopReason | None, metrics: dict[str, Any]) -> None:
        self._close()
        finished = step == self.run.plan.total_steps or stop is StopReason.FINISHED
        why = self.run.best.early_end.reason if stop is StopReason.FINISHED else stop.text if stop else None
        total_steps, best, source = self.run.plan.total_steps, self.run.best, self.run.source
        longer = best.early_end.longer if step < total_steps else "--train.epochs N"
        self.say(*ending(self.run.path, step, total_steps, finished, why, best.row, metrics, longer))
        self.say(*source.bad_samples.lines(), *advice(self.run.clock.seconds, self.config.data, source))
        report = None
        if finished and self.config.tracking.report:
            command, environment = own_python("distloop.commands.report", str(self.run.path))
            report = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        seconds = self.config.tracking.end_seconds
        self._end_wandb("finished" if finished else "stopped", seconds if finished else min(seconds, STOPPED_SECONDS))
        if report is not None:
            self.say(drawn(report, self.run.path, self.ranks.still_at_work, self.say))

    def _wandb_started(self) -> list[str]:
        if self.wandb is None:
            return []
        line = self.wandb.started(self._while_waiting)
        if self.wandb.url and self.console:
            self.console.link(self.wandb.url)
        return [line]

    def _end_wandb(self, state: str, seconds: float) -> None:
        wandb, self.wandb = self.wandb, None
        if wandb and (problem := wandb.finish(state, seconds, self._while_waiting)):
            self.say(problem)

    def _while_waiting(self) -> StopReason | None:
        """Called several times a second while rank 0 waits for W&B. A reason to stop ends the wait at the start."""
        self.ranks.still_at_work()
        return self.ranks.watch.wish

    def __enter__(self) -> Trackers:
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        self._close()
        if kind is not None:
            interrupted = issubclass(kind, KeyboardInterrupt)  # Ctrl-C again: end at once
            self._end_wandb("stopped" if interrupted else "failed", 0.0 if interrupted else FAILED_SECONDS)

    def _close(self) -> None:
        if self.file is not None:
            self.file.close()
            self.file = None
        if self.console is not None:
            self.console.close()


def drawn(report: subprocess.Popen[bytes], run: Path, waiting: Callable[[], Any], say: Callable[[str], Any]) -> str:
    """Wait for the process that draws the report, REPORT_SECONDS at most; returns a line about it for people. It is a
    process of its own, so that no failure of its libraries is one of the run. `waiting` is called several times a
    second; `say`, where it takes long."""
    begun, output, is_said = time.monotonic(), None, False
    while output is None and time.monotonic() < begun + REPORT_SECONDS:
        waiting()
        if not is_said and time.monotonic() > begun + SILENT_SECONDS:
            is_said = True
            say(f"  the report is being drawn: {REPORT_SECONDS:g} s at most")
        with contextlib.suppress(subprocess.TimeoutExpired):
            output = report.communicate(timeout=0.2)[0].decode(errors="replace").strip()
    if output is not None and report.returncode == 0:
        return f"  report: {run / 'report.html'}"
    report.kill()
    output = f"not ready after {REPORT_SECONDS:g} s" if output is None else output or "no reason given"
    problem, again = output.splitlines()[-1], f"`distloop report {run}` tries again"
    return f"distloop: WARNING: the report was not written ({problem}); {again}"
