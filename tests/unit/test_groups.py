"""Groups of parameters: whose they are, their rates, what is frozen, and when."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torchvision
from torch import nn

from distloop.config.optim_settings import Group, OptimizerOfGroup
from distloop.config.settings import Config, Optim, Schedule, Train
from distloop.data.order import Plan
from distloop.errors import StoppedEarly, UsageError
from distloop.training.groups import layers_of, leave_out_frozen, members, set_lr
from distloop.training.nonfinite import FiniteCheck
from distloop.training.optimizers import build_optimizer
from distloop.training.schedules import LearningRate

CPU = torch.device("cpu")


class Net(nn.Module):
    """A body with a BatchNorm, a BatchNorm without parameters, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.BatchNorm1d(4, affine=False))
        self.neck = nn.BatchNorm1d(4)
        self.head = nn.Linear(4, 2)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.head(self.neck(self.body(inputs)))


def groups(*given: dict[str, Any]) -> tuple[Group, ...]:
    return tuple(Group(**each) for each in given)


def build(model: nn.Module, *given: dict[str, Any], **settings: Any) -> torch.optim.Optimizer:
    return build_optimizer(model, Optim(groups=groups(*given), **settings), CPU, "no")


def names_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[list[str]]:
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return [[names[id(parameter)] for parameter in group["params"]] for group in optimizer.param_groups]


def test_the_first_match_counts_and_what_matches_none_has_the_defaults() -> None:
    model = Net()
    optimizer = build(
        model, {"match": r"head\.weight", "lr_scale": 10}, {"match": "head", "weight_decay": 0.5}, weight_decay=0.1
    )
    found = [
        (names, group["weight_decay"], group.get("lr_scale", 1))
        for names, group in zip(names_of(model, optimizer), optimizer.param_groups, strict=True)
    ]
    assert found == [
        (["body.0.weight"], 0.1, 1),
        (["head.weight"], 0.1, 10),
        (["body.0.bias", "body.1.weight", "body.1.bias", "neck.weight", "neck.bias"], 0.0, 1),
        (["head.bias"], 0.0, 1),
    ]


def test_without_groups_there_are_the_two_of_before_in_their_order() -> None:
    model = Net()
    assert names_of(model, build(model)) == [
        ["body.0.weight", "head.weight"],
        ["body.0.bias", "body.1.weight", "body.1.bias", "neck.weight", "neck.bias", "head.bias"],
    ]
    assert [sorted(group) for group in build(model, weight_decay=0).param_groups] == [
        sorted(group) for group in torch.optim.AdamW(model.parameters()).param_groups
    ] * 2


def test_a_pattern_called_default_is_a_group_of_its_own() -> None:
    model = nn.Sequential()
    model.add_module("default", nn.Linear(2, 2))
    model.add_module("other", nn.Linear(2, 2))
    optimizer = build(model, {"match": "default", "weight_decay": 0.5}, weight_decay=0.1)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.5, 0.1, 0.0]


def test_each_group_has_the_rate_of_the_step_times_its_scale() -> None:
    model = Net()
    optimizer = build(model, {"match": "^body", "lr_scale": 0.1}, lr=0.4)
    config = Config(optim=Optim(lr=0.4), schedule=Schedule(name="linear"), train=Train(epochs=None, steps=10))
    learning_rate = LearningRate(config, 10)
    for step in (0, 7, 3):
        set_lr(optimizer, learning_rate(step))
        rates = {
            name: group["lr"]
            for names, group in zip(names_of(model, optimizer), optimizer.param_groups, strict=True)
            for name in names
        }
        assert rates["head.weight"] == rates["neck.bias"] == learning_rate(step)
        assert rates["body.0.weight"] == rates["body.1.bias"] == learning_rate(step) * 0.1


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"match": "haed"}, r"optim.groups\[0\].match = 'haed' matches no parameter of the model. Known: body.0.bias"),
        ({"match": "head.wieght"}, "Did you mean 'head.weight'"),
        ({"match": "(head"}, "is no regular expression"),
        ({"match": "head", "freeze": True, "lr_scale": 2}, "has freeze: true"),
        ({"match": "head", "freeze": True, "until_step": 2}, "has freeze: true"),
        ({"match": ".", "freeze": True}, "there is nothing to train"),
        ({"match": ".", "until_step": 3}, "freeze all parameters in the first steps"),
    ],
)
def test_a_group_that_does_not_fit_is_refused(given: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        build(Net(), given)


def test_a_pattern_that_an_earlier_one_hides_is_refused() -> None:
    with pytest.raises(UsageError, match=r"groups\[1\].match = 'head.weight' matches only .* earlier group \('head'\)"):
        build(Net(), {"match": "head", "lr_scale": 2}, {"match": "head.weight", "lr_scale": 3})


def test_a_group_that_begins_after_the_end_of_the_run_is_refused() -> None:
    config = Config(optim=Optim(groups=groups({"match": "x", "until_step": 10})))
    LearningRate(config, 11)
    with pytest.raises(UsageError, match="frozen until step 10, and the run has 10 steps"):
        LearningRate(config, 10)


def test_what_is_frozen_gets_no_gradient_and_its_statistics_stay() -> None:
    torch.manual_seed(0)
    model = Net()
    build(model, {"match": "^body", "freeze": True})
    before = copy.deepcopy(model.state_dict())
    for _ in range(3):
        model.train()
        model(torch.randn(8, 3)).square().sum().backward()
    assert {name for name, p in model.named_parameters() if p.grad is None} == {
        name for name, _ in model.named_parameters() if name.startswith("body")
    }
    after = model.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"neck.running_mean", "neck.running_var", "neck.num_batches_tracked"}


def test_a_batch_norm_that_is_partly_trained_goes_on_counting() -> None:
    model = Net()
    build(model, {"match": r"body\.0|body\.1\.weight", "freeze": True})
    model.train()
    model(torch.randn(8, 3))
    assert [int(model.state_dict()[f"body.{place}.num_batches_tracked"]) for place in (1, 2)] == [1, 1]


@pytest.mark.parametrize("name", ["sgd", "adamw", "nadam"])
def test_the_moments_of_a_group_begin_at_its_first_step(name: str) -> None:
    """As if the optimizer had got the group then."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    by_hand = copy.deepcopy(model)
    optimizer = build(model, {"match": "^0", "until_step": 3}, name=name, lr=0.1)
    kind = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW, "nadam": torch.optim.NAdam}[name]
    more = {"momentum": 0.9} if name == "sgd" else {}
    head, body = ([by_hand.get_parameter(f"{place}.{part}") for part in ("weight", "bias")] for place in (1, 0))
    make: Any = kind
    other = make([{"params": [p], "weight_decay": 0.05 if p.ndim > 1 else 0.0} for p in head], lr=0.1, **more)
    for step in range(6):
        inputs = torch.randn(5, 3)
        norms: list[torch.Tensor] = []
        if step == 3:
            for parameter in body:
                decay = 0.05 if parameter.ndim > 1 else 0.0
                other.add_param_group({"params": [parameter], "weight_decay": decay})
        for net, one in ((model, optimizer), (by_hand, other)):
            net.zero_grad()
            net(inputs).square().sum().backward()
            if net is model:
                set_lr(one, 0.1)
                leave_out_frozen(one, step)
            elif step < 3:
                for parameter in body:
                    parameter.grad = None
            norms.append(torch.nn.utils.get_total_norm([p.grad for p in net.parameters() if p.grad is not None]))
            one.step()
        torch.testing.assert_close(norms[0], norms[1], msg=f"norm of step {step}")
        for (place, one), two in zip(model.named_parameters(), by_hand.parameters(), strict=True):
            torch.testing.assert_close(one, two, rtol=1e-6, atol=1e-7, msg=f"{place} in step {step}")


@pytest.mark.parametrize("policy", ["stop", "skip"])
def test_a_frozen_group_is_nothing_to_speak_of_for_the_check_of_the_step(
    policy: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    optimizer = build(model, {"match": "^0", "until_step": 1}, name="sgd")
    check = FiniteCheck(policy, model, optimizer, None, Plan(40, 4, 1))
    for step in range(2):
        check.begin_step()
        model(torch.randn(5, 3)).sum().backward()
        leave_out_frozen(optimizer, step)
        check.before_update(step, torch.tensor(1.0), [torch.tensor(1.0)])
        optimizer.step()
        optimizer.zero_grad()
    assert check.check() == []
    assert "got no gradient" not in "".join(capsys.readouterr())


def test_a_loop_that_does_not_leave_a_frozen_group_out_is_refused() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    check = FiniteCheck("stop", model, build(model, {"match": "^0", "until_step": 1}), None, Plan(40, 4, 1))
    model(torch.randn(5, 3)).sum().backward()
    with pytest.raises(UsageError, match=r"call leave_out_frozen\(optimizer, step\)"):
        check.before_update(0, torch.tensor(1.0), [torch.tensor(1.0)])


# ---- rates by layer --------------------------------------------------------------------------------------------


def test_the_rate_falls_from_layer_to_layer() -> None:
    model = torchvision.models.resnet18(num_classes=3)
    scales = {member.name: member.lr_scale for member in members(model, Optim(layer_decay=0.5))}
    assert scales["fc.weight"] == scales["fc.bias"] == 1
    assert scales["layer4.1.conv2.weight"] == scales["layer4.1.bn1.bias"] == 0.5
    assert scales["layer4.0.conv1.weight"] == scales["layer4.0.downsample.0.weight"] == 0.25
    assert scales["layer1.0.conv1.weight"] == 0.5**8
    assert scales["conv1.weight"] == scales["bn1.weight"] == 0.5**9


@pytest.mark.parametrize(
    ("name", "layers", "first", "last"),
    [
        ("resnet50", 16 + 2, "conv1.weight", "fc.weight"),
        ("convnext_tiny", 18 + 3 + 2, "features.0.0.weight", "classifier.2.weight"),
        ("swin_t", 12 + 3 + 2, "features.0.0.weight", "head.weight"),
        ("vit_b_16", 12 + 2, "conv_proj.weight", "heads.head.weight"),
    ],
)
def test_blocks_of_torchvisions_models_are_layers(name: str, layers: int, first: str, last: str) -> None:
    with torch.device("meta"):
        model = torchvision.models.get_model(name)
    found = layers_of(model, 0.5)
    assert set(found) == {name for name, _ in model.named_parameters()}
    assert sorted(set(found.values())) == [0.5**power for power in reversed(range(layers))]
    assert (found[first], found[last]) == (0.5 ** (layers - 1), 1.0)
    order = [found[name] for name, _ in model.named_parameters() if name not in ("class_token",)]
    assert name == "vit_b_16" or order == sorted(order)


def test_a_scale_of_a_group_and_one_of_a_layer_are_multiplied() -> None:
    config = Optim(layer_decay=0.5, groups=groups({"match": r"layer4\.1", "lr_scale": 3}))
    scales = {member.name: member.lr_scale for member in members(torchvision.models.resnet18(), config)}
    assert (scales["layer4.1.conv1.weight"], scales["layer4.0.conv1.weight"]) == (1.5, 0.25)


def test_layers_of_another_model_are_refused() -> None:
    with pytest.raises(UsageError, match="the blocks of Net are not known, only those of torchvision's ResNet"):
        build(Net(), layer_decay=0.75)


def test_the_table_has_a_line_for_each_parameter() -> None:
    model = Net()
    with pytest.raises(StoppedEarly) as stopped:
        build(
            model,
            {"match": "^body", "freeze": True},
            {"match": "neck", "until_step": 7},
            {"match": r"head\.weight", "lr_scale": 10, "optimizer": OptimizerOfGroup("nadam")},
            show=True,
            lr=0.01,
        )
    lines = [line.split() for line in str(stopped.value).splitlines()]
    assert len(lines) == 2 + len(list(model.parameters()))
    assert ["body.0.weight", "[4,", "3]", "^body", "adamw", "0.01", "0.05", "frozen"] in lines
    assert ["neck.bias", "[4]", "neck", "adamw", "0.01", "0", "frozen", "until", "step", "7"] in lines
    assert ["head.weight", "[2,", "4]", r"head\.weight", "nadam", "0.1", "0.05"] in lines
    assert ["head.bias", "[2]", "default", "adamw", "0.01", "0"] in lines
