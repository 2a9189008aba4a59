"""Part "doctor": what it finds on this machine, and says of it."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from tests.gpu.conftest import Figures
from tests.tools.ranks import command


def test_the_doctor_measures_the_device_and_finds_nothing_that_fails(
    tmp_path: Path, device: str, figures: Figures
) -> None:
    result = command([sys.executable, "-m", "distloop.doctor", "--device", device, "--json"], tmp_path)
    found, _ = json.JSONDecoder().raw_decode(result.stdout, result.stdout.index("{"))  # a library may warn before it
    for line in found["lines"]:
        if line["check"] in ("versions", "devices", "memory", "speed") or line["verdict"] != "ok":
            figures[line["check"]] = f"{line['verdict']}: {line['found']} {line['advice']}".strip()
    assert result.returncode == 0, result.stdout
    [rank] = found["ranks"]
    assert rank["measured_on"] == rank["device"] == device
    if device == "cuda":
        assert 0 < rank["gpu"]["free"] <= rank["gpu"]["total"]
        assert rank["gpu"]["name"] in json.dumps(found["lines"])
