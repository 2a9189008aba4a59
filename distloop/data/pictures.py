"""A picture from a file, for the folders of pictures: its 8 bits a channel are exact, or it is refused."""

import re
from typing import Any

import numpy as np

from distloop.errors import UsageError

WAY_OUT = "Convert the files, or load them with a data set of your own that gives floats: docs/own-code.md, Pictures."


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
