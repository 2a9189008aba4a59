"""From a data set to batches as the model takes them."""

from __future__ import annotations

import dataclasses
import os
import random
import threading
import time
from collections.abc import Iterable, Iterator
from types import MappingProxyType
from typing import Any, ClassVar, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import Dataset, default_collate
from torchvision.transforms.v2 import functional as reference

from distloop.config.settings import Config, Data
from distloop.data import whole_batches
from distloop.data.batches import cast, to_model
from distloop.data.datasets import DataSource, digits
from distloop.data.loader import Micro, TrainBatches, make_loader, offers_to_model, worker_count
from distloop.data.look import example_batch
from distloop.data.order import FixedBatchSampler, MicroBatch, MicroBatchSampler, Order, Part, Plan
from distloop.data.seeded import SeededDataset, collate_of, no_check
from distloop.data.seeding import seed_forward
from distloop.data.whole_batches import InMemory
from distloop.errors import UsageError
from distloop.ranks.leaving import kill_workers
from distloop.ranks.places import Position
from distloop.tasks import Classification, Task

CPU = torch.device("cpu")


class Pair(NamedTuple):
    image: Any
    label: Any


class Noisy(Dataset):
    """Samples that draw from every global generator, as transforms do."""

    def __len__(self) -> int:
        return 20

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        drawn = [float(torch.rand(())), float(np.random.random()), random.random()]
        return torch.tensor([index, *drawn], dtype=torch.float64), index % 10


class Broken(Noisy):
    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        if index == 7:
            raise UsageError(f"Sample {index} is broken.\nPut another in its place.")
        return super().__getitem__(index)


def loaded(dataset: Any, task: Task, workers: int, sampler: Any, dtype: torch.dtype = torch.float64) -> list[Any]:
    source = DataSource(dataset, dataset)
    return list(make_loader(Data(workers=workers), source, task, 0, CPU, dtype, dataset, sampler))


# ---- the order and the seeds -----------------------------------------------------------------------------------


def test_batches_come_in_the_samplers_order() -> None:
    sampler = MicroBatchSampler(Plan(20, 8, 2, 2, "train", total_steps=5, rank=1), 0)
    expected = [batch.indices.tolist() for batch in sampler]
    assert [batch[0][:, 0].tolist() for batch in loaded(Noisy(), Task(), 0, sampler)] == expected


def test_a_sample_is_augmented_alike_in_any_batch_and_in_any_worker() -> None:
    def rows(workers: int, batch_size: int) -> dict[int, list[float]]:
        batches = loaded(Noisy(), Task(), workers, FixedBatchSampler(20, batch_size, 0, 1))
        return {int(row[0]): row[1:].tolist() for inputs, _ in batches for row in inputs}

    alone = rows(0, 1)
    assert len({tuple(row) for row in alone.values()}) == 20
    assert rows(0, 7) == alone
    assert rows(2, 3) == alone


def test_a_sample_is_augmented_otherwise_in_another_epoch_and_under_another_seed() -> None:
    def drawn(seed: int, epoch: int) -> list[float]:
        dataset = SeededDataset(Noisy(), seed, collate_of(Data()), no_check)
        return dataset.__getitems__(MicroBatch(epoch, np.array([4])))[0].flatten().tolist()

    for column in list(zip(drawn(0, 0), drawn(0, 1), drawn(1, 0), strict=True))[1:]:
        assert len(set(column)) == 3
    assert drawn(0, 1) == drawn(0, 1)


def test_data_in_memory_is_augmented_alike_in_any_batch() -> None:
    images = torch.randint(0, 256, (20, 1, 8, 8), dtype=torch.uint8)
    memory = InMemory(images, torch.arange(20), pad=2, flip=True)
    dataset = SeededDataset(memory, 3, collate_of(Data()), no_check)
    together = dataset.__getitems__(MicroBatch(1, np.arange(20)))[0]
    for index in range(20):
        alone, target = dataset.__getitems__(MicroBatch(1, np.array([index])))
        assert torch.equal(alone[0], together[index])
        assert target.tolist() == [index]
    assert not torch.equal(together, images)


def test_a_collate_function_of_ones_own_makes_the_batches() -> None:
    function = collate_of(Data(collate=f"{__name__}:stack_in_a_dict"))
    batch = SeededDataset(Noisy(), 0, function, no_check).__getitems__(MicroBatch(0, np.array([3, 5])))
    assert batch["inputs"].shape == (2, 4)
    assert batch["targets"].tolist() == [3, 5]


def stack_in_a_dict(samples: list[tuple[Tensor, int]]) -> dict[str, Tensor]:
    return {
        "inputs": torch.stack([inputs for inputs, _ in samples]),
        "targets": torch.tensor([target for _, target in samples]),
    }


# ---- the steps of a run ----------------------------------------------------------------------------------------

SEED = 5
SHORT = Plan(18, 8, 4, 1, "train")  # each third step has two samples: ranks 1 and 3 have none there
STEPS = 7


def batches_of(rank: int, workers: int, first_step: int = 0, **more: Any) -> TrainBatches:
    """The training data of a rank of the plan SHORT."""
    plan = Plan(18, 8, 4, 1, "train", total_steps=STEPS, rank=rank, seed=SEED)
    config = Config(seed=SEED, dtype="float64", data=Data(workers=workers))
    position = more.pop("position", Position())
    return TrainBatches(config, DataSource(Noisy(), Noisy()), Task(), plan, CPU, first_step, position, **more)


def sample_count(micro: Micro) -> list[int]:
    return [int(row[0]) for row in micro.batch[0]]


def expected_samples(part: Part) -> list[int]:
    """Those of the part; where it is empty, the first sample of its step."""
    epoch, first, _ = SHORT.span(part.step)
    order = Order(SHORT.samples, SEED)
    return order(epoch, part.start, part.stop).tolist() or order(epoch, first, first + 1).tolist()


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(("rank", "first_step"), [(0, 0), (1, 0), (3, 2), (2, 5)])
def test_a_step_has_the_micro_batches_of_its_rank_in_the_plan(rank: int, first_step: int, workers: int) -> None:
    position = Position()
    batches = batches_of(rank, workers, first_step, position=position)
    empty = 0
    for step in range(first_step, STEPS):
        window = SHORT.window(step, rank)
        micros = []
        for micro, part in zip(batches.of_step(step), window, strict=True):
            assert (position.step, position.phase) == (step + 1, "forward and backward pass")
            drawn = torch.rand(3)  # as dropout does
            seed_forward(SEED, step, part.number, CPU)
            assert torch.equal(drawn, torch.rand(3))
            micros.append(micro)
        assert position.phase == "parameter update"
        assert [sample_count(micro) for micro in micros] == [expected_samples(part) for part in window]
        assert [micro.is_last for micro in micros] == [part.is_last for part in window]
        assert [micro.is_empty for micro in micros] == [part.start == part.stop for part in window]
        scales = [0.0 if part.start == part.stop else 4 / SHORT.sample_count(step) for part in window]
        assert [micro.scale for micro in micros] == scales
        empty += sum(micro.is_empty for micro in micros)
    short_steps = [step for step in range(first_step, STEPS) if step % 3 == 2]
    assert empty == (len(short_steps) if rank in (1, 3) else 0)


def test_the_mean_over_the_ranks_of_the_scaled_sums_is_the_mean_over_the_step() -> None:
    ranks = [batches_of(rank, 0) for rank in range(4)]
    for step in range(STEPS):
        micros = [micro for batches in ranks for micro in batches.of_step(step)]
        mean_of_ones = sum(micro.scale * len(micro.batch[0]) for micro in micros) / 4  # DDP divides by the ranks
        assert mean_of_ones == pytest.approx(1, rel=1e-12)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_step_that_was_not_taken_whole_is_noticed_in_the_next_one(workers: int) -> None:
    batches = batches_of(0, workers)
    assert not next(batches.of_step(0)).is_last
    with pytest.raises(RuntimeError, match=r"of_step\(1\): the next micro-batch belongs to step 0\. .* take all"):
        list(batches.of_step(1))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(("first_step", "steps", "wrong", "next_step"), [(0, 1, 2, 1), (0, 1, 0, 1), (3, 0, 0, 3)])
def test_a_step_out_of_order_is_refused(first_step: int, steps: int, wrong: int, next_step: int, workers: int) -> None:
    batches = batches_of(1, workers, first_step)
    for step in range(first_step, first_step + steps):
        list(batches.of_step(step))
    with pytest.raises(RuntimeError, match=rf"of_step\({wrong}\): .* belongs to step {next_step}\. Ask for the steps"):
        list(batches.of_step(wrong))


def test_the_wait_for_each_batch_can_be_measured() -> None:
    waited_for: list[Any] = []

    def waiting(loader: Iterable[Any]) -> Iterator[Any]:
        for batch in loader:
            waited_for.append(batch)
            yield batch

    batches = batches_of(0, 0, waiting=waiting)
    for step in range(2):
        for micro in batches.of_step(step):
            assert micro.batch is waited_for[-1]
    assert len(waited_for) == sum(len(SHORT.window(step, 0)) for step in range(2))


class Moves:
    """A batch that says when it is brought to the device."""

    moved: ClassVar[set[Any]] = set()

    def __init__(self, samples: list[Any]) -> None:
        self.samples = samples

    def to(self, device: torch.device) -> Moves:
        self.moved.add(self)
        return self


@pytest.mark.parametrize("workers", [0, 1])
def test_a_step_that_may_lack_samples_waits_for_all_of_its_batches_with_one_of_them_on_the_device(workers: int) -> None:
    Moves.moved.clear()
    config = Config(data=Data(workers=workers, on_bad_sample="skip", collate=f"{__name__}:Moves"))
    plan = Plan(16, 8, 1, 2, total_steps=2)  # four micro-batches a step
    batches = TrainBatches(config, DataSource(Noisy(), Noisy()), None, plan, CPU, 0, Position())
    for done, micro in enumerate(batches.of_step(0), 1):
        assert len(Moves.moved) == done
        assert micro.batch in Moves.moved
    assert done == 4


def fixed(samples: list[Any]) -> Any:
    return MappingProxyType({"inputs": torch.stack([values for values, _ in samples])})


def with_a_function(samples: list[Any]) -> Any:
    return samples[0][0], lambda: samples


def with_a_lock(samples: list[Any]) -> Any:
    return {"inputs": samples[0][0], "lock": threading.Lock()}


@pytest.mark.parametrize("collate", [fixed, with_a_function, with_a_lock], ids=lambda collate: collate.__name__)
def test_a_batch_that_no_loader_process_can_send_is_refused_and_not_waited_for(collate: Any) -> None:
    source = DataSource(Noisy(), Noisy())
    data = Data(workers=1, timeout_seconds=30, collate=f"{__name__}:{collate.__name__}")
    with pytest.raises(UsageError, match=r"batch cannot be sent .*pickle.* --data.workers 0"):
        example_batch(source, data, 0, torch.float32)
    assert example_batch(source, dataclasses.replace(data, workers=0), 0, torch.float32)


def with_a_history(samples: list[Any]) -> Any:
    return 2 * samples[0][0].clone().requires_grad_(), samples[0][1]


def test_a_batch_with_a_history_of_gradients_is_refused_and_not_waited_for() -> None:
    source = DataSource(Noisy(), Noisy())
    data = Data(workers=1, timeout_seconds=30, collate=f"{__name__}:with_a_history")
    with pytest.raises(UsageError, match=r"batch cannot be sent .*requires_grad.* --data.workers 0"):
        example_batch(source, data, 0, torch.float32)
    assert example_batch(source, dataclasses.replace(data, workers=0), 0, torch.float32)


# ---- mistakes --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 1])
def test_a_usage_error_arrives_with_its_plain_message_from_a_worker_as_well(workers: int) -> None:
    with pytest.raises(UsageError) as error:
        loaded(Broken(), Task(), workers, FixedBatchSampler(20, 5, 0, 1))
    assert str(error.value) == "Sample 7 is broken.\nPut another in its place."


class Stuck(Noisy):
    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        if index == 7:
            time.sleep(20)
        return super().__getitem__(index)


def test_a_worker_that_does_not_answer_is_waited_for_as_long_as_the_config_says() -> None:
    sampler = MicroBatchSampler(Plan(20, 4, total_steps=5), 0)
    data = Data(workers=1, timeout_seconds=1)
    loader = make_loader(data, DataSource(Stuck(), Stuck()), None, 0, CPU, torch.float64, Stuck(), sampler)
    try:
        with pytest.raises(RuntimeError, match="timed out after 1 seconds"):
            list(loader)
    finally:
        kill_workers()


def test_a_wrong_label_is_told_with_its_index() -> None:
    task = Classification()
    task.probe(torch.zeros(1, 9))
    with pytest.raises(UsageError) as error:
        loaded(Noisy(), task, 0, FixedBatchSampler(20, 5, 0, 1))
    assert str(error.value).startswith("Sample 9 has label 9, but the model has 9 classes")


@pytest.mark.parametrize(
    "dataset", [Noisy(), InMemory(torch.arange(20.0)[:, None], torch.arange(20))], ids=["samples", "memory"]
)
def test_the_task_sees_each_batch_with_the_indices_of_its_samples(dataset: Any) -> None:
    seen: list[tuple[list[int], list[int]]] = []

    class Watching(Task):
        def check(self, batch: Any, indices: Any) -> None:
            seen.append((batch[0][:, 0].int().tolist(), list(indices)))

    loaded(dataset, Watching(), 0, MicroBatchSampler(Plan(20, 5, total_steps=4, seed=1), 0))
    assert len(seen) == 4
    assert all(samples == indices for samples, indices in seen)


# ---- the form that the model takes -----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_images_in_bytes_are_normalised_as_torchvision_does(dtype: torch.dtype) -> None:
    images = torch.randint(0, 256, (6, 3, 5, 4), dtype=torch.uint8)
    mean, std = (0.1, 0.5, 0.9), (0.2, 0.3, 0.4)
    source = DataSource(None, None, mean=mean, std=std)
    inputs, targets, extra = to_model((images, torch.arange(6), torch.ones(6)), source, dtype)
    expected = reference.normalize(reference.to_dtype(images, torch.float64, scale=True), list(mean), list(std))
    assert inputs.dtype == dtype
    assert torch.allclose(inputs.double(), expected, atol=1e-6)
    assert (targets.dtype, extra.dtype) == (torch.int64, dtype)


def test_images_that_are_numbers_already_are_not_normalised_again() -> None:
    source = DataSource(None, None, mean=(0.5,), std=(0.1,))
    images = torch.rand(2, 1, 3, 3)
    assert torch.equal(to_model((images, torch.arange(2)), source, torch.float32)[0], images)


def test_mean_and_std_may_be_lists() -> None:
    batch = torch.randint(0, 256, (2, 1, 3, 3), dtype=torch.uint8), torch.arange(2)
    mean: Any = [0.5]
    std: Any = [0.2]
    inputs, _ = to_model(batch, DataSource(None, None, mean=mean, std=std), torch.float32)
    expected, _ = to_model(batch, DataSource(None, None, mean=(0.5,), std=(0.2,)), torch.float32)
    assert torch.equal(inputs, expected)


def test_bytes_of_data_without_mean_and_std_stay_bytes() -> None:
    images = torch.randint(0, 256, (2, 1, 3, 3), dtype=torch.uint8)
    assert to_model((images, torch.arange(2)), DataSource(None, None), torch.float32)[0].dtype == torch.uint8


def test_cast_reaches_floating_tensors_in_any_container_and_nothing_else() -> None:
    def batch(dtype: torch.dtype) -> dict[str, Any]:
        number = torch.ones(2, dtype=dtype)
        return {
            "dict": {"inner": number},
            "tuple": (number, torch.arange(2), "text", None, 3),
            "list": [number, torch.ones(2, dtype=torch.bool)],
            "named": Pair(number, torch.zeros(2, dtype=torch.uint8)),
            "tensor": number,
        }

    def described(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.dtype, value.tolist()
        if isinstance(value, dict):
            return {key: described(inner) for key, inner in value.items()}
        if isinstance(value, (tuple, list)):
            return type(value).__name__, [described(inner) for inner in value]
        return value

    for dtype in (torch.float64, torch.bfloat16):
        assert described(cast(batch(torch.float32), dtype)) == described(batch(dtype))
    assert isinstance(cast(batch(torch.float32), torch.float64)["named"], Pair)


def test_the_loader_yields_what_the_model_takes() -> None:
    source = digits()
    sampler = FixedBatchSampler(len(source.validation), 100, 0, 1)
    task = Classification()
    task.probe(torch.zeros(1, 10))
    batches = list(make_loader(Data(), source, task, 0, CPU, torch.float64, source.validation, sampler))
    assert sum(len(targets) for _, targets in batches) == len(source.validation) == 360
    inputs = torch.cat([inputs for inputs, _ in batches])
    assert inputs.dtype == torch.float64
    assert abs(float(inputs.mean())) < 0.05
    assert abs(float(inputs.std()) - 1) < 0.05


def test_the_example_is_the_first_sample_as_the_model_takes_it() -> None:
    source = digits(shift=0)
    inputs, targets = example_batch(source, Data(), 0, torch.float32)
    assert inputs.shape == (1, 1, 8, 8)
    assert torch.allclose(inputs[0], (source.train.inputs[0].float() / 255 - 0.305) / 0.376)
    assert targets.tolist() == [int(source.train.targets[0])]


@pytest.mark.parametrize(
    ("example", "source", "offers"),
    [
        (
            (torch.zeros(1, 3, 4, 4), torch.zeros(1, dtype=torch.int64)),
            DataSource(None, None, classes=("a", "b")),
            {"num_classes": 2, "num_outputs": 2, "input_shape": (3, 4, 4)},
        ),
        ((torch.zeros(1, 5), torch.zeros(1, 2)), DataSource(None, None), {"input_shape": (5,), "num_outputs": 2}),
        ({"inputs": torch.zeros(1, 5)}, DataSource(None, None), {}),
        ("text", DataSource(None, None), {}),
    ],
)
def test_a_model_is_offered_what_the_data_shows(example: Any, source: DataSource, offers: dict[str, Any]) -> None:
    assert offers_to_model(example, source) == offers


# ---- workers ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("workers", "in_memory", "cpus", "local", "expected"),
    [
        (3, True, 16, None, 3),
        (0, False, 16, None, 0),
        ("auto", True, 16, None, 0),
        ("auto", False, 8, None, 8),
        ("auto", False, 8, "4", 2),
        ("auto", False, 2, "4", 1),
        ("auto", False, 128, "2", 16),
    ],
)
def test_the_workers_are_those_set_or_the_ranks_share_of_the_cpus(
    workers: Any, in_memory: bool, cpus: int, local: str | None, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cpus)))
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    if local:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", local)
    dataset = InMemory(torch.zeros(2, 1), torch.zeros(2)) if in_memory else Noisy()
    assert worker_count(Data(workers=workers), dataset) == expected


def test_samples_of_different_forms_lead_to_the_collate_setting() -> None:
    ragged = [torch.zeros(size) for size in (3, 5)]
    dataset = SeededDataset(ragged, 0, default_collate, lambda *_: None)
    with pytest.raises(UsageError, match=r"(?s)Samples \[0, 1\].*data.collate"):
        dataset.__getitems__(MicroBatch(0, np.array([0, 1])))


def test_for_a_gpu_batches_lie_in_pinned_memory_and_workers_are_not_forked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("distloop.data.loader.start_forkserver", lambda *_: None)
    gpu, source = torch.device("cuda", 1), DataSource(Noisy(), Noisy())
    sampler = FixedBatchSampler(4, 2, 0, 1)
    for workers, context in ((0, None), (2, "forkserver")):
        made = make_loader(Data(workers=workers), source, None, 0, gpu, torch.float32, Noisy(), sampler).loader
        assert (made.pin_memory, made._non_blocking, made.device) == (True, True, gpu)
        found = made.multiprocessing_context
        assert (None if found is None else found.get_start_method()) == context


# ---- micro-batches that are taken together ---------------------------------------------------------------------


def of_steps(dataset: InMemory, plan: Plan, first: int, workers: int = 0) -> list[tuple[list[Tensor], int]]:
    """Inputs and targets of each step from `first` on, and how many micro-batches it had."""
    config = Config(data=Data(workers=workers))
    source = DataSource(dataset, dataset, mean=(0.3,), std=(0.4,))
    batches = TrainBatches(config, source, None, plan, CPU, first, Position())
    steps = []
    for step in range(first, plan.total_steps):
        micros = list(batches.of_step(step))
        steps.append(([torch.cat([micro.batch[part] for micro in micros]) for part in (0, 1)], len(micros)))
    return steps


@pytest.mark.parametrize("remainder", ["drop", "train"])
@pytest.mark.parametrize("rank", [0, 2])
def test_rows_in_memory_are_the_same_however_many_micro_batches_are_taken_at_once(
    rank: int, remainder: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over the ends of epochs, of which a short last step has no sample for the last ranks, and from any step on."""
    images = torch.randint(0, 256, (25, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    dataset = InMemory(images, torch.arange(25), pad=1, flip=True)
    plan = Plan(25, 12, 3, 2, remainder, total_steps=11, rank=rank, seed=4)
    asked: list[int] = []
    batch = InMemory.batch

    def counted(self: InMemory, indices: Any, random: Any) -> Any:
        asked.append(len(indices))
        return batch(self, indices, random)

    monkeypatch.setattr(InMemory, "batch", counted)
    together = of_steps(dataset, plan, 0)
    assert len(asked) == -(-11 // plan.steps_per_epoch)  # once an epoch
    asked.clear()
    monkeypatch.setattr(whole_batches, "MOST_TOGETHER", 1)
    alone = of_steps(dataset, plan, 0)
    assert len(asked) >= 11
    monkeypatch.setattr(whole_batches, "MOST_TOGETHER", 3)
    three, from_4, by_workers = of_steps(dataset, plan, 0), of_steps(dataset, plan, 4), of_steps(dataset, plan, 4, 2)
    for first, others in ((0, together), (0, three), (4, from_4), (4, by_workers)):
        for (expected, count), (values, other_count) in zip(alone[first:], others, strict=True):
            assert all(map(torch.equal, expected, values))
            assert count == other_count


@pytest.mark.parametrize("workers", [0, 1])
def test_what_is_divided_lies_in_memory_as_what_was_taken_alone(workers: int) -> None:
    """Matrix products round by where their numbers lie: a run that is continued takes others together."""
    dataset = InMemory(torch.randn(25, 10), torch.arange(25.0))
    plan = Plan(25, 6, micro_batch_size=3, total_steps=7)
    batches = TrainBatches(
        Config(data=Data(workers=workers)), DataSource(dataset, dataset), None, plan, CPU, 0, Position()
    )
    micros = [micro for step in range(7) for micro in batches.of_step(step)]
    assert [len(micro.batch[0]) for micro in micros] == [3] * 14
    assert {part.data_ptr() % 64 for micro in micros for part in micro.batch} == {0}


@pytest.mark.parametrize("rows", [True, False])
def test_what_is_noted_of_a_micro_batch_does_not_outlive_it(rows: bool) -> None:
    """A run may have millions of them."""
    dataset = InMemory(torch.zeros(20, 4), torch.arange(20)) if rows else Noisy()
    plan = Plan(20, 4, total_steps=20)
    batches = TrainBatches(Config(), DataSource(dataset, dataset), None, plan, CPU, 0, Position())
    batches.rehearsal()
    for step in range(plan.total_steps):
        list(batches.of_step(step))
    assert not batches.sampler.parts
    assert not batches.sampler.sizes


def test_large_rows_are_taken_one_micro_batch_at_a_time() -> None:
    images = InMemory(torch.zeros(8, 3, 224, 224), torch.zeros(8))
    assert whole_batches.batches_together(images, 4) == 1
    assert whole_batches.batches_together(InMemory(torch.zeros(8, 4, 4), torch.zeros(8)), 4) == 64
    targets_are_large = InMemory(torch.zeros(8, 2), torch.zeros(8, 3, 224, 224))
    assert whole_batches.batches_together(targets_are_large, 4) == 1


def first_batches(dataset: InMemory, size: int, first: int = 0) -> list[Any]:
    plan = Plan(len(dataset), size, total_steps=first + 6)
    batches = TrainBatches(Config(), DataSource(dataset, dataset), None, plan, CPU, first, Position())
    return [micro.batch for step in range(first, first + 6) for micro in batches.of_step(step)]


def test_micro_batches_begin_where_memory_of_their_own_would() -> None:
    """Else the last bits of a matrix product would depend on the step from which a run was continued."""
    dataset = InMemory(torch.randn(60, 10), torch.randn(60))
    for size in (1, 2, 3, 16):
        for batch in first_batches(dataset, size) + first_batches(dataset, size, 1):
            assert [part.data_ptr() % 64 for part in batch] == [0, 0]


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("pad", [0, 1])
def test_batches_keep_the_memory_format_of_the_data(channels: int, pad: int) -> None:
    images = torch.rand(60, 8, 8, channels).permute(0, 3, 1, 2)
    for inputs, _ in first_batches(InMemory(images, torch.arange(60), pad), 4):
        assert inputs.stride() == images.stride()


def test_a_micro_batch_has_no_history_in_common_with_others() -> None:
    learned = torch.rand(60, 10, requires_grad=True)
    for inputs, _ in first_batches(InMemory(learned, torch.arange(60)), 4):
        inputs.square().sum().backward()  # frees what a common history would need again
    assert learned.grad is not None
