"""Loops of one's own, in tests/lab/loops: what the package promises of its loop holds for them."""

from __future__ import annotations

import random
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.distributions import Beta
from torch.nn.functional import cross_entropy

from distloop.data.batches import to_model
from distloop.data.datasets import digits
from distloop.data.order import Order
from distloop.data.seeding import seed_forward
from distloop.run.checkpoint import newest_published, published_in, verify
from distloop.training.models import linear
from tests.lab.loops import gan, mixup
from tests.tools import stage
from tests.tools.kills import await_moment, has_reached, last_row, newest_step, saves_under_way, started_from
from tests.tools.ranks import Ranks, train, wait_until, write_config
from tests.tools.records import found, largest_difference, losses, rows, status, weights

MIXUP, GAN = mixup.__name__, gan.__name__
MIXUP_STEPS, GAN_STEPS = 60, 200
STEPS_PER_EPOCH = 44  # 1437 samples in batches of 32

# Dropout and mixup draw from the same generators.
MIXUP_SETTINGS: dict[str, Any] = {
    "data": "digits",
    "model": {"name": "cnn", "args": {"width": 8, "dropout": 0.3}},
    "task": "tests.lab.resuming:StoppedClassification",
    "optim": {"ema_decay": 0.99},
    "batch": {"global_size": 32, "micro_size": 16},
    "train": {"steps": MIXUP_STEPS},
    "log": {"every_steps": 1},
    "checkpoint": {"every_steps": 50},
    "validate": {"every_steps": 25},
    "own": {"alpha": 0.4},
}
# Saves of some MB, after every 8 steps.
GAN_SETTINGS: dict[str, Any] = {
    "data": "digits",
    "optim": {"clip_norm": 10.0, "ema_decay": 0.99},
    "batch": {"global_size": 32, "micro_size": 16},
    "train": {"steps": GAN_STEPS},
    "log": {"every_steps": 1},
    "checkpoint": {"every_steps": 8},
    "own": {"hidden": 512},
}
GAN_FILES = {
    "generator.safetensors",
    "averaged_generator.safetensors",
    "discriminator.safetensors",
    "generator_optimizer.pt",
    "discriminator_optimizer.pt",
}


def tensors_of(run: Path) -> dict[str, torch.Tensor]:
    """All tensors of the newest checkpoint, by file and name."""
    newest = newest_published(run / "checkpoints")
    assert newest is not None
    verify(newest)
    tensors: dict[str, torch.Tensor] = {}
    for path in newest.iterdir():
        if path.suffix == ".safetensors":
            tensors |= {f"{path.name} {name}": tensor.clone() for name, tensor in load_file(path).items()}
        elif path.suffix == ".pt":
            for place, moments in torch.load(path, weights_only=True)["state"].items():
                tensors |= {f"{path.name} {place} {name}": tensor for name, tensor in moments.items()}
    return tensors


def check_same(run: Path, whole: Path, steps: int) -> None:
    """Both have trained to the same bits: weights, averages, moments, all that was logged."""
    one, other = tensors_of(run), tensors_of(whole)
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []
    assert [row["step"] for row in rows(run, "train")] == list(range(1, steps + 1))
    for kind in ("train", "validate"):
        assert list(map(found, rows(run, kind))) == list(map(found, rows(whole, kind))), kind
    assert status(run)["state"] == "finished"


def differences(one: Path, other: Path) -> list[float]:
    """How far the tensors of two runs are from each other."""
    tensors, others = tensors_of(one), tensors_of(other)
    assert tensors.keys() == others.keys()
    return [float((tensor - others[name]).abs().max()) for name, tensor in tensors.items()]


# ---- mixup -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("world_size", [1, 2])
def test_the_mixup_loop_that_is_stopped_at_random_steps_continues_to_the_same_bits(
    tmp_path: Path, world_size: int
) -> None:
    config = ["--config", str(write_config(tmp_path, MIXUP_SETTINGS))]
    train(tmp_path, [*config, "--name", "whole"], world_size, loop=MIXUP).check()
    run, whole = tmp_path / "runs" / "stopped", tmp_path / "runs" / "whole"
    chance = random.Random(world_size)
    calls_of_step = 4 // world_size  # of task.loss(): two for each of the rank's micro-batches
    step = 0
    for last in (STEPS_PER_EPOCH // 2, STEPS_PER_EPOCH - 4):
        call = chance.randint(3, (last - step) * calls_of_step)
        stage.interrupt(tmp_path, "loss", call, rank=world_size - 1)
        outcome = train(tmp_path, [*config, "--name", "stopped"], world_size, loop=MIXUP).check()
        assert (status(run)["state"], status(run)["reason"]) == ("stopped", "SIGTERM"), outcome.output
        assert status(run)["step"] > step
        step = status(run)["step"]
    train(tmp_path, [*config, "--name", "stopped"], world_size, loop=MIXUP).check()
    assert status(run)["first_step"] == step
    check_same(run, whole, MIXUP_STEPS)
    assert {row["attempt"] for row in rows(run, "train")} == {1, 2, 3}


def test_a_step_of_mixup_is_that_of_the_mixed_inputs_and_of_the_mixed_losses(tmp_path: Path) -> None:
    """One step on all samples, against the same step written by hand."""
    source = digits(shift=0)
    samples = len(source.train)
    model = linear((1, 8, 8), 10).double()
    save_file(model.state_dict(), tmp_path / "start.safetensors")
    settings: dict[str, Any] = {
        "data": {"name": "digits", "args": {"shift": 0}},
        "model": "linear",
        "optim": {"name": "sgd", "lr": 0.1, "momentum": 0.0, "weight_decay": 0.0},
        "batch": {"global_size": samples},
        "train": {"steps": 1},
        "dtype": "float64",
        "init_from": "start.safetensors",
        "own": {"alpha": 5.0},
    }
    train(tmp_path, ["--config", str(write_config(tmp_path, settings))], loop=MIXUP).check()

    chosen = Order(samples, 0)(0, 0, samples)
    inputs, labels = to_model((source.train.inputs[chosen], source.train.targets[chosen]), source, torch.float64)
    seed_forward(0, 0, 0, torch.device("cpu"))
    share, order = float(Beta(5.0, 5.0).sample()), torch.randperm(samples)
    assert 0.1 < share < 0.9
    outputs = model(share * inputs + (1 - share) * inputs[order])
    loss = share * cross_entropy(outputs, labels) + (1 - share) * cross_entropy(outputs, labels[order])
    loss.backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    run = tmp_path / "runs" / "run"
    assert losses(run) == [pytest.approx(float(loss.detach()), rel=1e-12)]
    assert largest_difference(weights(run), model.state_dict()) < 1e-12


def test_alpha_decides_what_is_trained_and_may_not_change_in_a_run(tmp_path: Path) -> None:
    own = {"own": {}, "task": "classification", "train": {"steps": 6}, "checkpoint": {}}
    config = ["--config", str(write_config(tmp_path, {**MIXUP_SETTINGS, **own}))]
    for name, alpha in (("run", []), ("same", ["--own.alpha", "0.2"]), ("other", ["--own.alpha", "2"])):
        train(tmp_path, [*config, "--name", name, *alpha], loop=MIXUP).check()
    train(tmp_path, [*config, "--name", "none"]).check()  # the package's loop
    runs = tmp_path / "runs"
    assert max(differences(runs / "run", runs / "same")) == 0, "0.2 is the loop's default"
    for name in ("other", "none"):
        assert max(differences(runs / "run", runs / name)) > 1e-4

    longer = [*config, "--name", "run", "--train.steps", "8", "--own.alpha", "2"]
    outcome = train(tmp_path, longer, loop=MIXUP)
    assert outcome.codes == [2]
    assert "own.alpha: 0.2 there, 2.0 now" in outcome.output


# ---- the GAN ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of the GAN that nothing has disturbed, on one rank."""
    folder = tmp_path_factory.mktemp("gan")
    train(folder, ["--config", str(write_config(folder, GAN_SETTINGS)), "--name", "whole"], loop=GAN).check()
    return folder / "runs" / "whole"


def test_a_checkpoint_of_the_gan_holds_both_networks_and_both_optimizers(whole: Path) -> None:
    for checkpoint in published_in(whole / "checkpoints"):
        files = {path.name for path in checkpoint.iterdir()}
        assert files == GAN_FILES | {"state.json", "manifest.json"}
    tensors = tensors_of(whole)
    for file in GAN_FILES:
        assert any(name.startswith(f"{file} ") and tensor.abs().max() > 0 for name, tensor in tensors.items()), file


def test_each_network_of_the_gan_learns_at_its_own_rate(tmp_path: Path) -> None:
    """Adam's first step changes a parameter by the learning rate, wherever its gradient is not zero."""
    optim = {"name": "adam", "lr": 0.01}
    settings = {
        **GAN_SETTINGS,
        "optim": optim,
        "train": {"steps": 1},
        "own": {"hidden": 64, "discriminator_rate": 0.25},
    }
    train(tmp_path, ["--config", str(write_config(tmp_path, settings))], loop=GAN).check()
    torch.manual_seed(0)
    before = gan.Gan(int(gan.OWN["noise"]), 64, (1, 8, 8))
    newest = newest_published(tmp_path / "runs" / "run" / "checkpoints")
    assert newest is not None
    for name, rate in (("generator", 0.01), ("discriminator", 0.0025)):
        after = load_file(newest / f"{name}.safetensors")
        for key, tensor in before.get_submodule(name).state_dict().items():
            assert float((after[key] - tensor).abs().max()) == pytest.approx(rate, rel=1e-3), f"{name} {key}"


def kill_often(folder: Path, arguments: list[str], world_size: int, kinds: list[str], seed: int) -> int:
    """Start the run again and again, and kill -9 it each time: at its start, in a save, or anywhere. Returns how many
    saves were cut off."""
    run = folder / "runs" / arguments[arguments.index("--name") + 1]
    chance = random.Random(seed)
    chance.shuffle(kinds)
    steps = sorted(chance.sample(range(1, GAN_STEPS - 80), len(kinds)))  # each attempt has something left to do
    inside_saves = 0
    for kind, step in zip(kinds, steps, strict=True):
        attempt, _ = last_row(run)
        newest = newest_step(run)
        ranks = Ranks(folder, arguments, world_size, loop=GAN)
        await_moment(kind, run, ranks, attempt, step, chance)
        ranks.kill()
        outcome = ranks.join()
        assert outcome.codes == [-9] * world_size, outcome.output  # nothing had ended by itself
        assert started_from(outcome.outputs[0]) in (None, newest), "the newest checkpoint was not continued from"
        inside_saves += bool(saves_under_way(run))
    return inside_saves


@pytest.mark.parametrize("world_size", [1, pytest.param(2, marks=pytest.mark.long)])
def test_the_gan_that_is_killed_five_times_ends_with_the_bits_of_the_one_that_was_not(
    tmp_path: Path, whole: Path, world_size: int
) -> None:
    arguments = ["--config", str(write_config(tmp_path, GAN_SETTINGS)), "--name", "killed"]
    if world_size > 1:
        train(tmp_path, [*arguments, "--name", "whole"], world_size, loop=GAN).check()
        whole = tmp_path / "runs" / "whole"
    kinds = ["start-up", "anywhere", "save", "save", "save"]
    assert kill_often(tmp_path, arguments, world_size, kinds, seed=world_size) >= 1
    run = tmp_path / "runs" / "killed"
    newest = newest_step(run)
    outcome = train(tmp_path, arguments, world_size, loop=GAN).check()
    assert started_from(outcome.outputs[0]) == newest > 0
    assert "passed over" not in outcome.output
    check_same(run, whole, GAN_STEPS)


@pytest.mark.parametrize("file", ["discriminator.safetensors", "generator_optimizer.pt"])
def test_a_checkpoint_of_the_gan_with_a_truncated_file_is_passed_over_and_the_end_is_the_same(
    tmp_path: Path, whole: Path, file: str
) -> None:
    arguments = ["--config", str(write_config(tmp_path, GAN_SETTINGS)), "--name", "cut"]
    run = tmp_path / "runs" / "cut"
    ranks = Ranks(tmp_path, arguments, loop=GAN)
    wait_until(partial(has_reached, run, 0, 40), "step 40")
    ranks.kill()
    ranks.join()
    *_, older, newest = published_in(run / "checkpoints")
    content = (newest / file).read_bytes()
    (newest / file).write_bytes(content[: len(content) // 2])
    outcome = train(tmp_path, arguments, loop=GAN).check()
    assert f"passed over a damaged checkpoint: runs/cut/checkpoints/{newest.name}: {file} has " in outcome.output
    assert f"from runs/cut/checkpoints/{older.name}" in outcome.output
    check_same(run, whole, GAN_STEPS)


# ---- both ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("loop", "settings"), [(MIXUP, MIXUP_SETTINGS), (GAN, GAN_SETTINGS)], ids=["mixup", "gan"])
def test_a_loop_of_ones_own_trains_the_same_on_two_ranks_as_on_one(
    tmp_path: Path, loop: str, settings: dict[str, Any]
) -> None:
    """Micro-batches of one size, but for the third step: it has one sample, so that one of two ranks has none."""
    batch = {"global_size": 718, "micro_size": 359, "remainder": "train"}
    changes = {"batch": batch, "dtype": "float64", "train": {"epochs": 2}, "own": {}}
    config = ["--config", str(write_config(tmp_path, {**settings, **changes}))]
    for world_size in (1, 2):
        outcome = train(tmp_path, [*config, "--name", f"on-{world_size}"], world_size, loop=loop).check()
        assert f"\n{'gan' if loop == GAN else 'cnn'} with " in outcome.outputs[0]
    one, two = tmp_path / "runs" / "on-1", tmp_path / "runs" / "on-2"
    assert max(differences(one, two)) < 1e-10
    names = ["loss", "gradient_norm"] + ["discriminator_loss"] * (loop == GAN)
    for row, other in zip(rows(one, "train"), rows(two, "train"), strict=True):
        assert [row[name] for name in names] == pytest.approx([other[name] for name in names], rel=1e-10)
