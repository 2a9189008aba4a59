"""What a forward pass changes, such as BatchNorm's statistics: the same on all ranks before a validation and a save."""

import hashlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from distloop.errors import UsageError

EXCHANGED: tuple[torch.dtype, ...] = (
    torch.float32,
    torch.float64,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.int32,
    torch.uint8,
)
EXCHANGED += (torch.int8, torch.bool, torch.complex64, torch.complex128)  # the dtypes that gloo and NCCL know


def broadcast_buffers(*models: Any) -> None:
    """Give all ranks rank 0's buffers. Of a task that is no module: raise UsageError, on all ranks, if its state_dict()
    differs between them. None and other tasks are left out."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        for model in models:
            if not isinstance(model, nn.Module):
                if hasattr(model, "state_dict"):
                    _refuse_other_state(model)
                continue
            for buffer in model.buffers():
                if buffer.layout != torch.strided:
                    continue  # not in a checkpoint either
                if buffer.dtype in EXCHANGED:
                    dist.broadcast(buffer, src=0)
                else:  # no group sends int16 or float8: their bytes
                    whole = buffer.contiguous()
                    dist.broadcast(whole.reshape(-1).view(torch.uint8), src=0)
                    buffer.copy_(whole)


def _refuse_other_state(task: Any) -> None:
    digest = hashlib.sha256()
    for part in _bytes_of(task.state_dict()):
        digest.update(part)
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, digest.hexdigest())
    if others := [rank for rank, each in enumerate(found) if each != found[0]]:
        raise UsageError(
            f"{type(task).__name__}.state_dict() gives something else on rank {others[0]} than on rank 0. A checkpoint "
            "holds one state for all ranks, so that a run that is continued would train something else. Let the state "
            "follow from what all ranks know alike, such as self.now.step and what summary() gets, and not from the "
            "batches of a rank."
        )


def _bytes_of(value: Any) -> Iterator[bytes]:
    """What tells states of plain data apart."""
    if isinstance(value, Tensor):
        yield f"{value.dtype} {list(value.shape)}".encode()
        yield value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    elif isinstance(value, (dict, list, tuple)):
        yield f"{type(value).__name__} {len(value)}".encode()
        for inner in value.items() if isinstance(value, dict) else value:
            yield from _bytes_of(inner)
    else:
        yield f"{value!r};".encode()
