"""Settings that make steps faster or smaller train what the run without them trains."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.multiprocess.test_exact_resume import bits, go_on, newest, stop
from tests.tools.ranks import train, write_config
from tests.tools.records import losses, run_of, weights

SETTINGS: dict[str, Any] = {
    "device": "cpu",
    "data": "digits",
    "model": {"name": "cnn", "args": {"width": 8, "norm": "batch", "dropout": 0.3}},
    "task": "tests.lab.resuming:StoppedClassification",
    "optim": {"name": "adamw", "clip_norm": 1.0, "ema_decay": 0.9},
    "batch": {"global_size": 64, "micro_size": 16},
    "train": {"steps": 8},
    "log": {"every_steps": 1},
    "validate": {"every_steps": 8},
}
ON = ["--model.channels-last", "--model.checkpointing", "--ddp.gradient-as-bucket-view", "--ddp.bucket-cap-mb", "1"]


@pytest.mark.parametrize("world_size", [pytest.param(1, marks=pytest.mark.long), 2])
def test_a_run_in_channels_last_continues_to_the_same_bits_with_gradients_in_buckets_and_checkpointing(
    tmp_path: Path, world_size: int
) -> None:
    config = ["--config", str(write_config(tmp_path, SETTINGS))]
    outcome = train(tmp_path, [*config, *ON[:1], "--name", "whole"], world_size).check()
    assert "channels_last on (4 weights) · compile off" in outcome.output
    on = [*config, *ON, "--name", "stopped"]
    calls = 5 * 64 // 16 // world_size
    step = stop(tmp_path, on, world_size, calls)
    outcome = go_on(tmp_path, on, world_size, step)
    assert "compile off · activation checkpointing on (5 segments)" in outcome.output
    if world_size > 1:
        assert "gradient_as_bucket_view on (buckets of 1 MiB)" in outcome.output
    run, whole = (tmp_path / "runs" / name for name in ("stopped", "whole"))
    for name in ("model.safetensors", "averaged.safetensors"):
        assert bits(newest(run) / name) == bits(newest(whole) / name)
    assert losses(run) == losses(whole)


@pytest.mark.long
def test_a_run_goes_on_in_channels_last_that_was_begun_without(tmp_path: Path) -> None:
    """What the optimizer holds takes the new format: a fused update pairs numbers by their places in memory."""
    config = ["--config", str(write_config(tmp_path, {**SETTINGS, "dtype": "float64"}))]
    train(tmp_path, [*config, "--name", "whole"]).check()
    step = stop(tmp_path, [*config, "--name", "run"], 1, 20)
    go_on(tmp_path, [*config, "--name", "run", "--model.channels-last"], 1, step)
    one, other = weights(run_of(tmp_path)), weights(tmp_path / "runs" / "whole")
    assert all(tensor.allclose(other[name], rtol=1e-9, atol=1e-12) for name, tensor in one.items())


@pytest.mark.long
def test_what_is_compiled_in_one_start_is_found_again_by_the_next(tmp_path: Path) -> None:
    settings = {**SETTINGS, "model": {"name": "mlp", "args": {"hidden": 8, "layers": 1}}}
    arguments = ["--config", str(write_config(tmp_path, settings)), "--name", "run"]
    arguments += ["--compile", "{mode: default, dynamic: false}"]
    environment = {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "compiled")}

    def compiled() -> set[Path]:
        return {path for path in (tmp_path / "compiled").rglob("*") if path.suffix in (".cpp", ".so")}

    train(tmp_path, [*arguments, "--train.steps", "2"], environment=environment).check()
    assert (before := compiled())
    outcome = train(tmp_path, [*arguments, "--resume", "extend", "--train.steps", "4"], environment=environment).check()
    assert f"compile on (default, fixed shapes, code kept in {tmp_path / 'compiled'})" in outcome.output
    assert compiled() == before
