"""Part "policies": what a step decides and counts is on the device what it is on the CPU, in float64 to 1e-9."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.gpu.conftest import Figures
from tests.tools.ranks import Outcome, train, write_config
from tests.tools.records import largest_difference, rows, run_of, status, weights

SETTINGS: dict[str, Any] = {
    "dtype": "float64",
    "train": {"epochs": None, "steps": 16},
    "log": {"every_steps": 1},
    "validate": {"every_epochs": None, "every_steps": 8},
}
POINTS: dict[str, Any] = {
    **SETTINGS,
    "data": {"name": "tests.lab.nonfinite:points", "args": {"bad": [17]}},
    "model": "tests.lab.nonfinite:network",
    "optim": {"name": "adamw", "lr": 0.01},
    "batch": {"global_size": 12, "micro_size": 3},
}
DIGITS: dict[str, Any] = {
    **SETTINGS,
    "data": "tests.gpu.data:packed_digits",
    "model": {"name": "cnn", "args": {"width": 8}},
    "batch": {"global_size": 64},
}
TOKENS: dict[str, Any] = {
    **SETTINGS,
    "data": {"name": "tests.lab.user_code:lines", "collate": "tests.lab.user_code:pad", "workers": 0},
    "model": "tests.lab.user_code:LanguageModel",
    "task": "tests.lab.user_code:NextLetter",
    "batch": {"global_size": 16, "micro_size": 4},
}


def on_both(folder: Path, device: str, settings: dict[str, Any]) -> tuple[Outcome, Outcome]:
    """The run on the device, in `folder`, and on the CPU, in `folder`/cpu."""
    (folder / "cpu").mkdir()
    outcomes = []
    for place, where in ((folder, device), (folder / "cpu", "cpu")):
        config = write_config(place, {**settings, "device": where})
        outcomes.append(train(place, ["--config", str(config)]))
    return outcomes[0], outcomes[1]


def check_same(folder: Path, figures: Figures) -> None:
    """All that was trained and found is the same to 1e-9, and what is counted is the same."""
    here, there = run_of(folder), run_of(folder / "cpu")
    one, other = weights(here), weights(there)
    figures["largest_difference_of_a_weight"] = largest_difference(one, other)
    assert figures["largest_difference_of_a_weight"] < 1e-9
    for kind in ("train", "validate"):
        for row, expected in zip(rows(here, kind), rows(there, kind), strict=True):
            for name in ("step", "skipped_steps", "samples", "tokens", "accuracy"):
                assert row.get(name) == expected.get(name), (kind, name)
            for name in ("gradient_norm", "loss", "perplexity"):
                assert (row.get(name) or 0) == pytest.approx(expected.get(name) or 0, rel=1e-9), (kind, name)
    assert status(here)["state"] == "finished"


@pytest.mark.parametrize("optim", ["adamw", "sgd"])
def test_a_step_that_is_not_finite_is_left_out_on_the_device(
    tmp_path: Path, device: str, figures: Figures, optim: str
) -> None:
    settings = {**POINTS, "optim": {"name": optim, "lr": 0.01}, "train": {"steps": 16, "on_nonfinite": "skip"}}
    for outcome in on_both(tmp_path, device, settings):
        outcome.check()
        assert outcome.output.count("It was left out.") == 2
    check_same(tmp_path, figures)
    assert rows(run_of(tmp_path), "train")[-1]["skipped_steps"] == 2


def test_a_step_that_is_not_finite_ends_the_run_and_is_named(tmp_path: Path, device: str) -> None:
    outcomes = on_both(tmp_path, device, POINTS)
    assert [outcome.codes for outcome in outcomes] == [[1], [1]], outcomes[0].output
    [message] = {line for outcome in outcomes for line in outcome.output.splitlines() if "is not finite" in line}
    assert "rank 0 is not either (micro-batch" in message


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({}, id="plain"),
        pytest.param({"optim": {"name": "adamw", "ema_decay": 0.9}}, id="averaged"),
        pytest.param({"optim": {"name": "sgd", "lr": 0.05, "clip_norm": 0.1}}, id="clipped"),
        pytest.param({"batch": {"global_size": 64, "micro_size": 16}}, id="accumulated"),
        pytest.param({"batch": {"global_size": 200, "remainder": "train"}}, id="short last step"),
    ],
)
def test_training_and_validation_are_those_of_the_cpu(
    tmp_path: Path, device: str, figures: Figures, changes: dict[str, Any]
) -> None:
    for outcome in on_both(tmp_path, device, {**DIGITS, **changes}):
        outcome.check()
    check_same(tmp_path, figures)
    one, other = ((run_of(folder) / "validation.json").read_text() for folder in (tmp_path, tmp_path / "cpu"))
    assert one.partition('"mistakes"')[0] == other.partition('"mistakes"')[0]  # the confusion of all classes


def test_weights_that_vary_are_added_up_on_the_device(tmp_path: Path, device: str, figures: Figures) -> None:
    for outcome in on_both(tmp_path, device, TOKENS):
        outcome.check()
    check_same(tmp_path, figures)
