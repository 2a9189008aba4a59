"""bf16 where the hardware does not compute it is warned of, and advised where it does."""

from __future__ import annotations

import platform
from pathlib import Path

import pytest
import torch
from torch import nn

from distloop.config.settings import Config
from distloop.data.order import Plan
from distloop.run.files import Start
from distloop.tracking.summary import describe
from distloop.training.bf16 import native_bf16

CPU = torch.device("cpu")
LARGE, SMALL = nn.Linear(1000, 1000), nn.Linear(10, 10)


@pytest.fixture
def instructions(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU with these instructions."""
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    for name, attribute in (("AMX", "_is_amx_tile_supported"), ("AVX512-BF16", "_is_avx512_bf16_supported")):
        monkeypatch.setattr(torch.cpu, attribute, lambda name=name: name in request.param, raising=False)


def lines(model: nn.Module, step: int = 0, **settings: str) -> list[str]:
    """What the start says of bf16, beside its line of settings."""
    start = Start(Path("runs/run"), 1, None, None, step, False, [], {})
    config = Config(name="run", **settings)  # type: ignore[arg-type]
    found = describe(config, start, Plan(1000, 64, total_steps=10), model, CPU, "net")
    return [line for line in found if "bf16" in line and "channels_last" not in line]


@pytest.mark.parametrize("instructions", [()], indirect=True)
@pytest.mark.usefixtures("instructions")
def test_bf16_on_a_cpu_without_it_is_warned_of_in_one_line() -> None:
    (line,) = lines(SMALL, precision="bf16")
    assert line.startswith("distloop: WARNING: this CPU has no instructions for bf16")
    assert "19 times" in line
    assert lines(LARGE) == []
    assert len(lines(SMALL, step=3, precision="bf16")) == 1, "also in a later start"


@pytest.mark.parametrize(
    ("instructions", "name"),
    [(("AMX", "AVX512-BF16"), "AMX"), (("AVX512-BF16",), "AVX512-BF16")],
    indirect=["instructions"],
)
@pytest.mark.usefixtures("instructions")
def test_where_bf16_would_help_one_line_says_so(name: str) -> None:
    (line,) = lines(LARGE)
    assert line.startswith(f"bf16 is off, and would make steps faster, as this CPU has {name}: --precision bf16")
    assert lines(LARGE, precision="bf16") == [], "it is on"
    assert lines(SMALL) == [], "little to gain"
    assert lines(LARGE, dtype="float64") == [], "which it would not be"
    assert lines(LARGE, step=3) == [], "a begun run keeps its precision"


def test_of_a_cpu_that_is_not_known_nothing_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "arm64")
    assert native_bf16(CPU) is None
    assert lines(LARGE) == lines(LARGE, precision="bf16") == []
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    monkeypatch.delattr(torch.cpu, "_is_avx512_bf16_supported", raising=False)  # an earlier torch
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False, raising=False)
    assert native_bf16(CPU) is None


@pytest.mark.parametrize("instructions", [("AMX",)], indirect=True)
@pytest.mark.usefixtures("instructions")
def test_precision_is_said_on_or_off() -> None:
    start = Start(Path("runs/run"), 1, None, None, 0, False, [], {})
    plan = Plan(1000, 64, 2, total_steps=10)
    for config, said in (
        (
            Config(name="run"),
            "float32 · channels_last off · compile off · activation checkpointing off · gradient_as_bucket_view off (b",
        ),
        (Config(name="run", precision="bf16"), "float32, forward pass in bf16 · channels_last off · compile off"),
    ):
        assert describe(config, start, plan, SMALL, CPU, "net")[3].startswith(said)
