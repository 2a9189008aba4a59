"""Which method of the user's an error came from, and with which samples: notes on the error, once it ends the run."""

import contextlib
import sys
import types
from collections.abc import Iterator, Mapping
from typing import Any

from distloop.errors import NOTE, add_note
from distloop.ranks.places import Position

METHODS = ("forward", "loss", "metrics", "guesses", "summary")  # of a task; the loader notes what it calls
NOT_OF_THE_MODEL = ("torch.nn.parallel.", "torch.optim.", "distloop.")  # modules around it


def note_user_code(error: BaseException, position: Position, names: Mapping[str, str]) -> None:
    """Note on the error what its traceback tells. `names`: those of data, model and task in the config, by their keys.
    Nothing is kept for that while the run goes on."""
    with contextlib.suppress(Exception):  # of an object of the user's that is looked at
        notes = list(_notes(error, position, names))
        for text in notes:
            add_note(error, text)


def _notes(error: BaseException, position: Position, names: Mapping[str, str]) -> Iterator[str]:
    methods = [method for frame in _frames(error) if (method := _method_of_task(frame))]
    modules = [type(frame.f_locals["self"]).__name__ for frame in _frames(error) if _is_forward(frame)]
    where = f"in step {position.step}, " if position.step else ""
    if methods:
        yield f"{where}{methods[0]}{_setting('task.name', names)}"
    if modules:
        yield f"{where}forward() of the model: {' > '.join(modules)}{_setting('model.name', names)}"
    if (methods or modules) and position.samples is not None:
        with contextlib.suppress(NameError):  # before the first batch
            yield f"the batch has samples {position.samples()}"


def _frames(error: BaseException) -> Iterator[types.FrameType]:
    trace = error.__traceback__
    while trace is not None:
        yield trace.tb_frame
        trace = trace.tb_next


def _method_of_task(frame: types.FrameType) -> str:
    """Such as "task.loss() of NextLetter"; "" for other frames."""
    task = _class("distloop.training.tasks", "Task")
    it = frame.f_locals.get("self")
    name = frame.f_code.co_name
    return f"task.{name}() of {type(it).__name__}" if task and isinstance(it, task) and name in METHODS else ""


def _is_forward(frame: types.FrameType) -> bool:
    module, it = _class("torch.nn", "Module"), frame.f_locals.get("self")
    is_one = frame.f_code.co_name == "forward" and module is not None and isinstance(it, module)
    return is_one and not type(it).__module__.startswith(NOT_OF_THE_MODEL)


def _class(module: str, name: str) -> Any:
    """A class of a module that comes later, or is not imported before the rest: None if it is not imported yet."""
    return getattr(sys.modules.get(module), name, None)


def _setting(key: str, names: Mapping[str, str]) -> str:
    return f" ({key} = {names[key]!r})" if key in names else ""


def notes_in(trace: str) -> list[str]:
    """The notes in a traceback, without repetition."""
    lines = (line.strip() for line in trace.splitlines())
    return list(dict.fromkeys(line.removeprefix(NOTE) for line in lines if line.startswith(NOTE)))


def without_notes(text: str) -> str:
    """An error's message without the notes that follow it."""
    return "\n".join(line for line in text.splitlines() if not line.startswith(NOTE))
