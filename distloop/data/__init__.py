"""Data: which samples, in which order, changed how, brought how."""

from typing import TYPE_CHECKING

from distloop import hand_on

if TYPE_CHECKING:
    from distloop.data.datasets import DataSource, InMemory, load_data
    from distloop.data.loader import TrainBatches
    from distloop.data.order import Plan
else:
    __getattr__ = hand_on(__name__, __file__)
