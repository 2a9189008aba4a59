"""A batch: its inputs and targets, and the form in which a model takes it."""

from __future__ import annotations

from typing import Any

from distloop.errors import UsageError


def inputs_of(batch: Any) -> Any:
    """The inputs of a batch: its first element, or what a dict holds under "inputs"."""
    return _part(batch, 0, "inputs")


def targets_of(batch: Any) -> Any:
    """The targets of a batch: its second element, or what a dict holds under "targets"."""
    return _part(batch, 1, "targets")


def with_inputs(batch: Any, inputs: Any) -> Any:
    """The batch with other inputs."""
    if isinstance(batch, dict):
        return {**batch, "inputs": inputs}
    rest = batch[1:]
    return type(batch)(inputs, *rest) if hasattr(batch, "_fields") else type(batch)((inputs, *rest))


def _part(batch: Any, position: int, key: str) -> Any:
    try:
        return batch[key] if isinstance(batch, dict) else batch[position]
    except (KeyError, IndexError, TypeError):
        have = f"a dict of {list(batch)}" if isinstance(batch, dict) else f"a {type(batch).__name__}"
        raise UsageError(
            f"The batch has no {key}: it is {have}. Use tuples (inputs, targets) or dicts with 'inputs' and "
            "'targets', or a task of your own with its own forward() and loss()."
        ) from None
