"""Task and model are tried on one sample, and all targets in memory are checked, as the model is built."""

import re
from typing import Any

import torch
from torch import Tensor, nn

from distloop.data.batches import inputs_of, targets_of
from distloop.data.halves import halves, word_of
from distloop.data.whole_batches import InMemory, gives_batches
from distloop.errors import UsageError
from distloop.training.putting_back import put_back
from distloop.training.tasks import Guesses, Task

OF_DTYPES = re.compile(r"same dtype|scalar type|type \(.*\) should be the same|not implemented for '\w+'")


def try_out(task: Task, model: nn.Module, example: Any, source: Any) -> None:
    """Run task and model on the one-sample batch `example`, and check all targets of data sets in memory.

    Raises UsageError. So a mistake ends the run before training, and not on one rank in the middle of an epoch.
    """
    modules = (model, task.as_module)
    for module in modules:
        module.eval()
    with torch.no_grad():
        try:
            with put_back(model, task, keep_created=True):  # neither has seen a sample before training
                outputs = task.forward(model, example)
        except RuntimeError as error:
            if not OF_DTYPES.search(str(error)):
                raise
            raise UsageError(_of_dtypes(model, example, error)) from error
        task.probe(outputs)
        with put_back(task):
            guesses = task.guesses(outputs, example)
        check_guesses(guesses, 1 if task.weight == "samples" or guesses is None else len(guesses[0]))
    for module in modules:
        module.train()
    for name, half in halves(source).items():
        # Other data sets may change their targets as they load samples: the loader checks their batches.
        if isinstance(half, InMemory) and gives_batches(half):
            try:
                task.check_targets(half.targets)
            except UsageError as error:
                raise UsageError(f"In the {word_of(name)} data: {error}") from None


def _of_dtypes(model: nn.Module, example: Any, error: Exception) -> str:
    """What to do about a forward pass that failed because of the dtypes in the batch."""
    found = ((what, part(example)) for what, part in (("inputs", inputs_of), ("targets", targets_of)))
    try:
        forms = [f"{what} {_form(value)}" for what, value in found]
    except UsageError:  # a batch of another form
        forms = [f"a {type(example).__name__}"]
    own = str(next(model.parameters()).dtype).removeprefix("torch.")
    return (
        f"The model does not take what the data gives ({str(error).splitlines()[0]}). A batch of the first sample has "
        f"{', '.join(forms)}, and the model's parameters are {own}. Integers and bools stay what they are: give "
        "floats from __getitem__, such as image.float() / 255, or .long() where the model counts or looks up."
    )


def _form(value: Any) -> str:
    if not isinstance(value, Tensor):
        return f"of type {type(value).__name__}"
    return f"of {str(value.dtype).removeprefix('torch.')} {list(value.shape)}"


def check_guesses(guesses: Guesses | None, samples: int) -> None:
    """Raise UsageError unless the guesses have one value for each of the batch's `samples`."""
    if guesses is not None and any(values.shape != (samples,) for values in guesses):
        raise UsageError(
            f"task.guesses() must give labels, predictions and confidences of shape [{samples}], one for each sample "
            f"of the batch; it gave {', '.join(str(list(values.shape)) for values in guesses)}."
        )
