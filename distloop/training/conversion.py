"""A model as its user has built it, on the device and in the config's dtype: exact, or refused by name."""

import itertools
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from distloop.data.batches import COMPLEX
from distloop.errors import UsageError
from distloop.run.module_state import check_tensors, make_whole

# What is called of a module, here, in PyTorch and in Accelerate.
METHODS = "forward train eval to apply children modules named_modules parameters named_parameters buffers named_buffers"
METHODS += " state_dict load_state_dict zero_grad compile"


def convert(model: nn.Module, device: torch.device, dtype: torch.dtype, what: str = "model") -> nn.Module:
    """The model, or `what` it is else, on `device`, in place: its floating tensors in `dtype`, complex ones in the
    complex dtype of that precision; buffers that are views of fewer numbers than they show become whole. Raises
    UsageError for what would become something else, or hides what a module does."""
    for name, module in model.named_modules():
        if hidden := [method for method in METHODS.split() if not callable(getattr(module, method))]:
            kind = type(module).__name__
            raise UsageError(
                f"The {_place(what, name, kind)} has an attribute {hidden[0]} of its own, in the place of the method "
                "of all modules. Give it another name."
            )
    make_whole(model)
    check_tensors(f"The {what}'s ", model, is_built=False)
    for name, tensor in _named_tensors(model):
        _check_values(f"{what}'s {name}", tensor, dtype)
    if any(tensor.is_complex() for _, tensor in _named_tensors(model)):

        def converted(tensor: Tensor) -> Tensor:
            if tensor.is_complex():
                return tensor.to(device, COMPLEX[dtype])
            return tensor.to(device, dtype if tensor.is_floating_point() else None)

        return model._apply(converted)  # as Module.to() does it, which makes complex numbers real
    return model.to(device, dtype)


def _place(what: str, name: str, kind: str) -> str:
    return f"{what}'s {name} ({kind})" if name else f"{what}, a {kind},"


def _named_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    tensors = itertools.chain(model.named_parameters(), model.named_buffers())
    return ((name, tensor) for name, tensor in tensors if not nn.parameter.is_lazy(tensor))


@torch.no_grad()
def _check_values(name: str, tensor: Tensor, dtype: torch.dtype) -> None:
    if tensor.dtype != torch.float64 or dtype == torch.float64 or tensor.layout != torch.strided:  # all others fit
        return
    narrow = tensor.to(dtype).double()
    # Whole numbers below 2^53 are counts, more likely than not; others are rounded, as asked for.
    wrong = (narrow != tensor) & (tensor == tensor.round()) & (tensor.abs() <= 2**53)
    if bool(wrong.any()):
        value, other = (float(values[wrong][0]) for values in (tensor, narrow))
        raise UsageError(
            f"The {name} is float64 and holds {value:.17g}, which the config's dtype, float32, makes "
            f"{other:.17g}. Keep whole numbers in an int64 buffer, make it float32 yourself (.float()), or set dtype: "
            "float64."
        )
