"""The line at the end of a run that says what to do about waiting for data."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import TensorDataset

from distloop.config.settings import Data
from distloop.data import advice
from distloop.data.datasets import DataSource, digits
from tests.tools.ranks import train, write_config

ONE_BY_ONE = TensorDataset(torch.zeros(4))


class Slow(TensorDataset):
    def __getitem__(self, index: int) -> tuple[Tensor, ...]:
        time.sleep(0.01)
        return super().__getitem__(index)


def slow() -> tuple[Any, Any]:
    advice.LEAST_SECONDS = 0.1
    return tuple(Slow(torch.zeros(count, 2), torch.zeros(count, 1)) for count in (80, 2))  # type: ignore[return-value]


def lines(waited: float, computed: float, dataset: Any = ONE_BY_ONE, **settings: Any) -> list[str]:
    seconds = {"start_up": 50.0, "data": waited, "compute": computed, "validation": 50.0}
    return advice.advice(seconds, Data(**{"workers": 3, **settings}), DataSource(dataset, dataset))


def test_a_loop_that_waits_for_more_than_a_tenth_is_told_what_may_help() -> None:
    assert lines(9.0, 91.0) == lines(4.9, 10.0) == []
    [line] = lines(11.0, 89.0)
    assert line.startswith(
        "  data wait: 11% of the time of steps. More loader processes may help (data.workers, 3 now):"
    )
    [line] = lines(50.0, 50.0, name="image_folder")
    assert "3 now); --data.args.decoder torchvision, or `distloop pack`: docs/speed.md" in line
    [line] = lines(50.0, 50.0, name="image_folder", args={"decoder": "torchvision"})
    assert "3 now); `distloop pack`: docs/speed.md" in line


def test_the_last_lines_of_a_run_have_the_advice_once(tmp_path: Path) -> None:
    data = {"name": "tests.unit.test_advice:slow", "workers": 0}
    settings = {
        "data": data,
        "model": "linear",
        "task": "regression",
        "batch": {"global_size": 4},
        "train": {"epochs": 1},
    }
    done = train(tmp_path, ["--config", str(write_config(tmp_path, settings))], 2).check()
    [line] = [line for line in done.output.splitlines() if "data wait" in line and "data.workers" in line]
    assert "More loader processes may help (data.workers, 0 now): docs/speed.md" in line


def test_data_in_memory_get_no_advice_but_with_loader_processes() -> None:
    dataset = digits().train
    assert lines(50.0, 50.0, dataset, workers="auto") == []
    assert len(lines(50.0, 50.0, dataset, workers=1)) == 1


def test_the_advice_names_a_heading_of_the_documents() -> None:
    [line] = lines(11.0, 89.0)
    heading = line.rpartition("docs/speed.md, ")[2]
    assert f"\n## {heading}\n" in (Path(__file__).parents[2] / "docs" / "speed.md").read_text()
