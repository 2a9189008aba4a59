"""A sample's image as a small picture that a page can hold."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

LARGEST = 128  # pixels


def png_uri(image: Any, mean: Sequence[float] | None = None, std: Sequence[float] | None = None) -> str | None:
    """The image as a PNG of at most 128 × 128 pixels in a data: URI; None for what is no image.

    `image`: [1 or 3 channels, height, width], bytes or floating. Floats between 0 and 1 are taken as they are; others
    were normalised, by `mean` and `std` if these are known for its channels, and are else stretched from their least
    to their greatest.
    """
    if not isinstance(image, Tensor) or image.ndim != 3 or image.shape[0] not in (1, 3) or not image.numel():
        return None
    image = image.detach().cpu()
    if image.is_floating_point():
        image = _bytes(image.float(), mean, std)
    elif image.dtype != torch.uint8:
        return None
    from PIL import Image

    pixels = image.permute(1, 2, 0).contiguous().numpy()
    picture = Image.fromarray(pixels[:, :, 0] if image.shape[0] == 1 else pixels)
    picture.thumbnail((LARGEST, LARGEST))
    file = io.BytesIO()
    picture.save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def _bytes(image: Tensor, mean: Sequence[float] | None, std: Sequence[float] | None) -> Tensor:
    """A floating image as uint8."""
    image = image.nan_to_num(0.0, 0.0, 0.0)
    if image.min() < 0 or image.max() > 1:
        if mean and std and len(mean) == len(std) == len(image):
            image = image * torch.tensor(std)[:, None, None] + torch.tensor(mean)[:, None, None]
        else:
            image = (image - image.min()) / (image.max() - image.min()).clamp(min=1e-12)
    return (image.clamp(0, 1) * 255).round().to(torch.uint8)
