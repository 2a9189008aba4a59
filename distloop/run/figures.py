"""Pictures that a loop shows beside its rows: figures/step_00000120/NAME.png in the run directory, a bounded number."""

import io
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from distloop.errors import UsageError
from distloop.ranks.sums import describe
from distloop.ranks.talking import say
from distloop.run.files import FIGURES, write_bytes

MOST_OF_A_STEP = 16
STEPS_KEPT = 20
LARGEST_SIDE = 2000  # pixels
NAME = re.compile(r"[A-Za-z0-9_-]{1,100}")
FOLDER = re.compile(r"step_(\d{8,})")
FILE = re.compile(rf"{FIGURES}/{FOLDER.pattern}/{NAME.pattern}\.png")  # what a row may name
MODES = {"L": "L", "LA": "LA", "RGB": "RGB", "RGBA": "RGBA", "1": "L", "P": "RGBA", "CMYK": "RGB"}  # PIL's: as written
TAKEN = (
    "It takes a figure of matplotlib, an image of PIL, or an array or tensor of shape [height, width], "
    "[height, width, 3 or 4] or [1 or 3, height, width], of uint8 (0 to 255) or floats (0 to 1)."
)


class Figures:
    """Writes pictures into the directory of a run. Use it on rank 0 only."""

    def __init__(self, run: Path, first_step: int, check_ownership: Callable[[], None] = lambda: None) -> None:
        """`first_step`: how many steps were done when the attempt began. Removes the pictures of later ones, which are
        done again."""
        self.run, self.check_ownership = run, check_ownership
        self.step, self.count = first_step, 0  # of the last picture; how many its step has
        self.said: set[str] = set()
        self._remove([step for step in self._steps() if step > first_step])

    def write(self, name: str, step: int, picture: Any) -> str | None:
        """Write a picture; returns its file as its row names it, or None, after one line, if it cannot be written.

        Raises UsageError for what is no picture, or a name that is none for a file.
        """
        where = f"trackers.figure({name!r}, {step}, …)"
        if not (isinstance(name, str) and NAME.fullmatch(name)):
            raise UsageError(f"{where}: a picture's name has 1 to 100 letters, digits, _ and -.")
        self.count = self.count + 1 if step == self.step else 1
        self.step = step
        if self.count > MOST_OF_A_STEP:
            self._warn("count", f"{where}: a step has at most {MOST_OF_A_STEP} pictures; more of one are left out")
            return None
        path = self._folder(step) / f"{name}.png"
        try:
            png, changed = as_png(picture, where)
            self.check_ownership()
            path.parent.mkdir(parents=True, exist_ok=True)
            write_bytes(path, png)
        except UsageError:
            raise
        except Exception as error:  # a full disk, or a library that draws: no reason to end the run
            reason = getattr(error, "strerror", None) or " ".join(str(error).split())[:200] or type(error).__name__
            self._warn("failure", f"{where} was not written ({reason}); training goes on")
            return None
        if changed:
            self._warn("change", f"{where}: {changed}")
        self._remove(self._steps()[:-STEPS_KEPT])
        return str(path.relative_to(self.run))

    def _folder(self, step: int) -> Path:
        return self.run / FIGURES / f"step_{step:08d}"

    def _steps(self) -> list[int]:
        """The steps with pictures, in order."""
        found = (FOLDER.fullmatch(path.name) for path in (self.run / FIGURES).glob("step_*"))
        return sorted(int(one[1]) for one in found if one)

    def _remove(self, steps: list[int]) -> None:
        for step in steps:
            self.check_ownership()
            shutil.rmtree(self._folder(step), ignore_errors=True)

    def _warn(self, kind: str, text: str) -> None:
        """Print a warning, the first of its kind in this attempt."""
        if kind not in self.said:
            self.said.add(kind)
            say(f"distloop: WARNING: {text}")


def as_png(picture: Any, where: str) -> tuple[bytes, str]:
    """(the picture as a PNG of at most LARGEST_SIDE pixels a side, what was changed about its values or "").

    Raises UsageError, which begins with `where`, for what is no picture.
    """
    changed = ""
    if _is_a(picture, "matplotlib.figure", "Figure"):
        return _drawn(picture), changed
    if _is_a(picture, "PIL.Image", "Image"):
        if picture.mode not in MODES:
            raise UsageError(f"{where}: the image has PIL's mode {picture.mode}; convert it to RGB or L. {TAKEN}")
        image = picture.convert(MODES[picture.mode])  # a copy
    else:
        from PIL import Image

        pixels, changed = _pixels(picture, where)
        image = Image.fromarray(pixels)
    image.thumbnail((LARGEST_SIDE, LARGEST_SIDE))  # does nothing to a smaller one
    return _encoded(image), changed


def _is_a(value: Any, module: str, name: str) -> bool:
    """Whether `value` is of this class, without importing its module: if nobody has, there is no object of it."""
    return isinstance(value, getattr(sys.modules.get(module), name, ()))


def _drawn(figure: Any) -> bytes:
    from PIL import Image

    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=min(figure.dpi, LARGEST_SIDE / max(figure.get_size_inches())))
    image = Image.open(png)
    if max(image.size) <= LARGEST_SIDE:
        return png.getvalue()
    image.thumbnail((LARGEST_SIDE, LARGEST_SIDE))  # matplotlib's settings may add to a figure's size
    return _encoded(image)


def _encoded(image: Any) -> bytes:
    png = io.BytesIO()
    image.save(png, "PNG")
    return png.getvalue()


def _pixels(picture: Any, where: str) -> tuple[Any, str]:
    """(an array of uint8, of shape [height, width] or [height, width, 3 or 4], what was changed about its values)."""
    import numpy as np

    if is_tensor := _is_a(picture, "torch", "Tensor"):
        picture = picture.detach().cpu()
        array = (picture.float() if picture.is_floating_point() else picture).numpy()  # NumPy lacks bfloat16
    else:
        array = picture
    is_float = isinstance(array, np.ndarray) and np.issubdtype(array.dtype, np.floating)
    if not isinstance(array, np.ndarray) or not (is_float or array.dtype == np.uint8):
        dtype = f" and {array.dtype}" if isinstance(array, np.ndarray) else ""
        raise UsageError(f"{where}: the picture is a {describe(picture)}{dtype}. {TAKEN}")
    channels_first = array.ndim == 3 and array.shape[0] in (1, 3)
    channels_last = array.ndim == 3 and array.shape[2] in (3, 4)
    if not array.size or not (array.ndim == 2 or channels_first or channels_last):
        raise UsageError(f"{where}: the picture is a {describe(picture)}. {TAKEN}")
    if channels_first and array.shape[0] == 1:
        array = array[0]
    elif channels_first and (is_tensor or not channels_last):  # where both fit, the library's own order
        array = np.moveaxis(array, 0, 2)
    changed = ""
    if is_float:
        low, high = float(array.min()), float(array.max())
        if not (low >= 0 and high <= 1):  # also for nan
            changed = f"the picture's values go from {low:.4g} to {high:.4g}; what is outside of 0 to 1 is cut off"
            array = np.nan_to_num(array, nan=0.0).clip(0, 1)
        array = np.rint(array * 255).astype(np.uint8)
    return np.ascontiguousarray(array), changed
