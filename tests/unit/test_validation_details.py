"""Beside the numbers of a validation: confusion, the accuracy of each class, the most confident mistakes."""

from __future__ import annotations

import base64
import io
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import confusion_matrix
from torch import Tensor, nn
from torchvision.datasets import VisionDataset

from distloop.config.settings import Data
from distloop.data.datasets import DataSource
from distloop.data.order import FixedBatchSampler, MicroBatch
from distloop.data.seeded import SeededDataset, collate_of, no_check
from distloop.data.whole_batches import InMemory
from distloop.errors import UsageError
from distloop.tasks import Classification, Task
from distloop.training.details import MISTAKES, Details, png_uri
from distloop.training.validation import validate

CPU = torch.device("cpu")


class Outputs(nn.Module):
    """Gives its inputs back: data sets here hold the outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(()))

    def forward(self, inputs: Tensor) -> Tensor:
        return inputs


class OwnTask(Task):
    """As a user would write it: two classes, told by one number. The names come from the data set."""

    def loss(self, outputs: Tensor, batch: Any) -> tuple[Tensor, int]:
        return outputs.sum() * 0, len(outputs)

    def guesses(self, outputs: Tensor, batch: Any) -> tuple[Tensor, Tensor, Tensor]:
        probability = outputs[:, 0].sigmoid()
        return batch[1], (probability > 0.5).long(), torch.maximum(probability, 1 - probability)


def validated(
    outputs: Tensor,
    labels: Tensor,
    folder: Path,
    task: Task | None = None,
    batch_size: int = 7,
    names: tuple[str, ...] | None = None,
    dataset: Any = None,
) -> tuple[dict[str, float], dict[str, Any]]:
    """The row, and what is in the file; {} where there is none."""
    if task is None:
        task = Classification()
        task.probe(outputs[:1])
    dataset = InMemory(outputs, labels) if dataset is None else dataset
    details = Details(task, DataSource(dataset, dataset, names), Data(), 0)
    sampler = FixedBatchSampler(len(outputs), batch_size, 0, 1)
    batches = [(outputs[indices], labels[indices]) for _, indices in sampler]
    row = validate(Outputs(), task, batches, sampler, None, details)
    assert repr(row) == repr(validate(Outputs(), task, batches, sampler))  # bit for bit, not numbers too
    details.write(folder, 5, 2)
    path = folder / "validation.json"
    return row, json.loads(path.read_text()) if path.exists() else {}


class Measured(Classification):
    """Gives numbers as NumPy and torchmetrics do."""

    def __init__(self, odd: Any) -> None:
        super().__init__()
        self.odd = odd

    def summary(self, sums: dict[str, Tensor]) -> dict[str, Any]:
        accuracy = sums["correct"] / sums["samples"]
        return {"loss": sums["loss"] / sums["weight"], "balanced": np.float32(accuracy), "odd": self.odd}


def test_metrics_of_numpy_and_torch_are_the_numbers_that_they_are(tmp_path: Path) -> None:
    task = Measured([torch.tensor(1), np.float64(0.5), None])
    task.probe(scores()[0][:1])
    row, _ = validated(*scores(), tmp_path, task)
    assert [type(value) for value in row.values()] == [float, float, list, int]
    assert row["odd"] == [1, 0.5, None]
    task = Measured(torch.zeros(2))
    task.probe(scores()[0][:1])
    with pytest.raises(UsageError, match=r"^task\.summary\(\): odd is a Tensor of shape \[2\]\. A row takes numbers"):
        validated(*scores(), tmp_path, task)


def scores(samples: int = 200, classes: int = 5) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    outputs = torch.randn(samples, classes, generator=generator)
    return outputs, torch.randint(0, classes, (samples,), generator=generator)


def expected_mistakes(outputs: Tensor, labels: Tensor) -> list[tuple[int, int, int]]:
    confidences, predictions = outputs.float().softmax(1).max(1)
    wrong = [index for index in range(len(labels)) if labels[index] != predictions[index]]
    wrong.sort(key=lambda index: (-float(confidences[index]), index))
    return [(index, int(labels[index]), int(predictions[index])) for index in wrong[:16]]


def listed(details: dict[str, Any]) -> list[tuple[int, int, int]]:
    return [(mistake["index"], mistake["label"], mistake["predicted"]) for mistake in details["mistakes"]]


# ---- confusion and classes -------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 7, 200, 1000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_file_holds_confusion_classes_and_the_most_confident_mistakes(
    tmp_path: Path, batch_size: int, dtype: torch.dtype
) -> None:
    outputs, labels = scores()
    outputs = outputs.to(dtype)
    row, details = validated(outputs, labels.to(torch.int16), tmp_path, batch_size=batch_size)
    assert (details["step"], details["attempt"], details["samples"], details["classes"]) == (5, 2, 200, None)
    assert details["confusion"] == confusion_matrix(labels, outputs.float().argmax(1)).tolist()
    assert [row["name"] for row in details["per_class"]] == ["0", "1", "2", "3", "4"]
    assert [row["correct"] for row in details["per_class"]] == np.diag(details["confusion"]).tolist()
    assert [row["samples"] for row in details["per_class"]] == torch.bincount(labels).tolist()
    assert np.diag(details["confusion"]).sum() / 200 == row["accuracy"]
    assert listed(details) == expected_mistakes(outputs, labels)
    confidences = [mistake["confidence"] for mistake in details["mistakes"]]
    assert len(confidences) == MISTAKES
    assert confidences == sorted(confidences, reverse=True)
    first = details["mistakes"][0]
    assert first["confidence"] == pytest.approx(float(outputs.float().softmax(1)[first["index"]].max()), abs=1e-6)


def test_classes_have_the_data_sets_names_and_those_without_a_name_their_number(tmp_path: Path) -> None:
    _, details = validated(*scores(classes=3), tmp_path, names=("cat", "dog"))
    assert details["classes"] == [row["name"] for row in details["per_class"]] == ["cat", "dog", "2"]


def test_names_are_found_as_torchvisions_data_sets_have_them(tmp_path: Path) -> None:
    class OfTorchvision(InMemory, VisionDataset):
        classes = ("cat", "dog")

    outputs, labels = scores(classes=2)
    assert validated(outputs, labels, tmp_path, dataset=OfTorchvision(outputs, labels))[1]["classes"] == ["cat", "dog"]
    other = InMemory(outputs, labels)
    other.classes = ["cat", "dog"]  # type: ignore[attr-defined]
    assert validated(outputs, labels, tmp_path, dataset=other)[1]["classes"] is None


@pytest.mark.parametrize(("classes", "whole"), [(1000, True), (1001, False)])
def test_of_very_many_classes_only_what_was_right_is_kept(tmp_path: Path, classes: int, whole: bool) -> None:
    outputs, labels = scores(300, classes)
    outputs[torch.arange(300), labels] += 3
    row, details = validated(outputs, labels, tmp_path)
    assert (details["confusion"] is not None) == whole
    right = (outputs.argmax(1) == labels).long()
    expected = [int(right[labels == number].sum()) for number in range(classes)]
    assert [row["correct"] for row in details["per_class"]] == expected
    assert [row["samples"] for row in details["per_class"]] == torch.bincount(labels, minlength=classes).tolist()
    assert 0 < sum(expected) == round(row["accuracy"] * 300)


# ---- the mistakes ----------------------------------------------------------------------------------------------


def test_among_equally_confident_mistakes_the_first_ones_are_shown(tmp_path: Path) -> None:
    outputs = torch.tensor([[2.0, 0.0]]).repeat(100, 1)
    outputs[60], outputs[61] = torch.tensor([3.0, 0.0]), torch.tensor([0.0, 9.0])
    _, details = validated(outputs, torch.ones(100, dtype=torch.int64), tmp_path)
    assert listed(details) == [(60, 1, 0), *((index, 1, 0) for index in range(15))]


@pytest.mark.parametrize("wrong", [0, 1, 15])
def test_fewer_mistakes_are_all_shown(tmp_path: Path, wrong: int) -> None:
    outputs, labels = 20 * torch.eye(3).repeat(20, 1), torch.arange(3).repeat(20)
    labels[:wrong] = (labels[:wrong] + 1) % 3
    _, details = validated(outputs, labels, tmp_path)
    assert listed(details) == [(index, (index + 1) % 3, index % 3) for index in range(wrong)]


def test_outputs_that_are_no_numbers_are_counted_but_are_no_confident_mistakes(tmp_path: Path) -> None:
    outputs, labels = scores(40, 3)
    outputs[::2] = torch.nan
    outputs[1] = torch.tensor([torch.inf, 0.0, 0.0])  # a softmax of it has no numbers either
    _, details = validated(outputs, labels, tmp_path)
    assert sum(map(sum, details["confusion"])) == 40
    assert all(index % 2 and index > 1 for index, _, _ in listed(details))
    assert details["mistakes"]
    _, details = validated(torch.full_like(outputs, torch.nan), labels, tmp_path)
    assert details["mistakes"] == []


def test_each_validation_starts_afresh(tmp_path: Path) -> None:
    outputs, labels = scores(30, 3)
    task = Classification()
    task.probe(outputs)
    dataset, sampler = InMemory(outputs, labels), FixedBatchSampler(30, 30, 0, 1)
    details = Details(task, DataSource(dataset, dataset), Data(), 0)
    for step, some_outputs in enumerate([outputs, torch.eye(3)[labels]]):
        validate(Outputs(), task, [(some_outputs, labels)], sampler, None, details)
        details.write(tmp_path, step, 1)
    last = json.loads((tmp_path / "validation.json").read_text())
    assert (last["step"], last["mistakes"]) == (1, [])
    assert sum(map(sum, last["confusion"])) == 30


def test_collecting_never_waits_for_the_device() -> None:
    # On the meta device there are no values to wait for: whatever asks for one raises.
    task, meta = Classification(), torch.device("meta")
    for classes in (10, 2000):
        outputs, labels = torch.empty(8, classes, device=meta), torch.empty(8, dtype=torch.int64, device=meta)
        task.probe(outputs)
        details = Details(task, DataSource([0], [0]), Data(), 0)
        details.begin(meta)
        details.add(task.guesses(outputs, (None, labels)), 16, 24)
        assert details.mistakes.shape == (3, MISTAKES)


# ---- tasks of one's own ----------------------------------------------------------------------------------------


def test_a_task_of_ones_own_has_details_where_it_has_guesses(tmp_path: Path) -> None:
    outputs = torch.tensor([[4.0], [-4.0], [1.0], [-2.0], [8.0]])
    labels = torch.tensor([1, 0, 0, 1, -1])  # the last has none
    _, details = validated(outputs, labels, tmp_path, OwnTask(), names=("no", "yes"))
    assert details["confusion"] == [[1, 1], [1, 1]]
    assert listed(details) == [(3, 1, 0), (2, 0, 1)]
    _, details = validated(outputs, labels, tmp_path, OwnTask())  # nobody knows how many classes there are
    assert (details["classes"], details["confusion"], details["per_class"]) == (None, None, [])
    assert listed(details) == [(3, 1, 0), (2, 0, 1)]


class OtherOutputs(Classification):
    """A Classification that overrides what it has to for outputs of another form."""

    def loss(self, outputs: Any, batch: Any) -> tuple[Tensor, int]:
        return outputs.sum() * 0, len(outputs)

    def metrics(self, outputs: Any, batch: Any) -> dict[str, Tensor]:
        return {"correct": torch.tensor(0)}


class NoGuesses(OwnTask):
    guesses = Task.guesses  # type: ignore[assignment]


@pytest.mark.parametrize(
    ("task", "labels"),
    [
        (NoGuesses(), torch.zeros(9, dtype=torch.int64)),
        (OtherOutputs(), torch.zeros(9, 2)),
        (OtherOutputs(), torch.zeros(9)),
    ],
)
def test_other_tasks_leave_no_file(tmp_path: Path, task: Task, labels: Tensor) -> None:
    assert validated(torch.zeros(9, 2), labels, tmp_path, task)[1] == {}


# ---- pictures --------------------------------------------------------------------------------------------------


def pixels(uri: str | None) -> Tensor:
    """[channels, height, width]"""
    kind, _, data = (uri or "").partition(",")
    assert kind == "data:image/png;base64"
    values = torch.from_numpy(np.array(Image.open(io.BytesIO(base64.b64decode(data)))))
    return values[None] if values.ndim == 2 else values.permute(2, 0, 1)


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 128, 20), (1, 1, 1)])
def test_images_are_shown_as_they_are(shape: tuple[int, ...]) -> None:
    image = torch.randint(0, 256, shape, dtype=torch.uint8)
    assert torch.equal(pixels(png_uri(image)), image)
    assert torch.equal(pixels(png_uri(image / 255)), image)
    assert torch.equal(pixels(png_uri((image / 255).double())), image)


def test_normalised_images_are_brought_back() -> None:
    image = torch.randint(0, 256, (3, 9, 9), dtype=torch.uint8)
    image[0, 0, :2] = torch.tensor([0, 255])
    mean, std = (0.5, 0.4, 0.3), (0.25, 0.2, 0.1)
    normalised = (image / 255 - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
    assert torch.equal(pixels(png_uri(normalised, mean, std)), image)
    assert torch.equal(pixels(png_uri((image / 255 - 0.5) * 7)), image)  # nobody knows how: from least to greatest
    assert pixels(png_uri(torch.full((1, 2, 2), 3.0))).unique().tolist() == [0]
    holes = torch.tensor([[[torch.nan, -1.0, 1.0, torch.inf]]])
    assert pixels(png_uri(holes)).tolist() == [[[128, 0, 255, 128]]]


@pytest.mark.parametrize(("shape", "small"), [((3, 640, 320), (3, 128, 64)), ((1, 10, 1000), (1, 1, 128))])
def test_large_images_become_small(shape: tuple[int, ...], small: tuple[int, ...]) -> None:
    assert pixels(png_uri(torch.zeros(shape, dtype=torch.uint8))).shape == small


@pytest.mark.parametrize(
    "sample",
    [
        torch.zeros(10),
        torch.zeros(5, 5),
        torch.zeros(2, 5, 5),
        torch.zeros(3, 0, 5),
        torch.zeros(1, 5, 5).long(),
        "text",
    ],
)
def test_what_is_no_image_has_no_picture(sample: Any) -> None:
    assert png_uri(sample) is None


class Noisy:
    """Images with noise from torch, numpy and random; some cannot be loaded any more."""

    def __init__(self, missing: tuple[int, ...] = ()) -> None:
        self.missing = missing

    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        if index in self.missing:
            raise RuntimeError("the file is gone")
        image = torch.rand(3, 8, 8) * 0.5
        return image + float(np.random.random()) * 0.25 + random.random() * 0.25, 0


def test_the_picture_is_what_was_validated_or_nothing(tmp_path: Path) -> None:
    outputs, labels = torch.tensor([[0.0, 1.0]]).repeat(12, 1), torch.zeros(12, dtype=torch.int64)
    torch.manual_seed(1), np.random.seed(1), random.seed(1)
    following = float(torch.rand(())), np.random.random(), random.random()
    torch.manual_seed(1), np.random.seed(1), random.seed(1)
    _, details = validated(outputs, labels, tmp_path, dataset=Noisy(missing=(3, 11)))
    assert (float(torch.rand(())), np.random.random(), random.random()) == following  # nothing was drawn for it
    images, _ = SeededDataset(Noisy(), 0, collate_of(Data()), no_check).__getitems__(MicroBatch(0, np.arange(12)))
    assert [mistake["index"] for mistake in details["mistakes"]] == list(range(12))
    for mistake, image in zip(details["mistakes"], images, strict=True):
        if mistake["index"] in (3, 11):
            assert mistake["picture"] is None
        else:
            assert torch.equal(pixels(mistake["picture"]), (image * 255).round().byte())


def test_a_file_that_cannot_be_written_is_said_and_no_more(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    validated(*scores(), tmp_path / "gone")
    said = capsys.readouterr().out
    assert "WARNING: validation.json cannot be written (No such file or directory)" in said
    assert said.count("\n") == 1
