"""Part "figures": how fast it is, beside the same loop by hand and Accelerate's example. Nothing is asserted of a time.

Times are on the device's own clock, medians over the steps of interleaved rounds.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.gpu import speed
from tests.gpu.conftest import Figures, seconds_left
from tests.gpu.data import write_full_cifar10, write_images
from tests.tools.ranks import command, forkserver, write_config
from tests.tools.records import rows, run_of


def measured(folder: Path, needed: float, work: Callable[..., None], *arguments: Any) -> dict[str, list[float]]:
    """Milliseconds by loop, one after the other over all rounds, from a process of its own; skips the test if there is
    not enough time. A process that is too slow is ended, and what it has measured counts."""
    if seconds_left() < needed:
        pytest.skip(f"needs {needed:.0f} s, and {seconds_left():.0f} s are left")
    process = forkserver.Process(target=speed.in_folder, args=(str(folder), work, *arguments))
    process.start()
    process.join(max(1.0, min(seconds_left() - 3, 280)))
    if process.is_alive():
        process.kill()
    process.join()
    found: dict[str, list[float]] = defaultdict(list)
    if (folder / "rounds").exists():
        for entry in map(json.loads, (folder / "rounds").read_text().splitlines()):
            found[entry["loop"]] += entry["milliseconds"]
    output = (folder / "output").read_text()[-3000:] if (folder / "output").exists() else ""
    assert found, f"it ended with {process.exitcode} and measured nothing:\n{output}"
    assert process.exitcode in (0, -9), output
    return found


def check_step(folder: Path, on_gpu: bool, figures: Figures, name: str, compiled: bool, rounds: int) -> None:
    found = measured(folder, 45 if compiled else 20, speed.steps, name, "cuda" if on_gpu else "cpu", compiled, rounds)
    case = (speed.ON_CUDA if on_gpu else speed.ON_CPU)[name]
    medians = {loop: statistics.median(times) for loop, times in found.items()}
    for loop, median in medians.items():
        figures[f"{loop}_ms"] = round(median, 3)
    for loop in sorted(medians.keys() - {"distloop"}) if "distloop" in medians else ():
        figures[f"distloop / {loop}"] = round(medians["distloop"] / medians[loop], 3)
    if "distloop" in medians:
        unit, each = ("images", 1) if case.shape else ("tokens", 256)
        figures[f"{unit}_per_second"] = round(case.batch * each / medians["distloop"] * 1000)
    figures["batch"], figures["precision"] = case.batch, case.precision
    assert set(found) == set(speed.LOOPS), "there was no time for all loops"


@pytest.mark.parametrize("name", speed.ON_CUDA)
def test_a_step(tmp_path: Path, on_gpu: bool, figures: Figures, name: str) -> None:
    check_step(tmp_path, on_gpu, figures, name, False, 2 if on_gpu else 1)


def test_data_in_the_format_of_cifar10(tmp_path: Path, device: str, on_gpu: bool, figures: Figures) -> None:
    (write_full_cifar10 if on_gpu else write_images)(tmp_path / "data")
    found = measured(tmp_path, 20, speed.data_of_cifar10, str(tmp_path / "data"), device, 2 if on_gpu else 1)
    for loop, times in found.items():
        figures[f"{loop.replace(' ', '_')}_ms"] = round(statistics.median(times), 3)
    figures["from files / ready tensor"] = round(
        statistics.median(found["from files"]) / statistics.median(found["ready tensor"]), 3
    )


def test_a_save(tmp_path: Path, device: str, on_gpu: bool, figures: Figures) -> None:
    found = measured(tmp_path, 25, speed.save, device, 1.0 if on_gpu else 0.05, 3 if on_gpu else 1)
    for loop, times in found.items():
        figures[loop if loop == "gigabytes" else f"{loop}_ms"] = round(statistics.median(times), 2)


def test_from_the_start_to_the_first_step(tmp_path: Path, device: str, figures: Figures) -> None:
    settings = {"data": "tests.gpu.data:packed_digits", "train": {"epochs": None, "steps": 2}}
    more = {"log": {"every_steps": 1}, "device": device, "tracking": {"report": False}}
    config = write_config(tmp_path, {**settings, **more})
    begun = time.monotonic()
    result = command([sys.executable, "-m", "distloop.train", "--config", str(config)], tmp_path)
    assert result.returncode == 0, result.stdout
    figures["whole_process_seconds"] = round(time.monotonic() - begun, 2)
    account = json.loads((run_of(tmp_path) / "time.json").read_text())["attempts"][0]["seconds"]
    figures["start_up_seconds"] = round(account["start_up"], 2)
    assert len(rows(run_of(tmp_path), "train")) == 2


# The last ones: where time is short, the others are measured.
@pytest.mark.parametrize("name", ["tiny CNN", "small GPT", "ResNet-18, 32 px", "ResNet-50, 224 px"])
def test_a_compiled_step(tmp_path: Path, on_gpu: bool, figures: Figures, name: str) -> None:
    if not on_gpu and name != "tiny CNN":
        pytest.skip("compiling it for the CPU takes minutes")
    check_step(tmp_path, on_gpu, figures, name, True, 1)
