"""Data: which samples, in which order, changed how, brought how."""

from typing import TYPE_CHECKING

from distloop import hand_on

if TYPE_CHECKING:
    from distloop.data.datasets import DataSource as DataSource
    from distloop.data.datasets import load_data as load_data
    from distloop.data.loader import TrainBatches as TrainBatches
    from distloop.data.order import Plan as Plan
    from distloop.data.whole_batches import InMemory as InMemory
    from distloop.data.whole_batches import WholeBatches as WholeBatches
else:
    __getattr__ = hand_on(__name__, __file__)
