"""The built-in data sets, and the form of a data set of your own.

A data set is a callable that returns a DataSource or (train, validation), each with __len__ and __getitem__ as for any
PyTorch DataLoader. Its arguments are data.args, and `root` if its signature names it.
"""

import dataclasses
import os
import re
import sys
from collections.abc import Callable, Iterable, Sequence, Sized
from pathlib import Path
from types import NoneType
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from distloop.config.places import root_for_code
from distloop.config.registry import call, resolve
from distloop.config.settings import Data
from distloop.data.augment import check_augment, transform_of
from distloop.data.bad_samples import BadSamples
from distloop.data.download import load_or_download
from distloop.data.embedded import diabetes_halves, digits_halves
from distloop.data.halves import TRAIN, VALIDATION, validation_sets
from distloop.data.packed import HALVES, Packed, read_store, refuse_larger
from distloop.data.pictures import check_decoder, decode, load_picture, open_folders, transforms_of_pictures
from distloop.data.seeding import Place, building
from distloop.data.tokens import tokens
from distloop.data.whole_batches import InMemory, Transformed, WholeBatches, gives_batches
from distloop.errors import UsageError
from distloop.ranks.talking import say, speaks

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
WAYS_OUT = (  # for samples without an index
    "with them each rank gets its own samples, and a run that is continued finds its place. What can only be iterated "
    "over has three ways out: list(it), if that fits into memory; a class whose __getitem__(i) reads sample i where it "
    "lies, such as a member of a tar by (file, offset, size); for text, --data tokens on what `distloop tokens` writes "
    "(docs/own-code.md, Samples without an index)."
)


@dataclasses.dataclass(frozen=True)
class DataSource:
    """The two halves of a data set, the names of its classes, and the normalisation of its images. With mean and std of
    each channel, uint8 inputs [batch, channels, height, width] are scaled to 0 … 1 and normalised on the device.
    `validation`: a data set, or a mapping of names to several; the metrics of the first one carry no name."""

    train: Any
    validation: Any
    classes: Sequence[str] | None = None
    mean: Sequence[float] | None = None
    std: Sequence[float] | None = None
    # Of the halves, by their names, once they are found (fingerprint.py): samples are loaded for them.
    fingerprints: dict[str, Any] = dataclasses.field(default_factory=dict, init=False, repr=False, compare=False)
    # Those of the training half that the run has left out so far.
    bad_samples: BadSamples = dataclasses.field(default_factory=BadSamples, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Keeps tuples, also of lists and arrays. Raises UsageError for values that mean something else."""
        validation_sets(self.validation)  # refuses other names
        if isinstance(self.classes, (str, bytes, dict)) or not isinstance(self.classes, (Iterable, NoneType)):
            raise UsageError(f'DataSource(classes={self.classes!r}): give the names in order, as ("cat", "dog").')
        if (self.mean is None) != (self.std is None):
            raise UsageError("DataSource: mean and std work together only. Give both, or none.")
        for name in ("mean", "std"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, Iterable) or not all(0 <= x <= 1 for x in value)):
                raise UsageError(
                    f"DataSource({name}={value!r}): give one number for each channel, of pixels that are scaled to "
                    "0 … 1, such as (0.485, 0.456, 0.406)."
                )
        kept = {"classes": str, "mean": float, "std": float}
        for name, kind in kept.items():
            if (value := getattr(self, name)) is not None:
                object.__setattr__(self, name, tuple(map(kind, value)))
        if self.std is not None and not all(self.std):
            raise UsageError(f"DataSource(std={self.std}): no channel's deviation can be 0: it divides.")


def class_names(source: DataSource) -> tuple[str, ...]:
    """The names of the data's classes, if the DataSource has them, or a data set of torchvision; else ()."""
    if source.classes is None and _is_of_torchvision(source.train):
        classes = getattr(source.train, "classes", None)
        return tuple(map(str, classes)) if isinstance(classes, (list, tuple)) else ()
    return tuple(source.classes or ())


def _is_of_torchvision(dataset: Any) -> bool:
    loaded = sys.modules.get("torchvision.datasets")  # if nobody has imported it, there is none
    return loaded is not None and isinstance(dataset, loaded.VisionDataset)


def digits(shift: int = 1) -> DataSource:
    """The digits of scikit-learn: 1797 images, 8 × 8 pixels; a stratified 80/20 split."""
    (pixels, labels), validation = digits_halves()
    halves = InMemory(pixels, labels, pad=shift), InMemory(*validation)
    return DataSource(*halves, classes=tuple("0123456789"), mean=(0.305,), std=(0.376,))


def diabetes() -> DataSource:
    """The diabetes data of scikit-learn: 442 rows, 10 numbers and one target, standardised; an 80/20 split."""
    train, validation = diabetes_halves()
    return DataSource(InMemory(*train), InMemory(*validation))


def fashion_mnist(
    root: str,
    download: bool = True,
    pad: int | None = None,
    flip: bool | None = None,
    augment: str = "crop_flip",
    erase: float = 0.0,
) -> DataSource:
    """Fashion-MNIST: 60000 + 10000 images of clothes, 28 × 28 pixels. `pad`: 2 pixels, and `flip`, by default; the
    policy of augment: auto is that of CIFAR-10."""
    from torchvision.datasets import FashionMNIST

    check_augment(augment, erase, pad, flip)
    train, validation = load_or_download(FashionMNIST, root, download, Path(root) / "FashionMNIST" / "raw")
    chosen = augment, erase, 2 if pad is None else pad, True if flip is None else flip, (0.286,)
    augmented = _augmented(train.data.unsqueeze(1), train.targets, *chosen)
    plain = InMemory(validation.data.unsqueeze(1), validation.targets)
    return DataSource(augmented, plain, classes=tuple(train.classes), mean=(0.286,), std=(0.353,))


def cifar10(
    root: str,
    download: bool = True,
    pad: int | None = None,
    flip: bool | None = None,
    augment: str = "crop_flip",
    erase: float = 0.0,
) -> DataSource:
    """CIFAR-10: 50000 + 10000 colour images, 32 × 32 pixels. `pad`: 4 pixels, and `flip`, by default."""
    from torchvision.datasets import CIFAR10

    check_augment(augment, erase, pad, flip)
    halves = load_or_download(CIFAR10, root, download, Path(root) / "cifar-10-batches-py")
    tensors = [
        (torch.from_numpy(half.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(half.targets)) for half in halves
    ]
    mean = (0.4914, 0.4822, 0.4465)
    train = _augmented(*tensors[0], augment, erase, 4 if pad is None else pad, True if flip is None else flip, mean)
    return DataSource(train, InMemory(*tensors[1]), tuple(halves[0].classes), mean, std=(0.247, 0.2435, 0.2616))


def _augmented(
    images: Tensor, targets: Tensor, augment: str, erase: float, pad: int, flip: bool, mean: Sequence[float]
) -> InMemory:
    """Images of bytes, [samples, channels, height, width]: whole batches, if they are shifted and flipped at most, else
    one by one."""
    if augment == "none":
        pad, flip = 0, False
    whole = InMemory(images, targets, pad, flip)
    if augment in ("none", "crop_flip") and not erase:
        return whole
    from torchvision.transforms import v2

    crop = [v2.RandomCrop(tuple(images.shape[2:]), padding=pad)] if pad else []
    first = [v2.ToPILImage(), *crop, *([v2.RandomHorizontalFlip()] if flip else [])]
    return Transformed(images, targets, transform_of(first, augment, erase, mean, "cifar10"))


def image_folder(
    root: str,
    crop: int = 224,
    resize: int = 256,
    augment: str = "crop_flip",
    erase: float = 0.0,
    validation_crop: int | None = None,
    decoder: str = "pil",
) -> DataSource:
    """Images in ROOT/train/CLASS/ and ROOT/val/CLASS/, as in ImageNet. Raises UsageError for other folders.
    `validation_crop`: `crop` by default. With augment: none training pictures are cropped as those of validation, to
    `crop` pixels. `decoder`: pil, or torchvision, which takes less time; their pixels differ a little."""
    check_augment(augment, erase)
    check_decoder(decoder)
    policy, crops = (augment, erase, IMAGENET_MEAN), (crop, resize, validation_crop or crop)
    transforms = transforms_of_pictures(*crops, policy, of_tensors=decoder == "torchvision")
    train, validation = open_folders(root, transforms, load_picture if decoder == "pil" else decode)
    return DataSource(train, validation, tuple(train.classes), IMAGENET_MEAN, IMAGENET_STD)


def packed(
    root: str,
    crop: int = 224,
    resize: int = 256,
    augment: str = "crop_flip",
    erase: float = 0.0,
    validation_crop: int | None = None,
) -> DataSource:
    """The store of pictures in ROOT that `distloop pack` has made; arguments as for image_folder. Raises UsageError if
    there is none, or its pictures are too small."""
    check_augment(augment, erase)
    store = read_store(Path(root))
    policy, crops = (augment, erase, IMAGENET_MEAN), (crop, resize, validation_crop or crop)
    refuse_larger(store, dict(zip(("crop", "resize", "validation_crop"), crops, strict=True)))
    transforms = transforms_of_pictures(*crops, policy, of_tensors=True)
    train, validation = (Packed(store, *each) for each in zip(HALVES, transforms, strict=True))
    return DataSource(train, validation, store.classes, IMAGENET_MEAN, IMAGENET_STD)


DATASETS: dict[str, Callable[..., DataSource | tuple[Any, Any]]] = {
    "digits": digits,
    "diabetes": diabetes,
    "fashion_mnist": fashion_mnist,
    "cifar10": cifar10,
    "image_folder": image_folder,
    "packed": packed,
    "tokens": tokens,
}


def load_data(config: Data, seed: int | None = None) -> DataSource:
    """The data set that the config names. `seed`: the run's; what building it draws from the global generators follows
    from it. Raises UsageError if the data set is unknown, missing, empty or of another form."""
    offered = {"root": root_for_code(config.root)}
    with building(Place.DATA, seed):
        source = call("data.args", resolve("data.name", config.name, DATASETS), config.args, offered)
    if isinstance(source, tuple) and len(source) == 2:
        names = [name.lower() for name in getattr(type(source), "_fields", ())]
        if names and (names[1].startswith("train") or re.match("(val|valid|validation|test|dev|eval)(_|$)", names[0])):
            raise UsageError(
                f"data.name = {config.name!r} returned a {type(source).__name__}({', '.join(names)}): the first half "
                "is trained on. Return (train, validation) in this order, or a distloop.data.DataSource."
            )
        source = DataSource(*source)
    if not isinstance(source, DataSource):
        of = f" of {len(source)}" if isinstance(source, tuple) else ""
        raise UsageError(
            f"data.name = {config.name!r} returned a {type(source).__name__}{of}; return (train, validation) or a "
            "distloop.data.DataSource. tuple(torch.utils.data.random_split(data, [0.9, 0.1])) makes two of one."
        )
    sets = {f"{VALIDATION}{name and f'[{name!r}]'}": each for name, each in validation_sets(source.validation).items()}
    for half, dataset in {TRAIN: source.train, **sets}.items():
        _check_half(f"data.name = {config.name!r}: its {half} half", dataset)
    has_names = _are_names(getattr(source.train, "classes", None))
    if source.classes is None and has_names and not _is_of_torchvision(source.train) and speaks(os.environ):
        say(
            f"distloop: WARNING: the classes of {type(source.train).__name__} are not looked at. To name the data's "
            "classes, return distloop.data.DataSource(train, validation, classes=train.classes).",
            sys.stderr,
        )
    return source


def _check_half(what: str, dataset: Any) -> None:
    inherited = getattr(type(dataset), "__getitem__", None) is Dataset.__getitem__  # torch's, which raises an error
    has_index = gives_batches(dataset) or (hasattr(dataset, "__getitem__") and not inherited)
    kind = type(dataset).__name__
    if not (isinstance(dataset, Sized) and has_index):
        why = "return data sets. distloop makes the loaders itself (data.workers, batch.global_size)."
        if isinstance(dataset, Iterable) and not isinstance(dataset, DataLoader):
            why = WAYS_OUT
        raise UsageError(f"{what} needs __len__ and __getitem__, which a {kind} lacks: {why}")
    if len(dataset) == 0:
        raise UsageError(f"{what} is empty.")
    looks_like_it = callable(getattr(type(dataset), "batch", None)) and isinstance(getattr(dataset, "draws", None), int)
    if looks_like_it and not isinstance(dataset, WholeBatches):
        raise UsageError(
            f"{what}, a {kind}, has batch() and draws. If distloop is to take whole batches from batch(), derive "
            f"the class from distloop.data.WholeBatches: class {kind}(distloop.data.WholeBatches). If not, give "
            "one of the two another name."
        )
    if isinstance(dataset, InMemory) and not gives_batches(dataset) and dataset.draws:
        raise UsageError(
            f"{what}, a {kind}, has a __getitem__ of its own, which is what is trained on, and pad or flip, which "
            "batch() alone applies. Define batch() instead of __getitem__, or augment in __getitem__."
        )


def _are_names(value: Any) -> bool:
    if not isinstance(value, (list, tuple)) or not all(isinstance(each, str) for each in value):
        return False
    return 1 < len(value) == len(set(value))
