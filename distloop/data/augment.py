"""Augment whole batches of small images, with random numbers that the caller passes."""

import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

DRAWS = 3  # random numbers per sample: vertical shift, horizontal shift, flip


def shift_and_flip(images: Tensor, random: NDArray, pad: int, flip: bool) -> Tensor:
    """Shift each image by up to `pad` pixels (zeros fill the gap) and, if `flip`, mirror it with probability 1/2.

    images: any type, [batch, channels, height, width]; random: numbers in [0, 1), [batch, DRAWS]. The same as
    torchvision's RandomCrop(size, padding=pad) and RandomHorizontalFlip.
    """
    batch, _, height, width = images.shape
    if pad:
        padded = functional.pad(images, (pad, pad, pad, pad))
        windows = padded.unfold(2, height, 1).unfold(3, width, 1)  # a view: [batch, channels, 2p+1, 2p+1, h, w]
        offsets = torch.from_numpy((random[:, :2] * (2 * pad + 1)).astype("int64"))
        images = windows[torch.arange(batch), :, offsets[:, 0], offsets[:, 1]]
    if flip:
        mirrored = torch.from_numpy(random[:, 2] < 0.5)[:, None, None, None]
        images = torch.where(mirrored, images.flip(3), images)
    return images
