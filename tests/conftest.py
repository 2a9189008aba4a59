"""For all tests: one thread, since ranks and pytest share two cores."""

from __future__ import annotations

import torch

torch.set_num_threads(1)
