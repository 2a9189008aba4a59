"""The model as a task has it in training: the same on one process and on many."""

import sys
import types
from typing import Any, cast

from torch import nn

from distloop.errors import UsageError

OF_MODULES = frozenset(dir(nn.Module()))  # what each torch.nn.Module has: parameters(), training, train(), …
ADVICE = (
    'Put what it does into the model\'s forward(), for example with an argument (`model(inputs, mode="encode")`), '
    "and let the task's forward() call `model(…)`; give a number such as `model.num_classes` to the task in task.args."
)


class TaskModel:
    """The call `model(…)` goes through DistributedDataParallel, where there is one. What each torch.nn.Module has, and
    what a task sets, are those of the bare model, so that names are the same on any number of processes. The model's
    own methods and attributes are not offered, on one process neither: several exchange only the gradients of what
    went through the call."""

    def __init__(self, model: nn.Module, bare_model: nn.Module) -> None:
        self.__dict__.update(_call=model, _bare_model=bare_model, _is_called=False)
        self.__dict__["_missed"] = []  # attributes that were asked for, and that the bare model has
        self.__dict__["_set"] = set()  # those that the task has set, and may read

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        self.__dict__["_is_called"] = True
        return self._call(*arguments, **named)

    forward = __call__

    def __getattr__(self, name: str) -> Any:
        # torch's own functions, such as torch.func.functional_call, look up modules and parameters by their names.
        if name in self._set or sys._getframe(1).f_globals.get("__name__", "").startswith("torch."):
            return getattr(self._bare_model, name)
        if name in OF_MODULES:
            return self._of_modules(getattr(self._bare_model, name))
        if name == "module":  # what DistributedDataParallel holds: code may ask for it
            self._missed.append("model.module")
        elif hasattr(self._bare_model, name):
            self._missed.append(f"model.{name}")
            raise UsageError(_bypass("The task", f"model.{name}"))  # of an AttributeError hasattr() makes False
        raise AttributeError(f"{type(self._bare_model).__name__!r} object has no attribute {name!r}")

    def _of_modules(self, value: Any) -> Any:
        """What torch.nn.Module has; of a method, one that gives this object where it would give the bare model."""
        if not isinstance(value, types.MethodType):
            return value

        def method(*arguments: Any, **named: Any) -> Any:
            result = value(*arguments, **named)
            return self if result is self._bare_model else result

        return method

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._bare_model, name, value)
        self._set.add(name)

    def __delattr__(self, name: str) -> None:
        delattr(self._bare_model, name)
        self._set.discard(name)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self._bare_model.__reduce_ex__(protocol)  # a copy of it is one of the bare model

    __class__ = property(lambda self: type(self._bare_model))  # for isinstance()


def offered_to_task(model: nn.Module, bare_model: nn.Module) -> nn.Module:
    """`model`, as prepared for training, as tasks have it: see TaskModel."""
    return cast(nn.Module, TaskModel(model, bare_model))


def refuse_bypass(kind: str, model: TaskModel) -> None:
    """Raise UsageError if the task, of that class name, has used more of the model than is offered."""
    if model._missed:
        raise UsageError(_bypass(kind, model._missed[0]))
    if not model._is_called:
        raise UsageError(
            f"{kind}.forward() does not call `model(…)`: several processes exchange the gradients of what went through "
            f"that call, and would drift apart. {ADVICE}"
        )


def _bypass(kind: str, what: str) -> str:
    return (
        f"{kind} uses `{what}`: with several processes the model is inside DistributedDataParallel, where the call "
        f"`model(…)` and the methods of torch.nn.Module alone work. {ADVICE}"
    )
