"""Open a page in Chromium, without a window, and see what it does and how it is laid out."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from html import unescape
from pathlib import Path
from typing import Any, NamedTuple

import pytest


class Opened(NamedTuple):
    """What came of a page."""

    dom: str
    """The document as the browser has it."""
    console: list[str]
    """What it has to complain about."""
    requests: list[str]
    """What the page asked the network for."""


def open_page(page: Path, folder: Path, *flags: str) -> Opened:
    """Open a file; `folder` is for the browser. Skips the test where there is no Chromium, except in CI."""
    if find_chromium() is None:
        if "CI" in os.environ:
            pytest.fail("Chromium is missing")
        pytest.skip("Chromium is missing")
    log = folder / "network.json"
    done = run_chromium(page, folder, "--dump-dom", f"--log-net-log={log}", *flags)
    events = json.loads(log.read_text())["events"]
    asked = [event["params"] for event in events if "url" in event.get("params", {})]
    # The browser itself calls home, or tries to; what the page asks for is marked as a file's.
    requests = [each["url"] for each in asked if "file://" in each.get("network_isolation_key", "")]
    return Opened(done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line], requests)


def measure(page: Path, folder: Path, widths: list[int], script: str, *flags: str) -> dict[int, Any]:
    """width in pixels -> the value of the JavaScript expression `script` in the page at this width, as JSON.

    The expression sees the page as `document` and `window`. The page stands in a frame, and needs no change.
    """
    text = json.dumps(page.read_text()).replace("<", "\\u003c")  # it holds </script>
    host = folder / "host.html"
    host.write_text(
        f"""<body><script>const results = {{}}, widths = {widths}; let left = widths.length;
        for (const width of widths) {{
            const frame = document.createElement("iframe");
            frame.style = `border: 0; height: 1000px; width: ${{width}}px`;
            frame.onload = () => {{
                const value = ((document, window) => ({script}))(frame.contentDocument, frame.contentWindow);
                results[width] = value;
                frame.remove();
                if (--left == 0) document.body.textContent = JSON.stringify(results);
            }};
            frame.srcdoc = {text};
            document.body.append(frame);
        }}</script></body>"""
    )
    dom = open_page(host, folder, *flags).dom
    results = json.loads(unescape(dom.partition("<body>")[2].partition("</body>")[0]))
    return {int(width): value for width, value in results.items()}


def find_chromium() -> str | None:
    return next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def run_chromium(page: Path, folder: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    """Run Chromium on a file to its end."""
    always = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
    always += " --disable-component-update --disable-sync --enable-logging=stderr --v=0"
    command = [find_chromium() or "chromium", *always.split(), "--host-resolver-rules=MAP * ~NOTFOUND", *flags]
    command += [f"--user-data-dir={folder / 'profile'}", page.resolve().as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done
