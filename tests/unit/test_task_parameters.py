"""Parameters of a task: which optimizer updates them, under which names, and which loops train and save them."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import nn

from distloop.config.optim_settings import Group, Optim
from distloop.config.settings import Task as TaskConfig
from distloop.data.now import Now, tell
from distloop.errors import UsageError
from distloop.tasks import Classification
from distloop.training.averaging import Average
from distloop.training.builtin_tasks import build_task
from distloop.training.gradients import exchange_gradients
from distloop.training.optimizers import build_optimizer
from distloop.training.tasks import Task, check_attributes
from distloop.training.untrained import refuse_untrained_task, refuse_unused_in_task
from tests.lab.knowing import Knowing, Learning, Remembering

CPU = torch.device("cpu")


def test_groups_find_them_behind_task_and_decay_is_for_matrices() -> None:
    model, task = nn.Linear(10, 10), Learning()
    groups = (Group(match=r"^task\.temperature", lr_scale=10.0), Group(match="norm", freeze=True))
    optimizer = build_optimizer(model, Optim(weight_decay=0.3, groups=groups), CPU, "no", task)
    found = {
        id(p): (group["weight_decay"], group.get("lr_scale", 1))
        for group in optimizer.param_groups
        for p in group["params"]
    }
    names = {name: found.get(id(p)) for name, p in [*model.named_parameters(), *task.named_parameters(prefix="task")]}
    assert names == {
        "weight": (0.3, 1),
        "bias": (0.0, 1),
        "task.temperature": (0.0, 10.0),
        "task.proxies.weight": (0.3, 1),
        "task.norm.weight": None,
        "task.norm.bias": None,
    }
    assert not task.norm.weight.requires_grad
    with pytest.raises(UsageError, match="nothing to train"):
        build_optimizer(model.requires_grad_(False), Optim(), CPU, "no", task)


def test_a_loop_that_does_not_know_a_tasks_parameters_or_state_says_so() -> None:
    task, model = Learning(), nn.Linear(10, 10)
    parts = {"model": model, "optimizer": build_optimizer(model, Optim(), CPU, "no")}
    with pytest.raises(UsageError, match=r"does not train the task's temperature, proxies\.weight, norm\.weight"):
        refuse_untrained_task(task, parts)
    parts["optimizer"] = build_optimizer(model, Optim(), CPU, "no", task)
    assert refuse_untrained_task(task, {**parts, "task": task.as_part}) == []
    assert "no checkpoint of this loop holds the task's state" in refuse_untrained_task(Remembering(), parts)[0]
    assert refuse_untrained_task(Knowing(), parts) == []


def test_a_parameter_without_a_gradient_is_named_at_first_and_gets_zeros_later() -> None:
    task = Learning()
    task.proxies.weight.sum().backward()
    with pytest.raises(UsageError, match=r"The task's temperature, norm\.weight, norm\.bias got no gradient"):
        refuse_unused_in_task(task)
    exchange_gradients(task)
    refuse_unused_in_task(task)
    assert task.temperature.grad == 0
    exchange_gradients(Knowing())  # of a task that is no module: nothing


def test_an_average_is_that_of_a_task_with_trained_parameters_alone() -> None:
    model = nn.Linear(1, 1)
    for task in (Learning(frozen=True), Knowing()):
        assert Average(model, 0.5, task).task is task
    task = Learning()
    assert Average(model, None, task).task is task
    average = Average(model, 0.5, task)
    average.update(model)
    with torch.no_grad():
        task.temperature += 1
    average.update(model)
    assert average.task.temperature.item() == pytest.approx(1 + 9 / 11)  # decay: (1 + 1) / (10 + 1)


def test_what_has_a_state_is_a_part() -> None:
    class Empty(Knowing, nn.Module):
        pass

    for task, has_state in ((Knowing(), False), (Empty(), False), (Remembering(), True), (Learning(), True)):
        assert task.as_part is (task if has_state else None)
        assert task.now == Now(0, 0, 0, False)


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [("now", 3.0, r"now = 3\.0: distloop keeps there where the run is"), ("state_dict", dict, "not both methods")],
)
def test_names_that_mean_something_are_kept(name: str, value: Any, words: str) -> None:
    class Mine(Task):
        pass

    setattr(Mine, name, value)
    with pytest.raises(UsageError, match=words):
        check_attributes(Mine())


class OwnLoss(Classification, nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.loss = nn.CrossEntropyLoss()  # type: ignore[method-assign]


class OwnWeight(Task, nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))  # type: ignore[misc, assignment]


class NoInit(Task, nn.Module):
    def __init__(self) -> None:
        self.level = 1


class Turned(nn.Module, Task):
    pass


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (OwnLoss, r"OwnLoss\.loss is a CrossEntropyLoss.+self\.own_loss"),
        (OwnWeight, r"OwnWeight\.weight is a parameter.+self\.own_weight"),
        (NoInit, r"super\(\)\.__init__\(\)"),
        (Turned, r"class Turned\(distloop\.tasks\.Task, torch\.nn\.Module\)"),
    ],
)
def test_a_module_or_parameter_that_would_not_be_used_is_refused(kind: type, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        build_task(TaskConfig(f"{__name__}:{kind.__name__}"))


class Scale:
    def __init__(self, scale: float) -> None:
        self.scale = scale


class TwoBases(Classification, Scale):
    def __init__(self) -> None:
        Classification.__init__(self, label_smoothing=0.5)
        Scale.__init__(self, 3.0)


@dataclasses.dataclass(frozen=True)
class Frozen(Task):
    scale: float = 1.0


def test_tasks_with_other_bases_and_frozen_dataclasses_work() -> None:
    two = build_task(TaskConfig(f"{__name__}:TwoBases"))
    assert (two.scale, two.label_smoothing) == (3.0, 0.5)  # type: ignore[attr-defined]
    frozen = build_task(TaskConfig(f"{__name__}:Frozen"))
    tell(frozen, Now(step=3))
    assert frozen.now.step == 3
