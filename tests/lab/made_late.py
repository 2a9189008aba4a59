"""Models whose state is made, or takes its shape, in a forward pass, or has names of its own; and tasks beside them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from distloop.tasks import Classification


def make_data(validation: int = 16, ordered: bool = False) -> tuple[TensorDataset, TensorDataset]:
    """Two classes. `ordered`: the last samples of the validation are all of class 0."""
    inputs = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))
    labels = (inputs[:, 0] > 0).long()
    validated = torch.tensor([0, 1] * 8 + [0] * 4) if ordered else labels[:validation]
    return TensorDataset(inputs, labels), TensorDataset(inputs[: len(validated)], validated)


class Cached(nn.Module):
    """A buffer that the first forward pass makes."""

    def __init__(self, persistent: bool = True) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 2)
        self.mask: Tensor | None
        self.register_buffer("mask", None, persistent=persistent)

    def forward(self, inputs: Tensor) -> Tensor:
        if self.mask is None:
            self.mask = torch.ones(8, dtype=inputs.dtype)
        return self.layer(inputs * self.mask)


class CachedInTraining(Cached):
    """A buffer that the first forward pass of training makes: an average of the weights has none before."""

    def forward(self, inputs: Tensor) -> Tensor:
        return super().forward(inputs) if self.training else self.layer(inputs)


class Resized(nn.Module):
    """A buffer that takes its shape in the first forward pass, as those of quantisation-aware training do."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 2)
        self.least: Tensor
        self.register_buffer("least", torch.zeros(0))

    def forward(self, inputs: Tensor) -> Tensor:
        least = inputs.detach().amin(0)
        if not self.least.numel():
            self.least.resize_(least.shape).copy_(least)
        elif self.training:
            self.least.copy_(torch.minimum(self.least, least))
        return self.layer(inputs)


class Spread(nn.Module):
    """A parameter that shows fewer numbers than it has elements. `habit`: how."""

    def __init__(self, habit: str) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 2)
        made = {"one": torch.ones(1).expand(8), "rows": torch.ones(8).expand(2, 8)}
        made["gaps"] = torch.ones(1, 800)[:, ::100].expand(2, 8)
        made["windows"] = torch.arange(9.0).unfold(0, 8, 1)
        self.scale = nn.Parameter(made[habit])

    def forward(self, inputs: Tensor) -> Tensor:
        return self.layer(inputs * self.scale.reshape(-1, 8)[0])


class ExpandedLate(nn.Module):
    """A buffer that the first forward pass of training expands from one number, and that stays in the state."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 2)
        self.scale: Tensor | None
        self.register_buffer("scale", None)

    def forward(self, inputs: Tensor) -> Tensor:
        if self.scale is None and self.training:
            self.scale = inputs.detach().abs().mean().expand(8)
        return self.layer(inputs if self.scale is None else inputs * self.scale)


class ExpandedAnew(nn.Module):
    """A buffer in the place of which each forward pass of training puts an expanded one."""

    mean: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 2)
        self.register_buffer("mean", torch.zeros(8))

    def forward(self, inputs: Tensor) -> Tensor:
        if self.training:
            self.mean = (0.9 * self.mean.mean() + 0.1 * inputs.detach().mean()).expand(8)
        return self.layer(inputs - self.mean)


class WeightNorm(nn.Module):
    """The older of the two: it keeps the weight as a plain attribute with a history of gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.utils.weight_norm(nn.Linear(8, 2))

    def forward(self, inputs: Tensor) -> Tensor:
        return self.layer(inputs)


class Renamed(nn.Module):
    """Names in the state from which no way leads back."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 2))
        self._register_state_dict_hook(lambda module, state, *_: {k.replace("net.", ""): v for k, v in state.items()})

    def forward(self, inputs: Tensor) -> Tensor:
        return self.net(inputs)


class OwnLoading(nn.Module):
    """Overrides load_state_dict() with one argument."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 2)

    def load_state_dict(self, state: Any) -> Any:  # type: ignore[override]
        return super().load_state_dict(state)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.layer(inputs)


class Conjugated(nn.Module):
    """Two buffers of one memory, of which one is the conjugate of the other."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 2)
        values = torch.tensor([1 + 2j, 3 - 1j])
        self.register_buffer("values", values)
        self.register_buffer("conjugated", values.conj())

    def forward(self, inputs: Tensor) -> Tensor:
        return self.layer(inputs)


class SparseScratch(nn.Module):
    """A sparse buffer that no checkpoint holds."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 2)
        self.places: Tensor
        self.register_buffer("places", torch.eye(8).to_sparse(), persistent=False)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.layer((self.places @ inputs.T).T)


def scripted() -> nn.Module:
    return torch.jit.script(nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 2)))


class Positives(Classification):
    """Counts something of its own under a name that suggests itself."""

    def metrics(self, outputs: Tensor, batch: Any) -> dict[str, Tensor]:
        return {"correct": (outputs.argmax(1) == batch[1]).sum(), "labels": batch[1].sum()}


class Bins(Classification):
    """A table whose length depends on the batch."""

    def metrics(self, outputs: Tensor, batch: Any) -> dict[str, Tensor]:
        return {**super().metrics(outputs, batch), "per_class": torch.bincount(batch[1])}
