"""What a task collects in validation: its form, and what is refused. tests/multiprocess/test_collected.py has ranks."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn

from distloop.config.settings import Task as TaskConfig
from distloop.data.order import FixedBatchSampler
from distloop.errors import UsageError
from distloop.tasks import Classification
from distloop.training.builtin_tasks import build_task
from distloop.training.collected import Collected
from distloop.training.validation import validate
from tests.tools.documents import blocks_of
from tests.tools.ranks import REPOSITORY


class Identity(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(()))

    def forward(self, inputs: Tensor) -> Tensor:
        return inputs


class Scores(Classification):
    def collect(self, outputs: Tensor, batch: Any) -> dict[str, Any]:
        return {"scores": outputs, "labels": batch[1]}

    def summary(self, sums: dict[str, Tensor], collected: dict[str, Any]) -> dict[str, float]:  # type: ignore[override]
        self.seen = collected
        return super().summary(sums)


class OneValue(Classification):
    """Its summary() is that of a task without collect()."""

    def collect(self, outputs: Tensor, batch: Any) -> dict[str, Any]:
        return {}


def scores(samples: int = 100) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(samples, 10, generator=generator), torch.randint(0, 10, (samples,), generator=generator)


def validated(task: Any, batch_size: int = 7) -> dict[str, float]:
    outputs, labels = scores()
    sampler = FixedBatchSampler(len(outputs), batch_size, 0, 1)
    batches = [(outputs[indices], labels[indices]) for _, indices in sampler]
    return validate(Identity(), task, batches, sampler)


@pytest.mark.parametrize("batch_size", [1, 7, 100, 256])
def test_summary_gets_each_sample_once_and_in_order(batch_size: int) -> None:
    task = Scores()
    validated(task, batch_size)
    for found, expected in zip(task.seen.values(), scores(), strict=True):
        assert torch.equal(found, expected)


def test_a_summary_of_one_value_goes_on_working_and_is_refused_beside_collect() -> None:
    assert validated(Classification())["samples"] == 100
    with pytest.raises(
        UsageError, match=r"OneValue defines collect\(\).* Write: def summary\(self, sums, collected\):"
    ):
        build_task(TaskConfig(f"{__name__}:OneValue"))
    build_task(TaskConfig(f"{__name__}:Scores"))


def whole(*batches: dict[str, Any], samples: int = 4) -> dict[str, Any]:
    collected = Collected()
    sampler = FixedBatchSampler(samples, 2, 0, 1)
    for position, values in enumerate(batches):
        collected.add(values, sampler.size(position))
    return collected.whole(sampler)


def test_what_is_kept_is_a_copy_of_its_own_and_its_dtype_stays() -> None:
    buffer = torch.arange(2, dtype=torch.float16, requires_grad=True) * 1
    array = np.arange(8, dtype=np.int16).reshape(2, 4)[:, ::-1]
    numbers = [buffer, array]
    collected = Collected()
    collected.add({"buffer": buffer, "array": array, "list": numbers}, 2)
    with torch.no_grad():
        buffer += 10  # as a compiled model overwrites its outputs
    array += 10
    found = collected.whole(FixedBatchSampler(2, 2, 0, 1))
    assert (found["buffer"].dtype, found["array"].dtype) == (torch.float16, torch.int16)
    assert (found["buffer"].tolist(), found["buffer"].requires_grad) == ([0, 1], False)
    assert found["array"].tolist() == [[3, 2, 1, 0], [7, 6, 5, 4]]
    assert found["list"][0].tolist() == [0, 1]
    assert found["list"][1].tolist() == [[3, 2, 1, 0], [7, 6, 5, 4]]


def test_lists_keep_what_each_sample_has() -> None:
    found = whole(
        {"boxes": [torch.zeros(3, 4), torch.ones(0, 4)], "texts": ["a", "b"]},
        {"boxes": (torch.ones(1, 4), torch.zeros(2, 4)), "texts": ["c", ""]},
    )
    assert [len(boxes) for boxes in found["boxes"]] == [3, 0, 1, 2]
    assert found["texts"] == ["a", "b", "c", ""]


@pytest.mark.parametrize(
    ("batches", "said"),
    [
        ([{"a": torch.zeros(3)}], r"a has 3 values for a batch of 2 samples \(Tensor of shape \[3\]\)"),
        ([{"a": torch.zeros(3, 2)}], r"a has 3 values for a batch of 2 samples"),
        ([{"a": ["text"]}], r"a has 1 values for a batch of 2 samples"),
        ([{"a": torch.zeros(())}], r"a is a Tensor of shape \[\]\. Give a tensor or an array \[batch, …\], or a list"),
        ([{"a": "text"}], r"a is a str\. Give"),
        ([{"a": 1.0}], r"a is a float\. Give"),
        ([{"a": np.array(["text", "text"])}], r"a is a ndarray of shape \[2\]\. Give"),
        ([{"a": [object(), object()]}], r"a holds a object"),
        ([{3: torch.zeros(2)}], r"task\.collect\(\): the name 3 is a int"),
        ([torch.zeros(2)], r"task\.collect\(\) must return a dict"),
        ([{"a": torch.zeros(2)}, {"b": torch.zeros(2)}], r"a \(float32, \[batch\]\) in one batch, and b \(float32"),
        ([{"a": torch.zeros(2, 3)}, {"a": torch.zeros(2, 4)}], r"\[batch, 3\]\) in one batch, and a .*\[batch, 4\]"),
        ([{"a": torch.zeros(2)}, {"a": torch.zeros(2).long()}], r"a \(float32, \[batch\]\).* a \(int64, \[batch\]\)"),
        ([{"a": torch.zeros(2)}, {"a": [1, 2]}], r"in another"),
    ],
)
def test_what_is_not_one_value_for_each_sample_is_refused(batches: list[Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        whole(*batches)


def documented(name: str) -> dict[str, Any]:
    [block] = [block for block in blocks_of(REPOSITORY / "docs" / "own-code.md") if block.file == name]
    found: dict[str, Any] = {}
    exec(block.text, found)
    return found


@pytest.mark.parametrize(("file", "package"), [("auroc.py", "sklearn"), ("torch_auroc.py", "torchmetrics")])
def test_the_examples_in_the_documents_give_the_area_under_the_curve(file: str, package: str) -> None:
    pytest.importorskip(package)
    task = documented(file)["Auroc"]()
    task.probe(scores()[0])
    outputs, labels = scores()
    expected = roc_auc_score(labels, outputs.softmax(1), multi_class="ovr")
    assert validated(task)["auroc"] == pytest.approx(expected, rel=1e-5)
