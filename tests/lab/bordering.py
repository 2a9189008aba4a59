"""User code in forms that others use: data sets, batches, models and tasks whose names and types look like ours.

Each callable takes the name of a habit. Rows are points of two classes; however they are brought, the same is trained.
"""

from __future__ import annotations

import dataclasses
from collections import UserDict
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.utils.data import default_collate

from distloop.data import DataSource, InMemory, WholeBatches
from distloop.tasks import Classification, targets_of

ROWS, VALIDATED = 96, 22


def points(first: int, rows: int) -> tuple[Tensor, Tensor]:
    inputs = torch.sin(torch.arange(first, first + rows)[:, None] * torch.tensor([1.3, 0.7, 2.1]))
    return inputs, (inputs.sum(1) > 0).long()


# ---- data sets -------------------------------------------------------------------------------------------------------


class Rows:
    """The plain one. Twice the numbers of `points`, so that it shows whether __getitem__ is called."""

    def __init__(self, first: int, rows: int) -> None:
        self.rows = InMemory(*points(first, rows))

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        inputs, target = self.rows[index]
        return 2 * inputs, target


class Attributes(Rows):
    """Has attributes that others have too."""

    batch, draws = 4, 3
    samples, imgs, targets, transform, classes = 5, ["a.png"], torch.full((ROWS,), 99), None, 7


class Methods(Rows):
    def batch(self, number: int) -> list[int]:
        raise AssertionError("a method of the user's own")


class Wrapper:
    """Hands what it lacks on to what it wraps, as many wrappers do: also batch() and draws."""

    def __init__(self, first: int, rows: int) -> None:
        self.inner = InMemory(*points(first, rows))

    def __getattr__(self, name: str) -> Any:
        if name == "inner":
            raise AttributeError(name)
        return getattr(self.inner, name)

    def __len__(self) -> int:
        return len(self.inner)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        inputs, target = self.inner[index]
        return 2 * inputs, target


class Derived(InMemory):
    """Says how a sample is made, and inherits batch()."""

    def __init__(self, first: int, rows: int) -> None:
        super().__init__(*points(first, rows))

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        inputs, target = super().__getitem__(index)
        return 2 * inputs, target


class Declared(Rows, WholeBatches):
    """Says by its base class that it gives whole batches."""

    def batch(self, indices: Any, random: Any) -> Any:
        assert random.shape == (len(indices), 0)
        return default_collate([self[index] for index in indices.tolist()])


class Undeclared(Rows):
    draws = 0

    def batch(self, indices: Any, random: Any) -> Any:
        return default_collate([self[index] for index in indices.tolist()])


class Augmented(Derived):
    def __init__(self, first: int, rows: int) -> None:
        super().__init__(first, rows)
        self.draws = 3


class Swapped(NamedTuple):
    val: Any
    train: Any


DATA = {kind.__name__: kind for kind in (Rows, Attributes, Methods, Wrapper, Derived, Declared, Undeclared, Augmented)}


def make_data(habit: str = "Rows") -> Any:
    if habit == "Swapped":
        return Swapped(Rows(ROWS, VALIDATED), Rows(0, ROWS))
    kind = DATA[habit]
    return kind(0, ROWS), kind(ROWS, VALIDATED)


def typed(dtype: str) -> Any:
    """Inputs of another dtype, which the model does not take."""
    inputs, targets = points(0, ROWS)
    rows = InMemory((10 * inputs).round().to(getattr(torch, dtype)), targets)
    return rows, rows


def many_classes() -> DataSource:
    inputs, _ = points(0, ROWS)
    labels = torch.arange(ROWS).to(torch.uint8)
    return DataSource(InMemory(inputs, labels), InMemory(inputs, labels), classes=[str(name) for name in range(300)])


# ---- batches ---------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Record:
    inputs: Any
    targets: Any


class Named(NamedTuple):
    targets: Any
    inputs: Any


class Tokens(UserDict):
    """As the batches of a tokenizer."""


class Plain:
    def __init__(self, inputs: Tensor, targets: Tensor) -> None:
        self.inputs, self.targets = inputs, targets


def as_record(samples: list) -> Record:
    return Record(*default_collate(samples))


def as_named(samples: list) -> Named:
    inputs, targets = default_collate(samples)
    return Named(targets=targets, inputs=inputs)


def as_tokens(samples: list) -> Tokens:
    inputs, targets = default_collate(samples)
    return Tokens(inputs=inputs, targets=targets)


def as_plain(samples: list) -> Plain:
    return Plain(*default_collate(samples))


# ---- tasks -----------------------------------------------------------------------------------------------------------


class Sums(Classification):
    """Gives sums under the name that `sum` says, and a summary under that of `summary`."""

    def __init__(self, sum: str = "", summary: str = "") -> None:
        super().__init__()
        self.sum, self.named = sum, summary

    def metrics(self, outputs: Tensor, batch: Any) -> dict[str, Any]:
        more = {self.sum: torch.tensor(1e6)} if self.sum else {}
        return {**super().metrics(outputs, batch), **more}

    def summary(self, sums: dict[str, Tensor]) -> dict[str, Any]:
        more = {self.named: 0.5} if self.named else {}
        return {**super().summary(sums), **more}


class Numbers(Classification):
    """Sums and metrics of the kinds of numbers that libraries give."""

    def metrics(self, outputs: Tensor, batch: Any) -> dict[str, Any]:
        hits = int((outputs.argmax(1) == targets_of(batch)).sum())
        return {
            "correct": np.int32(hits),
            "python": 0.1,
            "numpy": np.float64(0.1),
            "backwards": np.arange(3)[::-1],
            "large": 2**53 + 1,
            "mixed": 0 if hits % 2 else 0.5,
            "evens": int(hits % 2 == 0),
        }

    def summary(self, sums: dict[str, Tensor]) -> dict[str, Any]:
        return {
            **super().summary(sums),
            "python": sums["python"],
            "numpy": sums["numpy"].numpy(),
            "backwards": sums["backwards"].tolist(),
            "large": sums["large"],
            "mixed": sums["mixed"],
            "evens": sums["evens"],
            "one": np.array([np.float32(0.5)]),
            "another": torch.ones(1, 1),
            "samples": sums["samples"],
        }


class Attribute(Classification):
    """Keeps a value under one of the names that distloop reads."""

    def __init__(self, name: str) -> None:
        super().__init__()
        values: dict[str, Any] = {
            "classes": ["cat", "dog"],
            "weight": torch.tensor([0.2, 0.8]),
            "best": "accuracy",
            "metrics": {},
            "summary": [],
            "loss": nn.CrossEntropyLoss(reduction="sum"),
        }
        setattr(self, name, values[name])


# ---- models ----------------------------------------------------------------------------------------------------------


class Net(nn.Module):
    """A linear layer of whose weight `habit` says what else it has: buffers and states of all kinds, that training
    changes and depends on."""

    phase: Tensor
    count: Tensor
    all: Tensor
    part: Tensor

    def __init__(self, habit: str = "") -> None:
        super().__init__()
        self.habit, self.seen = habit, 0
        self.layer: nn.Module = nn.Linear(3, 2)
        if habit == "spectral":
            self.layer = parametrizations.spectral_norm(nn.Linear(3, 2))
        elif habit == "weight":
            self.layer = parametrizations.weight_norm(nn.Linear(3, 2))
        elif habit == "orthogonal":
            self.layer = parametrizations.orthogonal(nn.Linear(3, 2))
        elif habit == "lazy":
            self.layer = nn.LazyLinear(2)
        elif habit == "complex":
            self.wave = nn.Parameter(torch.tensor([1 + 0.5j, 0.2 - 1j, 0.5j]))
            self.register_buffer("phase", torch.tensor([0.3j, 1.0, 0.5 + 0.1j]))
        elif habit in BUFFERS:
            self.register_buffer("count", BUFFERS[habit].clone() if habit != "expanded" else torch.ones(1).expand(3))
        elif habit == "views":
            whole = torch.arange(6.0)
            self.register_buffer("all", whole)
            self.register_buffer("part", whole[2:5])
        elif habit == "none":
            self.register_buffer("nothing", None)
        elif habit == "fleeting":
            self.register_buffer("cache", torch.ones(3), persistent=False)
        self.nested = nn.ModuleDict({"state": State()}) if habit == "nested" else None

    def forward(self, inputs: Tensor) -> Tensor:
        if self.training:
            self.seen += 1
        if self.nested is not None:
            inputs = inputs + self.nested["state"](inputs)
        if self.habit == "complex":
            inputs = (inputs * self.wave * self.phase).abs()
            if self.training:
                self.phase = 1.01j * self.phase
        elif self.habit in BUFFERS:
            inputs = inputs + 0.01 * self.count.double().sum().to(inputs)
            if self.training and self.habit in ("int16", "float64", "bool"):
                self.count.copy_(~self.count if self.habit == "bool" else self.count + 1)
        elif self.habit == "views":
            inputs = inputs + 0.01 * self.part
            if self.training:
                self.all.add_(1)
        return self.layer(inputs)


class State(nn.Module):
    """Counts its forward passes, as a number and as a tensor that grows."""

    def __init__(self) -> None:
        super().__init__()
        self.seen, self.history = 0, torch.zeros(0)

    def get_extra_state(self) -> Any:
        return {"seen": self.seen, "history": self.history}

    def set_extra_state(self, state: Any) -> None:
        self.seen, self.history = state["seen"], state["history"]

    def forward(self, inputs: Tensor) -> Tensor:
        if self.training:
            self.seen += 1
            self.history = torch.cat([self.history, torch.tensor([float(self.seen)])])
        return (0.01 * (self.seen + self.history.sum())).to(inputs)


BUFFERS: Mapping[str, Tensor] = {
    "int16": torch.zeros(3, dtype=torch.int16),
    "float8": torch.ones(3).to(torch.float8_e4m3fn),
    "float64": torch.zeros(3, dtype=torch.float64),
    "bfloat16": torch.ones(3, dtype=torch.bfloat16),
    "bool": torch.ones(3, dtype=torch.bool),
    "empty": torch.zeros(0, 3),
    "expanded": torch.ones(1),
}


class Alike(nn.Module):
    """Its own names are those of methods and attributes of distloop, Accelerate or DistributedDataParallel."""

    def __init__(self) -> None:
        super().__init__()
        self.module = nn.Linear(3, 2)
        self.parts, self.classes, self.reducer, self.logger = [1], 3, None, "mine"

    def mine(self, *arguments: Any) -> Any:
        raise AssertionError("a method of the user's own")

    no_sync = join = save = load = log = loss = step = prepare = compile = mine

    def forward(self, inputs: Tensor) -> Tensor:
        return self.module(inputs)


class Compiles(nn.Sequential):
    """Of digits; with a compile() of its own, as in Keras."""

    def __init__(self) -> None:
        super().__init__(nn.Flatten(), nn.Linear(64, 10))

    def compile(self, optimizer: str) -> None:
        raise AssertionError("a method of the user's own")


class Words(nn.Module):
    """An embedding of the inputs' signs."""

    def __init__(self, sparse: bool = True, bag: bool = False) -> None:
        super().__init__()
        self.words = nn.EmbeddingBag(2, 4, sparse=sparse, mode="sum") if bag else nn.Embedding(2, 4, sparse=sparse)
        self.head = nn.Linear(4, 2)

    def forward(self, inputs: Tensor) -> Tensor:
        found = self.words((inputs > 0).long())
        return self.head(found if found.ndim == 2 else found.sum(1))


class LooksUp(nn.Module):
    """Words without an embedding: a function looks the rows up. `how`: by which, and whether gradients are sparse."""

    def __init__(self, how: str, sparse: bool = True) -> None:
        super().__init__()
        self.how, self.sparse = how, sparse
        self.head = nn.Linear(4, 2)
        self.table = nn.Parameter(torch.linspace(-1, 1, 8).view(2, 4))
        if how == "frozen":  # an embedding that says so, and another parameter that nobody says it of
            self.words = nn.Embedding(2, 4, sparse=True).requires_grad_(False)

    def forward(self, inputs: Tensor) -> Tensor:
        signs = (inputs > 0).long()
        if self.how == "bag":
            return self.head(nn.functional.embedding_bag(signs, self.table, mode="sum", sparse=self.sparse))
        if self.how == "gather":
            places = signs.reshape(-1, 1).expand(-1, 4)
            found = torch.gather(self.table, 0, places, sparse_grad=self.sparse).view(len(inputs), -1, 4)
        else:
            found = nn.functional.embedding(signs, self.table, sparse=self.sparse)
        return self.head(found.sum(1))


class NotSaved(nn.Module):
    """A model with something that no checkpoint can hold."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self.layer: nn.Module = nn.Linear(3, 2)
        if what == "sparse":
            self.register_buffer("graph", torch.eye(3).to_sparse())
        elif what == "meta":
            self.layer = nn.Linear(3, 2, device="meta")
        elif what == "lazy":
            self.unused = nn.LazyLinear(2)
        elif what == "quantised":
            self.register_buffer("table", torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8))
        elif what == "beyond":
            self.register_buffer("count", torch.tensor([2.0**24 + 1], dtype=torch.float64))
        elif what == "hidden":
            self.buffers = [1, 2]  # type: ignore[assignment, method-assign]

    def forward(self, inputs: Tensor) -> Tensor:
        return self.layer(inputs)


class Unsaveable(NotSaved):
    """Its extra state is no plain data."""

    def __init__(self) -> None:
        super().__init__("nothing")

    def get_extra_state(self) -> Any:
        return {"rate": np.float64(0.5)}

    def set_extra_state(self, state: Any) -> None: ...
