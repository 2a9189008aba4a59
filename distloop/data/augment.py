"""Augment images: whole batches of small ones, with random numbers that the caller passes; others one by one, with
torchvision's transforms, which draw from torch's global generator."""

import itertools
import operator
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

DRAWS = 3  # random numbers per sample: vertical shift, horizontal shift, flip
ALIGNMENT = 64  # bytes: where torch lets the memory of a tensor begin
AUGMENTS = ("none", "crop_flip", "trivial", "rand", "auto")


def shift_and_flip(images: Tensor, random: NDArray, pad: int, flip: bool) -> Tensor:
    """Shift each image by up to `pad` pixels (zeros fill the gap) and, if `flip`, mirror it with probability 1/2.

    images: any type, [batch, channels, height, width]; random: numbers in [0, 1), [batch, DRAWS]. The same as
    torchvision's RandomCrop(size, padding=pad) and RandomHorizontalFlip.
    """
    if not is_plain(images) or images.dtype in (torch.float8_e4m3fn, torch.float8_e5m2):
        return _shift_and_flip_by_torch(images, random, pad, flip)
    if images.dtype is torch.bfloat16:  # which NumPy does not know
        return shift_and_flip(images.view(torch.int16), random, pad, flip).view(torch.bfloat16)
    pixels = images.numpy()  # NumPy copies whole images where torch would pick pixel by pixel
    if pad:
        rows, columns = (random[:, :2] * (2 * pad + 1)).astype(np.int64).T
        pixels = _shifted(pixels, rows, columns, pad)
    if flip:
        mirrored = np.flatnonzero(random[:, 2] < 0.5)
        pixels = pixels if pad else pixels.copy()
        pixels[mirrored] = _mirrored(pixels[mirrored])
    moved = torch.from_numpy(pixels)
    # NumPy aligns memory less, and the last bits of a matrix product depend on that.
    return moved.clone() if moved.data_ptr() % ALIGNMENT else moved


def _shifted(pixels: NDArray, rows: NDArray[np.int64], columns: NDArray[np.int64], pad: int) -> NDArray:
    """Crops of the size of the images, [batch, channels, height, width], that begin at `rows` and `columns` of the
    padded ones. In memory a shift moves an image as one piece; pixels that it moves to the next row are cleared."""
    batch, channels, height, width = pixels.shape
    size, margin = height * width, pad * (width + 1)
    wide = np.zeros((batch * channels, margin + size + margin), pixels.dtype)
    wide[:, margin : margin + size] = pixels.reshape(-1, size)
    starts = (rows * width + columns).repeat(channels)
    moved = sliding_window_view(wide, size, 1)[np.arange(batch * channels), starts].reshape(pixels.shape)
    for shift in range(1, pad + 1):
        moved[columns == pad - shift, :, :, :shift] = 0
        moved[columns == pad + shift, :, :, max(0, width - shift) :] = 0
    return moved


def _mirrored(pixels: NDArray) -> NDArray:
    """The images, which lie in the order of their indices, from right to left; bytes are moved by eight or four."""
    count = next((count for count in (8, 4) if pixels.shape[-1] % count == 0 and pixels.itemsize == 1), 1)
    if count == 1:
        return pixels[..., ::-1]
    words = np.ascontiguousarray(pixels.view(f"u{count}")[..., ::-1])
    return words.byteswap(inplace=True).view(pixels.dtype)


def _shift_and_flip_by_torch(images: Tensor, random: NDArray, pad: int, flip: bool) -> Tensor:
    """The same for tensors that NumPy does not know, and for those whose memory format would be lost there."""
    if pad:
        padded = functional.pad(images, (pad, pad, pad, pad))
        windows = padded.unfold(2, images.shape[2], 1).unfold(3, images.shape[3], 1)
        rows, columns = torch.from_numpy((random[:, :2] * (2 * pad + 1)).astype("int64")).T
        images = windows[torch.arange(len(images)), :, rows, columns]
    if flip:
        mirrored = torch.from_numpy(random[:, 2] < 0.5)[:, None, None, None].to(images.device)
        images = torch.where(mirrored, images.flip(3), images)
    return images


def is_plain(tensor: Tensor) -> bool:
    """Whether a tensor is an ordinary one on the CPU, without a gradient, its numbers in the order of its indices.
    is_contiguous() says so of channels_last with one channel, too, with which a convolution gives other bits."""
    strides = itertools.accumulate(reversed(tensor.shape[1:]), operator.mul, initial=1)
    return (
        type(tensor) is Tensor
        and tensor.device.type == "cpu"
        and not (tensor.requires_grad or tensor.is_conj() or tensor.is_neg())
        and tensor.stride() == tuple(strides)[::-1]
    )


def check_augment(augment: str, erase: float, pad: int | None = None, flip: bool | None = None) -> None:
    """Raise ValueError for another name, for what is no probability, and for shifts and flips that `augment` rules
    out. None: nobody has asked for them."""
    if augment not in AUGMENTS:
        raise ValueError(f"augment is one of {', '.join(AUGMENTS)}, not {augment!r}")
    if isinstance(erase, bool) or not isinstance(erase, (int, float)) or not 0 <= erase <= 1:
        raise ValueError(f"erase is the probability, 0 to 1, that a part of an image is erased, not {erase!r}")
    if augment == "none" and (pad or flip):
        raise ValueError(
            "augment: none rules out pad and flip, which shift and mirror images. Leave these out, or give augment: "
            "crop_flip"
        )


def transform_of(first: Sequence[Any], augment: str, erase: float, mean: Sequence[float], policy: str) -> Any:
    """A transform from a picture of PIL, or a tensor of bytes, to bytes [channels, height, width]: `first`, transforms
    that crop and flip; the policy that `augment` names; erasing with the probability `erase`. In the order, and with
    the values, of torchvision's references/classification/presets.py.

    trivial: Müller and Hutter 2021, TrivialAugment (wide); rand: Cubuk et al. 2020, RandAugment (two operations of
    magnitude 9); auto: Cubuk et al. 2019, AutoAugment, with the `policy` that was found on "imagenet" or "cifar10";
    erase: Zhong et al. 2020. What is erased gets the channels' `mean` (0 to 1), rounded to a byte: it becomes 0 when it
    is normalised, to half a level of 255.
    """
    from torchvision.transforms import v2

    smooth = v2.InterpolationMode.BILINEAR
    steps = [*first]
    if augment == "trivial":
        steps.append(v2.TrivialAugmentWide(interpolation=smooth))
    elif augment == "rand":
        steps.append(v2.RandAugment(interpolation=smooth))
    elif augment == "auto":
        steps.append(v2.AutoAugment(v2.AutoAugmentPolicy(policy), interpolation=smooth))
    steps.append(v2.PILToTensor())
    if erase:
        steps.append(v2.RandomErasing(erase, value=[round(255 * share) for share in mean]))
    return v2.Compose(steps)
