"""What lies between two logging steps does not wait for a GPU: run here on tensors that only say that they are on one.

torch's FakeTensorMode gives tensors without contents, on a device that need not exist. It raises an error where the
host asks for a value (item(), float(), if), where a result's shape depends on values, and where devices are mixed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Literal

import pytest
import torch
from accelerate.utils import convert_to_fp32
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from distloop.config.settings import Data, Optim
from distloop.data.batches import _normalisation, to_model
from distloop.data.datasets import DataSource
from distloop.data.order import Plan
from distloop.run.saving import HostBuffers
from distloop.tasks import Classification, Regression, Task
from distloop.training.averaging import Average
from distloop.training.details import Details
from distloop.training.gradients import divide_by_weight, norm_and_clip
from distloop.training.groups import set_lr
from distloop.training.losses import LossSums
from distloop.training.models import cnn
from distloop.training.nonfinite import FiniteCheck
from distloop.training.optimizers import build_optimizer

pytestmark = pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")

CUDA = torch.device("cuda", 0)
SOURCE = DataSource([0], [0], mean=(0.3,), std=(0.4,))

# Their CUDA kernels take one tensor of no dimension on the CPU as an argument, without a copy (gpu_kernel_with_scalars
# in ATen/native/cuda/Loops.cuh). where() copies it and waits (where_self_out in ATen/native/TensorCompare.cpp).
TAKE_CPU_SCALARS = {"add", "add_", "sub", "sub_", "mul", "mul_", "div", "div_", "eq", "lt", "gt"}
READ_NOTHING = {"empty_like"}
IN_PLACE_ALONE = {"_fused_sgd_"}  # which torch cannot do without contents; its arguments are looked at


class Waits(Exception):
    """The host would wait for the device here."""


def memory_of(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


class Watch(TorchDispatchMode):
    """Raises Waits where tensors of the CPU and of the device meet, but for what does not wait."""

    def __init__(self) -> None:
        super().__init__()
        self.pinned: list[Any] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        results = None if name in IN_PLACE_ALONE else func(*args, **kwargs)
        if kwargs.get("pin_memory"):
            self.pinned.append(results)
        tensors = [leaf for leaf in tree_leaves((args, kwargs, results)) if isinstance(leaf, Tensor)]
        devices = {tensor.device.type for tensor in tensors}
        if len(devices) > 1 and name not in READ_NOTHING and not self.is_free(name, args):
            raise Waits(f"{func} with tensors on {' and '.join(sorted(devices))}")
        return results

    def is_free(self, name: str, args: Any) -> bool:
        """Whether tensors of both devices can meet in this call without a wait."""
        on_cpu = [leaf for leaf in tree_leaves(args) if isinstance(leaf, Tensor) and leaf.device.type == "cpu"]
        if name == "copy_":
            return args[2:] == (True,) and memory_of(on_cpu[0]) in map(memory_of, self.pinned)  # True: non_blocking
        return name in TAKE_CPU_SCALARS and [tensor.ndim for tensor in on_cpu] == [0]


@pytest.fixture(autouse=True)
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(
        FakeTensorMode, "__deepcopy__", lambda mode, _: mode, raising=False
    )  # a copied model is in it, too
    _normalisation.cache_clear()
    with FakeTensorMode():
        yield
    _normalisation.cache_clear()  # other tests have no use for tensors without contents


# ---- what the tests can see --------------------------------------------------------------------------------------

PLANTED: dict[str, Callable[[Tensor], Any]] = {
    "item": lambda values: values.sum().item(),
    "float": lambda values: float(values.sum()),
    "if": lambda values: 1 if values.sum() > 0 else 0,
    "tolist": lambda values: values.tolist(),
    "cpu": lambda values: values.cpu(),
    "to the CPU": lambda values: values.to("cpu", non_blocking=True),  # not pinned
    "a number to the device": lambda values: torch.tensor(1.0, device=CUDA),
    "as_tensor": lambda values: torch.as_tensor(1, device=CUDA),
    "where": lambda values: torch.where(values.sum() > 0, 0, torch.tensor(3)),
    "copy_": lambda values: values.copy_(torch.zeros(3)),
    "nonzero": lambda values: values.nonzero(),
    "mask": lambda values: values[values > 0],
}


@pytest.mark.parametrize("planted", PLANTED)
def test_a_wait_is_seen(planted: str) -> None:
    values = torch.zeros(3, device=CUDA)
    with pytest.raises((Waits, DataDependentOutputException, DynamicOutputShapeException)), Watch():
        PLANTED[planted](values)


def test_a_number_in_a_kernel_is_no_wait() -> None:
    values = torch.zeros(3, device=CUDA)
    with Watch():
        assert (values + torch.tensor(2) * 3).device == (values * 2.0).device == CUDA


# ---- a step ------------------------------------------------------------------------------------------------------

WEIGHTS: dict[str, Callable[[Tensor], Any]] = {
    "a number": len,
    "a tensor on the CPU": lambda targets: torch.tensor(len(targets)),
    "a tensor on the device": lambda targets: (targets >= 0).sum(),
}


class Weighted(Classification):
    """Classification whose weight has one of the forms that a task may give it."""

    weight = "tokens"

    def __init__(self, form: str) -> None:
        super().__init__()
        self.form = form

    def loss(self, outputs: Tensor, batch: Any) -> tuple[Tensor, Any]:
        return super().loss(outputs, batch)[0], WEIGHTS[self.form](batch[1])


def network() -> nn.Module:
    with CUDA:
        return cnn((1, 8, 8), 10, width=8, norm="batch", dropout=0.1)


def images(samples: int = 4) -> tuple[Tensor, Tensor]:
    shape = (samples, 1, 8, 8)
    return torch.zeros(shape, dtype=torch.uint8, device=CUDA), torch.zeros(samples, dtype=torch.int64, device=CUDA)


class Loop:
    """The body of train.py's loop, for one process, without the backward pass."""

    def __init__(self, policy: Literal["stop", "skip"], optim: Optim, task: Task, model: nn.Module) -> None:
        self.task, self.model, self.optim = task, model.train(), optim
        self.optimizer = build_optimizer(model, optim, CUDA, "no")
        self.average = Average(model, optim.ema_decay)
        self.plan = Plan(80, 8, 1, 4)
        self.parameters = list(model.parameters())
        self.losses = LossSums(CUDA)
        self.finite = FiniteCheck(policy, model, self.optimizer, None, self.plan)

    def step(self, step: int, batch: Any, dtype: torch.dtype = torch.float32) -> None:
        """`dtype`: of the outputs, as autocast would make them, which is off where there is no GPU."""
        set_lr(self.optimizer, 0.1)
        self.losses.begin_step()
        self.finite.begin_step()
        for part in range(2):
            with torch.no_grad():
                outputs = convert_to_fp32(self.task.forward(self.model, batch).to(dtype))  # as Accelerate does
            loss, weight = self.task.loss(outputs, batch)
            assert (loss * 0.125).device == CUDA
            self.losses.add(loss, weight, part == 1, 4 if self.task.weight == "samples" else None)
        for parameter in self.parameters:  # autograd's engine asks for a device that exists
            parameter.grad = torch.zeros_like(parameter)
        if self.task.weight != "samples":
            divide_by_weight(self.model, self.losses.step_weight, 8)
        norm = norm_and_clip(self.parameters, self.optim.clip_norm)
        left_out = self.finite.before_update(step, norm, self.losses.step_losses)
        self.losses.end_step(left_out)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.average.update(self.model)
        self.finite.after_update(self.optimizer)


@pytest.mark.parametrize("policy", ["stop", "skip"])
@pytest.mark.parametrize(
    ("weight", "optimizer", "dtype"),
    [
        ("samples", "adamw", torch.float32),
        ("samples", "adam", torch.bfloat16),
        ("samples", "sgd", torch.float32),
        *((weight, "adamw", torch.float32) for weight in WEIGHTS),
    ],
)
def test_a_step_does_not_wait_for_the_device(
    weight: str, optimizer: Any, dtype: torch.dtype, policy: Literal["stop", "skip"]
) -> None:
    task = Classification() if weight == "samples" else Weighted(weight)
    loop = Loop(policy, Optim(optimizer, clip_norm=1.0, ema_decay=0.99), task, network())
    to_model(images(), SOURCE, torch.float32)  # the mean and the deviation come to the device with the first batch
    for step in range(3):
        batch = images()
        with Watch():
            loop.step(step, to_model(batch, SOURCE, torch.float32), dtype)
    assert loop.losses.epoch_loss.device == CUDA


def test_a_step_of_regression_does_not_wait_for_the_device() -> None:
    loop = Loop("skip", Optim("sgd"), Regression(), nn.Linear(3, 1, device=CUDA))
    with Watch():
        loop.step(0, (torch.zeros(4, 3, device=CUDA), torch.zeros(4, 1, device=CUDA)))


# ---- a batch of validation ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("classes", [10, 2000])
def test_a_batch_of_validation_does_not_wait_for_the_device(classes: int) -> None:
    task, model = Classification(), nn.Linear(3, classes, device=CUDA)
    batch = torch.zeros(8, 3, device=CUDA), torch.zeros(8, dtype=torch.int64, device=CUDA)
    task.probe(model(batch[0]))
    details = Details(task, SOURCE, Data(), 0)
    with Watch():
        details.begin(CUDA)
        outputs = task.forward(model, batch)
        assert task.loss(outputs, batch)[0].device == task.metrics(outputs, batch)["correct"].device == CUDA
        details.add(task.guesses(outputs, batch), 16, 24)


def test_a_batch_of_regression_is_validated_on_the_device() -> None:
    task, model = Regression(), nn.Linear(3, 1, device=CUDA)
    batch = torch.zeros(8, 3, device=CUDA), torch.zeros(8, 1, device=CUDA)
    with Watch():
        sums = task.metrics(task.forward(model, batch), batch)
    assert {name: value.dtype for name, value in sums.items()} == {
        "squared_error": torch.float64,
        "targets": torch.float64,
        "squared_targets": torch.float64,
        "elements": torch.int64,
    }


# ---- a save ------------------------------------------------------------------------------------------------------


class Event:
    """In the place of torch.cuda.Event, of which there is none without a GPU."""

    def __init__(self, log: list[Any]) -> None:
        self.log, self.device = log, torch.device("cuda", 3)

    def record(self) -> None:
        self.log.append("recorded")

    def synchronize(self) -> None:
        self.log.append("waited")


def test_a_save_does_not_wait_for_its_copies_and_its_thread_waits_on_their_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[Any] = []
    monkeypatch.setattr(torch.cuda, "Event", lambda: Event(log))
    monkeypatch.setattr(torch.cuda, "set_device", log.append)
    weight = torch.zeros(2, 3, 8, 8, device=CUDA).to(memory_format=torch.channels_last)
    state = {0: {"step": torch.zeros((), device=CUDA), "exp_avg": torch.zeros_like(weight)}, "lr": [0.1]}
    buffers = HostBuffers()
    with Watch():
        for _ in range(2):
            copies = [buffers.copy("weight", weight), *tree_leaves(buffers.copy_tree("state", state))]
            assert all(copy.device.type == "cpu" for copy in copies if isinstance(copy, Tensor))
            buffers.record()
    assert log == ["recorded", "recorded"]  # behind all copies of a save
    buffers.ready()
    assert log[2:] == [torch.device("cuda", 3), "waited"]
