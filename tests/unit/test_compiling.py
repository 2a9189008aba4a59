"""The memory format of weights, torch.compile, and where compiled code is kept."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import pytest
import torch
from torch import nn

from distloop.config.settings import Compile
from distloop.training.compiling import CACHE, compile_model, in_words, keep_compiled, to_channels_last
from distloop.training.models import cnn


@pytest.fixture(autouse=True)
def _own_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(CACHE, str(tmp_path))


def test_weights_of_four_dimensions_are_put_into_channels_last_and_compute_the_same() -> None:
    torch.manual_seed(0)
    model, images = cnn((3, 8, 8), 10, width=8), torch.randn(4, 3, 8, 8)
    expected, parameters = model(images), list(model.parameters())
    to_channels_last(model)
    assert all(one is other for one, other in zip(parameters, model.parameters(), strict=True)), "an optimizer has them"
    weights = [parameter for parameter in parameters if parameter.dim() == 4]
    assert len(weights) == 4
    assert all(weight.is_contiguous(memory_format=torch.channels_last) for weight in weights)
    assert not weights[-1].is_contiguous()
    torch.testing.assert_close(model(images), expected)
    # What follows a convolution has its format, too, though the images have another one.
    assert next(model.children())(images).is_contiguous(memory_format=torch.channels_last)


def test_other_weights_stay_as_they_are() -> None:
    model = nn.Sequential(nn.Conv3d(1, 2, 3), nn.Linear(4, 4))
    before = [parameter.stride() for parameter in model.parameters()]
    to_channels_last(model)
    assert [parameter.stride() for parameter in model.parameters()] == before


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (False, []),
        (True, [{}]),
        (Compile("max-autotune"), [{"mode": "max-autotune", "dynamic": None}]),
        (Compile(dynamic=False), [{"mode": "default", "dynamic": False}]),
    ],
)
def test_compile_gets_what_the_config_says(
    monkeypatch: pytest.MonkeyPatch, settings: bool | Compile, expected: list[dict]
) -> None:
    calls: list[dict] = []
    monkeypatch.setattr(nn.Module, "compile", lambda module, **options: calls.append(options))
    compile_model(nn.Linear(1, 1), settings)
    assert calls == expected


def test_compiled_code_is_kept_in_a_folder_of_this_user_alone(tmp_path: Path) -> None:
    environ: dict[str, str] = {}
    for _ in range(2):  # a later start finds it
        environ.clear()
        keep_compiled(environ, tmp_path)
        assert environ == {CACHE: str(tmp_path / f"distloop-compiled-{os.getuid()}")}
    assert Path(environ[CACHE]).stat().st_mode & 0o777 == 0o700


def test_a_folder_that_the_user_has_set_stays(tmp_path: Path) -> None:
    environ = {CACHE: "/mine"}
    keep_compiled(environ, tmp_path)
    assert environ == {CACHE: "/mine"}
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", ["open to others", "a link", "a file", "no such folder"])
def test_inductors_own_folder_stays_where_another_one_would_not_be_safe(tmp_path: Path, kind: str) -> None:
    folder, kept = tmp_path / f"distloop-compiled-{os.getuid()}", tmp_path
    if kind == "open to others":
        folder.mkdir()
        folder.chmod(0o777)
    elif kind == "a link":
        (tmp_path / "elsewhere").mkdir()
        folder.symlink_to(tmp_path / "elsewhere")
    elif kind == "a file":
        folder.touch()
    else:
        kept = tmp_path / "missing"
    environ: dict[str, str] = {}
    keep_compiled(environ, kept)
    assert environ == {}


def test_a_folder_of_another_user_is_not_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "distloop-compiled-12345").mkdir(mode=0o700)
    monkeypatch.setattr(os, "getuid", lambda: 12345)
    if (tmp_path / "distloop-compiled-12345").stat().st_uid == 12345:
        pytest.skip("these tests run as that user")
    environ: dict[str, str] = {}
    keep_compiled(environ, tmp_path)
    assert environ == {}


def test_the_start_says_what_is_on_and_what_that_means(tmp_path: Path) -> None:
    model, kept = cnn((1, 8, 8), 10, width=8), f"code kept in {tmp_path}"
    assert in_words(False, False, model) == ["channels_last off", "compile off"]
    to_channels_last(model)
    nn.Module.compile(model)
    assert in_words(True, True, model) == ["channels_last on (4 weights)", f"compile on (default, {kept})"]
    settings = dataclasses.replace(Compile(), mode="max-autotune", dynamic=True)
    flat = nn.Linear(1, 1)
    nn.Module.compile(flat)
    assert in_words(True, settings, flat) == [
        "channels_last on (without effect: no weight has 4 dimensions)",
        f"compile on (max-autotune, dynamic shapes, {kept})",
    ]


def test_the_start_does_not_claim_what_a_loop_with_a_model_of_its_own_has_not_done() -> None:
    left = "left to this loop, whose model is not one of build_model()"
    assert in_words(True, True, cnn((3, 8, 8), 10)) == [f"channels_last on ({left})", f"compile on ({left})"]
