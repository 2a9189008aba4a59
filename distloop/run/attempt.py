"""One start of a run: all that it opens, and in which order that is closed."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import torch

from distloop.config.settings import Config, path_of
from distloop.data.datasets import DataSource
from distloop.data.order import Plan
from distloop.errors import RunFailed
from distloop.ranks.agreement import Agreement
from distloop.ranks.attempt_base import AttemptBase
from distloop.ranks.leaving import end_at_once
from distloop.ranks.meeting import group_timeout
from distloop.ranks.ranks import Ranks
from distloop.ranks.stopping import STOP, StopReason
from distloop.ranks.talking import say
from distloop.run.accounts import TimeAccounts
from distloop.run.best import Best, EarlyEnd
from distloop.run.checkpoint import LoopState
from distloop.run.clock import Clock
from distloop.run.directory import open_directory, record_start
from distloop.run.failures import FailureRecords
from distloop.run.files import CHECKPOINTS, FAILURES, METRICS
from distloop.run.identity import facts_of, identity_of
from distloop.run.lock import RunLock
from distloop.run.micro_size import advice, refuse_unfound
from distloop.run.parts import Parts, check_parts, load_start
from distloop.run.provenance import LoopSource
from distloop.run.same import refuse_unlike_rank_0
from distloop.run.saving import Saver
from distloop.run.status import RunStatus


class Attempt(AttemptBase):
    """One start of a run, on this rank. Rank 0 owns the run directory and writes it. As a context it opens the
    directory (collective; raises UsageError if the run may not be continued like this) and closes it."""

    def __init__(
        self, config: Config, ranks: Ranks, plan: Plan, source: DataSource, device: torch.device, best: Best
    ) -> None:
        self.config, self.ranks, self.plan, self.source, self.best = config, ranks, plan, source, best
        self.path, self.clock, self.device, self.lock = path_of(config), Clock(device), device, RunLock()
        self.status = RunStatus(ranks.is_main, plan.total_steps, best.rule, self.check_ownership)
        self.is_open = self.is_closed = False
        self.best.early_end = EarlyEnd(config.train.early_stop, best.rule)
        self.agreed: StopReason | None = None  # what end_step() returned

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Measure a validation or a checkpoint, for the accounts and for the time to keep free before a deadline."""
        self.ranks.position.enter(name)
        with self.clock.on(name), self.ranks.watch.timed(name):
            yield

    def end_step(self, step: int) -> StopReason | None:
        """Call it after each step; `step`: how many are done. Returns why all ranks stop now; None: go on."""
        self.clock.add(self.plan.sample_count(step - 1))
        self.agreed = None if self.best.early_end.reason else self.agreement.reached()
        return self.stop_reason

    @property
    def stop_reason(self) -> StopReason | None:
        """What end_step() returned; FINISHED once finish() or train.early_stop has ended the run."""
        return StopReason.FINISHED if self.best.early_end.reason else self.agreed

    def load(self, parts: Parts) -> LoopState:
        """Load the newest good checkpoint, else the weights of --init-from, else none; returns the loop's state.
        `parts`: modules, optimizers, objects with state_dict(), None. Raises UsageError for what does not fit."""
        refuse_unfound(self.start, self.plan)
        self.start.messages.extend(check_parts(parts))
        state = load_start(self.start, parts, self.source.bad_samples, self.best.early_end, self.config)
        self.best.row = self.status.best = state.best
        if self.start.changes and self.ranks.is_main:
            record_start(self.start, self.config, self.ranks.world_size, self.loop)
        self.ranks.watch.begin_loop()
        return state

    def save(self, parts: Parts, state: LoopState) -> None:
        """Copy `parts` and the loop's state; a thread writes them as the checkpoint of state.step."""
        more = {"time": self.accounts.mark(), **self.source.bad_samples.state(), **self.best.early_end.state()}
        self.saver.save(parts, state, more)

    def finish(self, reason: str) -> StopReason:
        """End the run after this step as finished: returns what to set stop_reason to, before the loop saves. All ranks
        call it alike: they decide by numbers that are the same on all, as validate()'s are."""
        self.best.early_end.said = reason
        return StopReason.FINISHED

    def end(self, step: int, stop: StopReason | None) -> None:
        """Wait for the last checkpoint, then write that the run is finished, or why it is stopped. Collective.
        Raises RunFailed on all ranks if the last checkpoint, or with checkpoint.on_failure = stop any, is missing."""
        self.ranks.position.enter("finishing")
        self.clock.switch("checkpoint")
        self.ranks.from_main(self.saver.finish)
        self.clock.switch("start_up")
        stopped_by = stop if step < self.plan.total_steps and stop is not StopReason.FINISHED else None
        if stopped_by is StopReason.SAVE_FAILED:
            raise RunFailed(f"Stopped after step {step} (checkpoint.on_failure): a checkpoint could not be written.")
        if self.ranks.is_main:
            (self.path / STOP).unlink(missing_ok=True)
        state = "stopped" if stopped_by else "finished"
        self.status.end(state, stopped_by.text if stopped_by else self.best.early_end.reason or "all steps are done")
        self.accounts.write(state)
        self.agreement.close()
        self.ranks.stopped_by = stopped_by

    def __enter__(self) -> Attempt:
        self.ranks.position.enter("opening the run directory")
        self.ranks.watch.attempt = self
        try:
            self._open()
        except BaseException as error:
            self.__exit__(type(error), error, None)
            raise
        return self

    def _open(self) -> None:
        config, ranks, data = self.config, self.ranks, (self.config, self.source, self.device)
        self.loop = LoopSource.of(ranks.position.code)
        facts = facts_of(*data, self.loop) if ranks.world_size > 1 else {}
        opening, more = (config, self.lock, self.status, ranks.world_size), (self.loop, ranks.digests.of)
        start, of_rank_0 = ranks.from_main(lambda: (open_directory(*opening, identity_of(*data), *more), facts))
        refuse_unlike_rank_0(ranks, of_rank_0, facts, start)
        self.start, self.is_finished = start, start.finished  # before this attempt
        if self.is_finished:
            _say_finished(self)
            return
        self.status.start, ranks.on_memory = start, lambda: advice(config, self.plan, ranks.position.phase)
        self.records = FailureRecords(self.path / FAILURES, start.attempt, ranks.rank)
        if ranks.world_size > 1:
            self.records.open()
        self.accounts = TimeAccounts(start, self.clock, ranks.world_size, ranks.is_main, self.check_ownership)
        saved = (self.path / CHECKPOINTS, config.checkpoint, start.identity)
        self.saver = Saver(*saved, ranks.watch, self.status.update, ranks.is_main, self.check_ownership)
        self.is_open = True
        self.accounts.write()  # the process may be killed before the first tick()
        if ranks.is_main:
            ranks.watch.look_for(self.path, config.stop, os.environ)
        self.agreement = Agreement(ranks.watch, ranks.world_size, group_timeout(config.ddp))

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        interrupted = isinstance(error, KeyboardInterrupt)  # Ctrl-C again: end at once
        if self.is_open and not interrupted:
            self.saver.wait()
        state = "stopped" if interrupted else "failed"
        if error is not None:
            verdict = self.ranks.report_failure(error)  # on the first failure, perhaps another rank's
            self.status.end(state if verdict.code else "stopped", verdict.reason)
        if self.is_open:
            self.accounts.close(None if error is None else state)
            self.is_closed = True
            self.records.close()
        self.lock.release()

    def tick(self) -> None:
        self.check_ownership()
        if self.is_open and not self.is_closed:
            if self.ranks.is_main:
                self.records.write_ranks(self.ranks.roll_call.table())
            self.accounts.write_now_and_then()

    def cut_off(self, state: str, reason: str) -> None:
        for last in (self.status.cut_off, self.ranks.roll_call.cut_off):
            with contextlib.suppress(Exception):
                last(state, reason)
        self.lock.release()

    def keep_failure(self, record: dict[str, Any]) -> None:
        if self.is_open:
            self.records.keep(record)

    def rank_0_is_lost(self, reason: str) -> None:
        self.status.rank_0_is_lost(reason)

    def crash_report(self, rank: int) -> str:
        return self.records.crash_report(rank) if self.is_open else ""

    def check_ownership(self) -> None:
        """Count the lock's heartbeat up. Ends the process if another one has taken over the run directory."""
        if (taken_over_by := self.lock.beat()) is not None:
            say(f"distloop: {self.path} was taken over by {taken_over_by}; ending here.")
            self.ranks.roll_call.leave("its run directory was taken over")
            end_at_once(1)


def _say_finished(attempt: Attempt) -> None:
    start, early, longer = attempt.start, "", "--train.epochs N"
    if start.step != attempt.plan.total_steps:
        early, longer = f" after step {start.step}: {start.messages[0]}", attempt.best.early_end.longer
    if attempt.ranks.is_main:
        say(
            f"{start.path} is finished{early}; its metrics are in {start.path / METRICS}. "
            f"--name NAME trains another run, --resume extend {longer} goes on with this one."
        )


open_run = Attempt  # for train(): with open_run(…) as run
