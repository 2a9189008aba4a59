"""After a try modules and tasks hold what they held before, to the bit."""

from __future__ import annotations

import gc
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from distloop.errors import UsageError
from distloop.training.putting_back import put_back
from distloop.training.untrained import refuse_parameters_of_task
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


GENERATORS: dict[str, Callable[[], Any]] = {
    "torch": lambda: torch.Generator().manual_seed(3),
    "numpy": lambda: np.random.default_rng(3),
    "numpy's older one": lambda: np.random.RandomState(3),
    "python": lambda: random.Random(3),
}


def drawn(generator: Any) -> float:
    if isinstance(generator, torch.Generator):
        return float(torch.rand((), generator=generator))
    return float(generator.random() if isinstance(generator, random.Random) else generator.normal())


@pytest.mark.parametrize("kind", GENERATORS)
@pytest.mark.parametrize("place", ["model", "submodule", "task", "a list of the task"])
def test_generators_of_a_model_and_a_task_draw_as_if_nothing_was_tried(kind: str, place: str) -> None:
    generator, model, task = GENERATORS[kind](), nn.Sequential(nn.Linear(2, 2)), Restful()
    holders: dict[str, Any] = {"model": model, "submodule": model[0], "task": task}
    if place == "a list of the task":
        task.scores = [generator]
    else:
        holders[place].noise = generator
    drawn(generator)
    with put_back(model, task):
        drawn(generator)
    expected = GENERATORS[kind]()
    drawn(expected)
    assert drawn(generator) == drawn(expected)
    holders[place if place in holders else "task"].noise = random.SystemRandom()  # has no state: no reason to fail
    with put_back(model, task):
        pass


def deep(depth: int) -> list[Any]:
    inner: list[Any] = [torch.zeros(1)]
    outer = inner
    for _ in range(depth):
        outer = [outer]
    return [outer, inner]


def test_what_a_task_holds_may_be_deep_and_lead_back_to_where_it_began() -> None:
    task: Any = Restful()
    outer, inner = deep(5000)
    task.graph = {"outer": outer}
    task.graph["all"] = task.graph
    with put_back(nn.Linear(1, 1), task):
        inner.append("more")
        task.graph["new"] = 1
    assert inner == [torch.zeros(1)]
    assert task.graph.keys() == {"outer", "all"}
    refuse_parameters_of_task(task)
    inner.append(nn.Parameter(torch.zeros(1)))
    with pytest.raises(UsageError, match=r"graph\['outer'\](\[0\]){5000}\[1\]"):
        refuse_parameters_of_task(task)


def test_a_long_list_is_walked_once_and_not_by_the_garbage_collector_too() -> None:
    """Which would take two thirds of the time: 3e5 annotations are 0.8 s."""
    task: Any = Restful()
    task.rows = [{"box": [1.0, 2.0], "id": number} for number in range(60_000)]
    collected: list[int] = []
    gc.callbacks.append(lambda phase, info: collected.append(info["generation"]))
    try:
        with put_back(task):
            assert max(collected, default=0) < 2
            assert gc.isenabled()
            task.rows[7]["box"][1] = 3.0
            task.rows[8]["seen"] = True
    finally:
        gc.callbacks.pop()
    assert task.rows[7:9] == [{"box": [1.0, 2.0], "id": 7}, {"box": [1.0, 2.0], "id": 8}]
