"""What a module keeps beside its tensors, and what of a module a checkpoint cannot hold."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from distloop.errors import UsageError


def tensors_and_extra(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(parameters and buffers, what else its state_dict() has: what get_extra_state() gives), by their names there. A
    tensor of get_extra_state() belongs to the rest: its shape may change."""
    state = model.state_dict()
    tensors = {name: value for name, value in state.items() if isinstance(value, Tensor) and not is_extra(name)}
    return tensors, {name: value for name, value in state.items() if name not in tensors}


def is_extra(name: str) -> bool:
    """Whether a name of a state_dict() is that of a module's extra state."""
    return name.rpartition(".")[2] == "_extra_state"  # as PyTorch calls it


def check_tensors(what: str, model: nn.Module, is_built: bool = True) -> None:
    """Raise UsageError for a tensor that a checkpoint cannot hold. `what`: begins the message, such as "model.".
    `is_built`: a forward pass has initialised what torch's lazy modules leave open."""
    trained = dict(model.named_parameters(remove_duplicate=False))
    for name, tensor in tensors_and_extra(model)[0].items():
        if problem := next(_problems(tensor, is_built, name in trained), None):
            raise UsageError(f"{what}{name} {problem}")


def repeats_itself(tensor: Tensor) -> bool:
    """True if some elements of a tensor are one number in memory, as expand() and unfold() make it."""
    if nn.parameter.is_lazy(tensor) or tensor.layout != torch.strided or not tensor.numel():
        return False
    dimensions = [(size, stride) for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if size > 1]
    numbers = 1 + sum((size - 1) * stride for size, stride in dimensions)  # at most, from the first to the last
    return tensor.numel() > numbers or any(stride == 0 for _, stride in dimensions)


def make_whole(model: nn.Module) -> None:
    """Give buffers that expand() made, of which many elements are one number in memory, memory of their own: nothing
    can be copied into the others, as loading a checkpoint does."""
    whole: dict[int, Tensor] = {}
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False, remove_duplicate=False):
            if repeats_itself(buffer):
                setattr(module, name, whole.setdefault(id(buffer), buffer.clone(memory_format=torch.contiguous_format)))


def _problems(tensor: Tensor, is_built: bool, is_parameter: bool) -> Iterator[str]:
    if nn.parameter.is_lazy(tensor):
        if is_built:
            yield "is not initialised: no forward pass used its lazy module. Take it out, or give it its size."
    elif tensor.is_meta:
        yield "has no values: it is on the meta device. Build the model on the CPU, or call to_empty() and fill it."
    elif tensor.is_quantized:
        yield "is quantised, and cannot be trained or saved. Train the float model, and quantise it afterwards."
    elif tensor.layout != torch.strided:
        layout = str(tensor.layout).removeprefix("torch.")
        yield (
            f"is a tensor of layout {layout}, which a checkpoint cannot hold. Register what it is made of, such as "
            "indices and values, as buffers; or register it with persistent=False, if __init__ makes it anew."
        )
    elif hasattr(type(tensor), "__tensor_flatten__"):
        yield f"is a {type(tensor).__name__}, a tensor made of others, which a checkpoint cannot hold. Use plain ones."
    elif is_parameter and repeats_itself(tensor):  # buffers are made whole
        yield (
            f"shows fewer numbers as {tensor.numel()} elements, as expand() does: no optimizer can update it, and no "
            "checkpoint can be loaded into it. Keep the smaller one, and expand it in forward(); or make the elements "
            "numbers of their own: .clone() before nn.Parameter()."
        )
