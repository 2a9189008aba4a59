"""Crop and resize pictures that are tensors of bytes, [channels, height, width].

torchvision's own transforms would compute with floats on processors without AVX2; these give the same bytes on all.
Import it where it is needed: it imports torchvision.
"""

from typing import Any

from torch import Tensor
from torch.nn import Module
from torch.nn.functional import interpolate
from torchvision.transforms import v2


class RandomResizedCrop(v2.RandomResizedCrop):
    """torchvision's, with the same draws."""

    def transform(self, inpt: Tensor, params: dict[str, Any]) -> Tensor:
        top, left, height, width = (params[name] for name in ("top", "left", "height", "width"))
        return resized(inpt[:, top : top + height, left : left + width], *self.size)


class Resize(Module):
    """Scale a picture so that its shorter side has `size` pixels."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size

    def forward(self, picture: Tensor) -> Tensor:
        height, width = scaled(picture.shape[1], picture.shape[2], self.size)
        return picture if (height, width) == picture.shape[1:] else resized(picture, height, width)


def scaled(height: int, width: int, shorter: int) -> tuple[int, int]:
    """(height, width) of the picture whose shorter side has so many pixels, as torchvision rounds them."""
    if height < width:
        return shorter, int(shorter * width / height)
    return int(shorter * height / width), shorter


def resized(picture: Tensor, height: int, width: int) -> Tensor:
    """The picture in another size: bilinear, each pixel from all those that it covers, as PIL does it."""
    return interpolate(picture[None], (height, width), mode="bilinear", antialias=True)[0]
