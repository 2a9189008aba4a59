"""The loop computes what the same training written by hand in plain PyTorch computes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional

from distloop.data.datasets import digits
from distloop.data.order import Order
from distloop.data.seeding import uniforms
from distloop.training.models import mlp
from tests.tools.ranks import train, write_config
from tests.tools.records import largest_difference, losses, rows, weights

STEPS, GLOBAL_BATCH, LR = 50, 64, 0.1


def digits_steps_per_epoch() -> int:
    return len(digits().train) // GLOBAL_BATCH


def by_hand(clip_norm: float) -> tuple[list[tuple[float, float, float]], dict[str, torch.Tensor]]:
    """Digits, a small MLP and SGD with momentum in float64, with nothing of ours but the order and the draws. Loss,
    norm of the gradient and learning rate of each step, and the weights."""
    data = digits().train
    torch.manual_seed(0)
    model = mlp((1, 8, 8), 10, hidden=32).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=LR, momentum=0.9)
    order, steps_per_epoch = Order(len(data), 0), digits_steps_per_epoch()
    history = []
    for step in range(STEPS):
        epoch, start = step // steps_per_epoch, step % steps_per_epoch * GLOBAL_BATCH
        indices = order(epoch, start, start + GLOBAL_BATCH)
        images, targets = data.batch(indices, uniforms(0, epoch, indices, 3))
        inputs = (images.double() / 255 - 0.305) / 0.376
        for group in optimizer.param_groups:
            group["lr"] = LR * (1 + np.cos(np.pi * step / STEPS)) / 2
        loss = functional.cross_entropy(model(inputs), targets)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), clip_norm)
        optimizer.step()
        optimizer.zero_grad()
        history.append((loss.item(), norm.item(), group["lr"]))
    return history, dict(model.state_dict())


@pytest.mark.parametrize(("world_size", "micro_size"), [(1, 64), (2, 8)])
def test_a_run_equals_the_loop_written_by_hand(tmp_path: Path, world_size: int, micro_size: int) -> None:
    settings = {
        "data": "digits",
        "model": {"name": "mlp", "args": {"hidden": 32}},
        "optim": {"name": "sgd", "lr": LR, "weight_decay": 0, "clip_norm": 0.5},
        "dtype": "float64",
        "batch": {"global_size": GLOBAL_BATCH, "micro_size": micro_size},
        "train": {"steps": STEPS},
        "log": {"every_steps": 1},
    }
    train(tmp_path, ["--config", str(write_config(tmp_path, settings))], world_size).check()
    history, parameters = by_hand(clip_norm=0.5)
    run = tmp_path / "runs" / "run"
    assert losses(run) == pytest.approx([loss for loss, _, _ in history], rel=1e-10)
    assert largest_difference(weights(run), parameters) < 1e-10
    # What a user looks at: the norm is that before clipping, the running loss begins anew with each epoch.
    logged, epoch = rows(run, "train"), digits_steps_per_epoch()
    assert [row["gradient_norm"] for row in logged] == pytest.approx([norm for _, norm, _ in history], rel=1e-9)
    assert [row["lr"] for row in logged] == pytest.approx([lr for _, _, lr in history], rel=1e-12)
    running = [np.mean([loss for loss, _, _ in history[step // epoch * epoch : step + 1]]) for step in range(STEPS)]
    assert [row["running_loss"] for row in logged] == pytest.approx(running, rel=1e-10)
    whole_epochs = [running[step] for step in range(epoch - 1, STEPS, epoch)]
    assert [row["loss"] for row in rows(run, "epoch")] == pytest.approx(whole_epochs, rel=1e-10)
