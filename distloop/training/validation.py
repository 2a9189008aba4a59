"""Validation: every sample counted exactly once, the same sums on any number of ranks."""

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from distloop.config.settings import Config
from distloop.data.datasets import DataSource
from distloop.data.lengths import refuse_other_length
from distloop.data.loader import make_loader
from distloop.data.look import first_validation_batch
from distloop.data.order import FixedBatchSampler
from distloop.data.seeding import Place, generators_restored, seed_place
from distloop.errors import RunFailed, UsageError
from distloop.ranks.places import Position
from distloop.ranks.ranks import Ranks
from distloop.run.attempt import Attempt
from distloop.run.metrics import plain_values
from distloop.training.details import Details
from distloop.training.tasks import Task
from distloop.training.weights import Weights

Forms = dict[str, tuple[tuple[int, ...], bool]]  # name -> shape, whether it is floating


class Validation:
    """Validates the model: returns the metrics, and writes the details to validation.json."""

    def __init__(
        self, config: Config, model: nn.Module, task: Task, source: DataSource, run: Attempt, ranks: Ranks
    ) -> None:
        self.model, self.task, self.run, self.position = model, task, run, ranks.position
        self.config, self.source, self.seed = config, source, config.seed
        device, dtype, data = run.clock.device, getattr(torch, config.dtype), source.validation
        self.dataset = data
        self.sampler = FixedBatchSampler(len(data), config.validate.batch_size, ranks.rank, ranks.world_size)
        self.loader = make_loader(
            config.data, source, task, config.seed, device, dtype, data, self.sampler, persistent=True
        )
        self.details = Details(task, source, config.data, config.seed)

    def __call__(self, step: int) -> dict[str, float]:
        """Validate after `step` steps; returns the task's summary, the same on all ranks. Collective."""
        refuse_other_length("validation", self.dataset, self.sampler.samples)
        metrics = validate(self.model, self.task, self.loader, self.sampler, self.position, self.details, self.seed)
        self.details.write(self.run.path, step, self.run.start.attempt)
        return metrics

    def first_batch(self) -> dict[str, float]:
        """The metrics of one batch, this rank's first, for the rehearsal. Collective, although ranks differ in it."""
        batch, samples = first_validation_batch(
            self.config, self.source, self.task, self.sampler, self.run.clock.device
        )
        alone = FixedBatchSampler(samples, samples, 0, 1)
        return validate(self.model, self.task, [batch], alone, None, self.details, self.seed)


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
    weights = Weights()
    with torch.no_grad():
        for position, batch in enumerate(loader):
            seed_place(Place.VALIDATION, seed, device, sampler.rank + position * sampler.world_size)
            outputs = task.forward(model, batch)
            loss, weight = task.loss(outputs, batch)
            weights.check(weight, sampler.size(position) if task.weight == "samples" else None)
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
    weights.read()
    refuse_short_loader(len(rows), sampler)
    model.train(was_training)
    if here is not None:
        here.enter("adding up the validation")
    sums = add_in_batch_order(rows, counts, sampler, device)
    if details is not None:
        details.gather(sampler)
    seed_place(Place.SUMMARY, seed, device)
    return {**plain_values("task.summary()", task.summary(sums)), "samples": int(sums["samples"])}


def refuse_short_loader(batches: int, sampler: FixedBatchSampler) -> None:
    """Raise RunFailed if this rank got fewer batches than the sampler has for it."""
    due = len(range(sampler.rank, sampler.batches, sampler.world_size))
    if batches != due:
        raise RunFailed(
            f"Validation on rank {sampler.rank} got {batches} batches in the place of {due}: something ended the "
            "loader, such as a StopIteration that left the data set. The samples behind it would not be counted."
        )


def add_in_batch_order(
    rows: list[dict[str, Tensor]], counts: dict[str, Tensor], sampler: FixedBatchSampler, device: torch.device
) -> dict[str, Tensor]:
    """The sums over all batches of all ranks, on the CPU. Collective.

    `rows`: the float sums of each of this rank's batches; a table [batches, …] of them is added up. `counts`: the
    integer sums over this rank's batches, which are exact in any order (a table of confusion matrices would not fit).
    """
    own = {**rows[0], **counts} if rows else {}
    forms = [_forms(own)]
    distributed = sampler.world_size > 1
    if distributed:
        dist.broadcast_object_list(forms)  # a rank may have no batch at all; rank 0 has the first
        if rows:
            refuse_other_forms(_forms(own), forms[0], sampler.rank)
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


def refuse_other_forms(here: Forms, there: Forms, rank: int) -> None:
    """Raise UsageError if the sums of this rank have other names or shapes than those of rank 0, `there`."""
    for name in dict.fromkeys([*there, *here]):
        if here.get(name) != there.get(name):
            texts = [f"of shape {list(form[0])}" if (form := forms.get(name)) else "missing" for forms in (here, there)]
            raise UsageError(
                f"In validation the sum {name!r} is {texts[0]} on rank {rank}, but {texts[1]} on rank 0. The model's "
                "outputs and what task.metrics() makes of them must have one form on all ranks: their code must not "
                "ask which rank it runs on."
            )


def _forms(sums: dict[str, Tensor]) -> Forms:
    """The shape of each, and whether it is floating."""
    return {name: (tuple(value.shape), value.is_floating_point()) for name, value in sums.items()}


def broadcast_buffers(*models: nn.Module | None) -> None:
    """Give all ranks rank 0's buffers."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        for model in models:
            for buffer in model.buffers() if model is not None else ():
                dist.broadcast(buffer, src=0)
