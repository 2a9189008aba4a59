"""The data of the GPU parts: the kit's files, or what makes them where there is no kit.

$GPU_DATA is the kit's folder data/; run.sh sets it. scikit-learn, from which distloop's digits and diabetes come, is
not in the kit.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import torch

from distloop.data.datasets import DataSource, diabetes, digits
from distloop.data.whole_batches import InMemory
from tests.tools.image_files import write_cifar10, write_garments

KINDS, ABOUT = ("inputs", "targets"), ("classes", "mean", "std")


def packed_digits(shift: int = 1) -> DataSource:
    """distloop's digits(shift), bit for bit, from the kit's file."""
    return unpack("digits.npz", shift) or digits(shift)


def packed_diabetes() -> DataSource:
    """distloop's diabetes(), bit for bit, from the kit's file."""
    return unpack("diabetes.npz") or diabetes()


def packed_images(scratch: Path) -> Path:
    """The root of a small Fashion-MNIST (300 + 100 images) and a small CIFAR-10 (5 × 60 + 60), in their real formats.

    Where there is no kit they are written to `scratch`, unless they are there. small_cifar10, in tests.lab.user_code,
    reads the latter.
    """
    if "GPU_DATA" in os.environ:
        return Path(os.environ["GPU_DATA"])
    if not (scratch / "FashionMNIST").exists():
        write_images(scratch)
    return scratch


def write_images(folder: Path) -> None:
    write_garments(folder, 300, 100)
    write_cifar10(folder, 60)


def write_full_cifar10(folder: Path) -> None:
    """Random images in the format and of the size of CIFAR-10: 50,000 + 10,000, 184 MB, in a few seconds."""
    write_cifar10(folder, 10_000)


def write_packed(folder: Path) -> None:
    """Write what the kit has in data/."""
    pack(folder / "digits.npz", digits())
    pack(folder / "diabetes.npz", diabetes())
    write_images(folder)


def pack(path: Path, source: DataSource) -> None:
    arrays = {
        f"{half}_{kind}": getattr(getattr(source, half), kind).numpy()
        for half in ("train", "validation")
        for kind in KINDS
    }
    arrays |= {name: np.array(value) for name in ABOUT if (value := getattr(source, name)) is not None}
    np.savez_compressed(path, **arrays)


def unpack(name: str, pad: int = 0) -> DataSource | None:
    """The data in a file of the kit, the training half shifted by up to `pad` pixels; None where there is no kit."""
    if "GPU_DATA" not in os.environ:
        return None
    with np.load(Path(os.environ["GPU_DATA"]) / name) as file:
        arrays = dict(file)

    def half(name: str, pad: int = 0) -> InMemory:
        inputs, targets = (torch.from_numpy(arrays[f"{name}_{kind}"]) for kind in KINDS)
        return InMemory(inputs, targets, pad)

    classes, mean, std = (tuple(arrays[one].tolist()) if one in arrays else None for one in ABOUT)
    return DataSource(half("train", pad), half("validation"), classes, mean, std)
