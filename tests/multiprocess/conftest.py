"""For tests whose runs may be held, or outlive the rank that they belong to."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.tools.stopping import kill_all


@pytest.fixture
def nothing_is_left(tmp_path: Path) -> Iterator[None]:
    """Where a test fails, its processes may still wait: they end with it."""
    yield
    kill_all(tmp_path)
