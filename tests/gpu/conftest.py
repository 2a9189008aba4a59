"""For the parts, each a file of tests here: they run on the device that $GPU_DEVICE names, without it on the CPU.

What a test finds is written down as soon as it ends, a JSON line for each test in $GPU_RESULTS: a part that is killed
loses nothing, and the test that it was killed in is known by its line "begun".
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.gpu.data import packed_images

Figures = dict[str, Any]
HERE = Path(__file__).parent
FIGURES = pytest.StashKey[Figures]()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.long)


def pytest_runtest_logstart(nodeid: str) -> None:
    if "tests/gpu/" in nodeid:
        _write({"begun": nodeid.rpartition("::")[2]})


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    report: Any = yield
    # A test that passes has three reports, of which the middle one counts; a fixture may fail before or after it.
    if report.when == "call" or report.outcome != "passed":
        why = report.longrepr[2] if report.skipped else call.excinfo.exconly() if call.excinfo else ""
        entry = {"test": item.name, "outcome": report.outcome, "why": why.removeprefix("Skipped: ")[:2000]}
        _write({**entry, "seconds": round(report.duration, 2), "figures": item.stash.get(FIGURES, {})})
    return report


def _write(entry: dict[str, Any]) -> None:
    if path := os.environ.get("GPU_RESULTS"):
        with open(path, "a") as file:
            file.write(json.dumps(entry) + "\n")


@pytest.fixture(scope="session")
def device() -> str:
    """cuda or cpu."""
    return os.environ.get("GPU_DEVICE", "cpu")


@pytest.fixture(scope="session")
def on_gpu(device: str) -> bool:
    return device == "cuda"


@pytest.fixture
def gpu_only(on_gpu: bool) -> None:
    if not on_gpu:
        pytest.skip("needs a GPU")


@pytest.fixture
def figures(request: pytest.FixtureRequest) -> Figures:
    """What the test measures, by name: a number or a text. It stands in the table, also where the test fails."""
    return request.node.stash.setdefault(FIGURES, {})


@pytest.fixture
def out() -> Path | None:
    """The folder for files that are kept; None: nobody asked for them."""
    return Path(os.environ["GPU_OUT"]) if "GPU_OUT" in os.environ else None


def seconds_left() -> float:
    """Seconds until this part is killed; many without a limit."""
    return float(os.environ.get("GPU_DEADLINE", "inf")) - time.time()


@pytest.fixture(scope="session")
def data_root(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with small data sets in the formats of Fashion-MNIST and CIFAR-10."""
    return str(packed_images(tmp_path_factory.mktemp("data")))
