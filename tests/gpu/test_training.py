"""Part "training": the whole path on the device, in every precision; its losses beside those of the CPU."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from distloop.run.checkpoint import newest_published
from tests.gpu.conftest import Figures
from tests.tools import stage
from tests.tools.ranks import REPOSITORY, Outcome, train, write_config
from tests.tools.records import losses, rows, status

STEPS = 8
EACH_STEP = {"log": {"every_steps": 1}, "train": {"epochs": None, "steps": STEPS}, "validate": {"every_steps": 1000}}


def recipe(name: str, data: str) -> dict[str, Any]:
    """What configs/NAME.yaml trains, with the same data from the kit's file."""
    settings = yaml.safe_load((REPOSITORY / "configs" / f"{name}.yaml").read_text())
    return {**settings, "data": data, "train": EACH_STEP["train"]}


MODELS: dict[str, dict[str, Any]] = {
    "digits": recipe("digits", "tests.gpu.data:packed_digits"),
    "linear_regression": recipe("linear_regression", "tests.gpu.data:packed_diabetes"),
    "fashion_mnist": {
        "data": {"name": "fashion_mnist", "args": {"download": False}},
        "model": {"name": "cnn", "args": {"width": 8}},
        "batch": {"global_size": 32},
    },
    "language_model": {
        "data": {"name": "tests.lab.user_code:lines", "collate": "tests.lab.user_code:pad", "workers": 0},
        "model": "tests.lab.user_code:LanguageModel",
        "task": "tests.lab.user_code:NextLetter",
        "batch": {"global_size": 16, "micro_size": 8},
    },
    "resnet18": {
        "data": "tests.lab.user_code:small_cifar10",
        "model": "resnet18_small",
        "optim": {"name": "sgd", "lr": 0.05},
        "batch": {"global_size": 8},
        "train": {"epochs": None, "steps": 3},
    },
}

# Of a loss, relative to the CPU's in float64. In float32 PyTorch lets convolutions use TF32, whose rounding is 1e-3.
PRECISIONS: dict[str, tuple[list[str], float]] = {
    "float64": (["--dtype", "float64"], 1e-7),
    "float32": ([], 1e-2),
    "TF32": (["--matmul-precision", "high"], 1e-2),
    "bf16": (["--precision", "bf16"], 0.1),
    "fp16": (["--precision", "fp16"], 2e-2),
}
# ResNet-18 takes minutes in float64 on a CPU; Fashion-MNIST is there for its files.
LEFT_OUT = {
    ("resnet18", "float64"),
    *(("fashion_mnist", precision) for precision in PRECISIONS if precision != "float32"),
}


def start(folder: Path, model: str, name: str, *more: str) -> Outcome:
    config = write_config(folder, {**EACH_STEP, **MODELS[model]}, model)
    return train(folder, ["--config", str(config), "--name", name, *more])


@pytest.fixture(scope="module")
def on_cpu(tmp_path_factory: pytest.TempPathFactory, data_root: str) -> Any:
    """The losses of a model on the CPU in float64, of ResNet-18, which takes minutes in that, in float32."""
    known: dict[str, list[float]] = {}

    def of(model: str) -> list[float]:
        if model not in known:
            folder = tmp_path_factory.mktemp("cpu")
            dtype = "float32" if model == "resnet18" else "float64"
            start(folder, model, "run", "--device", "cpu", "--dtype", dtype, "--data.root", data_root).check()
            known[model] = losses(folder / "runs" / "run")
        return known[model]

    return of


@pytest.mark.parametrize(
    ("model", "precision"), [pair for pair in itertools.product(MODELS, PRECISIONS) if pair not in LEFT_OUT]
)
def test_losses_are_those_of_the_cpu_to_the_rounding_of_the_precision(
    tmp_path: Path, device: str, data_root: str, on_cpu: Any, figures: Figures, model: str, precision: str
) -> None:
    options, bound = PRECISIONS[precision]
    outcome = start(tmp_path, model, "run", "--device", device, "--data.root", data_root, *options)
    if precision == "fp16" and device == "cpu":
        assert outcome.codes == [2], outcome.output
        assert "precision = 'fp16' needs a GPU" in outcome.output
        pytest.skip("fp16 needs a GPU: the run is refused, as it should be")
    outcome.check()
    assert f"1 process on {device}" in outcome.output
    run = tmp_path / "runs" / "run"
    figures["skipped_steps"] = skipped = rows(run, "train")[-1]["skipped_steps"]
    # A step that the scaler has left out, to find its scale, trains nothing: later losses are those of other weights.
    until = None if skipped == 0 else 1
    differences = [abs(one / other - 1) for one, other in zip(losses(run), on_cpu(model), strict=True)]
    figures["largest_difference"] = max(differences[:until])
    assert figures["largest_difference"] < bound
    assert status(run)["state"] == "finished"
    assert precision == "fp16" or skipped == 0


def scaler_of(run: Path) -> dict[str, Any]:
    newest = newest_published(run / "checkpoints")
    assert newest is not None
    return json.loads((newest / "state.json").read_text())["scaler"]


@pytest.mark.usefixtures("gpu_only")
def test_fp16_counts_the_steps_that_its_scaler_leaves_out_and_continues_with_the_scale_that_it_had(
    tmp_path: Path, device: str, figures: Figures
) -> None:
    settings = {
        **EACH_STEP,
        **MODELS["digits"],
        "precision": "fp16",
        "device": device,
        "task": {"name": "tests.gpu.lab:OverflowingClassification", "args": {"at": [3]}},
        "train": {"epochs": None, "steps": 12},
    }
    config = ["--config", str(write_config(tmp_path, settings))]
    train(tmp_path, [*config, "--name", "whole"]).check()
    whole, stopped = (tmp_path / "runs" / name for name in ("whole", "stopped"))
    skipped = [row["skipped_steps"] for row in rows(whole, "train")]
    figures["skipped_steps"], figures["scale"] = skipped[-1], scaler_of(whole)["scale"]
    assert skipped[2] == skipped[1] + 1, "the step that overflows is not counted"
    assert scaler_of(whole)["scale"] == 65536 / 2 ** skipped[-1]
    stage.interrupt(tmp_path, "loss", 7)
    train(tmp_path, [*config, "--name", "stopped"]).check()
    assert status(stopped)["state"] == "stopped"
    before = scaler_of(stopped)
    assert before["_growth_tracker"] > 0
    # The continued attempt counts its passes anew: its third must not overflow as well.
    train(tmp_path, [*config, "--name", "stopped", "--task.args.at", "[]", "--resume", "extend"]).check()
    assert scaler_of(stopped) == scaler_of(whole)
    assert [row["skipped_steps"] for row in rows(stopped, "train")] == skipped
    assert losses(stopped) == pytest.approx(losses(whole), rel=1e-2)
