"""The training of a config with a user's code, written by hand in plain PyTorch, in one process.

Of distloop it takes what docs/guarantees.md promises as numbers, and nothing else: the order of the samples, the seeds,
the learning rate of a step. Losses, gradients, weights, batches, optimizer and validation are its own.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import random
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import default_collate

from distloop.config.settings import Schedule
from distloop.data import DataSource
from distloop.data.order import Order
from distloop.data.seeding import Place, derive
from distloop.training.schedules import lr_at

NORMS = (nn.BatchNorm1d,)  # of those that habits use; their weights do not decay


def seed(*parts: int) -> None:
    """Seed the global generators from a hash of `parts`."""
    value = derive(*parts)
    torch.manual_seed(value)
    np.random.seed(value & 0xFFFFFFFF)
    random.seed(value)


@contextlib.contextmanager
def imported(file: Path) -> Iterator[ModuleType]:
    """The module in a file, under a name that it has only here."""
    spec = importlib.util.spec_from_file_location(f"by_hand_{file.stem}", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[module.__name__] = module  # dataclasses look for it there
    try:
        spec.loader.exec_module(module)
        yield module
    finally:
        del sys.modules[module.__name__]


class Classification:
    """What `task: classification` means."""

    weight = "samples"

    def forward(self, model: nn.Module, batch: Any) -> Tensor:
        return model(first(batch, "inputs"))

    def loss(self, outputs: Tensor, batch: Any) -> tuple[Tensor, int]:
        targets = first(batch, "targets", 1)
        return functional.cross_entropy(outputs, targets.long(), reduction="none").sum(), len(targets)

    def metrics(self, outputs: Tensor, batch: Any) -> dict[str, Any]:
        return {"correct": int((outputs.argmax(1) == first(batch, "targets", 1)).sum())}

    def summary(self, sums: dict[str, Tensor]) -> dict[str, float]:
        count = float(sums["samples"])
        return {"loss": float(sums["loss"]) / count, "accuracy": float(sums["correct"]) / count}


class Regression(Classification):
    """What `task: regression` means, for one number a sample."""

    def loss(self, outputs: Tensor, batch: Any) -> tuple[Tensor, int]:
        targets = first(batch, "targets", 1)
        return (outputs - targets).square().sum(), len(targets)

    def metrics(self, outputs: Tensor, batch: Any) -> dict[str, Any]:
        targets = first(batch, "targets", 1).double()
        error = (outputs.double() - targets).square().sum()
        return {"error": error, "sum": targets.sum(), "squares": targets.square().sum()}

    def summary(self, sums: dict[str, Tensor]) -> dict[str, float]:
        count = float(sums["samples"])
        spread = float(sums["squares"]) - float(sums["sum"]) ** 2 / count
        return {"loss": float(sums["loss"]) / count, "r2": 1 - float(sums["error"]) / spread}


def first(batch: Any, key: str, position: int = 0) -> Any:
    """The inputs, or the targets, of a batch of a common form."""
    return batch[key] if isinstance(batch, dict) else batch[position]


def in_dtype(value: Any, dtype: torch.dtype) -> Any:
    """A batch with its floating tensors in `dtype`."""
    if isinstance(value, Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    if isinstance(value, dict):
        return {key: in_dtype(each, dtype) for key, each in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(in_dtype(each, dtype) for each in value))
    if isinstance(value, (tuple, list)):
        return type(value)(in_dtype(each, dtype) for each in value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {each.name: in_dtype(getattr(value, each.name), dtype) for each in dataclasses.fields(value)}
        return dataclasses.replace(value, **fields)
    return value


class ByHand:
    """Trains `settings` with the code in a file, as so many ranks would: `train`, `epochs` and `validations` are what a
    run would log, `weights` what it would save."""

    def __init__(self, file: Path, settings: dict[str, Any], world_size: int) -> None:
        self.settings, self.world_size, self.seed = settings, world_size, settings["seed"]
        self.dtype = getattr(torch, settings["dtype"])
        self.train: list[dict[str, float]] = []
        self.epochs: list[float] = []
        self.validations: list[dict[str, Any]] = []
        seed(self.seed, 0, 0, Place.DATA)
        with imported(file) as module:
            self._build(module)
            self._train()
        self.weights = dict(self.model.state_dict())

    def _build(self, module: ModuleType) -> None:
        data = module.make_data()
        self.source = data if isinstance(data, DataSource) else DataSource(*data)
        self.collate = module.collate if "collate" in self.settings["data"] else default_collate
        seed(self.seed, 0, 0, Place.TASK)
        built_in: dict[str, Any] = {"classification": Classification, "regression": Regression}
        self.task: Any = (built_in.get(self.settings["task"]) or module.Mine)()
        seed(self.seed, 0, 0, Place.MODEL)
        torch.manual_seed(self.seed)
        self.model: nn.Module = module.Net()
        # Not model.to(dtype), which drops the imaginary part of complex numbers.
        self.trained = nn.ModuleList([self.model, *([self.task] if isinstance(self.task, nn.Module) else [])])
        self.trained._apply(lambda tensor: tensor.to(self.dtype) if tensor.is_floating_point() else tensor)
        self.optimizer = self._make_optimizer()

    def _make_optimizer(self) -> torch.optim.Optimizer:
        optim = self.settings["optim"]
        decayed: list[nn.Parameter] = []
        others: list[nn.Parameter] = []
        for module in self.trained.modules():
            for parameter in module.parameters(recurse=False):
                if parameter.requires_grad and not any(parameter is each for each in (*decayed, *others)):
                    vector = parameter.ndim < 2 or isinstance(module, NORMS)
                    (others if vector else decayed).append(parameter)
        groups = [{"params": decayed, "weight_decay": optim["weight_decay"]}, {"params": others, "weight_decay": 0.0}]
        if optim["name"] == "sgd":
            return torch.optim.SGD(groups, lr=optim["lr"], momentum=0.9)
        kind = torch.optim.Adam if optim["name"] == "adam" else torch.optim.AdamW
        return kind(groups, lr=optim["lr"])

    def _batch(self, data: Any, epoch: int, indices: Sequence[int]) -> Any:
        samples = []
        for index in indices:
            seed(self.seed, epoch, index)
            samples.append(data[index])
        batch = self.collate(samples)
        if self.source.mean is not None and self.source.std is not None:
            mean, std = (
                torch.tensor(each, dtype=self.dtype)[:, None, None] for each in (self.source.mean, self.source.std)
            )
            inputs = (first(batch, "inputs").to(self.dtype) / 255 - mean) / std
            batch = {**batch, "inputs": inputs} if isinstance(batch, dict) else (inputs, *batch[1:])
        return in_dtype(batch, self.dtype)

    @contextlib.contextmanager
    def _buffers_of(self, rank: int) -> Iterator[None]:
        """Each rank has its own buffers, and those of rank 0 are saved."""
        before = [buffer.clone() for buffer in self.model.buffers()]
        yield
        if rank != 0:
            for buffer, value in zip(self.model.buffers(), before, strict=True):
                buffer.data.copy_(value)

    def _train(self) -> None:
        batch, samples = self.settings["batch"], len(self.source.train)
        size = batch["global_size"]
        per_epoch = samples // size + (samples % size > 0 and batch["remainder"] == "train")
        total = self.settings["train"]["epochs"] * per_epoch
        schedule, validate = Schedule(**self.settings["schedule"]), self.settings["validate"]["every_epochs"]
        order = Order(samples, self.seed)
        self.trained.train()
        for step in range(total):
            epoch, start = step // per_epoch, step % per_epoch * size
            if start == 0:
                sums = [0.0, 0.0]
            for group in self.optimizer.param_groups:
                group["lr"] = lr_at(step, total, self.settings["optim"]["lr"], schedule)
            loss, weight, norm = self._step(step, epoch, order(epoch, start, min(start + size, samples)).tolist())
            sums = [sums[0] + loss, sums[1] + weight]
            row = {"step": step + 1, "epoch": epoch + 1, "loss": loss / weight, "running_loss": sums[0] / sums[1]}
            self.train.append({**row, "gradient_norm": norm, "lr": self.optimizer.param_groups[0]["lr"]})
            if (step + 1) % per_epoch == 0:
                self.epochs.append(sums[0] / sums[1])
            if step + 1 == total or (step + 1) % (validate * per_epoch) == 0:
                self.validations.append({"step": step + 1, **self._validate()})

    def _step(self, step: int, epoch: int, indices: list[int]) -> tuple[float, float, float]:
        """One step: (sum of the losses, sum of the weights, norm of the gradient)."""
        micro = self.settings["batch"]["micro_size"] * self.world_size
        parts = -(-len(indices) // micro) * self.world_size
        borders = [-(-len(indices) * part // parts) for part in range(parts + 1)]
        loss_sum = weight_sum = 0.0
        for part in range(parts):
            chosen = indices[borders[part] : borders[part + 1]]
            if not chosen:
                continue
            batch = self._batch(self.source.train, epoch, chosen)
            seed(self.seed, step, part, Place.FORWARD)
            with self._buffers_of(part % self.world_size):
                outputs = self.task.forward(self.model, batch)
                loss, weight = self.task.loss(outputs, batch)
                loss.backward()
            loss_sum, weight_sum = loss_sum + float(loss.detach()), weight_sum + float(weight)
        divisor = len(indices) if self.task.weight == "samples" else weight_sum
        parameters = [parameter for parameter in self.trained.parameters() if parameter.grad is not None]
        for gradient in (parameter.grad for parameter in parameters if parameter.grad is not None):
            gradient /= divisor
        limit = self.settings["optim"].get("clip_norm") or float("inf")
        norm = float(torch.nn.utils.clip_grad_norm_(parameters, limit))
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss_sum, weight_sum, norm

    def _validate(self) -> dict[str, Any]:
        """A validation's numbers: sums over all batches, and what the task makes of them."""
        data, size = self.source.validation, self.settings["validate"]["batch_size"]
        sums: dict[str, Any] = {}
        self.trained.eval()
        with torch.no_grad():
            for number, start in enumerate(range(0, len(data), size)):
                indices = range(start, min(start + size, len(data)))
                batch = self._batch(data, 0, indices)
                seed(self.seed, number, 0, Place.VALIDATION)
                with self._buffers_of(number % self.world_size):
                    outputs = self.task.forward(self.model, batch)
                    loss, weight = self.task.loss(outputs, batch)
                found = {"loss": loss, "weight": weight, "samples": len(indices), **self.task.metrics(outputs, batch)}
                for name, value in found.items():
                    value = (
                        value if isinstance(value, Tensor) else torch.from_numpy(np.asarray(value))
                    )  # a float as float64
                    sums[name] = sums.get(name, 0) + value.to(
                        torch.float64 if value.is_floating_point() else torch.int64
                    )
        self.trained.train()
        seed(self.seed, 0, 0, Place.SUMMARY)
        return {**self.task.summary(sums), "samples": len(data)}
