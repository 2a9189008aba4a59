"""The check of each step: what it keeps, how it leaves a step out, and what it says."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn

from distloop.config.settings import Optim
from distloop.data.order import Order, Plan
from distloop.errors import RunFailed, UsageError
from distloop.training.nonfinite import MOST_UNREAD, FiniteCheck
from distloop.training.optimizers import build_optimizer

GOOD, BAD, INFINITE = torch.tensor(1.5), torch.tensor(float("nan")), torch.tensor(float("inf"))
OPTIMIZERS = ("sgd", "adam", "adamw")


def build(
    policy: Literal["stop", "skip"] = "stop",
    model: nn.Module | None = None,
    optimizer: Any = None,
    scaler: Any = None,
    samples: int = 40,
    batch: int = 4,
    micro: int | None = None,
) -> FiniteCheck:
    model = model or nn.Linear(2, 1)
    optimizer = optimizer or torch.optim.AdamW(model.parameters(), fused=True)
    return FiniteCheck(policy, model, optimizer, scaler, Plan(samples, batch, 1, micro))


def test_good_steps_are_nothing_to_speak_of() -> None:
    for check in (build("stop"), build("skip")):
        assert check.check() == []
        for step in range(5):
            check.begin_step()
            check.before_update(step, GOOD, [GOOD])
        assert check.check() == []
        assert check.check() == []


@pytest.mark.parametrize("norm", [BAD, INFINITE, -INFINITE])
def test_the_first_bad_step_stops_the_run_and_is_named_with_the_samples_of_its_micro_batch(norm: Tensor) -> None:
    check = build(batch=8, micro=4)
    check.before_update(6, GOOD, [GOOD, GOOD])
    check.before_update(7, norm, [GOOD, INFINITE])
    check.before_update(8, BAD, [BAD, BAD])
    samples = Order(40, 0)(1, 20, 24).tolist()
    with pytest.raises(RunFailed) as raised:
        check.check()
    text = str(raised.value)
    assert f"The gradient of step 8 is not finite ({float(norm)}): the loss of rank 0 is not either" in text
    assert f"(micro-batch 2 of 2, 4 samples: {', '.join(map(str, samples))}; epoch 2)." in text
    assert "--train.on-nonfinite skip" in text
    assert "step 9" not in text


def test_a_bad_gradient_of_good_losses_is_told_with_the_samples_of_the_step() -> None:
    check = build(batch=20)
    check.before_update(1, BAD, [GOOD])
    shown = ", ".join(map(str, Order(40, 0)(0, 20, 28).tolist()))
    with pytest.raises(RunFailed, match="while the losses of all ranks are") as raised:
        check.check()
    assert f"(20 samples: {shown}, …; epoch 1)" in str(raised.value)


def test_many_samples_are_not_all_listed_and_one_micro_batch_is_not_counted() -> None:
    check = build(batch=20)
    check.before_update(0, BAD, [BAD])
    shown = ", ".join(map(str, Order(40, 0)(0, 0, 8).tolist()))
    with pytest.raises(RunFailed) as raised:
        check.check()
    assert f"rank 0 is not either (20 samples: {shown}, …; epoch 1)." in str(raised.value)


def test_each_step_that_was_left_out_has_a_line_and_is_told_once() -> None:
    check = build("skip")
    for step, norm in enumerate((GOOD, BAD, GOOD, INFINITE)):
        check.begin_step()
        check.before_update(step, norm, [norm])
    first, second = check.check()
    assert first.startswith("distloop: WARNING: The gradient of step 2 is not finite (nan)")
    assert second.startswith("distloop: WARNING: The gradient of step 4 is not finite (inf)")
    assert first.endswith("It was left out.")
    assert check.check() == []
    assert check.skipped_steps == 2


def test_the_steps_that_earlier_attempts_left_out_count_as_well() -> None:
    model = nn.Linear(2, 1)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    check = FiniteCheck("skip", model, optimizer, None, Plan(40, 4), skipped_steps=3)
    assert check.skipped_steps == 3
    check.begin_step()
    check.before_update(0, BAD, [BAD])
    check.after_update(optimizer)
    check.check()
    assert check.skipped_steps == 4


def test_where_logging_is_rare_a_check_becomes_due_by_itself() -> None:
    check = build()
    for step in range(MOST_UNREAD):
        assert not check.is_full
        check.before_update(step % 10, GOOD, [GOOD])
    assert check.is_full
    check.check()
    assert not check.is_full


class WithBuffers(nn.Module):
    mask: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(3)
        self.register_buffer("mask", torch.tensor([0.0, float("-inf")]))

    def forward(self, inputs: Tensor) -> Tensor:
        return self.norm(inputs)


@pytest.mark.parametrize(("norm", "changed"), [(GOOD, True), (BAD, False)])
def test_buffers_are_put_back_where_a_step_is_left_out_and_there_alone(norm: Tensor, changed: bool) -> None:
    model = WithBuffers()
    check = build("skip", model)
    for step in range(2):  # the second finds what the first has left
        before = {name: buffer.clone() for name, buffer in model.named_buffers()}
        check.begin_step()
        for _ in range(2):  # micro-batches
            model(torch.randn(4, 3) if changed else torch.full((4, 3), float("nan")))
        left_out = check.before_update(step, norm, [norm])
        assert left_out is not None
        assert bool(left_out) is not changed
        for name in ("norm.running_mean", "norm.running_var", "norm.num_batches_tracked"):
            assert torch.equal(dict(model.named_buffers())[name], before[name]) is not changed, name
        assert torch.equal(model.mask, before["mask"])


def test_the_policy_stop_leaves_buffers_and_the_optimizer_alone() -> None:
    model = WithBuffers()
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    check = build("stop", model, optimizer)
    check.begin_step()
    model(torch.full((4, 3), float("nan")))
    assert check.before_update(0, BAD, [BAD]) is None
    assert model.norm.running_mean is not None
    assert model.norm.running_mean.isnan().all()
    assert not hasattr(optimizer, "found_inf")


@pytest.fixture
def filled_memory() -> Iterator[None]:
    """What torch.empty gives is filled with NaN, so that nobody may use it by luck."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("filled_memory")
@pytest.mark.parametrize("bad_steps", [(0,), (0, 1), (2,), (1, 3)])
@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_step_that_is_left_out_is_for_the_optimizer_as_if_it_had_not_been(
    name: Literal["sgd", "adam", "adamw"], fused: bool, bad_steps: tuple[int, ...]
) -> None:
    torch.manual_seed(0)
    config = Optim(name=name, lr=0.1, weight_decay=0.1)
    model = nn.Linear(3, 2)
    other = copy.deepcopy(model)
    optimizer, expected = (build_optimizer(m, config, torch.device("cpu"), "no") for m in (model, other))
    if not fused:  # as on MPS
        optimizer, expected = (build_optimizer(m, config, torch.device("meta"), "no") for m in (model, other))
        assert not optimizer.defaults["fused"]
    check = build("skip", model, optimizer)
    for step in range(5):
        inputs = torch.randn(4, 3)
        bad = step in bad_steps
        check.begin_step()
        for m, o in ((model, optimizer), (other, expected)):
            m(inputs).square().sum().backward()
            if m is model:
                if bad:
                    assert m.weight.grad is not None
                    m.weight.grad[0, 0] = float("nan")
                check.before_update(step, BAD if bad else GOOD, [GOOD])
            elif bad:
                o.zero_grad()
                continue
            o.step()
            o.zero_grad()
    assert torch.equal(model.weight, other.weight)
    assert torch.equal(model.bias, other.bias)
    found, wanted = (o.state_dict()["state"] for o in (optimizer, expected))
    assert found.keys() == wanted.keys()
    for key, moments in wanted.items():
        for entry, tensor in moments.items():
            assert torch.equal(found[key][entry], tensor), f"{entry} of {key}"


@pytest.mark.usefixtures("filled_memory")
@pytest.mark.parametrize("fused", [(True, True), (True, False), (False, True)])
def test_of_several_optimizers_all_leave_the_step_out(fused: tuple[bool, bool]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 1))
    optimizers = [
        torch.optim.SGD(layer.parameters(), lr=0.1, momentum=0.9, fused=f)
        for layer, f in zip(model, fused, strict=True)
    ]
    check = FiniteCheck("skip", model, optimizers, None, Plan(40, 4))
    for step, norm in enumerate((BAD, GOOD, INFINITE)):
        before = [parameter.clone() for parameter in model.parameters()]
        check.begin_step()
        model(torch.randn(4, 3)).square().sum().backward()
        check.before_update(step, norm, [norm])
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        for parameter, value in zip(model.parameters(), before, strict=True):
            assert torch.equal(parameter, value) is (norm is not GOOD)
    assert len(check.check()) == 2
    assert check.skipped_steps == 2


class Scaler:
    """In place of a GradScaler: its presence is enough."""


def test_an_overflow_under_a_scaler_is_the_scalers_business_and_a_bad_loss_is_not() -> None:
    check = build("stop", scaler=Scaler(), micro=2)
    check.before_update(0, INFINITE, [GOOD, GOOD])
    assert check.check() == []
    check.before_update(1, BAD, [GOOD, BAD])
    with pytest.raises(RunFailed, match="The gradient of step 2 is not finite"):
        check.check()


@pytest.mark.parametrize(("policy", "loss", "lines"), [("stop", GOOD, 0), ("skip", BAD, 2)])
def test_a_step_that_a_scaler_skips_counts_once(policy: Literal["stop", "skip"], loss: Tensor, lines: int) -> None:
    check = build(policy, scaler=Scaler())
    for step, skipped in enumerate((False, True, True, False)):
        check.begin_step()
        check.before_update(step, INFINITE if skipped else GOOD, [loss if skipped else GOOD])
        check.after_update(SimpleNamespace(step_was_skipped=skipped))
    assert len(check.check()) == lines
    assert check.skipped_steps == 2


def test_under_a_scaler_the_optimizer_gets_no_flag_of_ours() -> None:
    model = nn.Linear(2, 1)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    check = build("skip", model, optimizer, Scaler())
    check.begin_step()
    check.before_update(0, INFINITE, [GOOD])
    assert not hasattr(optimizer, "found_inf")


def test_a_gradient_scaler_serves_one_optimizer() -> None:
    model = nn.Linear(2, 1)
    optimizers = [torch.optim.SGD([parameter], lr=0.1) for parameter in model.parameters()]
    with pytest.raises(UsageError, match="precision = 'fp16': its gradient scaler serves one optimizer"):
        FiniteCheck("stop", model, optimizers, Scaler(), Plan(40, 4))
