"""`python -m tests.tools.pictures [FOLDER]`: the pictures of docs/, made by a real run of configs/digits.yaml.

live_view.svg: what a terminal shows while it trains. report.png: the upper part of its report. tmux and Chromium are
needed.
"""

from __future__ import annotations

import io
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image
from rich.console import Console
from rich.text import Text

from tests.tools.browser import measure, run_chromium
from tests.tools.ranks import REPOSITORY, wait_until

COMMAND = "python -m distloop.train --config configs/digits.yaml"
COLUMNS, LINES = 122, 24
FEWEST_EPOCHS = 3  # in the picture; it has as many as there is room for below the command
WIDTH = 1280  # of the report, in pixels of CSS
LAST_SECTION = "#time"  # the picture of the report ends below it
PIXELS_OF_ONE = 1.5  # so that it is sharp on a good screen
COLOURS = 128
FONTS = 'ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace'


class Terminal:
    """A terminal of tmux with a shell in `folder`, where nothing tells the machine's name."""

    def __init__(self, folder: Path) -> None:
        self.socket = str(folder / "tmux")
        shutil.copytree(REPOSITORY / "configs", folder / "configs")
        (folder / "bashrc").write_text("PS1='$ '\n")
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        # Without git: the report would name a commit and the changes of a working copy.
        variables = {"PATH": path, "PYTHONPATH": str(REPOSITORY), "CUDA_VISIBLE_DEVICES": ""}
        variables |= {"GIT_DIR": "/nowhere", "OMP_NUM_THREADS": "1"}
        environment = {**os.environ, **variables, "TERM": "screen-256color"}
        size = ["-x", str(COLUMNS), "-y", str(LINES)]
        words = ["tmux", "-S", self.socket, "-f", "/dev/null", "new-session", "-d", *size, "bash --rcfile bashrc"]
        subprocess.run(words, cwd=folder, env=environment, check=True)
        self.tmux("set-option", "status", "off")
        wait_until(lambda: self.screen() == "$", "the shell")

    def tmux(self, *words: str) -> str:
        return subprocess.run(["tmux", "-S", self.socket, *words], check=True, stdout=subprocess.PIPE, text=True).stdout

    def screen(self) -> str:
        """What can be seen now."""
        return self.tmux("capture-pane", "-p").rstrip()

    def coloured_screen(self) -> str:
        """The same with the terminal's commands for colours."""
        return self.tmux("capture-pane", "-p", "-e").rstrip()


def shows_the_view(screen: str) -> bool:
    """Whether some epochs are done, the command is still there, and the view has drawn the last validation."""
    validated = re.findall(r"validated · step (\d+)", screen)
    latest = re.search(r"^latest +step (\d+)", screen, re.MULTILINE)
    return len(validated) >= FEWEST_EPOCHS and COMMAND in screen and latest is not None and latest[1] == validated[-1]


def save_as_svg(screen: str, file: Path) -> None:
    """Write a terminal's screen as SVG that loads nothing."""
    console = Console(record=True, width=COLUMNS, file=io.StringIO())
    console.print(Text.from_ansi(screen), no_wrap=True)
    svg = console.export_svg(title="distloop", unique_id="live-view")
    svg = re.sub(r"@font-face {.*?}", "", svg, flags=re.DOTALL)  # rich's font would come from the network
    file.write_text(svg.replace("Fira Code, monospace", FONTS), encoding="utf-8")


def save_report(report: Path, file: Path, folder: Path) -> None:
    """Write the upper part of a report as PNG; `folder` is for the browser."""
    bottom = f"document.querySelector('{LAST_SECTION}').getBoundingClientRect().bottom"
    height = round(measure(report, folder, [WIDTH], bottom)[WIDTH]) + 18
    size = [f"--window-size={WIDTH},{height}", f"--force-device-scale-factor={PIXELS_OF_ONE}", "--hide-scrollbars"]
    run_chromium(report, folder, *size, f"--screenshot={file}")
    with Image.open(file) as picture:
        small = picture.convert("RGB").quantize(COLOURS)
    small.save(file, optimize=True)


def main(target: Path) -> None:
    """Train, and write both pictures into the folder `target`."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        terminal = Terminal(folder)
        try:
            terminal.tmux("send-keys", "-l", COMMAND)
            terminal.tmux("send-keys", "Enter")
            wait_until(lambda: COMMAND in terminal.screen(), "the command")
            good_screens = [""]

            def is_full() -> bool:
                coloured = terminal.coloured_screen()
                plain = Text.from_ansi(coloured).plain
                if shows_the_view(plain):
                    good_screens[:] = [coloured]
                return COMMAND not in plain  # it has scrolled away

            wait_until(is_full, "a full terminal")
            assert good_screens[0], "the view was never drawn after the newest line; try again"
            wait_until(lambda: terminal.screen().endswith("\n$"), "the end of the run")
            save_as_svg(good_screens[0], target / "live_view.svg")
            save_report(folder / "runs" / "digits" / "report.html", target / "report.png", folder)
        finally:
            terminal.tmux("kill-server")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else REPOSITORY / "docs")
