"""A file that does something to whoever unpickles it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any


class Trap:
    """Unpickled, it makes a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.folder),)
