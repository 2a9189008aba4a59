"""Open a page in Chromium, without a window, and see what it does."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest


class Opened(NamedTuple):
    """What came of a page."""

    dom: str
    """The document as the browser has it."""
    console: list[str]
    """What it has to complain about."""
    requests: list[str]
    """What the page asked the network for."""


def open_page(page: Path, folder: Path) -> Opened:
    """Open a file; `folder` is for the browser. Skips the test where there is no Chromium, except in CI."""
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if chromium is None:
        if "CI" in os.environ:
            pytest.fail("Chromium is missing")
        pytest.skip("Chromium is missing")
    log = folder / "network.json"
    flags = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
    flags += " --disable-component-update --disable-sync --enable-logging=stderr --v=0 --dump-dom"
    command = [chromium, *flags.split(), "--host-resolver-rules=MAP * ~NOTFOUND", f"--log-net-log={log}"]
    command += [f"--user-data-dir={folder / 'profile'}", page.resolve().as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    events = json.loads(log.read_text())["events"]
    asked = [event["params"] for event in events if "url" in event.get("params", {})]
    # The browser itself calls home, or tries to; what the page asks for is marked as a file's.
    requests = [each["url"] for each in asked if "file://" in each.get("network_isolation_key", "")]
    return Opened(done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line], requests)
