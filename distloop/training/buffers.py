"""Buffers of models, such as BatchNorm's statistics: the same on all ranks before a validation and a save."""

import torch
import torch.distributed as dist
from torch import nn

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


def broadcast_buffers(*models: nn.Module | None) -> None:
    """Give all ranks rank 0's buffers."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        for model in models:
            for buffer in model.buffers() if model is not None else ():
                if buffer.layout != torch.strided:
                    continue  # not in a checkpoint either
                if buffer.dtype in EXCHANGED:
                    dist.broadcast(buffer, src=0)
                else:  # no group sends int16 or float8: their bytes
                    whole = buffer.contiguous()
                    dist.broadcast(whole.reshape(-1).view(torch.uint8), src=0)
                    buffer.copy_(whole)
