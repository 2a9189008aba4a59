"""Find the callable with a name in the config: a built-in one, or the user's own as module:callable."""

import importlib
import inspect
import re
import sys
import traceback
from collections.abc import Callable, Mapping
from typing import Any

from distloop.config.notes import way_out
from distloop.config.places import start_folder
from distloop.config.settings import Config
from distloop.errors import UsageError, add_note, suggest


def resolve(key: str, name: str, known: Mapping[str, Callable[..., Any]]) -> Callable[..., Any]:
    """The callable with this name: one of `known`, or module:callable. Raises UsageError that names `key`."""
    if ":" in name:
        return import_callable(key, name)
    if name in known:
        return known[name]
    raise UsageError(f"{key} = {name!r} is not known.{suggest(name, list(known))} Your own: module:callable.")


def named_modules(config: Config) -> list[str]:
    """The modules that the config names as module:callable."""
    optimizers = (group.optimizer.name for group in config.optim.groups if group.optimizer)
    names = [config.data.name, config.data.collate or "", config.model.name, config.task.name]
    names += [config.optim.name, *optimizers, config.schedule.name]
    return list(dict.fromkeys(name.partition(":")[0] for name in names if ":" in name))


def import_callable(key: str, name: str) -> Callable[..., Any]:
    """The callable at "module:callable"; the module may be in the current folder. Raises UsageError."""
    module_name, _, attribute = name.partition(":")
    if (folder := start_folder()) not in sys.path and "" not in sys.path:
        sys.path.append(folder)
    try:
        module = importlib.import_module(module_name)
    except Exception as error:
        if isinstance(error, ModuleNotFoundError) and error.name and f"{module_name}.".startswith(f"{error.name}."):
            reason = f"there is no module '{error.name}' in {folder} or among the installed packages"
        else:
            reason = f"importing it raised {type(error).__name__}: {error} ({_failing_line(error)})"
        raise UsageError(f"{key} = {name!r}: {reason}.") from None
    target = getattr(module, attribute, None)
    if not callable(target):
        names = [name for name, value in vars(module).items() if callable(value) and not name.startswith("_")]
        raise UsageError(f"{key} = {name!r}: {module_name} has no callable '{attribute}'.{suggest(attribute, names)}")
    return target


def _failing_line(error: Exception) -> str:
    """The line of the user's own file at which importing it failed."""
    if isinstance(error, SyntaxError):
        return f"{error.filename}, line {error.lineno}"
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if not frame.filename.startswith("<frozen")]
    own = [frame for frame in frames if frame.name == "<module>" and "site-packages" not in frame.filename]
    frame = (own or frames)[-1]
    return f"{frame.filename}, line {frame.lineno}"


def call(
    key: str, function: Callable[..., Any], arguments: dict[str, Any], offered: dict[str, Any], *first: Any
) -> Any:
    """Call `function` with `first`, the config's `arguments`, and those of `offered` that its signature names. Raises
    UsageError that names `key` if they do not fit the signature, or if a function of distloop refuses them."""
    try:
        signature = inspect.signature(function)
    except ValueError:  # a builtin without a signature
        return function(*first, **arguments)
    extra = {name: value for name, value in offered.items() if name in signature.parameters and name not in arguments}
    try:
        signature.bind(*first, **arguments, **extra)
    except TypeError as error:
        takes = ", ".join(str(parameter) for parameter in signature.parameters.values())
        missing = re.fullmatch(r"missing a required argument: '(\w+)'", str(error))
        give = f" Give it: --{key}.{missing[1]} VALUE." if missing else ""
        raise UsageError(f"{key} = {arguments}: {error}; it takes ({takes}).{give}{way_out(key, arguments)}") from None
    try:
        return function(*first, **arguments, **extra)
    except Exception as error:
        if function.__module__.startswith(("distloop.", "torch.optim.")) and isinstance(
            error, (TypeError, ValueError, RuntimeError)
        ):
            raise UsageError(f"{key} = {arguments}: {error}.") from None
        name = f"{function.__module__}:{getattr(function, '__qualname__', function)}"
        add_note(error, f"calling {name}, which {key.partition('.')[0]}.name names, with {key} = {arguments}")
        raise  # the user's own code: they need the traceback
