"""What the part "figures" measures, in processes of its own: distloop's loop, one by hand, and Accelerate's example.

All train the same model on the same images or tokens in memory, in the same process, in turn, with the same optimizer.
A round of each writes a line into the file "rounds": {"loop": …, "milliseconds": […]}, one for each step.
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import yaml
from torch import Tensor, nn
from torch.nn import functional

from distloop.data.datasets import DataSource
from distloop.data.whole_batches import InMemory
from distloop.training.models import cnn, resnet18_small
from tests.gpu.lab import Gpt, Timed, TimedClassification, TimedNextToken, intervals, mark, tokens

WARM_UP = 0.4  # of the steps of a round: cuDNN chooses its algorithms, the allocator finds its sizes


class Case(NamedTuple):
    """What is trained. `shape`: of an image; None: tokens."""

    model: Callable[[], nn.Module]
    shape: tuple[int, int, int] | None
    batch: int
    steps: int
    precision: str = "no"
    pad: int = 0
    adamw: bool = False


def tiny_cnn() -> nn.Module:
    return cnn((1, 28, 28), 10, width=8, norm="batch")


def resnet18() -> nn.Module:
    return resnet18_small(10)


def resnet50() -> nn.Module:
    from torchvision.models import resnet50 as build

    return build(num_classes=10)


def gpt() -> nn.Module:
    return Gpt()


def tiny_gpt() -> nn.Module:
    return Gpt(32, 1, 2)


# A tiny CNN is bound by the host, which starts its kernels; the others are bound by the device.
ON_CUDA = {
    "tiny CNN": Case(tiny_cnn, (1, 28, 28), 64, 300),
    "ResNet-18, 32 px": Case(resnet18, (3, 32, 32), 128, 100, "bf16", 4),
    "small GPT": Case(gpt, None, 32, 60, "bf16", adamw=True),
    "ResNet-50, 224 px": Case(resnet50, (3, 224, 224), 64, 40, "bf16"),
}
ON_CPU = {
    "tiny CNN": Case(tiny_cnn, (1, 28, 28), 8, 10),
    "ResNet-18, 32 px": Case(resnet18, (3, 32, 32), 4, 4, pad=4),
    "small GPT": Case(tiny_gpt, None, 2, 4, adamw=True),
    "ResNet-50, 224 px": Case(resnet50, (3, 224, 224), 2, 3),
}


def images(shape: tuple[int, int, int] | list[int], samples: int = 512, pad: int = 0) -> DataSource:
    """Random images of ten classes."""
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randint(256, (samples, *shape), dtype=torch.uint8, generator=generator)
    labels = torch.randint(10, (samples,), generator=generator)
    mean, std = (0.5,) * shape[0], (0.25,) * shape[0]
    train = InMemory(pixels, labels, pad=pad, flip=pad > 0)
    return DataSource(train, InMemory(pixels[:8], labels[:8]), tuple("0123456789"), mean, std)


def source_of(case: Case) -> DataSource:
    return tokens() if case.shape is None else images(case.shape, pad=case.pad)


def build(case: Case, device: torch.device) -> tuple[nn.Module, torch.optim.Optimizer]:
    model = case.model().to(device)
    if case.adamw:
        return model, torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    return model, torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9, fused=True)


def loss_of(case: Case, model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
    if case.shape is None:
        return functional.cross_entropy(model(inputs).flatten(0, 1), targets.flatten())
    return functional.cross_entropy(model((inputs.float() / 255 - 0.5) / 0.25), targets)


# ---- the loops -----------------------------------------------------------------------------------------------


def distloop_loop(case: Case, device: torch.device, compiled: bool, number: int) -> list[Any]:
    """The moments at which the forward passes of distloop's loop begin."""
    data: dict[str, Any] = {"name": "tests.gpu.lab:tokens"}
    task: type[Timed] = TimedNextToken
    if case.shape is not None:
        data = {"name": "tests.gpu.speed:images", "args": {"shape": list(case.shape), "pad": case.pad}}
        task = TimedClassification
    return run_distloop(case, device, compiled, number, data, task)


def run_distloop(
    case: Case, device: torch.device, compiled: bool, number: int, data: dict[str, Any], task: type[Timed]
) -> list[Any]:
    from distloop.ranks.start import main
    from distloop.train import train

    never = 1_000_000
    settings = {
        "data": data,
        "model": f"tests.gpu.speed:{case.model.__name__}",
        "task": f"tests.gpu.lab:{task.__name__}",
        "optim": {"name": "adamw" if case.adamw else "sgd", "lr": 1e-3, "weight_decay": 0.0},
        "schedule": "constant",
        "batch": {"global_size": case.batch},
        "train": {"epochs": None, "steps": case.steps},
        "log": {"every_steps": never},
        "validate": {"every_epochs": None, "every_steps": never},
        "checkpoint": {"every_steps": never},
        "device": device.type,
        "precision": case.precision,
        "compile": compiled,
        "tracking": {"report": False},
    }
    Path("speed.yaml").write_text(yaml.safe_dump(settings))
    if code := main(train, ["--config", "speed.yaml", "--name", f"round-{number}-{compiled}", "--resume", "never"]):
        raise RuntimeError(f"distloop's loop ended with code {code}")
    return task.marks


def by_hand(case: Case, device: torch.device, compiled: bool, number: int) -> list[Any]:
    """The same for a loop written by hand in plain PyTorch."""
    data = source_of(case).train
    model, optimizer = build(case, device)
    if compiled:
        model.compile()
    marks = []
    for indices, random in order(len(data), case, data.draws, number):
        inputs, targets = (part.pin_memory() if device.type == "cuda" else part for part in data.batch(indices, random))
        inputs, targets = inputs.to(device, non_blocking=True), targets.to(device, non_blocking=True)
        marks.append(mark(device))
        with torch.autocast(device.type, torch.bfloat16, enabled=case.precision == "bf16"):
            loss = loss_of(case, model, inputs, targets)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return marks


def order(samples: int, case: Case, draws: int, seed: int) -> Iterator[tuple[Any, Any]]:
    """Indices and random numbers of each batch."""
    generator = np.random.default_rng(seed)
    done = 0
    while done < case.steps:
        permutation = generator.permutation(samples)
        for start in range(0, samples - case.batch + 1, case.batch):
            yield permutation[start : start + case.batch], generator.random((case.batch, draws))
            done += 1
            if done == case.steps:
                return


class Batches(torch.utils.data.Dataset):
    """Data in memory for a DataLoader, which asks for whole batches."""

    def __init__(self, data: InMemory) -> None:
        self.data, self.generator = data, np.random.default_rng(0)

    def __len__(self) -> int:
        return len(self.data)

    def __getitems__(self, indices: list[int]) -> Any:
        return self.data.batch(np.asarray(indices), self.generator.random((len(indices), self.data.draws)))


def as_it_is(batch: Any) -> Any:
    return batch


def accelerate_example(case: Case, device: torch.device, compiled: bool, number: int) -> list[Any]:
    """The same for the loop of Accelerate's examples: all is prepared, and gradients accumulate in its context."""
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=device.type == "cpu", mixed_precision=case.precision)
    loader = torch.utils.data.DataLoader(
        Batches(source_of(case).train),
        batch_size=case.batch,
        shuffle=True,
        drop_last=True,
        collate_fn=as_it_is,
        pin_memory=device.type == "cuda",
    )
    bare_model, bare_optimizer = build(case, device)
    if compiled:
        bare_model.compile()
    constant = torch.optim.lr_scheduler.ConstantLR(bare_optimizer, 1.0)
    model, optimizer, loader, scheduler = accelerator.prepare(bare_model, bare_optimizer, loader, constant)
    marks: list[Any] = []
    while len(marks) < case.steps:
        for inputs, targets in loader:
            marks.append(mark(device))
            with accelerator.accumulate(model):
                loss = loss_of(case, model, inputs, targets)
                accelerator.backward(loss)
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
            if len(marks) == case.steps:
                break
    return marks


LOOPS = {"distloop": distloop_loop, "by_hand": by_hand, "accelerate": accelerate_example}

# ---- in a process of its own ---------------------------------------------------------------------------------


def in_folder(folder: str, work: Callable[..., None], *arguments: Any) -> None:
    """What a child process does: call `work` in the folder; what it prints is in the file "output"."""
    os.chdir(folder)
    descriptor = os.open("output", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.stdout = os.fdopen(1, "w", buffering=1, closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
    try:
        work(*arguments)
        code = 0
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    os._exit(code)


def write(entry: dict[str, Any]) -> None:
    with open("rounds", "a") as file:
        file.write(json.dumps(entry) + "\n")


def steps(name: str, device_name: str, compiled: bool, rounds: int) -> None:
    """Time the steps of all loops, in turn."""
    torch.set_num_threads(1)
    device = torch.device(device_name)
    case = (ON_CUDA if device_name == "cuda" else ON_CPU)[name]
    for number in range(rounds):
        for loop in sorted(LOOPS, reverse=number % 2 == 1):
            if compiled:
                torch._dynamo.reset()  # each compiles anew; else the eighth model would silently not be compiled
            marks = LOOPS[loop](case, device, compiled, number)
            write({"loop": loop, "milliseconds": intervals(marks)[int(WARM_UP * case.steps) :]})


def data_of_cifar10(root: str, device_name: str, rounds: int) -> None:
    """Time the steps of distloop on a CIFAR-10-sized data set in the real format, and of the same model by hand on a
    batch that is ready on the device."""
    torch.set_num_threads(1)
    device = torch.device(device_name)
    case = (ON_CUDA if device_name == "cuda" else ON_CPU)["ResNet-18, 32 px"]
    data = {"name": "tests.lab.user_code:small_cifar10", "root": root}
    for number in range(rounds):
        marks = run_distloop(case, device, False, 10 + number, data, TimedClassification)
        write({"loop": "from files", "milliseconds": intervals(marks)[int(WARM_UP * case.steps) :]})
        model, optimizer = build(case, device)
        inputs = torch.randn(case.batch, 3, 32, 32, device=device)
        targets = torch.zeros(case.batch, dtype=torch.int64, device=device)
        marks = []
        for _ in range(case.steps):
            marks.append(mark(device))
            with torch.autocast(device.type, torch.bfloat16, enabled=case.precision == "bf16"):
                loss = functional.cross_entropy(model(inputs), targets)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        write({"loop": "ready tensor", "milliseconds": intervals(marks)[int(WARM_UP * case.steps) :]})


def save(device_name: str, gigabytes: float, rounds: int) -> None:
    """Time how long a save holds the loop and the device up, and when it is on the disk. The first makes buffers."""
    from distloop.config.settings import Checkpoint
    from distloop.ranks.stopping import listen
    from distloop.run.checkpoint import LoopState
    from distloop.run.saving import Saver

    device = torch.device(device_name)
    layers = max(1, round(gigabytes * 1e9 / 12 / 2048**2))  # a weight and two moments
    model = nn.Sequential(*(nn.Linear(2048, 2048, bias=False) for _ in range(layers))).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    model(torch.randn(8, 2048, device=device)).sum().backward()
    optimizer.step()
    saver = Saver(Path("saved"), Checkpoint(), {}, listen(), lambda step, best: None, enabled=True)
    for number in range(rounds + 1):
        if device.type == "cuda":
            torch.cuda.synchronize()
        begun, marks = time.perf_counter(), [mark(device)]
        saver.save({"model": model, "optimizer": optimizer}, LoopState(number), {})
        held = time.perf_counter() - begun
        marks.append(mark(device))
        saver.wait()
        durable = time.perf_counter() - begun
        write({"loop": "first" if number == 0 else "save", "milliseconds": [1000 * held]})
        write({"loop": "first, device" if number == 0 else "device", "milliseconds": intervals(marks)})
        write({"loop": "first, on the disk" if number == 0 else "on the disk", "milliseconds": [1000 * durable]})
    write({"loop": "gigabytes", "milliseconds": [layers * 12 * 2048**2 / 1e9]})
