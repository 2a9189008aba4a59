"""Two validation sets with names: by day the digits as they are, by night inverted."""

from __future__ import annotations

from distloop.data import DataSource, InMemory
from distloop.data.datasets import digits


def sets() -> tuple[InMemory, dict[str, InMemory]]:
    source = digits()
    inputs, targets = source.validation.inputs, source.validation.targets
    normal = (inputs.float() / 255 - 0.3) / 0.38
    train = InMemory((source.train.inputs.float() / 255 - 0.3) / 0.38, source.train.targets, pad=1)
    return train, {"day": InMemory(normal[:260], targets[:260]), "night": InMemory(-normal[260:], targets[260:])}


def day_and_night() -> tuple[InMemory, dict[str, InMemory]]:
    return sets()


def night_alone() -> DataSource:
    train, validation = sets()
    return DataSource(train, validation["night"])
