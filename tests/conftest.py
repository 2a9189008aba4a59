"""For all tests: one thread, since ranks and pytest share two cores; each has its own folder and no make above it."""

from __future__ import annotations

import os

import pytest
import torch

from distloop.config import places

torch.set_num_threads(1)
for name in ("MAKEFLAGS", "MFLAGS", "MAKELEVEL"):  # with them a make that a test starts prints its folder
    os.environ.pop(name, None)


@pytest.fixture(autouse=True)
def no_start_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    """Relative places begin in the current folder, and not where an earlier test of this process read a config."""
    monkeypatch.setattr(places, "_start_folder", None)
    monkeypatch.setattr(places, "_filled_in", {})
