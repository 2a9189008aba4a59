"""The console: plain lines for a log file, and what the live view of a terminal shows at any width."""

from __future__ import annotations

import fcntl
import io
import itertools
import math
import os
import pty
import re
import select
import struct
import subprocess
import sys
import termios
from collections.abc import Iterator
from typing import Any

import pytest
from rich.cells import cell_len

from distloop.tracking.console import Console
from distloop.tracking.live_view import GIVE_BACK, layout
from distloop.tracking.progress import Progress, number_in
from distloop.tracking.wording import encodable
from tests.tools.ranks import wait_until

TRAIN = {
    "kind": "train",
    "step": 20,
    "epoch": 1,
    "attempt": 1,
    "time": 1795346996.1,
    "loss": 1.9,
    "running_loss": 2.0071,
    "lr": 0.000995,
    "gradient_norm": 1.5,
    "samples_per_second": 10973.4,
    "skipped_steps": 0,
    "data_seconds": 0.02,
    "compute_seconds": 0.98,
    "memory_gib": [0.41, 0.42],
}
VALIDATE = {"kind": "validate", "step": 22, "epoch": 1, "attempt": 1, "time": 1.5, "loss": 1.018, "accuracy": 0.8222}


def test_a_validation_before_the_first_step_is_the_latest_and_never_the_best() -> None:
    shown = console().progress
    shown.add({**VALIDATE, "step": 0, "epoch": 0, "accuracy": 0.99})
    assert (shown.latest or {})["step"] == 0
    assert shown.best is None
    shown.add(VALIDATE)
    assert shown.best == VALIDATE


def console(**changes: Any) -> Console:
    values: dict[str, Any] = {
        "name": "digits",
        "attempt": 1,
        "first_step": 0,
        "total_steps": 440,
        "steps_per_epoch": 22,
        "best_rule": ("accuracy", "max"),
        "best": None,
        "saved_step": lambda: None,
    }
    return Console(Progress(**{**values, **changes}))


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """[seconds]: what time.monotonic says."""
    now = [1000.0]
    monkeypatch.setattr("distloop.tracking.progress.time.monotonic", lambda: now[0])
    return now


# ---- plain lines ---------------------------------------------------------------------------------------------


def test_a_log_file_gets_a_line_for_each_row(capsys: pytest.CaptureFixture, clock: list[float]) -> None:
    shown = console()
    shown.line("distloop 0.1.0 · runs/digits")
    shown.log({**TRAIN, "step": 10})
    clock[0] += 5
    shown.log(TRAIN)
    shown.log({"kind": "epoch", "step": 22, "epoch": 1, "attempt": 1, "time": 1.5, "loss": 1.951})
    shown.log({**VALIDATE, "samples": 360})
    shown.link("https://wandb.ai/x")
    shown.close()
    assert capsys.readouterr().out.splitlines() == [
        "distloop 0.1.0 · runs/digits",
        "epoch 1/20 · step 10/440 · running loss 2.007 · lr 0.000995 · 10973 samples/s · data wait 2 %",
        "epoch 1/20 · step 20/440 · running loss 2.007 · lr 0.000995 · 10973 samples/s · data wait 2 % · 3:30 left",
        "epoch 1/20 · trained · step 22 · loss 1.951",
        "epoch 1/20 · validated · step 22 · loss 1.018 · accuracy 0.8222",
    ]


def test_what_a_row_lacks_is_left_out_and_what_it_holds_as_none_is_nan(capsys: pytest.CaptureFixture) -> None:
    shown = console()
    shown.log({"kind": "train", "step": 20, "epoch": 1})
    shown.log({**TRAIN, "running_loss": None, "data_seconds": None, "memory_gib": None})
    shown.log({**VALIDATE, "loss": None, "accuracy": math.nan})
    assert capsys.readouterr().out.splitlines() == [
        "epoch 1/20 · step 20/440",
        "epoch 1/20 · step 20/440 · running loss nan · lr 0.000995 · 10973 samples/s",
        "epoch 1/20 · validated · step 22 · loss nan · accuracy nan",
    ]


@pytest.mark.parametrize(
    ("encoding", "said"),
    [("utf-8", "a · b × 2 … – ü"), ("latin-1", "a · b × 2 ... - ü"), ("ascii", "a - b x 2 ... - ?")],
)
def test_a_log_file_that_is_not_unicode_gets_what_it_can_hold(
    monkeypatch: pytest.MonkeyPatch, encoding: str, said: str
) -> None:
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding=encoding))
    console().line("a · b × 2 … – ü")
    assert written.getvalue().decode(encoding) == said + "\n"
    assert encodable("a · b × 2 … – ü", encoding) == said


def test_a_log_file_needs_no_rich() -> None:
    program = (
        "import sys; from distloop.tracking.console import Console; from distloop.tracking.progress import Progress\n"
        "Console(Progress('run', 1, 0, 9, 3, ('loss', 'min'), None, lambda: None)).line('a line')\n"
        "assert 'rich' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("a line\n", "")


# ---- the progress ---------------------------------------------------------------------------------------------


def progress(**changes: Any) -> Progress:
    return console(**changes).progress


def test_the_time_left_counts_the_steps_since_the_first_row_and_goes_down(clock: list[float]) -> None:
    now = progress(first_step=100)  # an attempt that continues, whose start-up took long
    clock[0] += 60
    now.add({**TRAIN, "step": 110})
    assert now.seconds_left() is None
    clock[0] += 10
    now.add({**TRAIN, "step": 120})
    assert now.seconds_left() == 320
    clock[0] += 30  # a validation
    now.add({**VALIDATE, "step": 120})
    assert now.seconds_left() == 4 * 320
    clock[0] += 20
    assert now.seconds_left() == 4 * 320 - 20
    now.add({**TRAIN, "step": 440})
    assert now.seconds_left() == 0


@pytest.mark.parametrize(("rule", "best"), [(("accuracy", "max"), 3), (("loss", "min"), 2), (("f1", "max"), 9)])
def test_the_best_validation_is_that_of_the_rule_of_all_attempts(rule: tuple[str, str], best: int) -> None:
    now = progress(best_rule=rule, best={"step": 9, "loss": 0.5, "accuracy": 0.5, "f1": 0.5})
    for step, loss, accuracy in ((1, 0.6, 0.4), (2, 0.1, math.nan), (3, 0.2, 0.9), (4, 0.1, 0.9), (5, None, math.inf)):
        now.add({"kind": "validate", "step": step, "loss": loss, "accuracy": accuracy})
    assert now.best is not None
    assert now.best["step"] == best
    assert now.latest is not None
    assert now.latest["step"] == 5


def test_memory_is_that_of_the_rank_that_uses_most() -> None:
    now = progress()
    for ranks, most in (([0.41, 0.42], 0.42), ([None, 0.1], 0.1), ([None], None), (None, None)):
        now.add({**TRAIN, "memory_gib": ranks})
        assert now.memory() == most


# ---- the live view -------------------------------------------------------------------------------------------


def texts(now: Progress, columns: int) -> list[str]:
    return ["".join(text for text, _ in line) for line in layout(now, columns)]


def stages() -> Iterator[Progress]:
    """The progress from the beginning of a run on."""
    yield progress()
    now = progress(saved_step=lambda: 220)
    now.add(TRAIN)
    yield now
    now.add({**TRAIN, "step": 40, "running_loss": 1.2e-05, "lr": 3e-7, "gradient_norm": math.inf})
    now.add({**VALIDATE, "step": 44})
    now.add({**VALIDATE, "step": 66, "accuracy": None, "loss": 12345.6})
    yield now
    now.add({"kind": "train", "step": 440, "epoch": 20, "running_loss": None, "memory_gib": None, "skipped_steps": 3})
    now.url = "https://wandb.ai/someone/distloop/runs/abcd1234"
    yield now


@pytest.mark.parametrize("columns", [20, 39, 60, 79, 119, 159, 250])
def test_no_line_is_longer_than_the_terminal_and_their_number_does_not_change(columns: int) -> None:
    heights = set()
    for now in stages():
        lines = texts(now, columns)
        heights.add(len(lines))
        if columns >= 39:  # what is narrower is cut when it is drawn
            assert max(cell_len(line) for line in lines) <= columns, "\n".join(lines)
        assert not any("\n" in line for line in lines)
    assert len(heights) == 1
    assert heights <= {6, 7}


def test_wide_terminals_show_all_and_narrow_ones_what_matters_most() -> None:
    now = next(itertools.islice(stages(), 2, None))
    now.url = "https://wandb.ai/someone/distloop/runs/abcd1234"
    wide = "\n".join(texts(now, 159))
    for text in ("step 66/440", "epoch 3/20", "left", "running loss 1.2e-05", "lr 3e-07", "gradient norm inf"):
        assert text in wide
    for text in (
        "samples/s 10973",
        "data wait 2 %",
        "memory 0.42 GiB",
        "saved step 220",
        "attempt 1",
        now.url,
        "digits",
    ):
        assert text in wide
    narrow = "\n".join(texts(now, 39))
    for text in ("run ", "15 %", "left", "epoch ", "running loss 1.2e-05", "accuracy", "saved step 220"):
        assert text in narrow
    assert "https" not in narrow  # a part of an address is of no use


def test_the_latest_and_the_best_validation_stand_below_each_other_with_the_rules_metric_first() -> None:
    now = progress()
    many = {f"metric_{index}": 0.5 for index in range(18)}
    now.add({**VALIDATE, **many})
    now.add({**VALIDATE, **many, "step": 44, "accuracy": 0.8, "confusion": [[1, 2], [3, 4]]})
    latest, best = texts(now, 79)[-3:-1]
    assert latest.startswith("latest  step 44    accuracy 0.8000      loss 1.018       metric_0 0.5000")
    assert best.startswith("best    step 22    accuracy 0.8222      loss 1.018       metric_0 0.5000")


def test_the_bar_of_an_epoch_that_is_cut_short_gets_to_its_end() -> None:
    now = progress(total_steps=30)
    now.add({**TRAIN, "step": 22})
    assert "100 %   epoch 1/2" in texts(now, 79)[1]
    now.add({**TRAIN, "step": 26})
    assert " 50 %   epoch 2/2" in texts(now, 79)[1]
    now.add({**TRAIN, "step": 30})
    assert "100 %   epoch 2/2" in texts(now, 79)[1]


# ---- in a terminal (more in multiprocess/test_terminal.py) ---------------------------------------------------


def written_to_a_terminal(monkeypatch: pytest.MonkeyPatch, encoding: str, **environment: str) -> bytes:
    """What a terminal gets of a line, a row and the line after the end."""
    for name in ("NO_COLOR", "COLORTERM", "FORCE_COLOR"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"TERM": "xterm-256color", **environment}.items():
        monkeypatch.setenv(name, value)
    end, other = pty.openpty()
    fcntl.ioctl(other, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    written = b""

    def shows(text: bytes) -> bool:
        nonlocal written
        if select.select([end], [], [], 0)[0]:
            written += os.read(end, 65536)
        return text in written

    with os.fdopen(other, "w", encoding=encoding) as stdout:
        monkeypatch.setattr(sys, "stdout", stdout)
        shown = console()
        shown.line("first · line")
        shown.log(TRAIN)
        if shown.view:
            wait_until(lambda: shows(b"10973"), "the view")
            shown.close()
        shown.line("the end")
        wait_until(lambda: shows(b"the end\r\n"), "the end")
        monkeypatch.undo()
    os.close(end)
    return written


def test_a_terminal_has_colors_and_bars_and_is_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    written = written_to_a_terminal(monkeypatch, "utf-8")
    assert b"\x1b[36m" in written
    assert "━".encode() in written or "─".encode() in written
    assert written.endswith(GIVE_BACK.encode() + b"the end\r\n")


def test_a_terminal_without_colors_and_unicode_gets_neither(monkeypatch: pytest.MonkeyPatch) -> None:
    written = written_to_a_terminal(monkeypatch, "ascii", NO_COLOR="1")
    assert b"first - line" in written
    assert b"-------" in written
    assert written.isascii()
    assert set(re.findall(rb"\x1b\[[0-9;]*m", written)) <= {b"\x1b[0m"}


def test_a_dumb_terminal_gets_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    written = written_to_a_terminal(monkeypatch, "utf-8", TERM="dumb")
    assert "step 20/440 · running loss 2.007".encode() in written
    assert b"\x1b" not in written


def test_a_number_of_a_row_in_a_form_of_its_own() -> None:
    assert [number_in({"lr": value}, "lr", ".3g") for value in (0.00099512, None)] == ["0.000995", "nan"]
    assert number_in({}, "lr") is None
