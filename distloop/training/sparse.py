"""Sparse gradients, of embeddings with sparse=True: which optimizers take them."""

import torch
import torch.distributed as dist
from torch import nn

from distloop.errors import UsageError
from distloop.training.groups import Member


def sparse_gradients(model: nn.Module) -> list[str]:
    """The names of the parameters whose gradients are sparse tensors: embeddings with sparse=True."""
    kinds = (nn.Embedding, nn.EmbeddingBag)
    modules = [(name, module) for name, module in model.named_modules() if isinstance(module, kinds)]
    names = [name for name, module in modules if module.sparse and module.weight.requires_grad]
    return [f"{name}.weight" if name else "weight" for name in names]


def check_sparse(key: str, kind: str, member: Member, optimizer: torch.optim.Optimizer, device: torch.device) -> None:
    """Raise UsageError unless the optimizer and the device can take the sparse gradient of `member`. `key`: of the
    optimizer's settings; `kind`: its name there."""
    group = next(g for g in optimizer.param_groups if any(each is member.parameter for each in g["params"]))
    hindering = {"sgd": ("momentum", "weight_decay"), "adagrad": ("weight_decay",)}.get(kind, ())
    given = [f"{name.replace('_', ' ')} {group[name]:g}" for name in hindering if group[name]]
    if kind == "sparseadam" or ":" in kind or (hindering and not given):
        if device.type == "cpu" or not (dist.is_initialized() and dist.get_world_size() > 1):
            return
        problem, way_out = "GPUs do not exchange sparse gradients", "Train on one GPU"
    else:
        problem = f"{key}.name = {kind!r}{' with ' if given else ''}{' and '.join(given)} cannot take it"
        way_out = (
            "Use --optim.name sgd --optim.momentum 0 --optim.weight-decay 0, or in optim.groups "
            f"{{match: {member.name}, optimizer: {{name: sparseadam}}}}"
        )
    raise UsageError(
        f"The gradient of the model's {member.name} is sparse (its embedding has sparse=True), and {problem}. "
        f"{way_out}, or leave out sparse=True: the updates are then those of whole tensors."
    )


def refuse_unforeseen_sparse(model: nn.Module) -> None:
    """After a backward pass, also one that DDP has not ended: raise UsageError for sparse gradients of other parameters
    than those of sparse_gradients()."""
    modules = [module for module in model.modules() if isinstance(module, (nn.Embedding, nn.EmbeddingBag))]
    known = {id(parameter) for module in modules if module.sparse for parameter in module.parameters()}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None and parameter.grad.is_sparse and id(parameter) not in known:
            raise UsageError(
                f"The gradient of the model's {name} is sparse, and it is no weight of a torch.nn.Embedding with "
                "sparse=True, by which the optimizer is chosen: neither that nor DistributedDataParallel can take it. "
                "Leave out sparse=True (or sparse_grad=True) where forward() looks it up: the updates are then those "
                "of whole tensors."
            )
