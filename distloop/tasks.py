"""Tasks of your own import from here: the base class and the built-in ones, which training/ defines."""

from distloop.data.batches import inputs_of, targets_of, with_inputs, with_targets
from distloop.training.classification import Classification
from distloop.training.language_modelling import LanguageModelling
from distloop.training.regression import Regression
from distloop.training.segmentation import Segmentation
from distloop.training.tasks import Guesses, Sums, Task

__all__ = [
    "Classification",
    "Guesses",
    "LanguageModelling",
    "Regression",
    "Segmentation",
    "Sums",
    "Task",
    "inputs_of",
    "targets_of",
    "with_inputs",
    "with_targets",
]
