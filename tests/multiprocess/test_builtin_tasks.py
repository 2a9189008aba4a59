"""Built-in tasks that weigh train by torch's mean over the whole global batch, on any number of ranks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torchvision.transforms import v2

from distloop.data.batches import to_model
from distloop.data.datasets import digits
from distloop.data.order import Order
from distloop.data.seeding import seed_forward, seed_sample
from distloop.training.models import linear
from tests.lab import user_code
from tests.multiprocess.test_exact_resume import check_same, go_on, stop
from tests.tools.ranks import train, write_config
from tests.tools.records import largest_difference, losses, rows, weights

STEPS, GLOBAL = 6, 12
CLASS_WEIGHTS = [3.0, 0.25, 1.0, 0.0, 2.0, 1.0, 1.0, 0.5, 1.0, 5.0]
COMMON: dict[str, Any] = {
    "device": "cpu",
    "dtype": "float64",
    "optim": {"name": "sgd", "lr": 0.3, "momentum": 0.9, "weight_decay": 0},
    "schedule": "constant",
    "batch": {"global_size": GLOBAL},
    "train": {"steps": STEPS},
    "validate": {"batch_size": 7},
    "log": {"every_steps": 1},
}
FORMS: dict[str, tuple[int, list[str]]] = {"one": (1, ["--batch.micro-size", "4"]), "two": (2, [])}


# ---- the same by hand: the whole global batch at once, and torch's mean ----------------------------------------------


def digits_of(source: Any, half: Any, indices: list[int]) -> tuple[Tensor, Tensor]:
    return to_model((half.inputs[indices], half.targets[indices]), source, torch.float64)


def shapes_of(source: Any, half: Any, indices: list[int]) -> tuple[Tensor, Tensor]:
    samples = []
    for index in indices:
        seed_sample(0, 0, index)
        samples.append(half[index])
    images, masks = zip(*samples, strict=True)
    return torch.stack(images).double(), torch.stack(masks)


def lines_of(source: Any, half: Any, indices: list[int]) -> tuple[Tensor, Tensor]:
    batch = user_code.pad([half[index] for index in indices])
    return batch["inputs"], batch["targets"]


class Transposed(nn.Module):
    """Logits [batch, vocabulary, length], as torch's cross_entropy takes them."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, inputs: Tensor) -> Tensor:
        return self.model(inputs).transpose(1, 2)


Case = tuple[dict[str, Any], Any, Callable[..., tuple[Tensor, Tensor]], Callable[[], nn.Module], dict[str, Any]]
# Settings, data, how they become a batch, the model, and the arguments of torch's cross_entropy.
CASES: dict[str, Callable[[], Case]] = {
    "classification": lambda: (
        {
            "data": {"name": "digits", "args": {"shift": 0}},
            "model": "linear",
            "task": {"name": "classification", "args": {"class_weights": CLASS_WEIGHTS, "label_smoothing": 0.1}},
        },
        digits(shift=0),
        digits_of,
        lambda: linear((1, 8, 8), 10),
        {"weight": torch.tensor(CLASS_WEIGHTS).double(), "label_smoothing": 0.1},
    ),
    "segmentation": lambda: (
        {
            "data": {"name": "tests.lab.user_code:shapes", "workers": 0, "args": {"samples": 72}},
            "model": "tests.lab.user_code:segmenter",
            "task": "segmentation",
        },
        user_code.shapes(72),
        shapes_of,
        lambda: user_code.segmenter(3),
        {"ignore_index": 255},
    ),
    "language_modelling": lambda: (
        {
            "data": {"name": "tests.lab.user_code:lines", "collate": "tests.lab.user_code:pad", "workers": 0},
            "model": "tests.lab.user_code:LanguageModel",
            "task": {"name": "language_modelling", "args": {"bytes_per_token": 1}},
        },
        user_code.lines(),
        lines_of,
        lambda: Transposed(user_code.LanguageModel(len(user_code.VOCABULARY))),
        {"ignore_index": -100},
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_a_step_descends_torchs_mean_over_the_global_batch_on_one_rank_and_two(tmp_path: Path, name: str) -> None:
    settings, source, batch_of, build, options = CASES[name]()
    config = write_config(tmp_path, {**COMMON, **settings})
    for form, (world_size, extra) in FORMS.items():
        train(tmp_path, ["--config", str(config), "--name", form, *extra], world_size).check()
    runs = [tmp_path / "runs" / form for form in FORMS]

    torch.manual_seed(0)
    model = build().double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.9)
    order, history, uneven = Order(len(source.train), 0), [], 0
    for step in range(STEPS):
        inputs, targets = batch_of(source, source.train, order(0, step * GLOBAL, (step + 1) * GLOBAL).tolist())
        loss = cross_entropy(model(inputs), targets, **options)
        history.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            half = GLOBAL // 2
            parts = [(inputs, targets), (inputs[:half], targets[:half]), (inputs[half:], targets[half:])]
            whole, *halves = (cross_entropy(model(some), of, **options).item() for some, of in parts)
        uneven += sum(halves) / 2 != pytest.approx(whole, rel=1e-6)
    assert uneven == STEPS  # a mean of the ranks' means would be another number
    for run in runs:
        assert losses(run) == pytest.approx(history, rel=1e-10)
        found = weights(run)
        trained = {name.removeprefix("model."): tensor for name, tensor in model.state_dict().items()}
        assert largest_difference(found, {name: trained[name] for name in found}) < 1e-10

    with torch.no_grad():
        inputs, targets = batch_of(source, source.validation, list(range(len(source.validation))))
        expected = cross_entropy(model(inputs), targets, **options).item()
    last = [rows(run, "validate")[-1] for run in runs]
    assert [row["loss"] for row in last] == pytest.approx([expected] * 2, rel=1e-10)
    own = [{key: value for key, value in row.items() if key not in ("time", "loss")} for row in last]
    assert own[0] == own[1]


# ---- mixup and cutmix ------------------------------------------------------------------------------------------------


def mixed_by_hand(steps: int) -> list[float]:
    """The losses of the steps: of micro-batches of 6 samples, each mixed by torchvision under its own seed."""
    source, cpu = digits(shift=0), torch.device("cpu")
    torch.manual_seed(0)
    model = linear((1, 8, 8), 10).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    mix = v2.RandomChoice([v2.MixUp(alpha=0.4, num_classes=10), v2.CutMix(alpha=1.0, num_classes=10)])
    order, history = Order(len(source.train), 0), []
    for step in range(steps):
        indices = order(0, step * GLOBAL, (step + 1) * GLOBAL).tolist()
        parts = []
        for number, some in enumerate((indices[:6], indices[6:])):
            images, labels = digits_of(source, source.train, some)
            seed_forward(0, step, number, cpu)
            parts.append(mix(images, labels))
        inputs, targets = (torch.cat(each) for each in zip(*parts, strict=True))
        weight = torch.tensor(CLASS_WEIGHTS).double()
        loss = cross_entropy(model(inputs), targets.double(), weight, label_smoothing=0.1)
        history.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return history


def test_mixed_batches_train_as_torch_and_torchvision_do_it_on_one_rank_and_two_and_over_a_stop(tmp_path: Path) -> None:
    arguments = {"mixup": 0.4, "cutmix": 1.0, "class_weights": CLASS_WEIGHTS, "label_smoothing": 0.1}
    steps = 30  # a few pass before all ranks agree on a stop
    settings = {
        "data": {"name": "digits", "args": {"shift": 0}},
        "model": "linear",
        "task": {"name": "tests.lab.resuming:StoppedClassification", "args": arguments},
        "batch": {"global_size": GLOBAL, "micro_size": 6},
        "train": {"steps": steps},
        "optim": {**COMMON["optim"], "lr": 0.05},
        "validate": {"every_steps": 15, "every_epochs": None},
    }
    config = write_config(tmp_path, {**COMMON, **settings})
    words, expected = ["--config", str(config), "--name"], mixed_by_hand(steps)
    for world_size, call in ((1, 6), (2, 5)):
        whole, stopped = f"whole{world_size}", f"stopped{world_size}"
        train(tmp_path, [*words, whole], world_size).check()
        step = stop(tmp_path, [*words, stopped], world_size, call)
        assert 0 < step < steps
        go_on(tmp_path, [*words, stopped], world_size, step)
        check_same(tmp_path / "runs" / stopped, tmp_path / "runs" / whole)
        assert losses(tmp_path / "runs" / whole) == pytest.approx(expected, rel=1e-10)
