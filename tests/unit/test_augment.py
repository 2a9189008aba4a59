"""Augmentation of whole batches equals torchvision's, image by image."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as reference

from distloop.data.augment import DRAWS, shift_and_flip
from distloop.data.seeding import uniforms

TYPES = [torch.uint8, torch.int64, torch.float16, torch.bfloat16, torch.float32, torch.float64]


def pictures(dtype: torch.dtype, batch: int = 40, height: int = 9, width: int = 7) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(1, 200, (batch, 3, height, width), generator=generator).to(dtype)


def one_by_one(images: Tensor, random: np.ndarray, pad: int, flip: bool) -> Tensor:
    """The same with torchvision's functions in a loop: crop(pad(image)), then mirror."""
    height, width = images.shape[2:]
    results = []
    for image, (vertical, horizontal, mirror) in zip(images, random, strict=True):
        top, left = int(vertical * (2 * pad + 1)), int(horizontal * (2 * pad + 1))
        moved = reference.crop(reference.pad(image, [pad] * 4), top, left, height, width)
        results.append(reference.horizontal_flip(moved) if flip and mirror < 0.5 else moved)
    return torch.stack(results)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(("pad", "flip"), [(0, True), (1, False), (2, True), (4, True), (8, False)])
def test_shift_and_flip_is_torchvisions_crop_with_padding_and_mirror(dtype: torch.dtype, pad: int, flip: bool) -> None:
    images, random = pictures(dtype), uniforms(0, 0, np.arange(40), DRAWS)
    moved = shift_and_flip(images, random, pad, flip)
    assert moved.dtype == dtype
    assert moved.shape == images.shape
    assert torch.equal(moved, one_by_one(images, random, pad, flip))


@pytest.mark.parametrize("width", [1, 4, 8, 12])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16])
def test_rows_of_bytes_are_mirrored_at_any_width(dtype: torch.dtype, width: int) -> None:
    """Bytes are mirrored by fours or eights, where the width allows it."""
    images, random = pictures(torch.uint8, width=width).to(dtype), uniforms(0, 0, np.arange(40), DRAWS)
    for pad in (0, 2):
        assert torch.equal(shift_and_flip(images, random, pad, True), one_by_one(images, random, pad, True))


def test_every_shift_in_both_directions_occurs_and_no_other() -> None:
    single = torch.zeros(1, 1, 7, 7)
    single[0, 0, 3, 3] = 1
    draws = uniforms(0, 0, np.arange(2000), DRAWS)
    moved = shift_and_flip(single.expand(2000, 1, 7, 7), draws, 2, False)
    places = {(int(row), int(column)) for _, _, row, column in torch.nonzero(moved).tolist()}
    assert places == {(row, column) for row in range(1, 6) for column in range(1, 6)}
    assert int(moved.sum()) == 2000


def test_the_extreme_draws_stay_inside_of_the_padding() -> None:
    images = pictures(torch.uint8, batch=2)
    random = np.array([[0.0, 0.0, 0.9], [np.nextafter(1, 0)] * 3])
    assert torch.equal(shift_and_flip(images, random, 3, True), one_by_one(images, random, 3, True))


def test_half_of_the_images_are_mirrored() -> None:
    images = pictures(torch.uint8, batch=1).expand(4000, -1, -1, -1)
    moved = shift_and_flip(images, uniforms(0, 0, np.arange(4000), DRAWS), 0, True)
    mirrored = int((moved == images.flip(3)).flatten(1).all(1).sum())
    assert abs(mirrored - 2000) < 5 * 32
    assert int((moved == images).flatten(1).all(1).sum()) == 4000 - mirrored


def test_without_pad_and_flip_images_stay_as_they_are() -> None:
    images = pictures(torch.float32)
    assert torch.equal(shift_and_flip(images, np.zeros((40, DRAWS)), 0, False), images)


def test_the_images_handed_in_are_left_alone() -> None:
    images = pictures(torch.uint8)
    before = images.clone()
    shift_and_flip(images, uniforms(0, 0, np.arange(40), DRAWS), 2, True)
    assert torch.equal(images, before)


@pytest.mark.parametrize(("pad", "flip"), [(1, False), (2, True), (0, True)])
@pytest.mark.parametrize("channels", [1, 3])
def test_the_memory_format_of_images_stays(channels: int, pad: int, flip: bool) -> None:
    """A convolution of images in channels_last has other last bits."""
    images = torch.rand(9, 6, 5, channels).permute(0, 3, 1, 2)
    draws = uniforms(0, 0, np.arange(9), DRAWS)
    moved = shift_and_flip(images, draws, pad, flip)
    assert moved.stride() == images.stride()
    assert torch.equal(moved, shift_and_flip(torch.stack(list(images)), draws, pad, flip))


@pytest.mark.parametrize(("pad", "flip"), [(1, False), (2, True), (0, True)])
def test_moved_images_begin_where_torch_lets_tensors_begin(pad: int, flip: bool) -> None:
    """The last bits of a matrix product depend on it; NumPy's memory begins at any multiple of 16 bytes."""
    some = [
        shift_and_flip(torch.rand(n, 1, 3, 5), uniforms(0, 0, np.arange(n), DRAWS), pad, flip) for n in range(1, 60)
    ]
    assert {moved.data_ptr() % 64 for moved in some} == {0}


def test_types_that_numpy_does_not_know_are_shifted() -> None:
    images, draws = torch.rand(9, 1, 3, 5).to(torch.float8_e4m3fn), uniforms(0, 0, np.arange(9), DRAWS)
    assert torch.equal(shift_and_flip(images, draws, 1, False).float(), shift_and_flip(images.float(), draws, 1, False))
