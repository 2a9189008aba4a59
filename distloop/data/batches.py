"""A batch: its inputs and targets, and the form in which a model takes it."""

import copy
import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from distloop.data.datasets import DataSource
from distloop.errors import UsageError

PLAIN = (tuple, list)  # which most batches are: asked first, since each step asks several times
COMPLEX = {torch.float32: torch.complex64, torch.float64: torch.complex128}  # as precise as the real ones


def inputs_of(batch: Any) -> Any:
    """The inputs of a batch: its first element, or what it holds under the name "inputs"."""
    return _part(batch, 0, "inputs")


def targets_of(batch: Any) -> Any:
    """The targets of a batch: its second element, or what it holds under the name "targets"."""
    return _part(batch, 1, "targets")


def with_inputs(batch: Any, inputs: Any) -> Any:
    """The batch with other inputs."""
    return _with_part(batch, 0, "inputs", inputs)


def with_targets(batch: Any, targets: Any) -> Any:
    """The batch with other targets."""
    return _with_part(batch, 1, "targets", targets)


def _with_part(batch: Any, position: int, key: str, value: Any) -> Any:
    """The batch with another value where _part() finds one."""
    if type(batch) in PLAIN:
        return type(batch)((*batch[:position], value, *batch[position + 1 :]))
    if isinstance(batch, dict):
        return {**batch, key: value}
    if isinstance(batch, Mapping):
        return _with_items(batch, {key: value})
    if _is_dataclass(batch):
        return _with_fields(batch, {key: value})
    if names := _names(batch):
        return type(batch)(**{**batch._asdict(), key if key in names else names[position]: value})
    return type(batch)((*batch[:position], value, *batch[position + 1 :]))


def _part(batch: Any, position: int, key: str) -> Any:
    if type(batch) in PLAIN and position < len(batch):
        return batch[position]
    names = _names(batch)
    try:
        if _is_dataclass(batch) or key in names:
            return getattr(batch, key)
        if isinstance(batch, Mapping):
            return batch[key]
        if names and names[position] in ("inputs", "targets"):  # the other one stands here
            raise KeyError(key)
        return batch[position]
    except (KeyError, IndexError, TypeError, AttributeError):
        have = f"a {type(batch).__name__}"
        if isinstance(batch, dict):
            have = f"a dict of {list(batch)}"
        elif fields := names or ([field.name for field in dataclasses.fields(batch)] if _is_dataclass(batch) else []):
            have += f" of {', '.join(fields)}"
        raise UsageError(
            f"The batch has no {key}: it is {have}. Use tuples (inputs, targets) or dicts with 'inputs' and "
            "'targets', or a task of your own with its own forward() and loss()."
        ) from None


def _names(batch: Any) -> tuple[str, ...]:
    """The names of a named tuple; else none."""
    return getattr(type(batch), "_fields", ()) if isinstance(batch, tuple) else ()


def _is_dataclass(value: Any) -> bool:
    return dataclasses.is_dataclass(value) and not isinstance(value, type)


def _with_fields(batch: Any, values: Mapping[str, Any]) -> Any:
    """A copy of a dataclass with other fields, also if it is frozen. Its __init__ is not called once more."""
    other = copy.copy(batch)
    for name, value in values.items():
        object.__setattr__(other, name, value)
    return other


def _with_items(batch: Mapping[Any, Any], values: Mapping[Any, Any]) -> Any:
    """A copy of a mapping with other values. One that does not change is made anew."""
    if not hasattr(type(batch), "__setitem__"):
        make: Any = type(batch)
        return make({**batch, **values})
    other: Any = copy.copy(batch)
    for key, value in values.items():
        other[key] = value
    return other


def to_model(batch: Any, source: DataSource, dtype: torch.dtype, device: torch.device | None = None) -> Any:
    """The batch in the form that the model takes: uint8 images normalised, floating tensors in `dtype`; on `device`, if
    one is given. Images are normalised there: bytes are a quarter of the traffic. Raises UsageError."""
    if source.mean and source.std:
        images = inputs_of(batch)
        if isinstance(images, Tensor) and not (images.is_floating_point() or images.is_complex()):
            if images.dtype != torch.uint8:
                raise UsageError(
                    f"The inputs are {_short(images.dtype)}, and mean and std of the DataSource are those of uint8 "
                    "images, 0 to 255. Give floats from 0 to 1 in __getitem__, normalised there, and no mean and std: "
                    "for 16 bits, (image / 65535 - mean) / std."
                )
            images = images.to(device)
            scale, shift = _normalisation(tuple(source.mean), tuple(source.std), dtype, images.device)
            batch = with_inputs(batch, images.to(dtype).mul_(scale).sub_(shift))
    return cast(batch, dtype, device)


@functools.cache
def _normalisation(
    mean: tuple[float, ...], std: tuple[float, ...], dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    """(scale, shift), [channels, 1, 1], with which (x / 255 - mean) / std is x · scale - shift."""
    means, stds = (torch.tensor(value, dtype=torch.float64)[:, None, None] for value in (mean, std))
    return (1 / (255 * stds)).to(device, dtype), (means / stds).to(device, dtype)


def send(batch: Any, device: torch.device) -> Any:
    """`batch` on `device`. Raises UsageError for a class of its own whose tensors would stay where they are."""
    return cast(batch, None, device)


def cast(batch: Any, dtype: torch.dtype | None, device: torch.device | None = None) -> Any:
    """`batch` with its floating tensors in `dtype`, and complex ones in the complex dtype of that precision; on
    `device`, if one is given. Goes through tuples, lists, mappings and dataclasses; any other object has a method
    to(device), holds no tensors, or is refused with UsageError."""
    if isinstance(batch, Tensor):
        if batch.is_floating_point():
            return batch.to(device=device, dtype=dtype)
        if batch.is_complex():
            return batch.to(device=device, dtype=COMPLEX.get(dtype) if dtype else None)
        return batch if device is None else batch.to(device)
    if isinstance(batch, (str, bytes, int, float, complex, type(None))):  # of most lists
        return batch
    if isinstance(batch, PackedSequence):  # a named tuple, of which a part has to stay on the CPU
        packed: Any = batch
        return packed.to(device=device, dtype=dtype if packed.data.is_floating_point() else None)
    if isinstance(batch, (tuple, list)):
        values = [cast(value, dtype, device) for value in batch]
        if type(batch) is list:
            return values
        return type(batch)(*values) if _names(batch) else type(batch)(values)
    if isinstance(batch, dict):
        return {key: cast(value, dtype, device) for key, value in batch.items()}
    return _cast_object(batch, dtype, device)


def _cast_object(batch: Any, dtype: torch.dtype | None, device: torch.device | None) -> Any:
    if isinstance(batch, Mapping):  # such as the batches of a tokenizer
        return _with_items(batch, {key: cast(value, dtype, device) for key, value in batch.items()})
    if _is_dataclass(batch):
        names = [field.name for field in dataclasses.fields(batch) if hasattr(batch, field.name)]  # init=False: unset
        return _with_fields(batch, {name: cast(getattr(batch, name), dtype, device) for name in names})
    if callable(getattr(type(batch), "to", None)):  # as Accelerate moves what is no tensor
        moved = batch if device is None else batch.to(device)
        if moved is None:
            raise UsageError(
                f"{type(batch).__name__}.to(device) returns None. A batch is what it returns: end it with return self."
            )
        return moved
    if (
        held := [name for name, value in vars(batch).items() if _has_tensors(value)]
        if hasattr(batch, "__dict__")
        else []
    ):
        kind = type(batch).__name__
        raise UsageError(
            f"A batch holds a {kind}, whose tensors ({', '.join(held[:3])}) would stay on the CPU, and would not be "
            f"cast to the config's dtype. Make {kind} a dataclass (@dataclasses.dataclass), give it a method "
            "to(device) that returns it there, or let the data set or data.collate give tuples or dicts."
        )
    return batch


def _has_tensors(value: Any) -> bool:
    if isinstance(value, Mapping):
        value = list(value.values())
    return isinstance(value, Tensor) or (isinstance(value, (list, tuple)) and any(map(_has_tensors, value)))


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
