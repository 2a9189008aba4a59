"""What a terminal shows of a run: its lines once each and untorn, and below them the live view, until it ends."""

from __future__ import annotations

import os
import re
import shlex
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from distloop.run.checkpoint import published_in, step_of
from distloop.tracking.wording import number
from tests.multiprocess.test_launchers_stop import TRAIN, Terminal, marker, needs_tmux
from tests.tools.ranks import accelerate_launch, wait_until
from tests.tools.records import rows, run_of, status
from tests.tools.stopping import NOTICE, processes_of, reached, waiting_run

__all__ = ["marker"]  # a fixture

pytestmark = needs_tmux
BARS = "━─"


class Screen(Terminal):
    """A terminal of 24 lines and so many columns."""

    def __init__(self, folder: Path, marker: str, columns: int) -> None:
        super().__init__(folder, marker)
        self.resize(columns, 24)

    def resize(self, columns: int, lines: int) -> None:
        self.columns = columns
        self._tmux("resize-window", "-x", str(columns), "-y", str(lines))

    def rows(self) -> list[str]:
        """What can be seen now, as it stands there."""
        return self._tmux("capture-pane", "-p").split("\n")[:-1]

    def shows_the_view(self) -> bool:
        """Whether the live view is on the screen. It must be so once, whole and at the bottom, or not at all."""
        seen = self.rows()
        bars = [index for index, row in enumerate(seen) if set(row) & set(BARS)]
        if not bars:
            return False
        view = seen[bars[0] :]
        labels = ["run", "epoch", "train", *([""] if len(view) == 7 else []), "latest", "best", "attempt"]
        assert [row[:8].strip() for row in view] == labels, "\n".join(seen)
        assert bars == [bars[0], bars[0] + 1], "\n".join(seen)
        assert max(len(row) for row in view) < self.columns, "\n".join(seen)
        return True


@pytest.fixture
def screen(tmp_path: Path, marker: str) -> Callable[[int], Screen]:
    return lambda columns: Screen(tmp_path, marker, columns)  # the marker's fixture kills it


def typed(folder: Path, words: list[str], steps: int = 150) -> str:
    return shlex.join([*words, *waiting_run(folder), "--train.steps", str(steps), "--tracking.no-report"])


def expected_lines(run: Path) -> list[str]:
    """The lines of all rows but those of training, in their order."""
    of_epochs = {
        row["step"]: f"trained · step {row['step']} · loss {number(row['loss'])}" for row in rows(run, "epoch")
    }
    found = []
    for row in rows(run, "validate"):
        metrics = [name for name in row if name not in ("kind", "step", "epoch", "attempt", "time", "samples")]
        text = " · ".join(f"{name} {number(row[name])}" for name in metrics)
        found.append((row["step"], f"validated · step {row['step']} · {text}"))
    return [text for _, text in sorted([*of_epochs.items(), *found], key=lambda each: each[0])]


def check_lines(screen: Screen, run: Path, attempts: int) -> None:
    """Each line of the run is there once, and nothing of the view is left, above or below."""
    shown = screen.screen()
    lines = [re.sub(r"^epoch \d+/\d+ · ", "", line) for line in shown.splitlines() if line.startswith("epoch ")]
    assert lines == expected_lines(run), shown
    assert not set(shown) & set(BARS), shown
    assert shown.count("global batch 16 = ") == attempts
    for attempt in range(1, attempts + 1):
        assert shown.count(f"runs/run · attempt {attempt} · ") == 1


def test_a_terminal_shows_each_line_once_and_the_live_view_through_a_stop_and_a_resume(
    tmp_path: Path, screen: Callable[[int], Screen]
) -> None:
    check_stop_and_resume(tmp_path, screen(80), TRAIN)


@pytest.mark.long
@pytest.mark.parametrize("columns", [40, 80, 160])
def test_a_terminal_of_two_ranks_and_a_launcher_does_so_as_well(
    tmp_path: Path, screen: Callable[[int], Screen], columns: int
) -> None:
    check_stop_and_resume(tmp_path, screen(columns), accelerate_launch(2))


def check_stop_and_resume(folder: Path, screen: Screen, words: list[str]) -> None:
    run = run_of(folder)
    command = typed(folder, words)
    screen.type(command)
    screen.shows("validated · step 8 ")
    wait_until(screen.shows_the_view, "the view")
    screen.interrupt()
    screen.shows(NOTICE)
    screen.shows_the_view()
    screen.prompt_is_back()
    assert not screen.shows_the_view()
    check_lines(screen, run, 1)
    shown = screen.screen()
    assert shown.count(NOTICE) == 1
    assert shown.count("stopped after step ") == 1

    step = step_of(published_in(run / "checkpoints")[-1])
    screen.type(command)
    screen.shows(f"continuing after step {step} of 150")
    seen = []

    def finished() -> bool:
        seen.append(screen.shows_the_view())
        return "finished: " in screen.screen()

    wait_until(finished, "the end")
    assert any(seen)
    screen.prompt_is_back()
    assert status(run)["state"] == "finished"
    check_lines(screen, run, 2)
    assert screen.screen().count("finished: ") == 1


@pytest.mark.long
def test_the_live_view_follows_the_size_of_its_terminal(tmp_path: Path, screen: Callable[[int], Screen]) -> None:
    now = screen(160)
    now.type(typed(tmp_path, TRAIN, steps=1500))
    now.shows("validated · step 8 ")
    wait_until(now.shows_the_view, "the view")
    for columns, lines in ((60, 24), (40, 12), (120, 40), (80, 16)):
        now.resize(columns, lines)

        def fits() -> bool:
            try:
                return now.shows_the_view()
            except AssertionError:  # until it is drawn again
                return False

        wait_until(fits, f"the view in {columns} columns")
    now.interrupt()
    now.prompt_is_back()
    now.resize(250, 50)
    check_lines(now, run_of(tmp_path), 1)


@pytest.mark.long
def test_a_run_that_is_killed_leaves_a_terminal_in_order(
    tmp_path: Path, screen: Callable[[int], Screen], marker: str
) -> None:
    now = screen(80)
    now.type(typed(tmp_path, TRAIN, steps=5000))
    reached(tmp_path, 40)
    wait_until(now.shows_the_view, "the view")
    [trainer, *_] = [pid for pid, command in processes_of(tmp_path, marker).items() if "distloop.train" in command]
    os.kill(trainer, signal.SIGKILL)
    now.shows("Killed")
    wait_until(lambda: not now.shows_the_view(), "the view's end")
    now.type("clear; seq 100")  # scrolls all of the lines again
    wait_until(lambda: now.rows()[-2:] == ["100", "ready>"], "the last line at the bottom")
