"""Optimizers: those of torch by their names, the user's own, several for the parts of a model; and what a checkpoint
says of them."""

from __future__ import annotations

import contextlib
import copy
import functools
import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from distloop.config.optim_settings import Group, OptimizerOfGroup
from distloop.config.settings import Config, Optim, Schedule, Train
from distloop.data.order import Plan
from distloop.errors import UsageError
from distloop.run.optimizer_state import load_optimizer
from distloop.run.parts import contents_of, names_of_parameters
from distloop.run.saving import HostBuffers
from distloop.training.nonfinite import FiniteCheck
from distloop.training.optimizers import SeveralOptimizers, build_optimizer, in_words, known_optimizers
from distloop.training.schedules import LearningRate

CPU = torch.device("cpu")
needs_muon = pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch 2.9 brings it")
TAKES_ANY = sorted(set(known_optimizers()) - {"muon", "sparseadam"})


def of_other_parameters(params: Any, lr: float) -> torch.optim.Optimizer:
    return torch.optim.SGD([params[0]["params"][0]], lr=lr)


def no_optimizer(params: Any) -> list[int]:
    return [1]


def model_of(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))


def train(model: nn.Module, optimizer: torch.optim.Optimizer, first: int, last: int) -> None:
    for step in range(first, last):
        inputs = torch.randn(5, 3, generator=torch.Generator().manual_seed(step))
        inputs = inputs.to(next(model.parameters()).dtype)
        model(inputs).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()


def stored(model: nn.Module, optimizer: torch.optim.Optimizer, path: Path) -> Path:
    """The optimizer's file in a checkpoint."""
    buffers = HostBuffers()
    _, others, _ = contents_of({"model": model, "optimizer": optimizer}, buffers)
    torch.save(others["optimizer"], path / "optimizer.pt")
    return path / "optimizer.pt"


def load(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    load_optimizer(path, optimizer, names_of_parameters({"model": model}))


@pytest.mark.parametrize("name", TAKES_ANY)
def test_any_optimizer_of_torch_trains_as_by_hand_and_goes_on_with_the_same_bits(name: str, tmp_path: Path) -> None:
    model = model_of()
    config = Optim(name=name, lr=0.01, weight_decay=0.0)
    optimizer = build_optimizer(model, config, CPU, "no")
    assert type(optimizer) is known_optimizers()[name]
    by_hand = model_of()
    more = {"sgd": {"momentum": 0.9}}.get(name, {})
    fused = {"fused": True} if optimizer.defaults.get("fused") else {}
    other = known_optimizers()[name](by_hand.parameters(), lr=0.01, **more, **fused)
    train(model, optimizer, 0, 3)
    path = stored(model, optimizer, tmp_path)
    continued = copy.deepcopy(model)
    loaded = build_optimizer(continued, config, CPU, "no")
    load(path, continued, loaded)
    train(model, optimizer, 3, 6)
    train(continued, loaded, 3, 6)
    train(by_hand, other, 0, 6)
    others = dict(by_hand.named_parameters())
    for place, parameter in model.named_parameters():
        assert torch.equal(parameter, continued.get_parameter(place)), place
        if name in ("adagrad", "sgd", "rmsprop", "rprop"):
            torch.testing.assert_close(parameter, others[place])


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"name": "SGD"}, "optim.name = 'SGD' is not known. Did you mean 'sgd'"),
        ({"name": "lion"}, "Known: adadelta, adafactor, .* Your own: module:callable"),
        ({"name": "adamv"}, "Did you mean 'adam'|Did you mean 'adamw'"),
        ({"name": "lbfgs"}, r"calls the model several times in a step \(its closure\)"),
        pytest.param(
            {"name": "muon"},
            r"'muon' takes matrices \(2-D parameters\) only, and would get 0.bias, 2.bias",
            marks=needs_muon,
        ),
        ({"name": "sparseadam"}, "'sparseadam' takes sparse gradients only.* would get 0.weight"),
        ({"name": "nadam", "args": {"lr": 1}}, "optim.args.lr: give it as optim.lr"),
        ({"name": "adamw", "args": {"betas": [0.9, 0.9]}}, "optim.args.betas: give it as optim.betas"),
        ({"name": "nadam", "args": {"momentun": 1}}, "momentun.*it takes"),
        ({"name": "rmsprop", "args": {"alpha": -1}}, "optim.args = .*Invalid alpha value: -1"),
        ({"name": "no_such_module:Lion"}, "there is no module 'no_such_module'"),
        ({"name": f"{__name__}:no_optimizer"}, "gave a list; let it return a torch.optim.Optimizer"),
        ({"name": f"{__name__}:of_other_parameters"}, "gave an optimizer of other parameters than those that it got"),
    ],
)
def test_an_optimizer_that_does_not_fit_is_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        build_optimizer(model_of(), Optim(**settings), CPU, "no")


@needs_muon
def test_a_name_that_only_a_newer_torch_has_is_refused_with_its_version(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.optim, "Muon")
    with pytest.raises(UsageError, match=r"'muon' is there from torch 2.9 on; torch 2\.\S+ is installed"):
        build_optimizer(nn.Linear(2, 2, bias=False), Optim(name="muon"), CPU, "no")


def test_arguments_reach_the_optimizer() -> None:
    optimizer = build_optimizer(model_of(), Optim(name="adamw", args={"amsgrad": True}), CPU, "no")
    assert all(group["amsgrad"] and group["betas"] == (0.9, 0.999) for group in optimizer.param_groups)


def test_an_optimizer_of_ones_own_gets_the_groups_and_what_it_takes() -> None:
    config = Optim(name="tests.lab.resuming:Signs", args={"beta": 0.5}, lr=0.3, weight_decay=0.2)
    optimizer = build_optimizer(model_of(), config, CPU, "no")
    assert [(g["lr"], g["weight_decay"], g["beta"]) for g in optimizer.param_groups] == [(0.3, 0.2, 0.5), (0.3, 0, 0.5)]


@pytest.mark.parametrize(
    ("name", "precision", "said"),
    [
        ("adamw", "no", "AdamW, fused"),
        ("sgd", "bf16", "SGD, fused"),
        ("adagrad", "no", "Adagrad, fused"),
        ("adamw", "fp16", "AdamW"),
        ("nadam", "no", "NAdam"),
        ("rprop", "no", "Rprop, without weight decay"),
        ("tests.lab.resuming:Signs", "no", "Signs"),
    ],
)
def test_the_start_up_line_says_whether_it_is_fused_and_decays(name: str, precision: str, said: str) -> None:
    assert in_words(build_optimizer(model_of(), Optim(name=name), CPU, precision)) == said


def test_a_sparse_embedding_has_an_optimizer_of_its_own_and_the_rest_stays_fused() -> None:
    model = nn.Sequential(nn.Embedding(5, 3, sparse=True), nn.Linear(3, 2))
    config = Optim(groups=(Group("^0", optimizer=OptimizerOfGroup("sparseadam")),))
    optimizer = build_optimizer(model, config, CPU, "no")
    assert in_words(optimizer) == "SparseAdam, without weight decay and AdamW, fused"
    before = copy.deepcopy(model.state_dict())
    model(torch.tensor([1, 2])).sum().backward()
    optimizer.step()
    after = model.state_dict()["0.weight"]
    assert torch.equal(after[3], before["0.weight"][3])
    assert not torch.equal(after[1], before["0.weight"][1])
    plain = build_optimizer(model, Optim(name="sgd", momentum=0.0, weight_decay=0.0), CPU, "no")
    model(torch.tensor([1, 2])).sum().backward()
    plain.step()
    with pytest.raises(UsageError, match="sparse"):
        build_optimizer(nn.Sequential(nn.Embedding(5, 3, sparse=True)), Optim(name="nadam"), CPU, "no")


# ---- several -----------------------------------------------------------------------------------------------------

MUON = Optim(
    lr=0.01,
    weight_decay=0.1,
    groups=(Group("weight", lr_scale=2, optimizer=OptimizerOfGroup("muon", {"ns_steps": 3})),),
)


@needs_muon
def test_two_optimizers_train_two_parts_of_a_model_as_by_hand() -> None:
    model, by_hand = model_of(), model_of()
    optimizer = build_optimizer(model, MUON, CPU, "no")
    assert isinstance(optimizer, SeveralOptimizers)
    for group in optimizer.param_groups:
        group["lr"] = 0.01 * group.get("lr_scale", 1)
    weights, biases = ([by_hand.get_parameter(f"{place}.{name}") for place in (0, 2)] for name in ("weight", "bias"))
    others: list[torch.optim.Optimizer] = [
        torch.optim.Muon(weights, lr=0.02, weight_decay=0.1, ns_steps=3),
        torch.optim.AdamW(biases, lr=0.01, weight_decay=0.0, fused=True),
    ]
    for step in range(4):
        train(model, optimizer, step, step + 1)
        by_hand(torch.randn(5, 3, generator=torch.Generator().manual_seed(step))).square().sum().backward()
        for other in others:
            other.step()
        by_hand.zero_grad()
    assert all(torch.equal(one, two) for one, two in zip(model.parameters(), by_hand.parameters(), strict=True))


@needs_muon
def test_several_optimizers_go_on_with_the_same_bits(tmp_path: Path) -> None:
    model = model_of()
    optimizer = build_optimizer(model, MUON, CPU, "no")
    train(model, optimizer, 0, 3)
    path = stored(model, optimizer, tmp_path)
    continued = copy.deepcopy(model)
    loaded = build_optimizer(continued, MUON, CPU, "no")
    load(path, continued, loaded)
    train(model, optimizer, 3, 6)
    train(continued, loaded, 3, 6)
    assert all(torch.equal(one, two) for one, two in zip(model.parameters(), continued.parameters(), strict=True))
    assert len(loaded.state) == 4


@needs_muon
@pytest.mark.parametrize("moments", [False, True])
def test_a_bad_step_is_left_out_by_each_of_several(moments: bool) -> None:
    model = model_of()
    groups = (
        Group(r"0\.weight", optimizer=OptimizerOfGroup("muon")),
        Group("^0", optimizer=OptimizerOfGroup("sgd", {})),
    )
    optimizer = build_optimizer(model, Optim(groups=groups), CPU, "no")
    check = FiniteCheck("skip", model, optimizer, None, Plan(40, 4, 1))
    if moments:
        check.begin_step()
        model(torch.ones(2, 3)).sum().backward()
        check.before_update(0, torch.tensor(1.0), [torch.tensor(1.0)])
        optimizer.step()
        optimizer.zero_grad()
    before, moments_before = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict()["state"])
    check.begin_step()
    (model(torch.ones(2, 3)).sum() * float("nan")).backward()
    check.before_update(1, torch.tensor(float("nan")), [torch.tensor(float("nan"))])
    assert isinstance(optimizer, SeveralOptimizers)
    flags = {type(one).__name__: bool(getattr(one, "found_inf", False)) for one in optimizer.optimizers}
    assert flags == {"Muon": False, "SGD": True, "AdamW": True}  # what is fused looks at the flag itself
    optimizer.step()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    after = optimizer.state_dict()["state"]
    for place, values in moments_before.items():
        assert all(torch.equal(values[name], after[place][name]) for name in values if values[name] is not None), place


# ---- what does not fit into a checkpoint -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (Optim(name="sgd"), "belongs to another optimizer: AdamW there, SGD here"),
        (
            Optim(groups=(Group("^0", optimizer=OptimizerOfGroup("nadam")),)),
            "belongs to another optimizer: AdamW there, NAdam and AdamW here",
        ),
        (
            Optim(groups=(Group("^0", lr_scale=2),)),
            r"belongs to other groups of parameters \(optim.groups, optim.layer_decay\): default \(2 parameters\), "
            r"default \(2 parameters\) there; '\^0' \(1 parameter\), default \(1 parameter\), ",
        ),
        (Optim(groups=(Group(r"0\.bias", freeze=True),)), "belongs to other parameters: model.0.bias only there"),
    ],
)
def test_a_checkpoint_says_what_does_not_fit(config: Optim, said: str, tmp_path: Path) -> None:
    model = model_of()
    path = stored(model, build_optimizer(model, Optim(), CPU, "no"), tmp_path)
    other = model_of()
    with pytest.raises(UsageError, match=said):
        load(path, other, build_optimizer(other, config, CPU, "no"))


def test_other_rates_and_decays_of_the_same_groups_fit(tmp_path: Path) -> None:
    model = model_of()
    path = stored(model, build_optimizer(model, Optim(groups=(Group("^0", lr_scale=2),)), CPU, "no"), tmp_path)
    other = build_optimizer(model, Optim(groups=(Group("^0", lr_scale=3, weight_decay=0.2),)), CPU, "no")
    load(path, model, other)
    assert [group.get("lr_scale") for group in other.param_groups] == [3, None, 3, None]


# ---- a schedule of one's own ----------------------------------------------------------------------------------


def half_cosine(step: int, total_steps: int) -> float:
    return 1 - step / total_steps / 2


def of_progress(share: Callable[[float], float]) -> Callable[[int, int], float]:
    @functools.wraps(share)
    def of_step(step: int, total_steps: int) -> float:
        return share(step / total_steps)

    return of_step


@of_progress
def decorated(progress: float) -> float:
    return 1 - progress / 2


counted = iter(range(10**9))


def impure(step: int, total_steps: int) -> float:
    return float(next(counted))


def negative(step: int, total_steps: int) -> float:
    return 0.5 if step < 7 else -0.1


def text(step: int, total_steps: int) -> str:
    return "0.5"


def of_the_step_alone(step: int) -> float:
    return 0.5


def schedule(name: str) -> Config:
    return Config(optim=Optim(lr=0.2), schedule=Schedule(name=f"{__name__}:{name}"), train=Train(epochs=None, steps=10))


@pytest.mark.parametrize("name", ["half_cosine", "decorated"])
def test_a_schedule_of_ones_own_is_the_share_of_the_peak_rate(name: str) -> None:
    learning_rate = LearningRate(schedule(name), 10)
    assert [learning_rate(step) for step in range(10)] == [0.2 * (1 - step / 20) for step in range(10)]


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("impure", "gives two values for step 0"),
        ("negative", "returned a number -0.1 for step 7 of 10"),
        ("text", "returned a str for step 0"),
        ("no_such", "has no callable 'no_such'"),
        ("of_the_step_alone", r"of_the_step_alone' is called as \(step, total_steps\): too many positional"),
    ],
)
def test_a_schedule_of_ones_own_that_is_no_such_function_is_refused(name: str, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        LearningRate(schedule(name), 10)


# ---- the start ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fails", [False, True])
def test_no_garbage_is_looked_for_in_what_the_first_optimizer_imports(
    monkeypatch: pytest.MonkeyPatch, fails: bool
) -> None:
    found: list[bool] = []

    def build(params: Any, lr: float) -> torch.optim.Optimizer:
        found.append(gc.isenabled())
        if fails:
            raise ValueError("no")
        return torch.optim.SGD(params, lr=lr)

    monkeypatch.setattr("distloop.training.optimizers.optimizer_kind", lambda key, name: build)
    with pytest.raises(ValueError, match="no") if fails else contextlib.nullcontext():
        build_optimizer(model_of(), Optim("own"), CPU, "no")
    assert found == [False]
    assert gc.isenabled()
