"""The validation sets of a run: their loaders, and the names that their metrics have in a row."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch

from distloop.config.settings import Config
from distloop.data.datasets import DataSource
from distloop.data.halves import half_of, validation_sets
from distloop.data.loader import Loader, make_loader
from distloop.data.order import FixedBatchSampler
from distloop.errors import UsageError
from distloop.training.tasks import Task


@dataclasses.dataclass(frozen=True)
class ValidationSet:
    """A data set to validate on, as this rank loads it."""

    suffix: str  # of its metrics' names: "" for the first one, "/night" for one of the others
    half: str  # which data it is (halves.py), such as "night validation"
    dataset: Any
    sampler: FixedBatchSampler
    loader: Loader


def load_sets(
    config: Config,
    source: DataSource,
    task: Task,
    device: torch.device,
    rank: int,
    world_size: int,
    persistent: bool = False,
) -> list[ValidationSet]:
    """All validation sets, for this rank. `persistent`: each keeps its loader processes between validations."""
    found: list[ValidationSet] = []
    dtype = getattr(torch, config.dtype)
    for name, dataset in validation_sets(source.validation).items():
        sampler = FixedBatchSampler(len(dataset), config.validate.batch_size, rank, world_size)
        loader = make_loader(config.data, source, task, config.seed, device, dtype, dataset, sampler, persistent)
        suffix = f"/{name}" if found else ""
        found.append(ValidationSet(suffix, half_of(name), dataset, sampler, loader))
    return found


def in_one_row(found: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The metrics of several sets in one row. `found`: by the sets' suffixes. Raises UsageError where two have one
    name."""
    row: dict[str, Any] = {}
    for suffix, metrics in found.items():
        for name, value in metrics.items():
            if name + suffix in row:
                raise UsageError(
                    f"The metric {name!r} of the validation set {suffix[1:]!r} has the name {name + suffix!r} in a "
                    "row, which task.summary() gives to a value of its own. Give that one another name."
                )
            row[name + suffix] = value
    return row
