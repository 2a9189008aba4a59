"""Files of Fashion-MNIST's and CIFAR-10's formats, and folders of pictures, as small or as large as a test wants."""

from __future__ import annotations

import hashlib
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Uint8s = NDArray[np.uint8]
CIFAR10_FILES = (*(f"data_batch_{number}" for number in range(1, 6)), "test_batch")


def idx_file(array: Uint8s) -> bytes:
    """The format of MNIST's files: 0, 0, type (8: unsigned byte), dimensions, sizes, bytes."""
    return struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.tobytes()


def garments(train: int = 30, test: int = 20) -> dict[str, Uint8s]:
    """Random pixels and labels for the four files of Fashion-MNIST."""
    generator = np.random.default_rng(0)
    arrays: dict[str, Uint8s] = {}
    for half, samples in (("train", train), ("t10k", test)):
        arrays[f"{half}-images-idx3-ubyte"] = generator.integers(0, 256, (samples, 28, 28), dtype=np.uint8)
        arrays[f"{half}-labels-idx1-ubyte"] = (np.arange(samples) % 10).astype(np.uint8)
    return arrays


def write_garments(root: Path, train: int = 30, test: int = 20) -> dict[str, Uint8s]:
    """Write them to where torchvision looks for them under `root`, the data set's root."""
    folder = root / "FashionMNIST" / "raw"
    folder.mkdir(parents=True)
    arrays = garments(train, test)
    for name, array in arrays.items():
        (folder / name).write_bytes(idx_file(array))
    return arrays


def write_cifar10(root: Path, samples: int = 4) -> Uint8s:
    """Write CIFAR-10's six batches, of `samples` random images each, under `root`; the pixels, [6 samples, 3072].

    Their checksums are others than the real ones: see accept_cifar10.
    """
    folder = root / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    count = len(CIFAR10_FILES) * samples
    pixels = np.frombuffer(bytearray(np.random.default_rng(0).bytes(count * 3072)), np.uint8).reshape(count, 3072)
    for position, name in enumerate(CIFAR10_FILES):
        part = slice(position * samples, (position + 1) * samples)
        labels = [index % 10 for index in range(part.start, part.stop)]
        content = {"data": pixels[part], "labels": labels, "batch_label": name}
        with open(folder / name, "wb") as file:
            pickle.dump(content, file, protocol=2)
    classes = ["airplane", *(f"class {number}" for number in range(1, 10))]
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": classes}, protocol=2))
    return pixels


def accept_cifar10(root: Path, set_attribute: Callable[[Any, str, Any], None] = setattr) -> None:
    """Let torchvision take the files under `root`, as they are now, for those of CIFAR-10."""
    from torchvision.datasets import CIFAR10

    sums = {path.name: hashlib.md5(path.read_bytes()).hexdigest() for path in (root / "cifar-10-batches-py").iterdir()}
    set_attribute(CIFAR10, "train_list", [[name, sums[name]] for name in CIFAR10_FILES[:5]])
    set_attribute(CIFAR10, "test_list", [[name, sums[name]] for name in CIFAR10_FILES[5:]])
    set_attribute(CIFAR10, "meta", {**CIFAR10.meta, "md5": sums["batches.meta"]})


def write_pictures(
    root: Path, train: int, validation: int, names: tuple[str, ...] = ("cat", "dog"), ending: str = "jpg"
) -> None:
    """Write folders of random pictures as image_folder reads them: `train` and `validation` of them for each name."""
    generator = np.random.default_rng(0)
    for half, count in (("train", train), ("val", validation)):
        for name in names:
            folder = root / half / name
            folder.mkdir(parents=True)
            for number in range(count):
                picture = generator.integers(0, 256, (48, 60, 3), dtype=np.uint8)
                Image.fromarray(picture).save(folder / f"{number:02}.{ending}")
