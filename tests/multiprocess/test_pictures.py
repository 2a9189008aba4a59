"""The pictures of docs/: made by the real program, small, and without a word of the machine that made them."""

from __future__ import annotations

import re
import shutil
import socket
from pathlib import Path

import pytest
from PIL import Image

from tests.tools import pictures
from tests.tools.browser import open_page
from tests.tools.ranks import REPOSITORY

LARGEST = {"live_view.svg": 40_000, "report.png": 250_000}  # bytes


def check(folder: Path) -> None:
    assert {name: (folder / name).stat().st_size < size for name, size in LARGEST.items()} == dict.fromkeys(
        LARGEST, True
    )
    svg = (folder / "live_view.svg").read_text(encoding="utf-8")
    assert not re.findall(r"url\((?!#)|@import|<image|href|<script", svg)
    shown = " ".join(re.sub(r"<style>.*?</style>|<[^>]*>", " ", svg, flags=re.DOTALL).replace("&#160;", " ").split())
    assert pictures.COMMAND in shown
    assert re.search(r"runs/digits · attempt 1 · 1 process on cpu .* epoch 3/20 · validated .* latest step ", shown)
    assert not re.search(rf"/(tmp|home|root|work|Users)\b|\b{re.escape(socket.gethostname())}\b", shown)
    with Image.open(folder / "report.png") as picture:
        assert picture.format == "PNG"
        assert picture.width >= 1280
        assert not picture.info.keys() - {"dpi", "transparency", "srgb"}  # no text


def test_the_pictures_in_docs_are_small_load_nothing_and_name_no_machine() -> None:
    check(REPOSITORY / "docs")


@pytest.mark.skipif(shutil.which("tmux") is None, reason="tmux is not installed")
@pytest.mark.long
def test_the_pictures_can_be_made_again(tmp_path: Path) -> None:
    (tmp_path / "empty.html").write_text("")
    open_page(tmp_path / "empty.html", tmp_path)  # skips the test without Chromium
    pictures.main(tmp_path)
    check(tmp_path)
