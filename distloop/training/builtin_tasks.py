"""The task that the config names: a built-in one, or your own as module:class."""

import re
from collections.abc import Callable

from distloop.config.registry import call, resolve
from distloop.config.settings import Task as TaskConfig
from distloop.data.seeding import Place, building
from distloop.errors import UsageError
from distloop.training.classification import Classification
from distloop.training.language_modelling import LanguageModelling
from distloop.training.regression import Regression
from distloop.training.segmentation import Segmentation
from distloop.training.tasks import Task, check_attributes, taken_by_task

TASKS: dict[str, Callable[..., Task]] = {
    "classification": Classification,
    "regression": Regression,
    "segmentation": Segmentation,
    "language_modelling": LanguageModelling,
}


def build_task(config: TaskConfig, seed: int | None = None) -> Task:
    """The task that the config names. `seed`: the run's, for what building it draws. Raises UsageError."""
    kind = resolve("task.name", config.name, TASKS)
    try:
        with building(Place.TASK, seed):
            task = call("task.args", kind, config.args, {})
    except KeyError as error:  # of torch, for a parameter under the name of an attribute that each task has
        found = re.fullmatch(r"attribute '(\w+)' already exists", str(error.args[0])) if error.args else None
        if found is None or not hasattr(Task, found[1]):
            raise
        raise taken_by_task(getattr(kind, "__name__", config.name), found[1], "parameter or buffer") from None
    if not isinstance(task, Task):
        raise UsageError(
            f"task.name = {config.name!r} gave a {type(task).__name__}; derive its class from distloop.tasks.Task."
        )
    check_attributes(task)
    return task
