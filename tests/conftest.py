"""For all tests: one thread, since ranks and pytest share two cores; no word of the `make` that started pytest."""

from __future__ import annotations

import os

import torch

torch.set_num_threads(1)
for name in ("MAKEFLAGS", "MFLAGS", "MAKELEVEL"):  # with them a make that a test starts prints its folder
    os.environ.pop(name, None)
