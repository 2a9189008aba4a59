"""Task segmentation against torch and scikit-learn, on torchvision's own models, and what it refuses."""

from __future__ import annotations

import math
import types
from collections import OrderedDict
from typing import Any

import pytest
import torch
from sklearn.metrics import accuracy_score, jaccard_score
from torch import Tensor
from torch.nn.functional import cross_entropy
from torchvision import tv_tensors
from torchvision.models.segmentation import fcn_resnet50, lraspp_mobilenet_v3_large

from distloop.config.settings import Task as TaskConfig
from distloop.data import InMemory
from distloop.errors import UsageError
from distloop.tasks import Segmentation
from distloop.training.builtin_tasks import build_task
from distloop.training.trying import try_out

CLASSES, WEIGHTS = 4, [2.0, 1.0, 0.25, 0.0]
SPLITS = [[8], [3, 5], [1] * 8]


@pytest.fixture
def scores() -> tuple[Tensor, Tensor]:
    """Outputs [8, 4, 5, 6] in float64, and masks [8, 5, 6]: of one nothing counts, of the next ones more and more."""
    generator = torch.Generator().manual_seed(0)
    outputs = torch.randn(8, CLASSES, 5, 6, generator=generator, dtype=torch.float64, requires_grad=True)
    masks = torch.randint(0, CLASSES, (8, 5, 6), generator=generator)
    for sample, mask in enumerate(masks):
        mask.flatten()[: 30 - 4 * sample] = 255
    return outputs, masks


def probed(classes: Any = CLASSES, **arguments: Any) -> Segmentation:
    task = Segmentation(**arguments)
    task.probe(torch.zeros(1, classes, 5, 6))
    return task


def sums_over(task: Segmentation, outputs: Tensor, masks: Tensor, split: list[int]) -> dict[str, Tensor]:
    """What validation adds up where the samples come in batches of these sizes."""
    sums: dict[str, Tensor] = {}
    for some, of in zip(outputs.split(split), masks.split(split), strict=True):
        loss, weight = task.loss(some, (None, of))
        row = {"loss": loss, "weight": torch.as_tensor(weight), "samples": torch.tensor(len(of))}
        metrics = task.metrics(some, (None, of))
        assert not any(value.is_floating_point() for value in metrics.values())
        for name, value in {**row, **metrics}.items():
            sums[name] = sums[name] + value if name in sums else value
    return sums


def same_with_gradient(loss: Tensor, expected: Tensor, outputs: Tensor) -> None:
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)
    found, reference = (torch.autograd.grad(each, outputs, retain_graph=True)[0] for each in (loss, expected))
    assert torch.allclose(found, reference, rtol=1e-10, atol=1e-14)
    assert float(reference.abs().max()) > 0


# ---- the loss ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("weights", [None, WEIGHTS])
def test_the_loss_is_torchs_mean_over_the_pixels_that_count_however_the_batch_is_split(
    scores: tuple[Tensor, Tensor], weights: list[float] | None, split: list[int]
) -> None:
    sums = sums_over(probed(class_weights=weights), *scores, split)
    of_classes = None if weights is None else torch.tensor(weights).double()
    expected = cross_entropy(*scores, of_classes, ignore_index=255)
    same_with_gradient(sums["loss"] / sums["weight"], expected, scores[0])
    assert Segmentation.weight != "samples"  # so that the loop adds the weights up over the ranks


def test_the_weight_is_the_number_of_pixels_that_count(scores: tuple[Tensor, Tensor]) -> None:
    assert int(probed().loss(scores[0], (None, scores[1]))[1]) == int((scores[1] != 255).sum())
    assert int(probed(ignore_index=0).loss(scores[0], (None, scores[1] % 4))[1]) == int((scores[1] % 4 != 0).sum())


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.uint16])
def test_masks_may_be_of_any_integer_type(scores: tuple[Tensor, Tensor], dtype: torch.dtype) -> None:
    outputs, masks = scores
    task, same = probed(), tv_tensors.Mask(masks.to(dtype))
    task.check((None, same), range(8))
    assert torch.equal(task.loss(outputs, (None, same))[0], task.loss(outputs, (None, masks))[0])
    assert torch.equal(
        task.metrics(outputs, (None, same))["confusion"], task.metrics(outputs, (None, masks))["confusion"]
    )


@pytest.mark.parametrize(("arguments", "factor"), [({}, 0.4), ({"aux_weight": 0.5}, 0.5)])
def test_an_auxiliary_head_has_its_share_of_the_loss(
    scores: tuple[Tensor, Tensor], arguments: dict[str, Any], factor: float
) -> None:
    outputs, masks = scores
    heads = OrderedDict(out=outputs, aux=outputs.flip(1) * 2)
    loss, weight = probed(**arguments).loss(heads, (None, masks))
    main, other = (cross_entropy(each, masks, ignore_index=255) for each in heads.values())
    same_with_gradient(loss / weight, main + factor * other, outputs)
    alone = probed().loss({"out": outputs}, (None, masks))[0]
    assert torch.equal(alone, probed().loss(outputs, (None, masks))[0])
    metrics = probed().metrics(heads, (None, masks))["confusion"]
    assert torch.equal(metrics, probed().metrics(outputs, (None, masks))["confusion"])


@pytest.mark.parametrize(
    ("build", "heads"),
    [
        (lambda: fcn_resnet50(weights_backbone=None, num_classes=3, aux_loss=True), 2),
        (lambda: lraspp_mobilenet_v3_large(weights_backbone=None, num_classes=3), 1),
    ],
    ids=["fcn_resnet50", "lraspp_mobilenet_v3_large"],
)
def test_torchvisions_models_train_as_they_are(build: Any, heads: int) -> None:
    model, images = build(), torch.rand(2, 3, 32, 32)
    masks = torch.randint(0, 3, (2, 32, 32))
    source = types.SimpleNamespace(train=InMemory(images, masks), validation=InMemory(images, masks))
    task = Segmentation()
    try_out(task, model, (images[:1], masks[:1]), source)
    assert task.classes == 3
    outputs = task.forward(model, (images, masks))
    assert len(outputs) == heads
    task.loss(outputs, (images, masks))[0].backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


# ---- the metrics -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("split", SPLITS)
def test_the_metrics_are_those_of_all_pixels_that_count_however_they_are_batched(
    scores: tuple[Tensor, Tensor], split: list[int]
) -> None:
    outputs, masks = scores[0].detach(), scores[1]
    summary = probed().summary(sums_over(probed(), outputs, masks, split))
    counts = masks != 255
    labels, predictions = masks[counts], outputs.argmax(1)[counts]
    iou = jaccard_score(labels, predictions, average=None, labels=range(CLASSES))
    assert [summary[f"iou/{label}"] for label in range(CLASSES)] == pytest.approx(iou)
    assert summary["mean_iou"] == pytest.approx(iou.mean())
    assert summary["pixel_accuracy"] == pytest.approx(accuracy_score(labels, predictions))
    assert summary["loss"] == pytest.approx(cross_entropy(outputs, masks, ignore_index=255).item())
    assert Segmentation.best == ("mean_iou", "max")


@pytest.mark.parametrize("ignored", [0, -100, 255])
def test_pixels_that_do_not_count_are_in_no_metric_whatever_their_label(
    scores: tuple[Tensor, Tensor], ignored: int
) -> None:
    outputs, masks = scores[0].detach(), scores[1]
    counts = (masks != 255) & (masks != ignored)
    labels = torch.where(counts, masks, ignored)
    found = probed(ignore_index=ignored).metrics(outputs, (None, labels))["confusion"]
    pairs = zip(labels[counts].tolist(), outputs.argmax(1)[counts].tolist(), strict=True)
    expected = torch.zeros(CLASSES, CLASSES, dtype=torch.int64)
    for label, prediction in pairs:
        expected[label, prediction] += 1
    assert torch.equal(found, expected)


def summary_of(confusion: list[list[int]], **arguments: Any) -> dict[str, float]:
    pixels = torch.tensor(1)
    sums = {"confusion": torch.tensor(confusion), "loss": torch.tensor(0.5), "weight": pixels, "samples": pixels}
    return Segmentation(**arguments).summary(sums)


def test_a_class_that_nobody_has_seen_is_left_out_of_the_mean() -> None:
    summary = summary_of([[6, 2, 0], [0, 2, 0], [0, 0, 0]])
    assert summary["mean_iou"] == pytest.approx((6 / 8 + 2 / 4) / 2)
    assert math.isnan(summary["iou/2"])


def test_a_class_that_is_only_predicted_counts_as_none_right() -> None:
    assert summary_of([[6, 0, 2], [0, 2, 0], [0, 0, 0]])["mean_iou"] == pytest.approx((6 / 8 + 1 + 0) / 3)


def test_a_class_that_is_ignored_is_left_out_of_the_mean_though_it_is_predicted() -> None:
    summary = summary_of([[0, 0, 0], [2, 6, 0], [0, 0, 2]], ignore_index=0)
    assert summary["mean_iou"] == pytest.approx((6 / 8 + 1) / 2)
    assert math.isnan(summary["iou/0"])


def test_without_a_pixel_that_counts_there_is_no_number() -> None:
    summary = summary_of([[0, 0], [0, 0]])
    assert all(math.isnan(summary[name]) for name in ("mean_iou", "pixel_accuracy", "iou/0"))


@pytest.mark.parametrize(("classes", "named"), [(32, 32), (33, 0)])
def test_a_row_has_the_classes_one_by_one_where_they_are_few(classes: int, named: int) -> None:
    summary = summary_of(torch.ones(classes, classes, dtype=torch.long).tolist())
    assert sum(name.startswith("iou/") for name in summary) == named
    assert 0 < summary["mean_iou"] < 1


# ---- what is refused ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("label", "sample"), [(4, 0), (-1, 5), (254, 7)])
def test_a_label_outside_of_the_classes_is_told_with_its_samples_index(
    scores: tuple[Tensor, Tensor], label: int, sample: int
) -> None:
    masks = scores[1].clone()
    masks[sample, 2, 3] = label
    with pytest.raises(UsageError) as refusal:
        probed().check((None, masks), list(range(70, 78)))
    message = str(refusal.value)
    assert f"The mask of sample {70 + sample} has label {label}, but the model has 4 classes (0 to 3)" in message
    assert f"task.args.ignore_index: {label}" in message


def test_all_masks_in_memory_are_checked_by_their_position() -> None:
    masks = torch.zeros(600, 2, 2, dtype=torch.uint8)
    probed().check_targets(masks)
    masks[517, 1, 0] = 9
    with pytest.raises(UsageError, match="sample 517 has label 9"):
        probed().check_targets(masks)
    assert probed().checks_targets_only


@pytest.mark.parametrize(
    ("masks", "way_out"),
    [
        (torch.zeros(2, 5, 6), r"mask\.long\(\).*ToTensor.*numpy"),
        (torch.zeros(2, 1, 5, 6).long(), r"mask\.squeeze\(0\)"),
        (torch.zeros(2, 4, 5, 6).long(), r"mask\.argmax\(0\)"),
        (torch.zeros(2, 30).long(), ""),
    ],
)
def test_masks_that_are_not_one_integer_for_each_pixel_are_refused(masks: Tensor, way_out: str) -> None:
    with pytest.raises(UsageError, match=f"one class for each pixel; the data gave .*{way_out}"):
        probed().check((None, masks), [0, 1])


def test_masks_of_too_few_bits_are_refused() -> None:
    with pytest.raises(UsageError, match="uint8 can name 256 classes only, and the model has 300"):
        probed(300).check_targets(torch.zeros(2, 5, 6, dtype=torch.uint8))


@pytest.mark.parametrize("shape", [(8, 5, 5), (8, 1, 6), (1, 5, 6)])
def test_a_mask_of_another_size_than_the_outputs_is_refused(scores: tuple[Tensor, Tensor], shape: Any) -> None:
    with pytest.raises(UsageError, match=r"\[8, 4, 5, 6\], the data .*interpolate") as refusal:
        probed().loss(scores[0], (None, torch.zeros(shape).long()))
    assert str(list(shape)) in str(refusal.value)


@pytest.mark.parametrize(
    ("outputs", "given"),
    [
        (torch.zeros(1, 4), r"\[1, 4\]"),
        ({"out": torch.zeros(1, 4)}, r"\[1, 4\]"),
        ((torch.zeros(1, 4, 5, 6),), "a tuple"),
        ({"logits": torch.zeros(1, 4, 5, 6)}, "a dict of logits"),
        ({"out": torch.zeros(1, 4, 5, 6), "edges": torch.zeros(1)}, "a dict of out, edges"),
        ({"out": None}, "a dict of out"),
    ],
)
def test_outputs_of_another_form_are_refused(outputs: Any, given: str) -> None:
    with pytest.raises(UsageError, match=rf"\[batch, classes, height, width\].*the model gave {given}"):
        Segmentation().probe(outputs)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"ignore_index": None}, "ignore_index = None.*whole number"),
        ({"ignore_index": 25.5}, "ignore_index = 25.5.*whole number"),
        ({"aux_weight": -1}, "aux_weight = -1.*0 or more"),
        ({"class_weights": [0, 0]}, "class_weights = .*one number for each class"),
    ],
)
def test_arguments_that_mean_nothing_are_refused(arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        build_task(TaskConfig("segmentation", arguments))


def test_as_many_class_weights_as_classes_are_needed() -> None:
    task = build_task(TaskConfig("segmentation", {"class_weights": [1, 2]}))
    with pytest.raises(UsageError, match="class_weights has 2 numbers, but the model has 4 classes"):
        task.probe(torch.zeros(1, 4, 5, 6))
