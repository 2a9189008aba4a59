"""After a try modules and tasks hold what they held before, to the bit."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from distloop.training.putting_back import put_back
from tests.lab.rehearsed import Restful, Restless

IMAGES = torch.linspace(0, 1, 8 * 64).view(8, 1, 8, 8)
LABELS = torch.arange(8)


def plain(value: Any) -> Any:
    """All that there is, as something that == compares to the bit."""
    if isinstance(value, Tensor):
        gradient = value.grad if value.is_leaf else None
        data = value.detach().clone().flatten().view(torch.uint8).tolist()
        return (str(value.dtype), tuple(value.shape), data, gradient)
    if isinstance(value, np.ndarray):
        return value.tobytes()
    if isinstance(value, nn.Module) or hasattr(value, "loss"):
        return {name: plain(inner) for name, inner in vars(value).items()}
    if isinstance(value, dict):
        return [(name, plain(inner)) for name, inner in value.items()]
    if isinstance(value, (list, tuple)):
        return [plain(inner) for inner in value]
    return value


def passed(model: nn.Module, task: Restful, passes: int = 2) -> None:
    for _ in range(passes):
        task.loss(model(IMAGES), (IMAGES, LABELS))[0].backward()
        with torch.no_grad():
            task.metrics(model.eval()(IMAGES), (IMAGES, LABELS))
        model.train()
    task.summary({name: torch.tensor(1) for name in ("loss", "weight", "samples", "correct")})


@pytest.mark.parametrize("training", [True, False])
def test_a_model_and_a_task_that_change_with_each_pass_are_as_before(training: bool) -> None:
    torch.manual_seed(0)
    model, task = Restless(10).train(training), Restful()
    before = plain(model), plain(task)
    objects = {name: id(tensor) for name, tensor in (*model.named_parameters(), *model.named_buffers())}
    with put_back(model, task):
        model.train()
        passed(model, task)
        changed = plain(model), plain(task)
        assert all(changed[i] != before[i] for i in (0, 1))
    assert (plain(model), plain(task)) == before
    now = {name: id(tensor) for name, tensor in (*model.named_parameters(), *model.named_buffers())}
    assert now == objects, "an optimizer holds these tensors"


def test_a_model_that_was_put_back_trains_as_one_that_was_never_tried() -> None:
    ends = []
    for tried in (False, True):
        torch.manual_seed(0)
        model, task = Restless(10), Restful()
        if tried:
            with put_back(model, task):
                passed(model, task)
        torch.manual_seed(1)
        np.random.seed(1)
        passed(model, task)
        ends.append((plain(model.state_dict()), [plain(p.grad) for p in model.parameters()], plain(task)))
    assert ends[0] == ends[1]


def test_buffers_of_a_checkpoint_that_is_loaded_next_are_kept() -> None:
    torch.manual_seed(0)
    model, task = Restless(10).eval(), Restful()
    names = set(model.state_dict())
    with put_back(model, task, keep_created=True):
        passed(model.train(), task)
    assert set(model.state_dict()) - names == {"mean"}
    assert model.ready, "with the attribute that says so"
    assert not model.training
    assert task.count == 0
    assert int(model.steps) == 0


@pytest.mark.parametrize("is_deep", [True, False])
def test_a_module_that_gets_its_shapes_in_a_try_keeps_them(is_deep: bool) -> None:
    lazy = nn.Sequential(nn.Flatten(), nn.LazyLinear(3), nn.LazyBatchNorm1d()) if is_deep else nn.LazyLinear(3)
    with put_back(lazy):
        lazy(torch.ones(4, 5))
    assert lazy(torch.ones(4, 5)).shape == (4, 3)
    assert not any(nn.parameter.is_lazy(parameter) for parameter in lazy.parameters())


def test_expanded_and_shared_tensors_stay_what_they_are() -> None:
    model = nn.Linear(3, 3)
    view = model.weight.detach()[0]
    model.register_buffer("wide", torch.ones(1, 3).expand(4, 3))
    model.register_buffer("view", view)
    model.register_buffer("missing", None)
    before = plain(model)
    with put_back(model):
        model.weight.data.mul_(2)
        view.add_(1)
    assert plain(model) == before
    assert view.data_ptr() == model.weight.data_ptr()


def test_parameters_that_the_block_freezes_are_trained_as_before() -> None:
    model = nn.Linear(2, 2)
    model.bias.requires_grad_(False)
    with put_back(model):
        model.weight.requires_grad_(False)
        model.bias.requires_grad_(True)
    assert (model.weight.requires_grad, model.bias.requires_grad) == (True, False)
