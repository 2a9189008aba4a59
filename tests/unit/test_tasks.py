"""Losses and metric sums against torch and scikit-learn, and what is refused before it trains something else."""

from __future__ import annotations

import types
from typing import Any

import pytest
import torch
from sklearn.metrics import accuracy_score, log_loss, mean_squared_error, r2_score
from torch import Tensor, nn
from torch.nn import functional

from distloop.config.settings import Task as TaskConfig
from distloop.data.batches import inputs_of, targets_of
from distloop.data.whole_batches import InMemory
from distloop.errors import UsageError
from distloop.tasks import Classification, LanguageModelling, Regression, Segmentation, Task
from distloop.training.builtin_tasks import build_task
from distloop.training.trying import try_out


def sums_over(task: Task, outputs: Tensor, targets: Tensor, parts: list[int]) -> dict[str, Tensor]:
    """What validation adds up where the samples come in batches of these sizes."""
    totals: dict[str, Tensor] = {}
    for some_outputs, some_targets in zip(outputs.split(parts), targets.split(parts), strict=True):
        batch = (None, some_targets)
        loss, weight = task.loss(some_outputs, batch)
        row = {"loss": loss, "weight": torch.as_tensor(weight), "samples": torch.tensor(len(some_targets))}
        for name, value in {**row, **task.metrics(some_outputs, batch)}.items():
            totals[name] = totals.get(name, torch.zeros(())) + value
    return totals


@pytest.fixture
def scores() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(50, 4, generator=generator).double(), torch.randint(0, 4, (50,), generator=generator)


# ---- classification --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_classification_sums_cross_entropy_over_the_samples(scores: tuple[Tensor, Tensor], smoothing: float) -> None:
    outputs, targets = scores
    loss, weight = Classification(smoothing).loss(outputs.requires_grad_(), (None, targets))
    each = functional.cross_entropy(outputs, targets, reduction="none", label_smoothing=smoothing)
    assert loss.item() == pytest.approx(each.sum().item())
    assert weight == 50
    assert loss.requires_grad


@pytest.mark.parametrize("parts", [[50], [17, 17, 16], [1] * 50])
def test_accuracy_and_loss_are_those_of_all_samples_however_they_are_batched(
    scores: tuple[Tensor, Tensor], parts: list[int]
) -> None:
    outputs, targets = scores
    task = Classification()
    summary = task.summary(sums_over(task, outputs, targets, parts))
    assert summary["accuracy"] == pytest.approx(accuracy_score(targets, outputs.argmax(1)))
    assert summary["loss"] == pytest.approx(log_loss(targets, outputs.softmax(1)))
    assert task.best == ("accuracy", "max")


def test_correct_ones_are_counted_in_integers() -> None:
    outputs = torch.tensor([[0.1, 0.7, 0.2], [0.5, 0.1, 0.4], [0.0, 0.1, 0.9]])
    correct = Classification().metrics(outputs, (None, torch.tensor([1, 2, 2])))["correct"]
    assert (correct.dtype, correct.item()) == (torch.int64, 2)


@pytest.mark.parametrize("outputs", [torch.zeros(1), torch.zeros(1, 3, 2), (torch.zeros(1, 3),), {"logits": 1}])
def test_outputs_that_are_not_one_row_of_classes_per_sample_are_refused(outputs: Any) -> None:
    with pytest.raises(UsageError, match=r"outputs of shape \[batch, classes\]"):
        Classification().probe(outputs)


def probed(classes: int = 10) -> Classification:
    task = Classification()
    task.probe(torch.zeros(1, classes))
    return task


@pytest.mark.parametrize(("label", "place"), [(10, 0), (-1, 2), (255, 3)])
def test_a_label_outside_of_the_classes_is_told_with_its_samples_index(label: int, place: int) -> None:
    labels = torch.tensor([1, 2, 3, 9])
    labels[place] = label
    with pytest.raises(UsageError) as refusal:
        probed().check((None, labels), [700, 701, 702, 703])
    message = str(refusal.value)
    assert f"Sample {700 + place} has label {label}" in message
    assert "10 classes (0 to 9)" in message
    assert "model.args.num_classes" in message


def test_the_first_of_several_wrong_labels_is_told() -> None:
    with pytest.raises(UsageError, match="Sample 5 has label 12"):
        probed().check((None, torch.tensor([0, 12, 11])), [3, 5, 4])


def test_all_labels_of_a_data_set_are_checked_by_their_position() -> None:
    with pytest.raises(UsageError, match="Sample 3 has label 10"):
        probed().check_targets([0, 9, 3, 10])
    probed().check_targets([0, 9, 3])
    probed().check_targets(torch.tensor([], dtype=torch.int64))


@pytest.mark.parametrize(
    ("labels", "way_out"),
    [
        (torch.tensor([0.0, 1.0]), r"int\(label\).*regression"),
        (torch.tensor([[0], [1]]), r"label\.squeeze\(\)"),
        (torch.eye(2).long(), r"label\.argmax\(\)"),
        (torch.tensor(3), ""),
        (["cat", "dog"], r"text.*sorted\(set\("),
        (("cat", "dog"), r"text.*sorted\(set\("),
    ],
)
def test_labels_that_are_not_one_integer_per_sample_are_refused(labels: Any, way_out: str) -> None:
    with pytest.raises(UsageError, match=f"one integer label per sample.*{way_out}"):
        probed().check((None, labels), [0, 1])


def test_labels_that_begin_with_1_are_refused_with_where_they_begin() -> None:
    with pytest.raises(UsageError, match=r"Sample 3 has label 10.*Let labels count from 0"):
        probed().check_targets([1, 9, 3, 10])


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32])
def test_labels_of_any_integer_type_are_taken(scores: tuple[Tensor, Tensor], dtype: torch.dtype) -> None:
    outputs, targets = scores
    task = probed(classes=4)
    task.check_targets(targets.to(dtype))
    assert torch.equal(task.loss(outputs, (None, targets.to(dtype)))[0], task.loss(outputs, (None, targets))[0])


def test_a_sample_is_taken_for_the_class_with_the_largest_output(scores: tuple[Tensor, Tensor]) -> None:
    guesses = Classification().guesses(scores[0].bfloat16(), {"targets": scores[1]})
    assert guesses is not None
    labels, predictions, confidences = guesses
    expected = scores[0].bfloat16().float().softmax(1)
    assert torch.equal(labels, scores[1])
    assert torch.equal(predictions, expected.argmax(1))
    assert torch.equal(confidences, expected.max(1).values)


@pytest.mark.parametrize(
    ("outputs", "batch"),
    [
        (torch.zeros(2, 3), {"image": 1, "label": 2}),
        (torch.zeros(2, 3), (None, torch.zeros(2, 3))),
        (torch.zeros(2, 3), (None, torch.zeros(2))),
        (torch.zeros(2, 3), (None, {"class": torch.zeros(2, dtype=torch.int64)})),
        (torch.zeros(2, 3, 4), (None, torch.zeros(2, dtype=torch.int64))),
        ({"logits": torch.zeros(2, 3)}, (None, torch.zeros(2, dtype=torch.int64))),
    ],
)
def test_a_classification_of_another_form_has_no_guesses(outputs: Any, batch: Any) -> None:
    assert Classification().guesses(outputs, batch) is None


class OwnCheck(Classification):
    def check(self, batch: Any, indices: Any) -> None: ...


def test_labels_in_memory_are_checked_once_unless_a_check_looks_at_more() -> None:
    assert Classification().checks_targets_only
    assert Task().checks_targets_only  # its check does nothing
    assert not OwnCheck().checks_targets_only


# ---- regression ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(40, 1), (40,)])
@pytest.mark.parametrize("parts", [[40], [13, 13, 14], [1] * 40])
def test_regression_is_the_mean_squared_error_and_r2_of_all_samples(shape: tuple[int, ...], parts: list[int]) -> None:
    generator = torch.Generator().manual_seed(1)
    targets = torch.randn(shape, generator=generator)
    outputs = targets + 0.5 * torch.randn(shape, generator=generator) + 0.1
    task = Regression()
    summary = task.summary(sums_over(task, outputs, targets, parts))
    assert summary["loss"] == pytest.approx(mean_squared_error(targets, outputs), rel=1e-5)
    assert summary["r2"] == pytest.approx(r2_score(targets, outputs), rel=1e-5)
    assert task.best == ("loss", "min")


def test_regressions_loss_is_a_sum_over_samples_of_means_over_outputs() -> None:
    outputs, targets = torch.randn(6, 3, requires_grad=True), torch.randn(6, 3)
    loss, weight = Regression().loss(outputs, (None, targets))
    assert weight == 6
    assert (loss / weight).item() == pytest.approx(functional.mse_loss(outputs, targets).item())
    assert loss.requires_grad


@pytest.mark.parametrize(("outputs", "targets"), [((6, 1), (6,)), ((6,), (6, 1)), ((6, 2), (6, 1)), ((1, 1), (6, 1))])
def test_outputs_and_targets_of_different_shapes_are_refused(
    outputs: tuple[int, ...], targets: tuple[int, ...]
) -> None:
    with pytest.raises(UsageError) as refusal:
        Regression().loss(torch.zeros(outputs), (None, torch.zeros(targets)))
    assert str(list(outputs)) in str(refusal.value)
    assert str(list(targets)) in str(refusal.value)


# ---- batches of any form ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [("in", "out"), ["in", "out"], {"targets": "out", "inputs": "in", "mask": 1}])
def test_inputs_and_targets_are_found_in_tuples_lists_and_dicts(batch: Any) -> None:
    assert (inputs_of(batch), targets_of(batch)) == ("in", "out")


@pytest.mark.parametrize(
    ("batch", "said"),
    [
        ({"image": 1, "label": 2}, "a dict of ['image', 'label']"),
        (("in",), "a tuple"),
        (types.SimpleNamespace(inputs=1), "a SimpleNamespace"),
        (3, "a int"),
    ],
)
def test_a_batch_without_targets_is_told_with_its_form_and_the_ways_out(batch: Any, said: str) -> None:
    with pytest.raises(UsageError) as refusal:
        targets_of(batch)
    message = str(refusal.value)
    assert "The batch has no targets" in message
    assert said in message
    assert "a task of your own" in message


# ---- tasks of one's own ----------------------------------------------------------------------------------------


class Own(Task):
    def __init__(self, scale: float = 1.0) -> None:
        self.scale = scale

    def loss(self, outputs: Any, batch: Any) -> tuple[Tensor, int]:
        return outputs.sum() * self.scale, 2


def not_a_task() -> int:
    return 3


def test_the_task_is_built_by_name_with_its_arguments() -> None:
    task = build_task(TaskConfig("classification", {"label_smoothing": 0.2}))
    assert isinstance(task, Classification)
    assert task.label_smoothing == 0.2
    own = build_task(TaskConfig(f"{__name__}:Own", {"scale": 3.0}))
    assert own.loss(torch.ones(2), None)[0] == 6
    assert own.summary({"loss": torch.tensor(6.0), "weight": torch.tensor(4)}) == {"loss": 1.5}


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (TaskConfig("clasification"), r"task\.name = 'clasification'.*Did you mean 'classification'"),
        (TaskConfig("classification", {"smoothing": 1}), r"task\.args = .*smoothing"),
        (TaskConfig(f"{__name__}:not_a_task"), r"gave a int; derive its class from distloop\.tasks\.Task"),
    ],
)
def test_a_task_that_cannot_be_built_is_refused(config: TaskConfig, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        build_task(config)


def test_a_task_of_ones_own_must_have_a_loss() -> None:
    with pytest.raises(NotImplementedError, match=r"Task must define loss\(outputs, batch\)"):
        Task().loss(None, None)


@pytest.mark.parametrize("kind", [Classification, Regression, Segmentation, LanguageModelling])
def test_a_subclass_of_a_built_in_task_may_be_a_module_too(kind: Any) -> None:
    class WithParameters(kind, nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.temperature = nn.Parameter(torch.ones(()))

    assert list(WithParameters().state_dict()) == ["temperature"]


@pytest.mark.parametrize("half", ["train", "validation"])
def test_wrong_labels_in_either_half_are_found_before_training(half: str) -> None:
    inputs = torch.zeros(4, 3)
    good, bad = torch.tensor([0, 1, 1, 0]), torch.tensor([0, 1, 2, 0])
    halves = {"train": good, "validation": good, half: bad}
    source = types.SimpleNamespace(**{name: InMemory(inputs, targets) for name, targets in halves.items()})
    model = nn.Linear(3, 2)
    with pytest.raises(UsageError, match="Sample 2 has label 2, but the model has 2 classes"):
        try_out(Classification(), model, (inputs[:1], good[:1]), source)


class GuessesForEachToken(Classification):
    def guesses(self, outputs: Tensor, batch: Any) -> tuple[Tensor, Tensor, Tensor]:
        return torch.zeros(7), torch.zeros(7), torch.zeros(1)


def test_guesses_that_are_not_one_for_each_sample_are_found_before_training() -> None:
    source = types.SimpleNamespace(train=[], validation=[])
    with pytest.raises(UsageError, match=r"of shape \[1\], one for each sample .*; it gave \[7\], \[7\], \[1\]"):
        try_out(GuessesForEachToken(), nn.Linear(3, 2), (torch.zeros(1, 3), torch.tensor([0])), source)


def test_trying_a_task_out_leaves_the_model_in_training_and_unchanged() -> None:
    model = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 2))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    source = types.SimpleNamespace(train=[], validation=[])
    try_out(Classification(), model, (torch.ones(1, 3), torch.tensor([0])), source)
    assert model.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
