"""data.args.augment and erase: torchvision's transforms in the order of its recipes, each sample seeded for itself."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2

from distloop.config.settings import Data
from distloop.data.augment import DRAWS, shift_and_flip
from distloop.data.datasets import IMAGENET_MEAN, load_data
from distloop.data.fingerprint import fingerprint
from distloop.data.order import MicroBatch
from distloop.data.seeded import SeededDataset, collate_of, no_check
from distloop.data.seeding import seed_sample, uniforms
from distloop.data.whole_batches import gives_batches
from distloop.errors import UsageError
from tests.tools.image_files import accept_cifar10, write_cifar10, write_garments

NAMES = ("fashion_mnist", "cifar10", "image_folder")
SMOOTH = v2.InterpolationMode.BILINEAR
# The bytes that are 0 once they are normalised.
GREY = {"fashion_mnist": [73], "cifar10": [125, 123, 114], "image_folder": [124, 116, 104]}


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with all three data sets, in small."""
    generator = np.random.default_rng(0)
    for half in ("train", "val"):
        (tmp_path / half / "cat").mkdir(parents=True)
        for number in range(12):
            picture = generator.integers(0, 256, (40, 50, 3), dtype=np.uint8)
            Image.fromarray(picture).save(tmp_path / half / "cat" / f"{number:02}.png")
    write_garments(tmp_path, 12, 3)
    write_cifar10(tmp_path)
    accept_cifar10(tmp_path, monkeypatch.setattr)
    return tmp_path


def halves(root: Path, name: str, **args: Any) -> tuple[Any, Any]:
    more = {"crop": 24, "resize": 30} if name == "image_folder" else {"download": False}
    source = load_data(Data(name, root=str(root), args={**more, **args}))
    return source.train, source.validation


def batch(dataset: Any, epoch: int, indices: list[int], seed: int = 3) -> Tensor:
    loaded = SeededDataset(dataset, seed, collate_of(Data()), no_check).__getitems__(
        MicroBatch(epoch, np.array(indices))
    )
    return loaded[0]


def by_hand(root: Path, name: str, augment: str, erase: float, epoch: int, indices: list[int]) -> Tensor:
    """The same images from torchvision's transforms, as references/classification/presets.py puts them together."""
    plain = halves(root, name)[0]
    policies = {
        "trivial": v2.TrivialAugmentWide(interpolation=SMOOTH),
        "rand": v2.RandAugment(interpolation=SMOOTH, magnitude=9),
        "auto": v2.AutoAugment(
            v2.AutoAugmentPolicy.IMAGENET if name == "image_folder" else v2.AutoAugmentPolicy.CIFAR10, SMOOTH
        ),
    }
    crop = {
        "fashion_mnist": v2.RandomCrop(28, padding=2),
        "cifar10": v2.RandomCrop(32, padding=4),
        "image_folder": v2.RandomResizedCrop(24, antialias=True),
    }[name]
    steps = [crop, v2.RandomHorizontalFlip(), policies.get(augment, v2.Identity()), v2.PILToTensor()]
    found = []
    for index in indices:
        if name == "image_folder":
            picture = Image.open(plain.samples[index][0]).convert("RGB")
        else:
            picture = v2.functional.to_pil_image(plain.inputs[index])
        seed_sample(3, epoch, index)
        image = v2.Compose(steps)(picture)
        found.append(v2.RandomErasing(erase, value=GREY[name])(image) if erase else image)
    return torch.stack(found)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("augment", "erase"), [("trivial", 0.0), ("rand", 0.0), ("auto", 0.0), ("trivial", 0.5), ("crop_flip", 0.1)]
)
def test_images_are_those_of_torchvisions_transforms(root: Path, name: str, augment: str, erase: float) -> None:
    train, validation = halves(root, name, augment=augment, erase=erase)
    assert not gives_batches(train)
    whole = batch(train, 1, list(range(12)))
    assert whole.dtype == torch.uint8
    assert torch.equal(whole, by_hand(root, name, augment, erase, 1, list(range(12))))
    assert torch.equal(batch(validation, 0, [0, 1]), batch(halves(root, name)[1], 5, [0, 1])), "only training changes"
    # A sample's numbers depend on (seed, epoch, index), in whatever batch and process it is.
    assert torch.equal(batch(train, 1, [7, 2]), whole[[7, 2]])
    assert torch.equal(batch(pickle.loads(pickle.dumps(train)), 1, [4]), whole[[4]])
    assert not torch.equal(batch(train, 2, list(range(12))), whole)
    assert not torch.equal(batch(train, 1, list(range(12)), seed=4), whole)


@pytest.mark.parametrize("name", NAMES)
def test_without_arguments_images_are_augmented_as_they_always_were(root: Path, name: str) -> None:
    train, _ = halves(root, name)
    indices = list(range(12))
    if name == "image_folder":
        expected = by_hand(root, name, "crop_flip", 0.0, 1, indices)
    else:
        pad = {"fashion_mnist": 2, "cifar10": 4}[name]
        assert gives_batches(train)
        assert (train.pad, train.flip) == (pad, True)
        expected = shift_and_flip(train.inputs[:12], uniforms(3, 1, np.arange(12), DRAWS), pad, True)
    assert torch.equal(batch(train, 1, indices), expected)
    assert torch.equal(batch(halves(root, name, augment="crop_flip", erase=0)[0], 1, indices), expected)


def test_without_arguments_pictures_are_cropped_as_they_always_were(root: Path) -> None:
    source = load_data(Data("image_folder", root=str(root)))
    assert batch(source.train, 0, [0]).shape == (1, 3, 224, 224)
    middle = v2.Compose([v2.Resize(256, antialias=True), v2.CenterCrop(224), v2.PILToTensor()])
    picture = Image.open(source.validation.samples[0][0])
    assert torch.equal(batch(source.validation, 0, [0])[0], middle(picture))


@pytest.mark.parametrize("name", NAMES)
def test_none_leaves_images_as_validation_has_them(root: Path, name: str) -> None:
    train, _ = halves(root, name, augment="none")
    images = batch(train, 1, [0, 1, 2])
    if name == "image_folder":
        middle = v2.Compose([v2.Resize(30, antialias=True), v2.CenterCrop(24), v2.PILToTensor()])
        assert torch.equal(images, torch.stack([middle(Image.open(path)) for path, _ in train.samples[:3]]))
    else:
        assert torch.equal(images, train.inputs[:3])


def test_what_is_erased_is_0_once_it_is_normalised(root: Path) -> None:
    plain, erased = (batch(halves(root, "image_folder", augment="none", erase=share)[0], 0, [0]) for share in (0, 1.0))
    there = (plain != erased).any(1)[0]
    assert 0.02 * 0.5 < there.float().mean() < 0.33 * 1.5
    values = erased[0][:, there].double() / 255 - torch.tensor(IMAGENET_MEAN).double()[:, None]
    assert float(values.abs().max()) <= 0.5 / 255 + 1e-9


def test_data_in_memory_are_the_same_data_however_they_are_augmented(root: Path) -> None:
    assert fingerprint(halves(root, "cifar10", augment="trivial")[0]) == fingerprint(halves(root, "cifar10")[0])


def test_validation_pictures_may_be_cropped_to_another_size(root: Path) -> None:
    train, validation = halves(root, "image_folder", validation_crop=28)
    assert (batch(train, 0, [0]).shape, batch(validation, 0, [0]).shape) == ((1, 3, 24, 24), (1, 3, 28, 28))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"augment": "triviall"}, "augment is one of none, crop_flip, trivial, rand, auto, not 'triviall'"),
        ({"erase": 1.5}, "erase is the probability, 0 to 1, .* not 1.5"),
        ({"erase": True}, "erase is the probability"),
        ({"augment": "none", "pad": 2}, "rules out pad and flip|'pad'"),
        ({"augment": "none", "flip": True}, "rules out pad and flip|'flip'"),
        ({"pad": -1, "augment": "trivial"}, "shifted by -1|'pad'"),
    ],
)
def test_what_cannot_be_meant_is_refused(root: Path, name: str, args: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=f"data.args = .*{message}"):
        halves(root, name, **args)
