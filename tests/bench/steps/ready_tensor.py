"""The loop by hand, fed with slices of a tensor that is ready: no order, no augmentation, no normalisation. It trains
on other data than the others."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from torch import Tensor

from tests.bench.steps import by_hand
from tests.bench.steps.job import Job, Rows, run


class Ready(Job):
    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        rows = Rows(self.data().train)
        inputs, targets = rows.normalised(rows.data.inputs), rows.data.targets
        size = self.batch // self.accumulation
        for number in itertools.count():
            start = (number * self.processes + self.rank) * size % (len(inputs) - size)
            yield inputs[start : start + size], targets[start : start + size]


def train(job: Job) -> None:
    by_hand.train(Ready(**vars(job)))


if __name__ == "__main__":
    run(train)
