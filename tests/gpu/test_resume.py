"""Part "resume": what is stopped, or killed in a save, goes on as if nothing had been; a save under load is right."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from distloop.config.settings import Checkpoint
from distloop.ranks.stopping import Watch
from distloop.run.checkpoint import LoopState, newest_published, verify
from distloop.run.saving import Saver
from tests.gpu.conftest import Figures
from tests.tools import stage
from tests.tools.kills import newest_step, saves_under_way
from tests.tools.ranks import Ranks, train, wait_until, write_config
from tests.tools.records import largest_difference, losses, rows, status, weights

# All that could carry a state: augmentation, BatchNorm, dropout, moments, accumulation, clipping, averaging.
SETTINGS: dict[str, Any] = {
    "data": "tests.gpu.data:packed_digits",
    "model": {"name": "cnn", "args": {"width": 16, "norm": "batch", "dropout": 0.3}},
    "task": "tests.lab.resuming:StoppedClassification",
    "optim": {"name": "adamw", "clip_norm": 1.0, "ema_decay": 0.99},
    "batch": {"global_size": 64, "micro_size": 16},
    "train": {"epochs": None, "steps": 30},
    "log": {"every_steps": 1},
    "checkpoint": {"every_steps": 30},
    "validate": {"every_epochs": None, "every_steps": 10},
}
DETERMINISTIC = {"task": "tests.gpu.lab:DeterministicClassification"}


def bits(run: Path) -> dict[str, bytes]:
    newest = newest_published(run / "checkpoints")
    assert newest is not None
    files = ("model.safetensors", "averaged.safetensors")
    tensors = {f"{file} {name}": tensor for file in files for name, tensor in load_file(newest / file).items()}
    return {name: tensor.numpy().tobytes() for name, tensor in tensors.items()}


def whole_and_stopped(folder: Path, settings: dict[str, Any], environment: dict[str, str]) -> tuple[Path, Path]:
    """A run that nothing disturbs, and one that is stopped by a signal in its tenth step and continued."""
    config = ["--config", str(write_config(folder, settings))]
    train(folder, [*config, "--name", "whole"], environment=environment).check()
    stage.interrupt(folder, "loss", 4 * 9 + 2)
    train(folder, [*config, "--name", "stopped"], environment=environment).check()
    whole, stopped = (folder / "runs" / name for name in ("whole", "stopped"))
    assert status(stopped)["state"] == "stopped"
    assert status(stopped)["step"] >= 10
    train(folder, [*config, "--name", "stopped"], environment=environment).check()
    assert [row["step"] for row in rows(stopped, "train")] == list(range(1, 31))
    assert {row["attempt"] for row in rows(stopped, "train")} == {1, 2}
    return whole, stopped


def test_a_save_under_load_gives_the_bits_of_a_save_at_rest(tmp_path: Path, device: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(512, 512) for _ in range(8))).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    watch = cast(Watch, SimpleNamespace(say=pytest.fail, ask=pytest.fail, took=lambda what, seconds: None))
    saver = Saver(tmp_path, Checkpoint(keep_last=100), {}, watch, lambda step, best: None, enabled=True)
    parts = {"model": model, "optimizer": optimizer}
    inputs = torch.randn(2048 if device == "cuda" else 64, 512, device=device)
    expected: dict[int, Any] = {}
    for step in range(1, 7):
        for _ in range(20 if device == "cuda" else 1):  # the device has plenty to do when the save begins,
            model(inputs).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        before = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
        moments = [value["exp_avg"].clone() for value in optimizer.state.values()]
        saver.save(parts, LoopState(step), {})
        held = [*model.parameters(), *(value["exp_avg"] for value in optimizer.state.values())]
        with torch.no_grad():
            for factor in (2.0, 0.5):  # and changes at once what is being saved; both are exact
                torch._foreach_mul_(held, factor)
        expected[step] = (before, moments)
    saver.finish()
    for step, (before, moments) in expected.items():
        path = tmp_path / f"step_{step:08d}"
        verify(path)
        stored = load_file(path / "model.safetensors")
        for name, tensor in before.items():
            assert torch.equal(stored[name], tensor.cpu()), f"{name} of step {step}"
        state = torch.load(path / "optimizer.pt", weights_only=True)["state"]
        for place, tensor in enumerate(moments):
            assert torch.equal(state[place]["exp_avg"], tensor.cpu()), f"moment {place} of step {step}"


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_under_deterministic_algorithms_a_stopped_run_ends_with_the_same_bits(
    tmp_path: Path, device: str, precision: str
) -> None:
    settings = {**SETTINGS, **DETERMINISTIC, "device": device, "precision": precision}
    whole, stopped = whole_and_stopped(tmp_path, settings, {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"})
    assert losses(stopped) == losses(whole)
    assert bits(stopped) == bits(whole)
    newest = [newest_published(run / "checkpoints") for run in (whole, stopped)]
    one, other = (torch.load(f"{path}/optimizer.pt", weights_only=True)["state"] for path in newest)
    for key, moments in one.items():
        for name, tensor in moments.items():
            assert torch.equal(other[key][name], tensor), f"{name} of parameter {key}"


def test_without_them_it_ends_the_same_to_rounding(tmp_path: Path, device: str, figures: Figures) -> None:
    whole, stopped = whole_and_stopped(tmp_path, {**SETTINGS, "device": device}, {})
    figures["same_bits"] = str(bits(stopped) == bits(whole))
    figures["largest_difference_of_a_weight"] = largest_difference(weights(stopped), weights(whole))
    assert losses(stopped) == pytest.approx(losses(whole), rel=2e-2)


def test_a_run_that_is_killed_in_a_save_continues_to_the_same_bits(tmp_path: Path, device: str) -> None:
    settings = {
        **SETTINGS,
        **DETERMINISTIC,
        "device": device,
        "model": {"name": "mlp", "args": {"hidden": 1024}},  # a save of some 50 MB can be hit
        "checkpoint": {"every_steps": 5},
    }
    config = ["--config", str(write_config(tmp_path, settings))]
    environment = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
    train(tmp_path, [*config, "--name", "whole"], environment=environment).check()
    whole, killed = tmp_path / "runs" / "whole", tmp_path / "runs" / "killed"
    ranks = Ranks(tmp_path, [*config, "--name", "killed"], environment=environment)
    alive = ranks.processes[0].is_alive
    wait_until(lambda: not alive() or (newest_step(killed) >= 5 and saves_under_way(killed)), "a second save")
    ranks.kill()
    outcome = ranks.join()
    assert outcome.codes == [-9], outcome.output  # else it has ended before a save was seen
    newest = newest_published(killed / "checkpoints")
    assert newest is not None
    verify(newest)
    train(tmp_path, [*config, "--name", "killed"], environment=environment).check()
    assert bits(killed) == bits(whole)
    assert [row["step"] for row in rows(killed, "train")] == list(range(1, 31))
