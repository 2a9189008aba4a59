"""A batch: its inputs and targets, and the form in which a model takes it."""

import functools
from typing import Any

import torch

from distloop.data.datasets import DataSource
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


def to_model(batch: Any, source: DataSource, dtype: torch.dtype) -> Any:
    """The batch in the form that the model takes: uint8 images normalised, floating tensors in `dtype`. Images are
    normalised on the device: bytes are a quarter of the traffic."""
    if source.mean and source.std:
        images = inputs_of(batch)
        if isinstance(images, torch.Tensor) and images.dtype == torch.uint8:
            scale, shift = _normalisation(tuple(source.mean), tuple(source.std), dtype, images.device)
            batch = with_inputs(batch, images.to(dtype).mul_(scale).sub_(shift))
    return cast(batch, dtype)


@functools.cache
def _normalisation(
    mean: tuple[float, ...], std: tuple[float, ...], dtype: torch.dtype, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """(scale, shift), [channels, 1, 1], with which (x / 255 - mean) / std is x · scale - shift."""
    means, stds = (torch.tensor(value, dtype=torch.float64)[:, None, None] for value in (mean, std))
    return (1 / (255 * stds)).to(device, dtype), (means / stds).to(device, dtype)


def cast(batch: Any, dtype: torch.dtype) -> Any:
    """`batch` with its floating tensors in `dtype`."""
    if isinstance(batch, torch.Tensor):
        return batch.to(dtype) if batch.is_floating_point() else batch
    if isinstance(batch, dict):
        return {key: cast(value, dtype) for key, value in batch.items()}
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(cast(value, dtype) for value in batch))
    if isinstance(batch, (tuple, list)):
        return type(batch)(cast(value, dtype) for value in batch)
    return batch
