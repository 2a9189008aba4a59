"""A picture from a file, for the folders of pictures: its 8 bits a channel are exact, or it is refused."""

from typing import Any

import numpy as np

from distloop.errors import UsageError


def load_picture(path: str) -> Any:
    """The picture as an image of PIL in RGB. An alpha channel is left out; CMYK becomes RGB as PIL has it.

    Raises UsageError for one of 16 or 32 bits a channel whose values are no whole numbers from 0 to 255: PIL would clip
    them, so that a picture of 16 bits becomes white.
    """
    from PIL import Image

    with open(path, "rb") as file, Image.open(file) as image:
        if image.mode == "F" or image.mode.startswith("I"):
            values = np.asarray(image)
            if not ((values >= 0) & (values <= 255) & (values == np.round(values))).all():
                raise UsageError(
                    f"{path} has values from {values.min():g} to {values.max():g} (PIL's mode {image.mode}), and a "
                    "folder of pictures has 8 bits a channel, 0 to 255. Convert the files, or load them with a data "
                    "set of your own that gives floats: docs/own-code.md, Pictures."
                )
            return Image.fromarray(values.astype(np.uint8)).convert("RGB")
        return image.convert("RGB")
