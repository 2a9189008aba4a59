"""The options of task classification, against torch, torchvision and scikit-learn."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from sklearn.metrics import top_k_accuracy_score
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, one_hot
from torchvision.models.googlenet import GoogLeNetOutputs
from torchvision.transforms import v2

from distloop.config.settings import Task as TaskConfig
from distloop.data.batches import to_model
from distloop.data.datasets import DataSource
from distloop.errors import UsageError
from distloop.tasks import Classification, targets_of
from distloop.training.builtin_tasks import build_task

WEIGHTS = [2.0, 1.0, 0.25, 0.0]
SPLITS = [[30], [7, 13, 10], [1] * 30]


@pytest.fixture
def scores() -> tuple[Tensor, Tensor]:
    """Outputs [30, 4] in float64, and labels of which the last third has other classes than the rest."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.cat([torch.randint(0, 2, (20,), generator=generator), torch.randint(2, 4, (10,))])
    return torch.randn(30, 4, generator=generator, dtype=torch.float64, requires_grad=True), labels


def mean_of_splits(task: Classification, outputs: Tensor, targets: Tensor, split: list[int]) -> Tensor:
    """Σ loss / Σ weight over micro-batches of these sizes: what a step descends."""
    pairs = [task.loss(some, (None, of)) for some, of in zip(outputs.split(split), targets.split(split), strict=True)]
    losses, weights = zip(*pairs, strict=True)
    return sum(losses, torch.zeros(())) / sum(weights)


def same_with_gradient(loss: Tensor, expected: Tensor, outputs: Tensor) -> None:
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)
    found, reference = (torch.autograd.grad(each, outputs, retain_graph=True)[0] for each in (loss, expected))
    assert torch.allclose(found, reference, rtol=1e-10, atol=1e-14)
    assert float(reference.abs().max()) > 0


def probed(classes: Any = 4, **arguments: Any) -> Classification:
    task = Classification(**arguments)
    task.probe(torch.zeros(1, classes))
    return task


# ---- class weights -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_class_weights_are_those_of_torchs_mean_over_the_whole_batch_however_it_is_split(
    scores: tuple[Tensor, Tensor], smoothing: float, split: list[int]
) -> None:
    task = probed(class_weights=WEIGHTS, label_smoothing=smoothing)
    criterion = nn.CrossEntropyLoss(torch.tensor(WEIGHTS, dtype=torch.float64), label_smoothing=smoothing)
    same_with_gradient(mean_of_splits(task, *scores, split), criterion(*scores), scores[0])
    assert task.weight != "samples"  # so that the loop adds the weights up over the ranks
    assert Classification.weight == Classification().weight == "samples"


def test_the_validated_loss_is_weighted_alike_and_the_accuracy_is_not(scores: tuple[Tensor, Tensor]) -> None:
    outputs, labels = scores
    task = probed(class_weights=WEIGHTS)
    loss, weight = task.loss(outputs, (None, labels))
    sums = {"loss": loss.detach(), "weight": torch.as_tensor(weight), "samples": torch.tensor(30)}
    summary = task.summary({**sums, **task.metrics(outputs, (None, labels))})
    expected = cross_entropy(outputs, labels, torch.tensor(WEIGHTS, dtype=torch.float64))
    assert summary["loss"] == pytest.approx(expected.item(), rel=1e-12)
    assert summary["accuracy"] == float((outputs.argmax(1) == labels).double().mean())


def test_auxiliary_outputs_are_weighted_as_the_first_ones(scores: tuple[Tensor, Tensor]) -> None:
    outputs, labels = scores
    others, task = [2 * outputs, outputs + labels[:, None]], probed(class_weights=WEIGHTS)
    loss, weight = task.loss(GoogLeNetOutputs(outputs, *others), (None, labels))
    main, one, two = (cross_entropy(each, labels, torch.tensor(WEIGHTS).double()) for each in (outputs, *others))
    same_with_gradient(loss / weight, main + 0.3 * (one + two), outputs)


@pytest.mark.parametrize(
    "weights", [[], 2, [1, -1, 1, 1], [0, 0, 0, 0], [1, float("nan")], "1111", {"a": 1}, [True, 1]]
)
def test_weights_that_are_no_weights_are_refused(weights: Any) -> None:
    with pytest.raises(UsageError, match=r"task\.args\.class_weights = .*one number for each class"):
        Classification(class_weights=weights)


def test_as_many_weights_as_classes_are_needed() -> None:
    with pytest.raises(UsageError, match=r"class_weights has 4 numbers, but the model has 3 classes"):
        probed(3, class_weights=WEIGHTS)


class Older(Classification):
    """A subclass as it was written before these options: names of its own, and no super().__init__()."""

    def __init__(self) -> None:
        self.class_weights, self.mixup, self.cutmix, self.top_k = torch.tensor([9.0, 9.0, 9.0, 9.0]), 0.4, 0.4, 2

    def loss(self, outputs: Tensor, batch: Any) -> tuple[Tensor, int]:
        targets = targets_of(batch)
        return cross_entropy(outputs, targets, self.class_weights.to(outputs), reduction="sum"), len(targets)


def test_a_subclass_with_such_names_of_its_own_means_what_it_did(scores: tuple[Tensor, Tensor]) -> None:
    task, batch = Older(), (torch.zeros(30, 1, 2, 2), scores[1])
    task.probe(scores[0])
    assert task.weight == "samples"
    assert task.augment_batch(batch) is batch
    assert task.metrics(scores[0], batch).keys() == Classification().metrics(scores[0], batch).keys()
    assert task.loss(scores[0], batch)[1] == 30


# ---- top-k -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("split", SPLITS)
def test_top_k_is_that_of_all_samples_however_they_are_batched(scores: tuple[Tensor, Tensor], split: list[int]) -> None:
    outputs, labels = scores[0].detach(), scores[1]
    task, sums = probed(top_k=2), {"loss": torch.ones(()), "weight": torch.ones(()), "samples": torch.tensor(30)}
    for some, of in zip(outputs.split(split), labels.split(split), strict=True):
        for name, value in task.metrics(some, (None, of)).items():
            assert not value.is_floating_point()
            sums[name] = sums.get(name, torch.tensor(0)) + value
    summary = task.summary(sums)
    assert summary["accuracy_top2"] == pytest.approx(top_k_accuracy_score(labels, outputs, k=2, labels=range(4)))
    assert summary["accuracy"] < summary["accuracy_top2"] < 1


@pytest.mark.parametrize("k", [4, 5])
def test_a_top_k_that_each_label_is_among_is_refused(k: int) -> None:
    with pytest.raises(UsageError, match=rf"top_k = {k}: the model has 4 classes"):
        probed(top_k=k)


@pytest.mark.parametrize("k", [0, 1, -1, 2.0, True, "5"])
def test_a_top_k_that_is_no_whole_number_from_2_is_refused(k: Any) -> None:
    with pytest.raises(UsageError, match=r"task\.args\.top_k = .*whole number from 2"):
        Classification(top_k=k)


# ---- mixup and cutmix --------------------------------------------------------------------------------------------

IMAGES = torch.rand(6, 3, 8, 8, generator=torch.Generator().manual_seed(1))
LABELS = torch.tensor([0, 1, 2, 3, 0, 2])


@pytest.mark.parametrize(("name", "kind"), [("mixup", v2.MixUp), ("cutmix", v2.CutMix)])
def test_a_batch_is_mixed_as_torchvision_mixes_it(name: str, kind: Any) -> None:
    torch.manual_seed(5)
    images, targets = probed(**{name: 0.7}).augment_batch((IMAGES, LABELS))
    torch.manual_seed(5)
    expected = kind(alpha=0.7, num_classes=4)(IMAGES, LABELS)
    assert torch.equal(images, expected[0])
    assert torch.equal(targets, expected[1])
    assert not torch.equal(images, IMAGES)
    assert targets.shape == (6, 4)
    assert torch.allclose(targets.sum(1), torch.ones(6))


def test_of_both_each_is_chosen_for_half_of_the_batches() -> None:
    task, pasted = probed(mixup=1.0, cutmix=1.0), 0
    torch.manual_seed(0)
    for _ in range(200):
        images, _ = task.augment_batch((IMAGES, LABELS))
        other = IMAGES.roll(1, 0)
        pasted += bool(((images == IMAGES) | (images == other)).all())
    assert 70 < pasted < 130


@pytest.mark.parametrize("arguments", [{}, {"mixup": 0}, {"cutmix": None, "mixup": 0.0}])
def test_without_them_a_batch_stays_the_same_object(arguments: Any) -> None:
    batch = (IMAGES, LABELS)
    assert probed(**arguments).augment_batch(batch) is batch


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32])
def test_the_form_of_the_batch_and_what_else_it_holds_stay(dtype: torch.dtype) -> None:
    batch: dict[str, Any] = {"inputs": IMAGES, "targets": LABELS.to(dtype), "path": ["a"] * 6}
    torch.manual_seed(2)
    found = probed(mixup=0.5).augment_batch(batch)
    torch.manual_seed(2)
    images, targets = probed(mixup=0.5).augment_batch((IMAGES, LABELS))
    assert found["path"] == ["a"] * 6
    assert torch.equal(found["inputs"], images)
    assert torch.equal(found["targets"], targets)
    assert torch.equal(batch["targets"], LABELS.to(dtype))  # the batch is as it was


def test_a_single_sample_is_mixed_with_itself() -> None:
    for name in ("mixup", "cutmix"):
        images, targets = probed(**{name: 1.0}).augment_batch((IMAGES[:1], LABELS[:1]))
        assert torch.allclose(images, IMAGES[:1])
        assert torch.allclose(targets, one_hot(LABELS[:1], 4).float())


def test_images_of_bytes_are_mixed_after_they_are_normalised() -> None:
    source = DataSource([0], [0], mean=(0.5,) * 3, std=(0.25,) * 3)
    batch = to_model(((IMAGES * 255).to(torch.uint8), LABELS), source, torch.float32)
    torch.manual_seed(3)
    images, _ = probed(mixup=0.7).augment_batch(batch)
    torch.manual_seed(3)
    assert torch.equal(images, v2.MixUp(alpha=0.7, num_classes=4)(batch[0], LABELS)[0])


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("weights", [None, WEIGHTS])
def test_mixed_targets_are_smoothed_and_weighted_as_torch_does(
    scores: tuple[Tensor, Tensor], weights: list[float] | None, smoothing: float
) -> None:
    outputs = scores[0]
    task = probed(mixup=0.5, cutmix=0.5, class_weights=weights, label_smoothing=smoothing)
    torch.manual_seed(4)
    targets = task.augment_batch((torch.rand(30, 1, 4, 4), scores[1]))[1]
    assert ((targets > 0) & (targets < 1)).any()
    of_classes = None if weights is None else torch.tensor(weights).double()
    criterion = nn.CrossEntropyLoss(of_classes, label_smoothing=smoothing)
    same_with_gradient(mean_of_splits(task, outputs, targets, [30]), criterion(outputs, targets.double()), outputs)
    same_with_gradient(mean_of_splits(task, outputs, targets, [9, 21]), criterion(outputs, targets.double()), outputs)


def test_auxiliary_outputs_learn_mixed_targets_too(scores: tuple[Tensor, Tensor]) -> None:
    outputs, targets = scores[0], torch.rand(30, 4, dtype=torch.float64).softmax(1)
    loss, weight = probed(mixup=0.5).loss(GoogLeNetOutputs(outputs, 2 * outputs, None), (None, targets))
    same_with_gradient(
        loss / weight, cross_entropy(outputs, targets) + 0.3 * cross_entropy(2 * outputs, targets), outputs
    )


@pytest.mark.parametrize(
    ("inputs", "given"),
    [
        (torch.zeros(6, 5), r"torch\.float32 \[6, 5\]"),
        ((IMAGES * 255).to(torch.uint8), r"torch\.uint8 \[6, 3, 8, 8\]"),
        ({"image": IMAGES}, "a dict"),
    ],
)
def test_what_is_no_batch_of_images_is_not_mixed(inputs: Any, given: str) -> None:
    with pytest.raises(UsageError, match=f"need images .* in floats, as inputs; the data gave {given}"):
        probed(mixup=0.2).augment_batch((inputs, LABELS))


@pytest.mark.parametrize("value", [-0.1, float("inf"), float("nan"), True, "0.2", [0.2]])
@pytest.mark.parametrize("name", ["mixup", "cutmix"])
def test_an_alpha_that_is_none_is_refused(name: str, value: Any) -> None:
    with pytest.raises(UsageError, match=rf"task\.args\.{name} = .*alpha of the Beta distribution"):
        build_task(TaskConfig("classification", {name: value}))


@pytest.mark.parametrize("value", [-0.1, 1.1, True, "0.1"])
def test_a_smoothing_that_is_no_share_is_refused(value: Any) -> None:
    with pytest.raises(UsageError, match=r"task\.args\.label_smoothing = .*from 0 to 1"):
        build_task(TaskConfig("classification", {"label_smoothing": value}))
