"""Validation: every sample counted exactly once, the same sums on any number of ranks."""

import contextlib
import dataclasses
from collections.abc import Iterable, Iterator
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from distloop.config.settings import Config
from distloop.data.bad_samples import listed
from distloop.data.datasets import DataSource
from distloop.data.loader import make_loader
from distloop.data.order import FixedBatchSampler
from distloop.data.seeding import Place, generators_restored, seed_place
from distloop.errors import RunFailed
from distloop.ranks.places import Position
from distloop.ranks.ranks import Ranks
from distloop.run.attempt import Attempt
from distloop.run.checkpoint import LoopState
from distloop.run.metrics import plain_values
from distloop.run.parts import Parts
from distloop.run.unvalidated import saved_if_it_fails
from distloop.training.details import Details
from distloop.training.tasks import Task


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
        self.ranks, self.trackers = ranks, trackers
        self.seed = config.seed
        device, dtype, data = run.clock.device, getattr(torch, config.dtype), source.validation
        self.sampler = FixedBatchSampler(len(data), config.validate.batch_size, ranks.rank, ranks.world_size)
        self.loader = make_loader(
            config.data, source, task, config.seed, device, dtype, data, self.sampler, persistent=True
        )
        self.details = Details(task, source, config.data, config.seed)

    def __call__(self, step: int, parts: Parts | None = None, state: LoopState | None = None) -> dict[str, float]:
        """Validate after `step` steps; returns the task's summary, the same on all ranks. Collective.

        With `parts` and the loop's `state`, what a checkpoint of this step holds: log the row, update run's Best, and
        where that fails, let rank 0 save them, for the next attempt to validate. Of a step that comes from such a
        checkpoint, save them as validated.
        """
        if self.trackers is None or parts is None or state is None:
            return self._validate(step)
        self.position.step = step
        is_saved = state.unvalidated
        with contextlib.nullcontext() if is_saved else saved_if_it_fails(self.run, parts, state):
            with self.run.phase("validation"):
                metrics = self._validate(step)
            self.run.best.update(step, metrics)
            self.trackers.log("validate", step, **metrics)
        if is_saved:
            self.run.save(parts, dataclasses.replace(state, unvalidated=False, best=self.run.best.row))
        return metrics

    def _validate(self, step: int) -> dict[str, float]:
        batches = self._until_verdict()
        metrics = validate(self.model, self.task, batches, self.sampler, self.position, self.details, self.seed)
        self.details.write(self.run.path, step, self.run.start.attempt)
        return metrics

    def _until_verdict(self) -> Iterator[Any]:
        """The batches, as long as no rank has failed. Raises RunFailed: the run is over, and this rank may have many
        batches left, without a collective that would tell it."""
        for batch in self.loader:
            if (verdict := self.ranks.roll_call.verdict) is not None:
                raise RunFailed(verdict.reason)
            yield batch


@generators_restored()  # so that no numbers of training depend on when it validates
def validate(
    model: nn.Module,
    task: Task,
    loader: Iterable[Any],
    sampler: FixedBatchSampler,
    here: Position | None = None,
    details: Details | None = None,
    seed: int = 0,
) -> dict[str, float]:
    """The task's summary over the whole validation set, with `samples`; the same on all ranks.

    `model`: the bare module, since DDP's forward waits for other ranks, which may have fewer batches. `loader`: yields
    the batches that `sampler` gives this rank. `here`: this rank's position. `details`: collects the details. `seed`:
    the run's; the global generators are seeded for each batch by its number, and for the summary. The sums of all
    batches are added in the order of the batches, in float64, so that the result does not depend on which rank computed
    which batch.
    """
    broadcast_buffers(model)  # BatchNorm's statistics differ between ranks: all validate rank 0's
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    if details is not None:
        details.begin(device)
    rows: list[dict[str, Tensor]] = []
    counts: dict[str, Tensor] = {}
    if here is not None:
        position = 0
        here.samples = lambda: f"{listed(range(*sampler.span(position)))} of the validation data"
    with torch.no_grad():
        for position, batch in enumerate(loader):
            seed_place(Place.VALIDATION, seed, device, sampler.rank + position * sampler.world_size)
            outputs = task.forward(model, batch)
            loss, weight = task.loss(outputs, batch)
            sums_of_batch = {"loss": loss, "weight": weight, "samples": sampler.size(position)}
            sums_of_batch |= task.metrics(outputs, batch)
            rows.append({})
            for name, value in sums_of_batch.items():
                tensor = torch.as_tensor(value)
                if tensor.is_floating_point():
                    rows[-1][name] = tensor
                else:
                    counts[name] = counts.get(name, 0) + tensor.to(torch.int64)
            if details is not None:
                details.add(task.guesses(outputs, batch), *sampler.span(position))
    model.train(was_training)
    if here is not None:
        here.enter("adding up the validation")
    sums = add_in_batch_order(rows, counts, sampler, device)
    if details is not None:
        details.gather(sampler)
    seed_place(Place.SUMMARY, seed, device)
    return {**plain_values("task.summary()", task.summary(sums)), "samples": int(sums["samples"])}


def add_in_batch_order(
    rows: list[dict[str, Tensor]], counts: dict[str, Tensor], sampler: FixedBatchSampler, device: torch.device
) -> dict[str, Tensor]:
    """The sums over all batches of all ranks, on the CPU. Collective.

    `rows`: the float sums of each of this rank's batches; a table [batches, …] of them is added up. `counts`: the
    integer sums over this rank's batches, which are exact in any order (a table of confusion matrices would not fit).
    """
    own = {**rows[0], **counts} if rows else {}
    forms = [{name: (tuple(value.shape), value.is_floating_point()) for name, value in own.items()}]
    distributed = sampler.world_size > 1
    if distributed:
        dist.broadcast_object_list(forms)  # a rank may have no batch at all; rank 0 has the first
    sums: dict[str, Tensor] = {}
    for name, (shape, floating) in forms[0].items():
        if floating:
            table = torch.zeros((sampler.batches, *shape), dtype=torch.float64)
            for position, row in enumerate(rows):
                table[sampler.rank + position * sampler.world_size] = row[name].cpu()
        else:
            table = counts.get(name, torch.zeros(shape, dtype=torch.int64)).cpu()[None]
        if distributed:
            table = table.to(device)
            dist.all_reduce(table)
        sums[name] = table.cpu().sum(0)
    return sums


def broadcast_buffers(*models: nn.Module | None) -> None:
    """Give all ranks rank 0's buffers."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        for model in models:
            for buffer in model.buffers() if model is not None else ():
                dist.broadcast(buffer, src=0)
