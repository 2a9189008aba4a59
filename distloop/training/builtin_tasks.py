"""The task that the config names: a built-in one, or your own as module:class."""

from collections.abc import Callable

from distloop.config.registry import call, resolve
from distloop.config.settings import Task as TaskConfig
from distloop.data.seeding import Place, building
from distloop.errors import UsageError
from distloop.training.classification import Classification
from distloop.training.language_modelling import LanguageModelling
from distloop.training.regression import Regression
from distloop.training.segmentation import Segmentation
from distloop.training.tasks import Task, check_attributes

TASKS: dict[str, Callable[..., Task]] = {
    "classification": Classification,
    "regression": Regression,
    "segmentation": Segmentation,
    "language_modelling": LanguageModelling,
}


def build_task(config: TaskConfig, seed: int | None = None) -> Task:
    """The task that the config names. `seed`: the run's, for what building it draws. Raises UsageError."""
    with building(Place.TASK, seed):
        task = call("task.args", resolve("task.name", config.name, TASKS), config.args, {})
    if not isinstance(task, Task):
        raise UsageError(
            f"task.name = {config.name!r} gave a {type(task).__name__}; derive its class from distloop.tasks.Task."
        )
    check_attributes(task)
    return task
