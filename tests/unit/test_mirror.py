"""The W&B mirror without W&B: what is told of it, what is logged of a row, and a process that does strange things."""

from __future__ import annotations

import errno
import fcntl
import json
import math
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from distloop.config.settings import Tracking
from distloop.tracking.wandb import process as wandb_process
from distloop.tracking.wandb import rows as wandb_rows
from distloop.tracking.wandb.mirror import only_mirror
from distloop.tracking.wandb.process import WandbProcess, wandb_mode
from distloop.tracking.wandb.rows import RowReader, as_logged, parse_row
from distloop.tracking.wandb.run import WandbRun
from tests.tools.report_runs import write_figure

SETTINGS = Tracking(start_seconds=30, end_seconds=30)


@pytest.mark.parametrize(
    ("setting", "variable", "mode"),
    [
        ("off", "online", None),
        ("online", None, "online"),
        ("online", "offline", "offline"),
        ("online", "dryrun", "offline"),
        ("online", "disabled", None),
        ("offline", "online", "offline"),
        ("offline", "disabled", None),
    ],
)
def test_the_environment_can_only_take_away(setting: Any, variable: str | None, mode: str | None) -> None:
    environ = {} if variable is None else {"WANDB_MODE": variable}
    assert wandb_mode(Tracking(wandb=setting), environ) == mode


# ---- rows --------------------------------------------------------------------------------------------------------


def test_a_row_is_logged_by_its_kind_with_a_number_for_each_rank(tmp_path: Path) -> None:
    row = {"kind": "train", "step": 20, "epoch": 2, "attempt": 3, "time": 5.5, "loss": 1.0, "memory_gib": [0.5, 0.25]}
    logged = as_logged(row, tmp_path, 0)
    ranks = {"train/memory_gib/rank_0": 0.5, "train/memory_gib/rank_1": 0.25}
    assert logged == {"global_step": 20, "epoch": 2, "attempt": 3, "_timestamp": 5.5, "train/loss": 1.0, **ranks}
    assert row["kind"] == "train"


def test_lists_of_the_loops_own_are_not_named_after_ranks(tmp_path: Path) -> None:
    logged = as_logged({"kind": "train", "step": 1, "rates": [0.1, 0.2], "is_odd": True}, tmp_path, 0)
    assert {key: logged[key] for key in logged if key.startswith("train/")} == {
        "train/rates/0": 0.1,
        "train/rates/1": 0.2,
        "train/is_odd": True,
    }


def test_a_figure_row_is_logged_as_its_picture_or_without_it_if_that_is_gone(tmp_path: Path) -> None:
    file = write_figure(tmp_path, 3, "a")
    row = {"kind": "figure", "step": 3, "epoch": 1, "attempt": 2, "name": "a", "file": file}
    logged = as_logged(row, tmp_path, 3)
    assert list(logged) == ["global_step", "epoch", "attempt", "redone", "figures/a"]
    assert (logged["figures/a"].format, logged["global_step"]) == ("png", 3)
    elsewhere = tmp_path / "elsewhere.png"
    elsewhere.write_bytes((tmp_path / file).read_bytes())
    for other in ("figures/step_00000003/gone.png", str(elsewhere), "elsewhere.png", None):
        assert list(as_logged({**row, "file": other}, tmp_path, 0)) == ["global_step", "epoch", "attempt"]


def test_a_row_without_anything_or_of_another_version_is_logged_all_the_same(tmp_path: Path) -> None:
    assert as_logged({}, tmp_path, 5) == {"global_step": None, "epoch": None, "attempt": None}
    odd = {"kind": "new", "step": "x", "words": ["a", "b"], "nested": {"a": 1}, "empty": []}
    logged = as_logged(odd, tmp_path, 5)
    assert (logged["new/words"], logged["new/nested"]) == (["a", "b"], {"a": 1})


def test_null_is_nan_and_steps_done_again_are_marked(tmp_path: Path) -> None:
    logged = as_logged({"kind": "epoch", "step": 4, "loss": None, "list": [None, 2]}, tmp_path, 4)
    assert math.isnan(logged["epoch/loss"])
    assert math.isnan(logged["epoch/list/0"])
    assert logged["redone"] == 1
    assert "redone" not in as_logged({"kind": "epoch", "step": 5, "loss": 1.0}, tmp_path, 4)


def test_pictures_that_cannot_be_made_cost_no_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> None:
        raise KeyError("name")

    monkeypatch.setattr(wandb_rows, "media_of", broken)
    assert as_logged({"kind": "validate", "step": 1, "loss": 2.0}, tmp_path, 0)["validate/loss"] == 2.0


@pytest.mark.parametrize("line", [b"", b"\n", b"{", b"[1]", b"null", b"\xff\xfe\n", b'"text"'])
def test_a_damaged_line_is_an_empty_row(line: bytes) -> None:
    assert parse_row(line) == {}


@pytest.mark.parametrize("first_row", [0, 1, 3])
def test_rows_are_read_from_the_first_that_the_server_lacks_on(tmp_path: Path, first_row: int) -> None:
    file = tmp_path / "metrics.jsonl"
    file.write_text("".join(f'{{"step": {step}}}\n' for step in range(3)))
    reader = RowReader(file, first_row)
    assert [row["step"] for row in reader.read()] == list(range(first_row, 3))
    with open(file, "a") as more:
        more.write('{"step": 3}\n{"ste')
    assert [row["step"] for row in reader.read()] == [3]


# ---- wandb.json --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"rows": 3}', '{"id": 3}', None])
def test_a_wandb_json_that_is_damaged_begins_another_run(tmp_path: Path, text: str | None) -> None:
    if text is not None:
        (tmp_path / "wandb.json").write_text(text)
    state = WandbRun(tmp_path, {}, "online").state
    assert len(state["id"]) == 8
    assert state["rows"] == 0
    assert WandbRun(tmp_path, {}, "online").state == state == json.loads((tmp_path / "wandb.json").read_text())


def test_numbers_in_wandb_json_that_are_none_count_as_0(tmp_path: Path) -> None:
    (tmp_path / "wandb.json").write_text('{"id": "abc", "rows": "x", "surplus": null, "url": "http://u"}')
    state = WandbRun(tmp_path, {}, "online").state
    assert state == {"id": "abc", "rows": 0, "uploaded": 0, "attempt": 0, "surplus": 0, "url": "http://u"}


@pytest.mark.parametrize(
    ("uploaded", "attempt", "right"), [(3, 1, 2), (2, 1, 2), (1, 1, 1), (0, 0, 0), (4, 2, 3), (3, 2, 3), (9, 3, 5)]
)
def test_rows_that_a_later_attempt_wrote_are_not_the_uploaded_ones(
    tmp_path: Path, uploaded: int, attempt: int, right: int
) -> None:
    """The file has two rows of attempt 1, one of attempt 2 and two of attempt 3."""
    lines = [json.dumps({"attempt": number}) + "\n" for number in (1, 1, 2, 3, 3)]
    (tmp_path / "metrics.jsonl").write_text("".join(lines))
    state = {"id": "abc", "uploaded": uploaded, "attempt": attempt}
    (tmp_path / "wandb.json").write_text(json.dumps(state))
    assert WandbRun(tmp_path, {}, "online")._rows_still_right() == right


def test_a_damaged_line_among_the_rows_of_a_later_attempt_hides_none_of_them(tmp_path: Path) -> None:
    row = '{{"attempt": {}}}\n'.format
    (tmp_path / "metrics.jsonl").write_text("".join([row(1), row(1), row(2), '{"atte\n', row(2)]))
    (tmp_path / "wandb.json").write_text(json.dumps({"id": "abc", "uploaded": 4, "attempt": 1}))
    assert WandbRun(tmp_path, {}, "online")._rows_still_right() == 2


def test_only_one_mirrors_a_run(tmp_path: Path) -> None:
    with only_mirror(tmp_path, 0.0) as first, only_mirror(tmp_path, 0.2) as second:
        assert (first, second) == (True, False)
    with only_mirror(tmp_path, 0.0) as again:
        assert again


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL, errno.EIO])
def test_a_file_system_without_locks_costs_no_mirror(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    monkeypatch.setattr(fcntl, "flock", failing_with(code))
    with only_mirror(tmp_path, 0.0) as first, only_mirror(tmp_path, 0.0) as second:
        assert (first, second) == (True, True)  # no marker in place of a lock: that of a killed process would stay


def failing_with(code: int) -> Callable[..., None]:
    def flock(*_: Any) -> None:
        raise OSError(code, "a disk")

    return flock


# ---- training's side ---------------------------------------------------------------------------------------------

Starter = Callable[[str], WandbProcess]


@pytest.fixture
def start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Starter:
    """Starts a mirror that is this Python code."""

    def starter(code: str) -> WandbProcess:
        monkeypatch.setattr(wandb_process, "own_python", lambda *_: ([sys.executable, "-c", code], dict(os.environ)))
        return WandbProcess(tmp_path / "a run", SETTINGS, "online")

    return starter


def never() -> bool:
    return False


def is_gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


STARTED = """import json, sys; print(json.dumps({"started": True, "problem": None, "url": "http://u"}), flush=True)"""


def test_what_a_mirror_prints_beside_its_answers_does_not_reach_training(start: Starter) -> None:
    mirror = start(f"print('hello', flush=True); print('[1]', flush=True)\n{STARTED}\nsys.stdin.readline()")
    assert mirror.started(never) == "W&B: http://u"
    assert mirror.finish("finished", 30, never) == (
        f"W&B: its process has ended; `distloop sync '{mirror.run}'` uploads the rest"
    )


def test_a_mirror_that_says_nothing_is_killed_and_leaves_no_zombie(start: Starter) -> None:
    mirror = start(f"{STARTED}\nimport time; time.sleep(600)")
    assert mirror.process is not None
    pid = mirror.process.pid
    assert mirror.started(never) == "W&B: http://u"
    said = mirror.finish("finished", 0.1, never)
    assert said is not None
    assert said.startswith("W&B: no answer within 0 s; ")
    assert is_gone(pid)
    assert mirror.finish("finished", 0.1, never) is None


def test_a_mirror_that_ends_at_once_is_said_to_be_off(start: Starter) -> None:
    mirror = start("")
    assert mirror.process is not None
    pid = mirror.process.pid
    assert mirror.started(never).startswith("W&B is off: its process has ended. Later `distloop sync ")
    assert is_gone(pid)
    assert mirror.finish("finished", 30, never) is None


def test_a_machine_that_starts_no_process_costs_wandb_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_process(*_: Any, **__: Any) -> None:
        raise BlockingIOError(11, "Resource temporarily unavailable")

    monkeypatch.setattr("subprocess.Popen", no_process)
    mirror = WandbProcess(tmp_path, SETTINGS, "online")
    expected = "W&B is off: no process can be started (Resource temporarily unavailable). Later "
    assert mirror.started(never).startswith(expected)
    assert mirror.finish("finished", 30, never) is None


def test_a_wish_to_stop_ends_the_waiting_for_the_start_but_not_that_for_the_end(start: Starter) -> None:
    answer = "import json, sys, time; sys.stdin.readline(); time.sleep(0.5); print(json.dumps({'problem': 'seen'}))"
    mirror = start(answer)
    asked = []

    def stop() -> int:
        asked.append(time.monotonic())
        return 15

    assert mirror.started(stop).startswith("W&B has not started yet; training goes on. ")
    before = len(asked)
    assert (mirror.finish("stopped", 30, stop) or "").startswith("W&B: seen; ")
    assert len(asked) > before  # the others are told meanwhile that rank 0 is at work


def test_an_answer_that_comes_late_is_not_taken_for_that_at_the_end(start: Starter) -> None:
    end = "told = json.loads(sys.stdin.readline()); print(json.dumps({'problem': told['state']}), flush=True)"
    mirror = start(f"import time; time.sleep(0.3)\n{STARTED}\n{end}")
    assert mirror.started(lambda: True).startswith("W&B has not started yet")
    assert (mirror.finish("failed", 30, never) or "").startswith("W&B: failed; ")


def test_more_open_files_than_select_can_count_do_not_matter(start: Starter) -> None:
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard < 1200:
        pytest.skip("no so many files are allowed here")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 1200), hard))
    files = [os.open(os.devnull, os.O_RDONLY) for _ in range(1100)]
    try:
        mirror = start(f"{STARTED}\nsys.stdin.readline(); print(json.dumps({{'problem': None}}))")
        assert mirror.started(never) == "W&B: http://u"
        assert mirror.finish("finished", 30, never) is None
    finally:
        for file in files:
            os.close(file)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
