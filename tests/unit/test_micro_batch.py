"""batch.micro_size: auto: what depends on the size, what counts as memory that has run out, and what to set then."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import distloop.tasks
from distloop.config.load import load_config
from distloop.config.settings import Batch, Config, Validate
from distloop.data.datasets import DataSource
from distloop.data.look import first_training_batch
from distloop.data.order import Plan
from distloop.data.whole_batches import InMemory
from distloop.ranks import Ranks
from distloop.ranks.out_of_memory import is_out_of_memory
from distloop.ranks.stopping import Watch
from distloop.run.micro_size import advice
from distloop.training.micro_batch import depends_on_size
from distloop.training.models import cnn
from distloop.training.optimizers import SeveralOptimizers
from distloop.training.putting_back import put_back
from distloop.training.rehearsal import is_no_sum

PLAN = Plan(samples=1000, global_batch_size=48, micro_batch_size=8)


class Own(distloop.tasks.Classification):
    def augment_batch(self, batch: Any) -> Any:
        return batch


class Inherits(distloop.tasks.Classification):
    pass


def reasons(model: nn.Module, task: distloop.tasks.Task | None = None, compares: bool = False) -> str:
    return " ".join(depends_on_size(model, task or Inherits(), compares, PLAN))


def test_nothing_is_said_of_what_does_not_depend_on_the_size() -> None:
    assert reasons(cnn((1, 8, 8), 10)) == ""
    assert reasons(nn.Sequential(nn.Dropout(0.0), nn.MultiheadAttention(4, 2), nn.LayerNorm(3))) == ""


@pytest.mark.parametrize(
    ("model", "task", "compares", "said"),
    [
        (cnn((1, 8, 8), 10, norm="batch"), None, False, "BatchNorm (1, 4, 8, 11) normalises over a micro-batch"),
        (nn.Sequential(nn.Dropout(0.1)), None, False, "dropout (0) draws for a micro-batch"),
        (nn.MultiheadAttention(4, 2, dropout=0.1), None, False, "dropout (the model) draws"),
        (nn.LSTM(2, 2, 2, dropout=0.1), None, False, "dropout (the model) draws"),
        (nn.Linear(1, 1), distloop.tasks.Classification(mixup=0.2), False, "mixup and cutmix mix samples"),
        (nn.Linear(1, 1), Own(), False, "Own.augment_batch() is given a micro-batch"),
        (nn.Linear(1, 1), None, True, "Inherits.loss() compares the samples of a micro-batch with each other"),
    ],
)
def test_one_line_names_why_results_depend_on_the_size(
    model: nn.Module, task: distloop.tasks.Task | None, compares: bool, said: str
) -> None:
    line = reasons(model, task, compares)
    assert said in line
    assert "--batch.micro-size 8" in line
    assert "\n" not in line


def test_all_reasons_are_in_one_line() -> None:
    lines = depends_on_size(cnn((1, 8, 8), 10, norm="batch", dropout=0.1), Own(), True, PLAN)
    assert len(lines) == 1
    assert lines[0].count(";") == 3


@pytest.mark.parametrize(
    ("once", "twice", "expected"),
    [
        ((2.3, 32), (4.6, 64), False),  # a sum
        ((2.3, 32), (4.6003, 64), False),  # up to rounding
        ((2.3, 32), (5.2, 64), True),  # contrastive
        ((0.0, 32), (0.0, 64), False),
        ((2.3, 1), (2.3, 1), False),  # of one batch, whatever it holds: its weight says so
    ],
)
def test_what_counts_as_a_loss_that_compares_samples(once: Any, twice: Any, expected: bool) -> None:
    assert is_no_sum(once, twice) is expected


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."), True),
        (RuntimeError("MPS backend out of memory (MPS allocated: 9 GB)"), True),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:66] . DefaultCPUAllocator: can't allocate memory"), True),
        (RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ValueError("out of memory"), False),
        (MemoryError(), False),  # Python's own: of the machine, whatever the batch
    ],
)
def test_what_counts_as_memory_that_has_run_out(error: BaseException, expected: bool) -> None:
    assert is_out_of_memory(error) is expected


@pytest.mark.parametrize(
    ("size", "phase", "said"),
    [
        (None, "forward and backward pass", "set --batch.micro-size 24, "),
        (16, "in the rehearsal: a step of training", "set --batch.micro-size 12, "),
        (1, "parameter update", "a micro-batch is a single sample already"),
        (16, "validation", "set --validate.batch-size 100, "),
        (16, "in the rehearsal: the first batch of validation", "set --validate.batch-size 100, "),
    ],
)
def test_the_size_to_set_is_the_next_that_divides_a_ranks_share(size: int | None, phase: str, said: str) -> None:
    plan = Plan(samples=1000, global_batch_size=96, world_size=2, micro_batch_size=size)
    assert advice(Config(validate=Validate(batch_size=200)), plan, phase).startswith(said)


def test_an_error_that_memory_has_run_out_gets_a_note_once() -> None:
    ranks = Ranks(Watch())
    ranks.on_memory = lambda: "set this"
    error = torch.OutOfMemoryError("CUDA out of memory.")
    for _ in range(2):
        ranks.report_failure(error)
    assert error.__notes__ == ["distloop: out of memory: set this"]


def test_a_plan_is_divided_again_once_the_size_is_found() -> None:
    config = Config(batch=Batch(global_size=64, micro_size="auto"))
    plan = Plan.of(config, 1000, Ranks(Watch()))
    assert (plan.is_divided, plan.micro_batch_size, plan.accumulation) == (False, 64, 1)
    plan.divide(20)
    assert (plan.is_divided, plan.micro_batch_size, plan.accumulation) == (True, 16, 4)
    assert len(plan.window(0, 0)) == 4


@pytest.mark.parametrize("rank", [0, 1])
def test_what_is_tried_is_a_whole_micro_batch_also_if_the_next_step_is_a_short_one(rank: int) -> None:
    dataset = InMemory(torch.zeros(17, 2), torch.arange(17.0))  # the third step has one sample, and rank 1 has none
    plan = Plan(17, 8, 2, 4, "train", total_steps=6, rank=rank)
    for step in range(6):
        inputs, _ = first_training_batch(Config(), DataSource(dataset, dataset), plan, step, torch.device("cpu"))
        assert len(inputs) == 4


def test_auto_is_a_size_on_the_command_line() -> None:
    assert load_config(["--batch.micro-size", "auto"]).batch.micro_size == "auto"


def test_optimizers_are_put_back_too() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    parts = [torch.optim.AdamW(model[0].parameters()), torch.optim.SGD(model[1].parameters(), momentum=0.9)]
    optimizer = SeveralOptimizers(parts)
    before = [value.clone() for value in model.parameters()]
    with put_back(model, optimizer, *parts):
        model(torch.ones(1, 2)).sum().backward()
        optimizer.step()
        optimizer.param_groups[0]["lr"] = 7.0
        assert len(optimizer.state) == 4
    assert not optimizer.state
    assert not any(part.state for part in parts)
    assert optimizer.param_groups[0]["lr"] == parts[0].param_groups[0]["lr"] == 1e-3
    assert all(torch.equal(one, other) for one, other in zip(before, model.parameters(), strict=True))
    optimizer.step()  # as if nothing had been
