"""distloop: one explicit training loop, the same run on one process or many."""

import ast
import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

__version__ = "0.1.0"


def hand_on(room: str, file: str) -> Callable[[str], Any]:
    """The __getattr__ of a room: each name that its `if TYPE_CHECKING:` block imports, once it is asked for.

    So the names of a room stand in one place, type checkers know them, and nothing is imported that is not used: a
    launcher's process knows its rank before it imports torch, and `distloop status` does without.
    """
    block = next(node for node in ast.parse(Path(file).read_text(encoding="utf-8")).body if isinstance(node, ast.If))
    owners = {
        alias.name: str(node.module) for node in block.body if isinstance(node, ast.ImportFrom) for alias in node.names
    }

    def __getattr__(name: str) -> Any:
        if name not in owners:
            raise AttributeError(f"module {room!r} has no attribute {name!r}")
        return getattr(importlib.import_module(owners[name]), name)

    return __getattr__
