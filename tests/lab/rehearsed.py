"""Models and tasks whose mistakes, or whose state, the rehearsal meets."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.utils import spectral_norm
from torch.nn.utils.parametrizations import spectral_norm as parametrized_norm

import distloop.tasks
from distloop.tasks import targets_of


class Restless(nn.Module):
    """Each forward pass changes parameters, buffers of all kinds and plain attributes."""

    steps: Tensor
    seen: Tensor
    smooth: Tensor
    mean: Tensor

    def __init__(self, num_outputs: int, creates_later: bool = True) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Flatten(),
            spectral_norm(nn.Linear(64, 32)),
            nn.BatchNorm1d(32),
            nn.Dropout(0.5),
            parametrized_norm(nn.Linear(32, 32)),
        )
        self.head = nn.Linear(32, num_outputs)
        self.register_buffer("steps", torch.tensor(0))
        self.register_buffer("seen", torch.zeros(3), persistent=False)
        self.register_buffer("smooth", torch.tensor(1.0))
        self.history: list[float] = []
        self.queue = torch.zeros(4)
        self.ready = False
        if not creates_later:
            self.register_buffer("mean", torch.tensor(0.0))
            self.ready = True

    def forward(self, images: Tensor) -> Tensor:
        if self.training and not self.ready:
            self.register_buffer("mean", images.mean().detach())
            self.ready = True
        with torch.no_grad():
            self.steps += 1
            self.seen += torch.rand(3)
            self.smooth = 0.9 * self.smooth + images.mean()  # another tensor each time
            self.head.bias.mul_(0.999)
            self.queue[int(self.steps) % 4] = images.mean()
            self.history.append(float(images.mean()))
            if self.training:
                self.mean += 0.1 * images.mean()
        noise = 0.01 * (torch.randn(()) + np.random.random() + sum(self.history[-3:]) + float(self.queue.sum()))
        return self.head(self.body(images)) + noise + (self.mean if self.training else 0)


class Restful(distloop.tasks.Classification):
    """Counts in itself, too, and its losses depend on the count."""

    def __init__(self) -> None:
        super().__init__()
        self.count, self.kept, self.weights = 0, {"losses": 0}, np.ones(10, dtype=np.float32)
        self.scores: list[Tensor] = []

    def loss(self, outputs: Any, batch: Any) -> tuple[Tensor, int]:
        self.count += 1
        self.kept["losses"] += 1
        self.weights *= 1.001
        targets = targets_of(batch)
        loss = cross_entropy(outputs, targets, weight=torch.from_numpy(self.weights), reduction="sum")
        return loss * (1 + 0.01 * self.count), len(targets)

    def metrics(self, outputs: Any, batch: Any) -> dict[str, Tensor]:
        self.scores.append(outputs.mean())
        return super().metrics(outputs, batch)

    def summary(self, sums: dict[str, Tensor]) -> dict[str, float]:
        return {**super().summary(sums), "batches": len(self.scores)}


class Mean(distloop.tasks.Classification):
    """The commonest habit."""

    def loss(self, outputs: Any, batch: Any) -> tuple[Tensor, int]:
        return cross_entropy(outputs, targets_of(batch)), len(targets_of(batch))


class MeanMetric(distloop.tasks.Classification):
    """A mean where a sum is asked for, and summary() does not see it."""

    def metrics(self, outputs: Any, batch: Any) -> dict[str, Tensor]:
        return super().metrics(outputs, batch) | {"confidence": outputs.softmax(1).amax(1).mean()}

    def summary(self, sums: dict[str, Tensor]) -> dict[str, float]:
        return super().summary(sums) | {"confidence": float(sums["confidence"])}


class MeanByName(distloop.tasks.Classification):
    """A mean among the sums that loss() gives by name."""

    def loss(self, outputs: Any, batch: Any) -> Any:
        return *super().loss(outputs, batch), {"logits": outputs.detach().square().mean()}


class SummedMetric(MeanMetric):
    def metrics(self, outputs: Any, batch: Any) -> dict[str, Tensor]:
        return super().metrics(outputs, batch) | {"confidence": outputs.softmax(1).amax(1).sum()}

    def summary(self, sums: dict[str, Tensor]) -> dict[str, float]:
        return super().summary(sums) | {"confidence": float(sums["confidence"] / sums["samples"])}


class MeanMetrics(MeanMetric):
    """A metric of several elements."""

    def metrics(self, outputs: Any, batch: Any) -> dict[str, Tensor]:
        sums = distloop.tasks.Classification.metrics(self, outputs, batch)
        return sums | {"errors": outputs.abs().mean(0), "confidence": outputs.softmax(1).amax(1).sum()}


class OfBatches(MeanMetric):
    """Divides by the number of batches, which it counts itself."""

    def metrics(self, outputs: Any, batch: Any) -> dict[str, Tensor]:
        return super().metrics(outputs, batch) | {"batches": torch.tensor(1)}

    def summary(self, sums: dict[str, Tensor]) -> dict[str, float]:
        return super().summary(sums) | {"confidence": float(sums["confidence"] / sums["batches"])}


class MeanBesideIds(Mean):
    """Its metrics need what only batches of validation have."""

    def metrics(self, outputs: Any, batch: Any) -> dict[str, Tensor]:
        return super().metrics(outputs, batch) | {"first": batch["image_id"]}


class OfClasses(Mean):
    """Weighted by class: halves of a batch have other sums of weights, and no mean of theirs is that of the whole."""

    def loss(self, outputs: Any, batch: Any) -> tuple[Tensor, int]:
        weights = torch.linspace(0.1, 3, 10)
        return cross_entropy(outputs, targets_of(batch), weight=weights), len(targets_of(batch))


class WithoutSome(Mean):
    """Over the samples that count, with the number of all."""

    def loss(self, outputs: Any, batch: Any) -> tuple[Tensor, int]:
        targets = torch.where(targets_of(batch) < 3, -100, targets_of(batch))
        return cross_entropy(outputs, targets, ignore_index=-100), len(targets)


class MeanOfTokens(Mean):
    """Of positions, not all of which count."""

    weight = "tokens"

    def loss(self, outputs: Any, batch: Any) -> tuple[Tensor, int]:
        targets = torch.where(targets_of(batch) < 3, -100, targets_of(batch))
        return cross_entropy(outputs, targets, ignore_index=-100), int((targets != -100).sum())


class MeanOfSquares(distloop.tasks.Classification):
    """Without a function that has a reduction."""

    def loss(self, outputs: Any, batch: Any) -> tuple[Tensor, int]:
        targets = nn.functional.one_hot(targets_of(batch), outputs.shape[1])
        return (outputs - targets).square().sum(1).mean(), len(targets)


class Contrastive(distloop.tasks.Classification):
    """Each sample against all others of the batch: neither a sum nor a mean of its halves."""

    def loss(self, outputs: Any, batch: Any) -> tuple[Tensor, int]:
        features = nn.functional.normalize(outputs)
        return cross_entropy(features @ features.T, torch.arange(len(features)), reduction="sum"), len(features)


class Zero(distloop.tasks.Classification):
    """A loss that is zero, of which nothing can be said."""

    def loss(self, outputs: Any, batch: Any) -> tuple[Tensor, int]:
        return 0 * super().loss(outputs, batch)[0], len(targets_of(batch))


class OfPairs(distloop.tasks.Classification):
    """Takes whole batches only, and the one sample that the model is tried out with."""

    def forward(self, model: nn.Module, batch: Any) -> Any:
        assert len(targets_of(batch)) not in range(2, 60)
        return super().forward(model, batch)


class OnlyLoss(distloop.tasks.Classification):
    def loss(self, outputs: Any, batch: Any) -> Any:
        return super().loss(outputs, batch)[0]


class AsNumber(distloop.tasks.Classification):
    def loss(self, outputs: Any, batch: Any) -> Any:
        loss, weight = super().loss(outputs, batch)
        return loss.item(), weight


class Detached(distloop.tasks.Classification):
    def loss(self, outputs: Any, batch: Any) -> Any:
        loss, weight = super().loss(outputs, batch)
        return loss.detach(), weight


class NoKey(distloop.tasks.Classification):
    def summary(self, sums: dict[str, Tensor]) -> dict[str, float]:
        return {**super().summary(sums), "top5": float(sums["correct_top5"])}


class Text(distloop.tasks.Classification):
    def summary(self, sums: dict[str, Tensor]) -> Any:
        return {**super().summary(sums), "model": "net"}


class NoSuchBest(distloop.tasks.Classification):
    best = ("f1", "max")


class Metrics(distloop.tasks.Classification):
    def metrics(self, outputs: Any, batch: Any) -> dict[str, Tensor]:
        return {"correct": (outputs.argmax(2) == targets_of(batch)).sum()}


class ManyNeeded(distloop.tasks.Classification):
    """Its summary needs more samples than a batch has."""

    def summary(self, sums: dict[str, Tensor]) -> dict[str, float]:
        if int(sums["samples"]) < 360:
            raise ValueError("too few samples for a quantile")
        return super().summary(sums)


class Sometimes(distloop.tasks.Classification):
    """A metric that a batch of some samples has not."""

    best = ("recall", "max")

    def __init__(self, otherwise: float | None = None) -> None:
        super().__init__()
        self.otherwise = {} if otherwise is None else {"recall": otherwise}

    def summary(self, sums: dict[str, Tensor]) -> dict[str, float]:
        values = super().summary(sums)
        return values | ({"recall": values["accuracy"]} if int(sums["samples"]) >= 360 else self.otherwise)


class Guesses(distloop.tasks.Classification):
    """Right for one sample, as the model is tried out with; wrong for more."""

    def guesses(self, outputs: Any, batch: Any) -> Any:
        found = super().guesses(outputs, batch)
        return found if found is None else tuple(values[:1] for values in found)


class OutOfMemory(distloop.tasks.Classification):
    def forward(self, model: nn.Module, batch: Any) -> Any:
        if len(targets_of(batch)) > 8 and os.environ.get("RANK", "0") == "0":
            raise torch.OutOfMemoryError("out of memory: tried to allocate 40 GiB")
        return super().forward(model, batch)


class Encoder(nn.Module):
    def __init__(self, num_outputs: int) -> None:
        super().__init__()
        self.num_classes = num_outputs
        self.body, self.head = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU()), nn.Linear(16, num_outputs)

    def encode(self, images: Tensor) -> Tensor:
        return self.body(images)

    def forward(self, images: Tensor, mode: str = "classify") -> Tensor:
        return self.encode(images) if mode == "encode" else self.head(self.encode(images))


class CallsMethod(distloop.tasks.Classification):
    def forward(self, model: Any, batch: Any) -> Any:
        return model.head(model.encode(batch[0]))


class Scaled(Encoder):
    """Its forward pass reads an attribute that the task sets."""

    scale = 1.0

    def forward(self, images: Tensor, mode: str = "classify") -> Tensor:
        return super().forward(images, mode) * self.scale


class ByName(distloop.tasks.Classification):
    """Has a penalty on the weights of one layer, by its name, and sets an attribute of the model."""

    def forward(self, model: nn.Module, batch: Any) -> Any:
        assert isinstance(model, Scaled)
        model.scale = 0.5
        outputs = model(batch[0])
        layers: Any = dict(model.named_children())
        for name, parameter in model.named_parameters():
            if name.startswith("head."):
                outputs = outputs * (1 + parameter.abs().mean() * layers["body"][1].weight.abs().mean())
        return outputs


class ReadsNumber(distloop.tasks.Classification):
    def forward(self, model: Any, batch: Any) -> Any:
        return model(batch[0]) / model.num_classes


class AsksFirst(distloop.tasks.Classification):
    """Would do something else on one process than on several, without a word."""

    def forward(self, model: Any, batch: Any) -> Any:
        return model(batch[0]) * (2 if hasattr(model, "encode") else 1)


class Unwraps(distloop.tasks.Classification):
    def forward(self, model: Any, batch: Any) -> Any:
        return getattr(model, "module", model)(batch[0])


class TakesLayers(distloop.tasks.Classification):
    def forward(self, model: Any, batch: Any) -> Any:
        features = batch[0]
        for layer in model:
            features = layer(features)
        return features


class PassesBy(distloop.tasks.Classification):
    """Calls a part of the model."""

    def forward(self, model: Any, batch: Any) -> Any:
        features = batch[0]
        for part in model.modules():
            if isinstance(part, (nn.Flatten, nn.Linear, nn.ReLU)):
                features = part(features)
        return features


class AsItShould(distloop.tasks.Classification):
    """What the message says, and what nn.Module itself offers."""

    def forward(self, model: Any, batch: Any) -> Any:
        assert next(model.parameters()).device == batch[0].device
        assert all(name for name, _ in model.named_parameters())
        assert isinstance(model, nn.Module)
        features = model(batch[0], mode="encode") if not model.training else None
        return model(batch[0]) if features is None else model(batch[0]) + 0 * features.sum()


class Late(nn.Module):
    """Makes a layer when it first trains."""

    def __init__(self, num_outputs: int) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(64, num_outputs))
        self.more: nn.Linear | None = None

    def forward(self, images: Tensor) -> Tensor:
        if self.training and self.more is None:
            self.more = nn.Linear(10, 10)
        return self.body(images) if self.more is None else self.more(self.body(images))


class Strange(nn.Module):
    """Has a state that cannot be read again safely."""

    def __init__(self, num_outputs: int) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(64, num_outputs))

    def get_extra_state(self) -> dict[str, Any]:
        return {"places": {torch.nn.Identity}}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        pass

    def forward(self, images: Tensor) -> Tensor:
        return self.body(images)
