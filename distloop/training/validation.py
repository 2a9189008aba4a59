"""Validation: every sample counted exactly once, the same sums on any number of ranks."""

import contextlib
import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Protocol

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from distloop.config.settings import Config
from distloop.data.bad_samples import listed
from distloop.data.datasets import DataSource
from distloop.data.lengths import refuse_other_length
from distloop.data.look import first_validation_batch
from distloop.data.now import now_at, tell
from distloop.data.order import FixedBatchSampler
from distloop.data.seeding import Place, generators_restored, seed_place
from distloop.errors import RunFailed
from distloop.ranks.places import Position
from distloop.ranks.ranks import Ranks
from distloop.ranks.sums import plain_number
from distloop.run.attempt import Attempt
from distloop.run.checkpoint import LoopState
from distloop.run.metrics import check_names, plain_values
from distloop.run.parts import Parts
from distloop.run.unvalidated import saved_if_it_fails
from distloop.training.buffers import broadcast_buffers
from distloop.training.collected import Collected
from distloop.training.details import Details
from distloop.training.named_sums import marked, split
from distloop.training.tasks import Task, collects
from distloop.training.validated_sums import ValidatedSums
from distloop.training.validation_sets import in_one_row, load_sets
from distloop.training.weights import Weights


class LogsRows(Protocol):
    """The part of Trackers that a validation uses."""

    def log(self, kind: str, step: int, /, **values: Any) -> None: ...


class Validation:
    """Validates the model: returns the metrics, and writes the details to validation.json."""

    def __init__(
        self,
        config: Config,
        model: nn.Module,
        task: Task,
        source: DataSource,
        run: Attempt,
        ranks: Ranks,
        trackers: LogsRows | None = None,
    ) -> None:
        """`trackers`: log the row of each validation; None: the loop does that, and updates its Best itself."""
        self.model, self.task, self.run, self.position = model, task, run, ranks.position
        self.config, self.source, self.seed = config, source, config.seed
        self.ranks, self.trackers = ranks, trackers
        place = (run.clock.device, ranks.rank, ranks.world_size)
        self.sets = load_sets(config, source, task, *place, persistent=True)
        self.details = Details(task, source, config.data, config.seed)

    def __call__(self, step: int, parts: Parts | None = None, state: LoopState | None = None) -> dict[str, float]:
        """Validate after `step` steps; returns the task's summary, the same on all ranks. Collective.

        With `parts` and the loop's `state`, what a checkpoint of this step holds: log the row, update run's Best, and
        where that fails, let rank 0 save them, for the next attempt to validate. Of a step that comes from such a
        checkpoint, save them as validated. Before the first step, only log the row.
        """
        if self.trackers is None or parts is None or state is None:
            return self._validate(step)
        self.position.step = step
        with contextlib.nullcontext() if state.unvalidated else saved_if_it_fails(self.run, parts, state):
            with self.run.phase("validation"):
                metrics = self._validate(step)
            if self.ranks.world_size > 1:
                self.position.enter("waiting for the other ranks' validation")
                dist.all_reduce(torch.zeros(()))  # rank 0 waits here for all, to save if one of them fails
            self.run.best.update(step, metrics)
            self.trackers.log("validate", step, **metrics)
        if state.unvalidated and step:
            self.run.save(parts, dataclasses.replace(state, unvalidated=False, best=self.run.best.row))
        return metrics

    def _validate(self, step: int) -> dict[str, float]:
        tell(self.task, now_at(step, self.run.plan, training=False))
        found: dict[str, dict[str, float]] = {}
        for each in self.sets:
            refuse_other_length(each.half, each.dataset, each.sampler.samples)
            details = None if found else self.details
            batches = self._until_verdict(each.loader)
            found[each.suffix] = validate(
                self.model, self.task, batches, each.sampler, self.position, details, self.seed, each.half
            )
        self.position.enter("keeping what was validated")  # one that is still in summary() is behind
        self.details.write(self.run.path, step, self.run.start.attempt)
        return in_one_row(found)

    def _until_verdict(self, loader: Iterable[Any]) -> Iterator[Any]:
        """The batches, as long as no rank has failed. Raises RunFailed: the run is over, and this rank may have many
        batches left, without a collective that would tell it."""
        for batch in loader:
            if (verdict := self.ranks.roll_call.verdict) is not None:
                raise RunFailed(verdict.reason)
            yield batch

    def first_batch(self) -> dict[str, float]:
        """The metrics of one batch of each set, this rank's first, for the rehearsal. Collective, although ranks differ
        in it."""
        tell(self.task, now_at(self.run.start.step, self.run.plan, training=False))
        found: dict[str, dict[str, float]] = {}
        for each in self.sets:
            batch, samples = first_validation_batch(
                self.config, self.source, self.task, each.dataset, each.sampler, self.run.clock.device
            )
            alone, details = FixedBatchSampler(samples, samples, 0, 1), None if found else self.details
            found[each.suffix] = validate(self.model, self.task, [batch], alone, None, details, self.seed)
        return in_one_row(found)


@generators_restored()  # so that no numbers of training depend on when it validates
def validate(
    model: nn.Module,
    task: Task,
    loader: Iterable[Any],
    sampler: FixedBatchSampler,
    here: Position | None = None,
    details: Details | None = None,
    seed: int = 0,
    half: str = "validation",
) -> dict[str, float]:
    """The task's summary over the whole validation set, with `samples`; the same on all ranks.

    `model`: the bare module, since DDP's forward waits for other ranks, which may have fewer batches. `loader`: yields
    the batches that `sampler` gives this rank. `here`: this rank's position. `details`: collects the details. `seed`:
    the run's; the global generators are seeded for each batch by its number, and for the summary. `half`: of the
    data. The sums of all batches are added in the order of the batches, in float64, so that the result does not depend
    on which rank computed which batch.
    """
    broadcast_buffers(model, task)  # BatchNorm's statistics differ between ranks: all validate rank 0's
    modules = [(module, module.training) for module in (model, task.as_module)]
    for module, _ in modules:
        module.eval()
    device = next(model.parameters()).device
    if details is not None:
        details.begin(device)
    sums, weights, collected = ValidatedSums(), Weights(), Collected() if collects(task) else None
    if here is not None:
        position = 0
        here.samples = lambda: f"{listed(range(*sampler.span(position)))} of the {half} data"
    with torch.no_grad():
        for position, batch in enumerate(loader):
            seed_place(Place.VALIDATION, seed, device, sampler.rank + position * sampler.world_size)
            outputs = task.forward(model, batch)
            loss, weight, *named = task.loss(outputs, batch)
            weights.check(weight, sampler.size(position) if task.weight == "samples" else None)
            sums_of_batch = {"loss": loss, "weight": weight, "samples": sampler.size(position)}
            metrics = task.metrics(outputs, batch)
            check_names("metrics", metrics)
            sums.add(sums_of_batch | metrics | marked(named[0] if named else {}, metrics))
            if collected is not None:
                collected.add(task.collect(outputs, batch), sampler.size(position))
            if details is not None:
                details.add(task.guesses(outputs, batch), *sampler.span(position))
    weights.read()
    refuse_short_loader(len(sums.rows), sampler)
    for module, was_training in modules:
        module.train(was_training)
    if here is not None:
        here.enter("adding up the validation")
    for_summary: list[Any] = [sums.total(sampler, device)]
    if collected is not None:
        for_summary.append(collected.whole(sampler))
    if details is not None:
        details.gather(sampler)
    seed_place(Place.SUMMARY, seed, device)
    return summary_of(task, *for_summary)


def summary_of(task: Task, sums: dict[str, Tensor], *collected: dict[str, Any]) -> dict[str, Any]:
    """The task's summary of these sums, with `samples`. `collected`: of a task that does so. Raises UsageError for
    names that distloop uses itself, and for values that are no numbers."""
    sums, means = split(sums)
    samples, values = int(sums["samples"]), task.summary(sums, *collected)
    if isinstance(values, Mapping) and plain_number(values.get("samples")) == samples:  # handed on as it came
        values = {name: value for name, value in values.items() if name != "samples"}
    check_names("summary", values)
    arrays = (Tensor, np.ndarray)  # of one number, as a metric's compute() may give it
    values = {n: v.reshape(()) if isinstance(v, arrays) and math.prod(v.shape) == 1 else v for n, v in values.items()}
    means = {name: mean for name, mean in means.items() if name not in values}
    return {**plain_values("task.summary()", values), **means, "samples": samples}


def refuse_short_loader(batches: int, sampler: FixedBatchSampler) -> None:
    """Raise RunFailed if this rank got fewer batches than the sampler has for it."""
    due = len(range(sampler.rank, sampler.batches, sampler.world_size))
    if batches != due:
        raise RunFailed(
            f"Validation on rank {sampler.rank} got {batches} batches in the place of {due}: something ended the "
            "loader, such as a StopIteration that left the data set. The samples behind it would not be counted."
        )
