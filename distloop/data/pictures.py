"""Folders of pictures, and a picture from a file: its 8 bits a channel are exact, or it is refused."""

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from distloop.data.augment import transform_of
from distloop.errors import UsageError

DECODERS = ("pil", "torchvision")
WAY_OUT = "Convert the files, or load them with a data set of your own that gives floats: docs/own-code.md, Pictures."


def open_folders(
    root: str, transforms: Sequence[Any], loader: Callable[[str], Any], name: str = "data.name = 'image_folder'"
) -> tuple[Any, Any]:
    """torchvision's ImageFolder of ROOT/train/CLASS/ and of ROOT/val/CLASS/, with a transform for each. `name`: what
    asks for them, in messages. Raises UsageError for other folders."""
    from torchvision.datasets import ImageFolder

    folders = [Path(root) / half for half in ("train", "val")]
    try:
        train, validation = (
            ImageFolder(str(folder), transform, loader=loader)
            for folder, transform in zip(folders, transforms, strict=True)
        )
    except FileNotFoundError as error:
        raise UsageError(
            f"{name}: {error} (looked in {folders[0].resolve()} and {folders[1].resolve()}). "
            "Put one folder of pictures per class in each, or point --data.root to where they are."
        ) from None
    if train.classes != validation.classes:
        differing = sorted(set(train.classes) ^ set(validation.classes))
        raise UsageError(
            f"{folders[0]} and {folders[1]} do not have the same classes; in one only: {', '.join(differing[:10])}"
        )
    return train, validation


def transforms_of_pictures(
    crop: int, resize: int, validation_crop: int, policy: tuple[str, float, Sequence[float]], of_tensors: bool
) -> tuple[Any, Any]:
    """(of training pictures, of validation pictures), to bytes [channels, height, width]: from tensors of bytes, else
    from images of PIL. `policy`: the name of augment, the probability to erase, the channels' means."""
    from torchvision.transforms import v2

    from distloop.data import resizing

    augment, erase, mean = policy
    scale = resizing.Resize(resize) if of_tensors else v2.Resize(resize, antialias=True)
    at_random = (resizing if of_tensors else v2).RandomResizedCrop(crop, antialias=True)
    first = [scale, v2.CenterCrop(crop)] if augment == "none" else [at_random, v2.RandomHorizontalFlip()]
    only_crop = [scale, v2.CenterCrop(validation_crop), v2.PILToTensor()]
    return transform_of(first, augment, erase, mean, "imagenet"), v2.Compose(only_crop)


def check_decoder(decoder: str) -> None:
    """Raise ValueError for one that is not known."""
    if decoder not in DECODERS:
        raise ValueError(f"decoder is one of {', '.join(DECODERS)}, not {decoder!r}")


def decode(path: str) -> Any:
    """The picture as a tensor of bytes, [3, height, width]: JPEGs by torchvision's decoder, which takes less time
    than PIL and gives the same pixels. What it refuses, and what has no 1 or 3 channels (CMYK), is loaded, or refused,
    by load_picture(), and so is all in a version of torchvision that has no decoder any more (0.29 announces it)."""
    from torchvision.transforms.v2.functional import pil_to_tensor

    try:
        from torchvision.io import decode_jpeg, read_file

        picture = decode_jpeg(read_file(path))
    except (ImportError, RuntimeError):  # no JPEG, a damaged one, or no file: load_picture() says which
        picture = None
    if picture is None or picture.shape[0] not in (1, 3):
        return pil_to_tensor(load_picture(path))
    return picture.expand(3, -1, -1)


def load_picture(path: str) -> Any:
    """The picture as an image of PIL in RGB. An alpha channel is left out; CMYK becomes RGB as PIL has it.

    Raises UsageError for one of 16 or 32 bits a channel whose values are no whole numbers from 0 to 255: PIL would clip
    them, so that a picture of 16 bits becomes white. Of colours of 16 bits it keeps the upper 8 bits: refused, too.
    """
    from PIL import Image

    with open(path, "rb") as file, Image.open(file) as image:
        if _loses_bits(image):
            raise UsageError(
                f"{path} has more than 8 bits a channel, PIL drops the lower ones, and a folder of pictures has "
                f"8. {WAY_OUT}"
            )
        if image.mode == "F" or image.mode.startswith("I"):
            values = np.asarray(image)
            if not ((values >= 0) & (values <= 255) & (values == np.round(values))).all():
                raise UsageError(
                    f"{path} has values from {values.min():g} to {values.max():g} (PIL's mode {image.mode}), and a "
                    f"folder of pictures has 8 bits a channel, 0 to 255. {WAY_OUT}"
                )
            return Image.fromarray(values.astype(np.uint8)).convert("RGB")
        return image.convert("RGB")


def _loses_bits(image: Any) -> bool:
    """Whether PIL's decoder makes 8 bits of more, in a mode that does not show it, such as RGB for PNG and TIFF of 16
    bits a channel. What it was asked to decode says so: "RGB;16B", or the largest value of a PPM."""
    if image.mode == "F" or image.mode.startswith("I"):
        return False
    for decoder, _, _, arguments in getattr(image, "tile", ()):
        values = arguments if isinstance(arguments, tuple) else (arguments,)
        if any(re.search(";16[BLN]$", str(value)) for value in values):
            return True
        if decoder.startswith("ppm") and any(isinstance(value, int) and value > 255 for value in values):
            return True
    return False
