"""The learning rate against PyTorch's schedulers, the parameter groups, and the moving average."""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.optim import lr_scheduler

from distloop.config.settings import Config, Optim, Schedule
from distloop.errors import UsageError
from distloop.training.averaging import Average
from distloop.training.groups import parameter_groups, set_lr
from distloop.training.optimizers import build_optimizer
from distloop.training.schedules import LearningRate, check_schedule, lr_at
from distloop.training.sparse import refuse_unforeseen_sparse

PEAK = 0.3
CPU = torch.device("cpu")
SHAPES = [
    Schedule("constant"),
    Schedule("linear", final_ratio=0.1),
    Schedule("cosine", final_ratio=0.1),
    Schedule("multi_step", milestones=(60, 80)),
    Schedule("warmup_stable_decay", final_ratio=0.1),
]


def rates(schedule: Schedule, total: int) -> list[float]:
    return [lr_at(step, total, PEAK, schedule) for step in range(total)]


def reference(total: int, scheduler: Callable[..., Any], **options: Any) -> list[float]:
    """The rates that one of PyTorch's schedulers gives, step by step."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=PEAK)
    following = scheduler(optimizer, **options)
    found = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(total):
            found.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            following.step()
    return found


@pytest.mark.parametrize("total", [1, 2, 7, 100])
@pytest.mark.parametrize("ratio", [0.0, 0.1, 0.9])
def test_cosine_is_cosine_annealing(total: int, ratio: float) -> None:
    expected = reference(total, lr_scheduler.CosineAnnealingLR, T_max=total, eta_min=ratio * PEAK)
    assert rates(Schedule("cosine", final_ratio=ratio), total) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("total", [1, 2, 7, 100])
@pytest.mark.parametrize("ratio", [0.0, 0.1, 0.9])
def test_linear_is_linear_lr(total: int, ratio: float) -> None:
    expected = reference(total, lr_scheduler.LinearLR, start_factor=1.0, end_factor=ratio, total_iters=total)
    assert rates(Schedule("linear", final_ratio=ratio), total) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("milestones", [(30,), (30, 60, 90), (1, 2), (60, 30)])
def test_multi_step_is_multi_step_lr(milestones: tuple[int, ...]) -> None:
    expected = reference(100, lr_scheduler.MultiStepLR, milestones=list(milestones), gamma=0.2)
    schedule = Schedule("multi_step", milestones=milestones, gamma=0.2)
    assert rates(schedule, 100) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(("total", "rise"), [(10, 2), (100, 29), (100, 50), (333, 1)])
def test_one_cycle_is_one_cycle_lr_with_its_factors(total: int, rise: int) -> None:
    expected = reference(total, lr_scheduler.OneCycleLR, max_lr=PEAK, total_steps=total, pct_start=(rise + 1) / total)
    assert rates(Schedule("one_cycle", warmup_steps=rise), total) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("total", [10, 100, 1000])
def test_one_cycle_rises_by_default_as_long_as_one_cycle_lr_does(total: int) -> None:
    expected = reference(total, lr_scheduler.OneCycleLR, max_lr=PEAK, total_steps=total)
    assert rates(Schedule("one_cycle"), total) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("schedule", SHAPES, ids=lambda schedule: schedule.name)
@pytest.mark.parametrize("warmup", [1, 5, 40])
def test_the_warm_up_rises_linearly_to_the_peak_and_the_shape_follows(schedule: Schedule, warmup: int) -> None:
    found = rates(dataclasses.replace(schedule, warmup_steps=warmup), 100)
    assert found[:warmup] == pytest.approx([PEAK * (step + 1) / warmup for step in range(warmup)])
    assert found[warmup] == pytest.approx(PEAK)
    assert found[0] > 0


@pytest.mark.parametrize("name", ["linear", "cosine"])
def test_after_the_warm_up_the_shape_takes_its_course_over_the_steps_that_are_left(name: Any) -> None:
    schedule = Schedule(name, final_ratio=0.2)
    warm = dataclasses.replace(schedule, warmup_steps=25)
    assert rates(warm, 100)[25:] == pytest.approx(rates(schedule, 75))


def test_the_milestones_of_a_warmed_up_run_are_steps_of_the_run() -> None:
    found = rates(Schedule("multi_step", warmup_steps=10, milestones=(50,)), 100)
    assert found[10:50] == pytest.approx([PEAK] * 40)
    assert found[50:] == pytest.approx([PEAK / 10] * 50)


@pytest.mark.parametrize(("decay_steps", "decay"), [(None, 20), (40, 40), (1, 1)])
def test_warmup_stable_decay_has_a_plateau_and_a_linear_descent(decay_steps: int | None, decay: int) -> None:
    schedule = Schedule("warmup_stable_decay", warmup_steps=10, final_ratio=0.1, decay_steps=decay_steps)
    found = rates(schedule, 100)
    assert found[10 : 100 - decay + 1] == pytest.approx([PEAK] * (90 - decay + 1))
    descent = [PEAK + (0.1 * PEAK - PEAK) * step / decay for step in range(decay)]
    assert found[100 - decay :] == pytest.approx(descent)
    assert lr_at(100, 100, PEAK, schedule) == pytest.approx(0.1 * PEAK)  # where a step more would be


def test_constant_stays() -> None:
    assert set(rates(Schedule("constant"), 50)) == {PEAK}


@settings(derandomize=True, deadline=None)
@given(
    st.sampled_from(["constant", "linear", "cosine", "multi_step", "one_cycle", "warmup_stable_decay"]),
    st.integers(1, 300),
    st.floats(1e-6, 10),
    st.data(),
)
def test_the_rate_is_never_negative_and_never_above_the_peak(
    name: Any, total: int, peak: float, data: st.DataObject
) -> None:
    schedule = Schedule(
        name,
        warmup_steps=data.draw(st.integers(0, total - 1)),
        final_ratio=data.draw(st.floats(0, 0.999)),
        milestones=tuple(data.draw(st.lists(st.integers(1, 300), max_size=3))),
        gamma=data.draw(st.floats(0.01, 0.99)),
        decay_steps=data.draw(st.none() | st.integers(1, total)),
    )
    check_schedule(dataclasses.replace(schedule, decay_steps=None), total)
    for step in range(total):
        lr = lr_at(step, total, peak, schedule)
        assert math.isfinite(lr)
        assert 0 <= lr <= peak * (1 + 1e-12)


@pytest.mark.parametrize("key", ["warmup_steps", "decay_steps"])
def test_a_schedule_longer_than_the_run_is_refused(key: str) -> None:
    def schedule(steps: int) -> Schedule:
        settings: dict[str, Any] = {key: steps}
        return Schedule("warmup_stable_decay", **settings)

    for steps in (100, 101):
        with pytest.raises(UsageError, match=rf"schedule\.{key} = {steps} does not fit into a run of 100 steps"):
            check_schedule(schedule(steps), 100)
    check_schedule(schedule(79), 100)
    check_schedule(Schedule(), 1)


def test_a_warm_up_and_a_descent_that_overlap_are_refused() -> None:
    def schedule(decay_steps: int) -> Schedule:
        return Schedule("warmup_stable_decay", warmup_steps=60, decay_steps=decay_steps)

    said = r"schedule\.warmup_steps = 60 and schedule\.decay_steps = 41 do not fit into a run of 100 steps together"
    with pytest.raises(UsageError, match=said):
        check_schedule(schedule(41), 100)
    check_schedule(schedule(40), 100)


def test_the_learning_rate_is_that_of_the_config_at_each_step() -> None:
    schedule = Schedule("cosine", warmup_steps=5, final_ratio=0.1)
    learning_rate = LearningRate(Config(optim=Optim(lr=PEAK), schedule=schedule), 50)
    for step in (*range(50), 7, 0):  # of the step alone: asked for in any order
        assert learning_rate(step) == lr_at(step, 50, PEAK, schedule)


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        (Schedule("cosine", warmup_steps=100), r"schedule\.warmup_steps = 100 does not fit into a run of 100 steps"),
        (Schedule("warmup_stable_decay", decay_steps=100), r"schedule\.decay_steps = 100 does not fit"),
        (Schedule("warmup_stable_decay", warmup_steps=60, decay_steps=41), "of 100 steps together"),
    ],
)
def test_a_learning_rate_refuses_a_schedule_that_does_not_fit_into_the_run(schedule: Schedule, message: str) -> None:
    config = Config(schedule=schedule)
    with pytest.raises(UsageError, match=message):
        LearningRate(config, 100)
    LearningRate(config, 102)


# ---- parameter groups ------------------------------------------------------------------------------------------


class Everything(nn.Module):
    """A layer of each kind whose parameters are treated in their own way."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 8)
        self.convolution = nn.Conv2d(3, 8, 3)
        self.batch_norm = nn.BatchNorm2d(8)
        self.instance_norm = nn.InstanceNorm2d(8, affine=True)
        self.layer_norm = nn.LayerNorm((4, 8))  # its weight has two dimensions and is a norm's all the same
        self.group_norm = nn.GroupNorm(2, 8)
        self.rms_norm = nn.RMSNorm((4, 8))
        self.attention = nn.MultiheadAttention(8, 2)
        self.scale = nn.Parameter(torch.ones(8))
        self.frozen = nn.Linear(8, 8).requires_grad_(False)
        self.head = nn.Linear(8, 11)
        self.head.weight = self.embedding.weight


def names_of(model: nn.Module, group: dict[str, Any]) -> set[str]:
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert len({id(parameter) for parameter in group["params"]}) == len(group["params"])
    return {names[id(parameter)] for parameter in group["params"]}


def test_norms_and_biases_are_not_decayed_tied_weights_count_once_and_frozen_ones_are_left_out() -> None:
    model = Everything()
    decayed, plain = parameter_groups(model, 0.25)
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.25, 0.0)
    assert names_of(model, decayed) == {
        "embedding.weight",  # the head's as well
        "convolution.weight",
        "attention.in_proj_weight",
        "attention.out_proj.weight",
    }
    norms = ("batch_norm", "instance_norm", "layer_norm", "group_norm")
    assert names_of(model, plain) == {
        *(f"{norm}.{part}" for norm in norms for part in ("weight", "bias")),
        "rms_norm.weight",
        "convolution.bias",
        "attention.in_proj_bias",
        "attention.out_proj.bias",
        "scale",
        "head.bias",
    }


def test_a_model_without_vectors_has_one_group() -> None:
    (group,) = parameter_groups(nn.Linear(3, 2, bias=False), 0.1)
    assert group["weight_decay"] == 0.1


def test_a_model_with_nothing_to_train_is_refused() -> None:
    for model in (nn.Flatten(), nn.Linear(3, 2).requires_grad_(False)):
        with pytest.raises(UsageError, match=r"nothing to train.*ModuleList"):
            build_optimizer(model, Optim(), CPU, "no")


@pytest.mark.parametrize(
    ("config", "kind", "expected"),
    [
        (
            Optim("sgd", lr=0.2, momentum=0.8, nesterov=True, weight_decay=0.3),
            torch.optim.SGD,
            {"lr": 0.2, "momentum": 0.8, "nesterov": True},
        ),
        (
            Optim("adam", lr=0.2, betas=(0.5, 0.6), eps=1e-3, weight_decay=0.3),
            torch.optim.Adam,
            {"lr": 0.2, "betas": (0.5, 0.6), "eps": 1e-3, "decoupled_weight_decay": False},
        ),
        (
            Optim("adamw", lr=0.2, betas=(0.5, 0.6), eps=1e-3, weight_decay=0.3),
            torch.optim.AdamW,
            {"lr": 0.2, "betas": (0.5, 0.6), "eps": 1e-3},
        ),
    ],
)
def test_the_optimizer_is_built_as_the_config_says(config: Optim, kind: type, expected: dict[str, Any]) -> None:
    optimizer = build_optimizer(nn.Linear(3, 2), config, CPU, "no")
    assert type(optimizer) is kind
    for group in optimizer.param_groups:
        assert {key: group[key] for key in expected} == expected
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.3, 0.0]


@pytest.mark.parametrize("name", ["sgd", "adam", "adamw"])
def test_a_step_equals_that_of_torchs_own_optimizer(name: Any) -> None:
    torch.manual_seed(0)
    models = [nn.Linear(3, 2).double() for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    config = Optim(name, lr=0.1, weight_decay=0.05)
    ours = build_optimizer(models[0], config, CPU, "no")
    groups = [{"params": [models[1].weight], "weight_decay": 0.05}, {"params": [models[1].bias], "weight_decay": 0.0}]
    theirs: torch.optim.Optimizer = {
        "sgd": lambda: torch.optim.SGD(groups, lr=0.1, momentum=0.9),
        "adam": lambda: torch.optim.Adam(groups, lr=0.1),
        "adamw": lambda: torch.optim.AdamW(groups, lr=0.1),
    }[name]()
    for _ in range(3):
        for model, optimizer in zip(models, (ours, theirs), strict=True):
            optimizer.zero_grad()
            model(torch.ones(4, 3).double()).square().sum().backward()
            optimizer.step()
    assert torch.allclose(models[0].weight, models[1].weight, rtol=1e-12)
    assert torch.allclose(models[0].bias, models[1].bias, rtol=1e-12)


def test_set_lr_reaches_all_groups() -> None:
    optimizer = build_optimizer(nn.Linear(3, 2), Optim(), CPU, "no")
    set_lr(optimizer, 0.125)
    assert [group["lr"] for group in optimizer.param_groups] == [0.125, 0.125]


# ---- the moving average --------------------------------------------------------------------------------------


class Masked(nn.Module):
    """Parameters, one of them tied, and buffers of all kinds: statistics, a counter and a mask with -inf."""

    mask: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 4)
        self.norm = nn.BatchNorm1d(4)
        self.second = nn.Linear(3, 4, bias=False)
        self.second.weight = self.first.weight
        self.register_buffer("mask", torch.tensor([[0.0, float("-inf")], [float("inf"), 1.0]]))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.norm(self.first(inputs) + self.second(inputs))


@pytest.mark.parametrize("decay", [0.5, 0.999])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_average_is_that_of_its_formula(decay: float, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = Masked().to(dtype)
    average = Average(model, decay)
    name, place = "first.weight", (1, 2)
    history: list[tuple[float, float]] = []
    for _ in range(30):
        with torch.no_grad():
            model(torch.randn(8, 3, dtype=dtype))
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter))
        average.update(model)
        history.append((float(model.state_dict()[name][place]), float(model.norm.running_var[0])))  # type: ignore[index]
    expected = list(history[0])
    for number, values in enumerate(history[1:], start=1):
        kept = min(decay, (1 + number) / (10 + number))
        expected = [kept * old + (1 - kept) * new for old, new in zip(expected, values, strict=True)]
    assert average.module is not None
    assert average.averaged is not None
    found = average.module.state_dict()
    tolerance = 1e-5 if dtype == torch.float32 else 1e-12
    assert float(found[name][place]) == pytest.approx(expected[0], rel=tolerance)
    assert float(found["norm.running_var"][0]) == pytest.approx(expected[1], rel=tolerance)
    assert int(found["norm.num_batches_tracked"]) == 30
    assert int(average.averaged.n_averaged) == 30
    assert torch.equal(found["mask"], model.mask), "infinite numbers stay what they are"
    assert torch.equal(found["second.weight"], found["first.weight"])


VIEWS: dict[str, Callable[[torch.Tensor], list[torch.Tensor]]] = {
    "a part": lambda whole: [whole, whole[:3]],
    "the part first": lambda whole: [whole[:3], whole],
    "overlapping": lambda whole: [whole[:5], whole[3:]],
    "another shape": lambda whole: [whole, whole.view(2, 4).T, whole.detach()],
    "conjugated": lambda whole: [values := torch.view_as_complex(whole.view(4, 2)), values.conj()],
    "real and imaginary": lambda whole: [whole.view(4, 2), torch.view_as_complex(whole.view(4, 2))],
}


@pytest.mark.parametrize("views", VIEWS.values(), ids=VIEWS.keys())
def test_buffers_that_share_memory_are_averaged_once(views: Callable[[torch.Tensor], list[torch.Tensor]]) -> None:
    """As buffers with memory of their own, which hold the same numbers."""
    whole, shared, apart = torch.zeros(8), nn.Linear(1, 1), nn.Linear(1, 1)
    held = views(whole)
    for number, view in enumerate(held):
        shared.register_buffer(f"view{number}", view)
        apart.register_buffer(f"view{number}", view.clone())
    averages = [Average(model, 0.9) for model in (shared, apart)]
    for step in range(6):
        whole.copy_(torch.arange(8) * step)
        for own, view in zip(apart.buffers(), held, strict=True):
            own.copy_(view)
        for average, model in zip(averages, (shared, apart), strict=True):
            average.update(model)
    found, expected = (dict(average.module.named_buffers()) for average in averages if average.module is not None)
    assert float(found["view0"].abs().sum()) > 0
    for name, buffer in expected.items():
        assert torch.equal(found[name], buffer), name


def test_the_average_begins_with_the_first_weights_and_is_apart_from_the_model() -> None:
    torch.manual_seed(0)
    model = nn.Linear(2, 2)
    average = Average(model, 0.9)
    assert average.module is not None
    averaged = average.module.get_parameter("weight")
    assert torch.equal(averaged, model.weight)
    with torch.no_grad():
        model.weight.fill_(3)
    average.update(model)
    assert torch.equal(averaged, torch.full((2, 2), 3.0))
    with torch.no_grad():
        model.weight.zero_()
    assert torch.equal(averaged, torch.full((2, 2), 3.0))


def test_without_a_decay_there_is_no_average() -> None:
    model = nn.Linear(2, 2)
    average = Average(model, None)
    average.update(model)
    assert (average.averaged, average.module) == (None, None)


def test_groups_of_ones_own_keep_their_factors_and_the_configs_optimizer() -> None:
    body, head = nn.Linear(3, 2), nn.Linear(2, 1)
    config = Optim(name="adamw", lr=0.1, weight_decay=0.3, betas=(0.5, 0.6))
    factors = ((body, 1.0), (head, 10.0))
    groups = [{**group, "factor": factor} for module, factor in factors for group in parameter_groups(module, 0.3)]
    optimizer = build_optimizer(groups, config, CPU, "no")
    assert isinstance(optimizer, torch.optim.AdamW)
    found = [(group["factor"], group["weight_decay"], group["betas"]) for group in optimizer.param_groups]
    assert found == [(factor, decay, (0.5, 0.6)) for factor in (1.0, 10.0) for decay in (0.3, 0.0)]


@pytest.mark.parametrize("name", ["sgd", "adam", "adamw"])
def test_fp16_leaves_pytorch_its_own_choice_of_an_optimizer_that_is_not_fused(name: Any) -> None:
    """Its scaler has to see the steps that are left out; fused=False would forbid the grouped way, too."""
    made = [build_optimizer(nn.Linear(1, 1), Optim(name=name), CPU, precision) for precision in ("fp16", "bf16")]
    assert [(one.defaults["fused"], one.defaults["foreach"]) for one in made] == [(None, None), (True, None)]


def test_an_announced_sparse_embedding_may_be_parametrized() -> None:
    model = nn.Sequential(nn.Embedding(4, 2, sparse=True))
    nn.utils.parametrize.register_parametrization(model[0], "weight", nn.Identity())
    model(torch.tensor([1, 2])).sum().backward()
    refuse_unforeseen_sparse(model)
