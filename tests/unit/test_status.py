"""distloop status: what is shown of run directories, whatever state they are in, and how a sweep is ranked."""

from __future__ import annotations

import datetime
import fcntl
import json
import math
import os
import pty
import re
import struct
import subprocess
import sys
import tempfile
import termios
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, BinaryIO

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.cells import cell_len

from distloop.commands import reading as runs
from distloop.commands import tables
from distloop.commands.reading import read_run
from distloop.commands.status import main
from distloop.run import checkpoint, set_aside
from distloop.run.lock import LOCK, RunLock
from tests.tools.ranks import REPOSITORY, clean_environment, command

BEST = {"step": 40, "loss": 0.5, "accuracy": 0.9, "samples": 360}


def ago(seconds: float) -> str:
    return (datetime.datetime.now(datetime.UTC) - datetime.timedelta(seconds=seconds)).isoformat(timespec="seconds")


def make_run(folder: Path, name: str, state: str = "finished", config: str = "", **status: Any) -> Path:
    """A run directory as this version writes it."""
    path = folder / name
    (path / "checkpoints" / "step_00000040").mkdir(parents=True)
    (path / "failures").mkdir()
    written = {"state": state, "step": 40, "attempt": 1, "reason": None, "written": ago(30), "total_steps": 100}
    known = {"first_step": 0, "best": BEST, "best_rule": ["accuracy", "max"], "slurm_job": None, "slurm_restart": 0}
    (path / "status.json").write_text(json.dumps({**written, **known, **status}))
    (path / "config.yaml").write_text(f"name: {name!r}\n{config}")
    return path


def validated(path: Path, **metrics: list[float]) -> Path:
    """Give a run validation rows, among rows of training with other values."""
    with open(path / "metrics.jsonl", "w") as file:
        for index, values in enumerate(zip(*metrics.values(), strict=True)):
            found = dict(zip(metrics, values, strict=True))
            step = 10 * (index + 1)
            misleading = {
                "kind": "train",
                "next": "validate",
                "step": step,
                **dict.fromkeys(metrics, -100 if index else 100),
            }
            clean = {key: value if math.isfinite(value) else None for key, value in found.items()}
            row = {"kind": "validate", "step": step, "epoch": index + 1, "attempt": 1, **clean, "samples": 360}
            file.write(f"{json.dumps(misleading)}\n{json.dumps(row)}\n")
    return path


@pytest.fixture
def locks() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def own(path: Path, locks: ExitStack, **identity: Any) -> RunLock:
    """Own a run directory: as this process, which lives, or with another identity."""
    lock = RunLock()
    lock.identity.update(identity)
    lock.acquire(path)
    locks.callback(lock.release)
    return lock


ELSEWHERE = {"machine": "gpu17", "processes": "the boot of another machine"}


def table(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, dict[str, str]]:
    """The rows that are printed into a pipe, by run, each by column."""
    assert main(list(arguments)) == 0
    title, *lines = [re.split("  +", line.strip()) for line in capsys.readouterr().out.splitlines()]
    rows = [dict(zip(title, line, strict=True)) for line in lines]
    return {row["run"]: row for row in rows}


def as_json(capsys: pytest.CaptureFixture[str], *arguments: str) -> list[dict[str, Any]]:
    assert main([*arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., list[str]]:
    """Prints on a terminal of a width without colours; returns the lines."""

    def lines(width: int, *arguments: str) -> list[str]:
        monkeypatch.setenv("COLUMNS", str(width))
        monkeypatch.setenv("TERM", "xterm")
        monkeypatch.setenv("NO_COLOR", "1")
        monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
        assert main(list(arguments)) == 0
        return re.sub(r"\x1b\[[0-9;]*m", "", capsys.readouterr().out).splitlines()

    return lines


# ---- states ------------------------------------------------------------------------------------------------------


def test_a_running_run_is_one_whose_process_is_there_and_nothing_waits_for_it(
    tmp_path: Path, locks: ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(_: float) -> None:
        raise AssertionError("it waited")

    monkeypatch.setattr(time, "sleep", never)
    here = make_run(tmp_path, "here", "running")
    own(here, locks)
    dead = make_run(tmp_path, "dead", "running")
    own(dead, locks, pid_started="1")  # its number is another process's by now
    beating = make_run(tmp_path, "beating", "running")
    own(beating, locks, **ELSEWHERE)
    silent = make_run(tmp_path, "silent", "running")
    own(silent, locks, pid=12, **ELSEWHERE)
    os.utime(silent / LOCK, (time.time() - 45, time.time() - 45))
    left = make_run(tmp_path, "left", "running")

    assert [read_run(path).state for path in (here, beating)] == ["running"] * 2
    found = {path.name: (read_run(path).state, read_run(path).reason) for path in (dead, silent, left)}
    assert found["dead"] == ("gone", f"process {os.getpid()} on {os.uname().nodename} has ended")
    assert found["silent"] in {("gone", f"silent {seconds} s: process 12 on gpu17") for seconds in (45, 46, 47)}
    assert found["left"] == ("gone", "its process has ended")


@pytest.mark.parametrize("state", ["stopped", "failed", "finished"])
def test_an_attempt_that_has_not_written_its_status_is_starting(tmp_path: Path, locks: ExitStack, state: str) -> None:
    run = make_run(tmp_path, "run", state, reason="SIGTERM")
    assert read_run(run).state == state
    own(run, locks)
    assert read_run(run).state == "starting"
    first = tmp_path / "first"
    first.mkdir()
    own(first, locks)
    assert (read_run(first).state, read_run(first).step) == ("starting", None)


def test_a_run_that_is_about_to_leave_is_what_its_status_says(tmp_path: Path, locks: ExitStack) -> None:
    run = make_run(tmp_path, "run", "stopped", written=ago(0))
    own(run, locks, since=ago(600))
    assert read_run(run).state == "stopped"


def test_a_run_that_ends_between_two_looks_is_not_taken_for_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(tmp_path, "run", "running")

    def meanwhile(path: Path) -> None:
        make_run(tmp_path / "other", "run", "finished")
        (tmp_path / "other" / "run" / "status.json").replace(path / "status.json")

    monkeypatch.setattr(runs, "owner_of", meanwhile)
    assert read_run(run).state == "finished"


@pytest.mark.parametrize("text", [b"", b"{", b"[1]", b"null", b"\x00\xff", b'{"step": 3}', b'{"state": 3}'])
def test_a_damaged_status_is_a_row_that_says_so_beside_the_others(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: bytes
) -> None:
    make_run(tmp_path, "good")
    (make_run(tmp_path, "bad") / "status.json").write_bytes(text)
    shown = table(capsys, str(tmp_path))
    assert (shown["bad"]["state"], shown["bad"]["reason"]) == ("damaged", "status.json is damaged")
    assert shown["good"]["state"] == "finished"


def test_what_a_directory_does_not_say_or_says_strangely_is_a_dash(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Directories of older versions lack keys; those of later ones may have other things there."""
    old = tmp_path / "old"
    old.mkdir()
    (old / "status.json").write_text('{"state": "finished", "step": 44}')
    strange: dict[str, Any] = {
        "step": "x",
        "total_steps": [],
        "best": 3,
        "best_rule": "max",
        "written": 7,
        "attempt": None,
    }
    make_run(tmp_path, "strange", **strange, slurm_job={}, slurm_restart="no")
    (tmp_path / "strange" / "metrics.jsonl").write_text('{"kind": "validate"}\n"validate"\n{"kind": "validate", "st')
    (tmp_path / "strange" / "config.yaml").write_text("{[")
    make_run(tmp_path, "whole", slurm_job="48211", slurm_restart=2)
    shown = table(capsys, str(tmp_path))
    dashes = {"written": "–", "attempt": "–", "best": "–", "Slurm job": "–"}
    assert shown["old"] == {"run": "old", "state": "finished", "step": "44/–", **dashes}
    assert shown["strange"] == {"run": "strange", "state": "finished", "step": "–/–", **dashes}
    assert shown["whole"]["best"] == "accuracy 0.9 @40"
    assert shown["whole"]["Slurm job"] == "48211 restart 2"
    assert shown["whole"]["step"] == "40/100 40%"
    assert table(capsys, str(tmp_path), "--sort", "written")["strange"]["#"] == "3"
    for name in ("old", "strange"):
        assert main([str(tmp_path / name)]) == 0


def test_a_running_run_is_at_the_step_that_all_its_ranks_have_reached(tmp_path: Path, locks: ExitStack) -> None:
    run = make_run(tmp_path, "run", "running")
    own(run, locks)
    ranks = [{"rank": rank, "node": "n1", "pid": 7, "step": 57 + rank, "phase": "forward pass"} for rank in range(2)]

    def write(written: str) -> None:
        (run / "failures" / "ranks.json").write_text(json.dumps({"written": written, "ranks": ranks}))

    write(ago(-1))
    assert (read_run(run).step, read_run(run).saved_step) == (57, 40)
    write(ago(3600))  # an earlier attempt's, which had been further
    assert (read_run(run).step, read_run(run).ranks) == (40, [])
    write(ago(-1))
    status = json.loads((run / "status.json").read_text())
    (run / "status.json").write_text(json.dumps({**status, "state": "stopped", "written": ago(-1)}))
    assert read_run(run).step == 40  # what is saved is what counts


def test_a_run_that_is_gone_is_at_what_it_saved_and_its_ranks_are_where_they_were_last(tmp_path: Path) -> None:
    run = make_run(tmp_path, "run", "running")
    ranks = [{"rank": 0, "node": "n1", "pid": 7, "step": 57, "phase": "forward pass"}]
    (run / "failures" / "ranks.json").write_text(json.dumps({"written": ago(60), "ranks": ranks}))
    found = read_run(run)
    assert (found.state, found.step, found.ranks) == ("gone", 40, ranks)


def test_numbers_that_json_does_not_have_are_null_in_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_run(tmp_path, "run", best={**BEST, "loss": math.nan})
    assert main([str(tmp_path), "--json"]) == 0

    def none(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    assert json.loads(capsys.readouterr().out, parse_constant=none)[0]["best"] == {**BEST, "loss": None}


# ---- ranking -----------------------------------------------------------------------------------------------------


def names(capsys: pytest.CaptureFixture[str], *arguments: str) -> list[str]:
    return [run["name"] for run in as_json(capsys, *arguments)]


@pytest.fixture
def sweep(tmp_path: Path) -> str:
    """Three runs whose best values are neither their last ones nor in the order of their names, and one without."""
    values: dict[str, dict[str, list[float]]] = {
        "a": {"accuracy": [0.5, 0.7, 0.6], "loss": [0.9, 0.1, 0.8], "error": [0.3, 0.2, 0.4], "skill": [3, 9, 1]},
        "b": {"accuracy": [0.1, 0.9, 0.2], "loss": [0.9, 0.3, 0.8], "error": [0.9, 0.1, 0.4], "skill": [5, 6, 7]},
        "c": {"accuracy": [0.8, math.nan, 0.1], "loss": [0.2, 0.9, 0.9], "error": [0.3, 0.9, 0.9], "skill": [2, 8, 2]},
    }
    for place, (name, metrics) in enumerate(values.items()):
        validated(make_run(tmp_path, name, step=10 * place, written=ago(100 - place)), **metrics)
    make_run(tmp_path, "without", step=5, written=ago(1000))
    return str(tmp_path)


@pytest.mark.parametrize(
    ("by", "order"),
    [
        ("accuracy", "bca"),  # by the runs' own rule
        ("loss", "acb"),
        ("error", "bac"),
        ("skill", "acb"),
        ("accuracy --reverse", "acb"),  # the best of each, the worst of them first
        ("skill --reverse", "acb"),  # less is better: 1, 2, 5
        ("loss --reverse", "abc"),  # more is better, for once: all have 0.9
    ],
)
def test_a_sweep_is_ranked_by_the_best_of_each_run_and_those_without_the_metric_are_last(
    sweep: str, capsys: pytest.CaptureFixture[str], by: str, order: str
) -> None:
    found = as_json(capsys, sweep, "--sort", *by.split())
    assert "".join(run["name"] for run in found[:3]) == order
    assert [run["place"] for run in found] == [1, 2, 3, None]


def test_the_value_that_ranks_a_run_is_shown_with_its_step(sweep: str, capsys: pytest.CaptureFixture[str]) -> None:
    shown = table(capsys, sweep, "--sort", "accuracy")
    assert [(name, row["#"], row["accuracy"]) for name, row in shown.items()] == [
        ("b", "1", "0.9 @20"),
        ("c", "2", "0.8 @10"),
        ("a", "3", "0.7 @20"),
        ("without", "–", "–"),
    ]
    assert "best" not in shown["a"]  # it would be the same
    assert table(capsys, sweep, "--sort", "loss")["a"]["best"] == "accuracy 0.9 @40"


def test_the_rule_of_the_runs_decides_what_is_best(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, value in (("a", 2.0), ("b", 1.0), ("c", 3.0)):
        validated(make_run(tmp_path, name, best_rule=["perplexity", "min"]), perplexity=[9.0, value])
    assert names(capsys, str(tmp_path), "--sort", "perplexity") == ["b", "a", "c"]


def test_a_validation_before_the_first_step_ranks_no_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, value in (("a", 2.0), ("b", 1.0)):
        path = validated(make_run(tmp_path, name, best_rule=["perplexity", "min"]), perplexity=[value])
        with open(path / "metrics.jsonl", "a") as file:
            file.write(json.dumps({"kind": "validate", "step": 0, "perplexity": 0.5 if name == "a" else 3.0}) + "\n")
    assert names(capsys, str(tmp_path), "--sort", "perplexity") == ["b", "a"]


@pytest.mark.parametrize(
    ("by", "order"),
    [
        ("step", ["c", "b", "without", "a"]),
        ("written", ["c", "b", "a", "without"]),
        ("name --reverse", ["without", "c", "b", "a"]),
    ],
)
def test_runs_are_ordered_by_what_is_no_metric(
    sweep: str, capsys: pytest.CaptureFixture[str], by: str, order: list[str]
) -> None:
    assert names(capsys, sweep, "--sort", *by.split()) == order


def test_names_are_in_the_order_of_their_numbers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    order = ["lr-0.001", "lr-1e-2", "lr-0.1", "lr-2", "lr-10", "run"]
    for name in reversed(order):
        make_run(tmp_path, name)
    assert names(capsys, str(tmp_path)) == order


def test_an_unknown_metric_names_the_known_ones(sweep: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([sweep, "--sort", "acuracy"]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert "no run has such a metric. Known: accuracy, error, loss, skill, step, written, name." in said.err


def test_what_the_runs_of_a_sweep_differ_in_is_shown_and_nothing_else(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = "runs_dir: {2}\nseed: 0\noptim: {{name: sgd, lr: {0}}}\nmodel: {{args: {1}}}\nlog: {{every_steps: {2}}}\n"
    for place, (name, lr, args) in enumerate((("a", "0.1", "{}"), ("b", "1.0e-3", "{width: 8}"), ("c", "0.1", "{}"))):
        make_run(tmp_path, name, config=config.format(lr, args, place))
    shown = table(capsys, str(tmp_path), "--sort", "name")
    assert {name: row["differs"] for name, row in shown.items()} == {
        "a": "optim.lr=0.1",
        "b": "optim.lr=1.0e-3 model.args.width=8",
        "c": "optim.lr=0.1",
    }
    (tmp_path / "b" / "config.yaml").unlink()
    assert "differs" not in table(capsys, str(tmp_path), "--sort", "name")["a"]


def test_what_is_tried_out_comes_first_and_a_pipe_gets_all_of_it(
    tmp_path: Path, terminal: Callable[..., list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    for number in range(3):
        args = ", ".join(f"argument{each}: {number // 2}" for each in range(6))
        make_run(tmp_path, f"run-{number}", config=f"model: {{args: {{{args}}}}}\noptim: {{lr: {number}}}\n")
    arguments = [str(tmp_path), "--sort", "name"]
    assert list(table(capsys, *arguments)["run-2"]["differs"].split()) == [
        "optim.lr=2",
        *(f"model.args.argument{each}=1" for each in range(6)),
    ]
    assert "optim.lr=2 model.args.argument0=1 model.args.argument1=1 …" in " ".join(
        terminal(160, *arguments)[3].split()
    )


def test_the_settings_of_a_sweep_come_first_whatever_else_is_in_the_folder(
    tmp_path: Path, terminal: Callable[..., list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    """Runs of other data and models differ in everything: that leaves no room for what the sweep tries out."""
    config = (
        "seed: {0}\ndata: {{name: {1}, root: x, args: {{size: {0}}}}}\nmodel: {{name: the_model_of_{1}}}\n"
        "task: {{name: the_task_of_{1}}}\noptim: {{name: sgd, lr: {2}}}\nbatch: {{global_size: {0}}}\n"
        "train: {{steps: {0}}}\nown: {{alpha: {3}}}\n"
    )
    for number, (lr, alpha) in enumerate((("0.1", 0), ("0.2", 0), ("0.1", 1), ("0.2", 1))):
        make_run(tmp_path, f"sweep-{number}", config=config.format(1, "mine", lr, alpha))
    for number in range(2, 8):
        make_run(tmp_path, f"other-{number}", config=config.format(number, f"data{number}", "0.1", 0))
    make_run(tmp_path, "another-of-2", config=config.format(2, "data2", "0.1", 0))
    (make_run(tmp_path, "without-a-config") / "config.yaml").unlink()
    make_run(tmp_path, "damaged", config="optim: {lr: [")
    arguments = [str(tmp_path), "--sort", "name"]
    shown = table(capsys, *arguments)
    lines = {line.split()[1]: " ".join(line.split()) for line in terminal(200, *arguments) if " finished " in line}
    for number, begins in enumerate(
        ("lr=0.1 own.alpha=0", "lr=0.2 own.alpha=0", "lr=0.1 own.alpha=1", "lr=0.2 own.alpha=1")
    ):
        assert f" optim.{begins} seed=1 " in lines[f"sweep-{number}"]
        assert shown[f"sweep-{number}"]["differs"].startswith(f"optim.{begins} seed=1 data.name=mine")
    keys = {
        "seed",
        "data.name",
        "data.args.size",
        "model.name",
        "task.name",
        "optim.lr",
        "batch.global_size",
        "train.steps",
    }
    for name in ("sweep-0", "other-2", "other-7", "another-of-2"):
        assert {pair.partition("=")[0] for pair in shown[name]["differs"].split()} == keys | {"own.alpha"}
    assert shown["other-3"]["differs"].startswith("seed=3 data.name=data3")


def test_the_help_says_what_reverse_does(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert "--reverse turn the order round: the worst run first" in said
    assert "If no run says whether more or less of METRIC is better" in said


# ---- one run, no run, output -------------------------------------------------------------------------------------


def test_a_runs_own_directory_gives_its_row_and_its_details(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    reason = "RunFailed: the gradient of step 41 is not finite\non rank 3"
    run = validated(make_run(tmp_path, "run", "failed", reason=reason, first_step=20, attempt=2), loss=[3.0, 2.0])
    (run / "checkpoints" / ".writing_step_00000050").mkdir()
    failure = {"rank": 3, "node": "n2", "step": 41, "phase": "backward pass", "traceback": "first\n" * 50 + "last\n"}
    (run / "failures" / "attempt_0002.json").write_text(json.dumps(failure))
    assert main([str(run)]) == 0
    text = capsys.readouterr().out
    for line in (
        r"run +failed +40/100 40% +accuracy 0.9 @40 +\d+ s ago +2",
        r"  checkpoints +step 40",
        r"  last validation +step 20 · loss 2",
        r"  this attempt +began after step 20",
        r"  reason +RunFailed: the gradient of step 41 is not finite",
        r" +on rank 3",
        r"  to continue +the same command goes on after step 40",
        r"  failed first +rank 3 on n2 · step 41 · backward pass\n( +first\n){7} +last",
    ):
        assert re.search(f"^{line}$", text, re.MULTILINE), text
    found = as_json(capsys, str(run))
    assert found[0]["checkpoints"] == [40]
    assert found[0]["failure"] == failure
    assert found[0]["last_validation"]["step"] == 20


kinds = st.sampled_from(["train", "validate", "epoch", 'a "validate"', "validate"])
line = st.one_of(
    st.builds(
        lambda kind, step, text: json.dumps({"kind": kind, "step": step, "x": text}), kinds, st.integers(), st.text()
    ),
    st.builds(
        lambda n: json.dumps({"kind": "validate", "step": n, "long": "ü" * n}, ensure_ascii=False), st.integers(0, 60)
    ),
    st.sampled_from(
        ["", '"validate"', '{"kind": "validate"}', '{"kind": "validate", "step": "x"}', '{"kind": "validate", "st']
    ),
)


@settings(derandomize=True, deadline=None, max_examples=300)
@given(st.lists(line, max_size=8), st.integers(0, 3), st.sampled_from([1, 5, 50, 1 << 18]))
def test_validations_are_those_of_a_line_by_line_reading(lines: list[str], torn: int, block: int) -> None:
    content = "".join(each + "\n" for each in lines).encode()
    content = content[: len(content) - torn * torn]
    values = [runs.parse_json(each) for each in content.split(b"\n")]
    rows = [row for row in values if isinstance(row, dict) and row.get("kind") == "validate"]
    rows = [row for row in rows if type(row.get("step")) is int]
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs, "BLOCK_BYTES", block)
        patch.setattr(set_aside, "BLOCK_BYTES", block)
        (Path(folder) / "metrics.jsonl").write_bytes(content)
        assert list(runs.validation_rows(Path(folder))) == rows
        assert runs.last_validation(Path(folder)) == (rows[-1] if rows else None)


def test_the_last_validation_is_found_from_the_end_of_a_long_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(tmp_path, "run")
    train = json.dumps({"kind": "train", "step": 1, "loss": 0.5}) + "\n"
    validate = json.dumps({"kind": "validate", "step": 7, "loss": 2}) + "\n"
    (run / "metrics.jsonl").write_text(train * 100_000 + validate + train * 100)
    read: list[int] = []

    def blocks(file: BinaryIO) -> Iterator[tuple[int, bytes]]:
        for begin, lines in set_aside.blocks_from_end(file):
            read.append(len(lines))
            yield begin, lines

    monkeypatch.setattr(runs, "blocks_from_end", blocks)
    monkeypatch.setattr(runs, "validation_rows", pytest.fail)
    assert main([str(run)]) == 0
    assert "last validation  step 7 · loss 2" in capsys.readouterr().out
    assert len(read) == 1


def test_details_say_where_the_ranks_are(tmp_path: Path, capsys: pytest.CaptureFixture[str], locks: ExitStack) -> None:
    run = make_run(tmp_path, "run", "running")
    own(run, locks)
    ranks = [{"rank": 3, "node": "n2", "pid": 99, "step": 57, "phase": "backward pass"}] * 40
    (run / "failures" / "ranks.json").write_text(json.dumps({"written": ago(-1), "ranks": ranks}))
    assert main([str(run)]) == 0
    text = capsys.readouterr().out
    assert "rank 3 on n2 · step 57 · backward pass · process 99" in text
    assert "and 24 more" in text


def test_no_runs_is_no_mistake_and_a_missing_folder_is_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "not-a-run").mkdir()
    (tmp_path / "file").touch()
    assert main([str(tmp_path)]) == 0
    assert capsys.readouterr().out == f"no runs in {tmp_path}\n"
    assert main([str(tmp_path), "--sort", "loss"]) == 0
    capsys.readouterr()
    assert as_json(capsys, str(tmp_path)) == []
    assert command([sys.executable, "-m", "distloop.status", "missing"], tmp_path).returncode == 2
    for name, says in (("missing", "no such folder"), ("file", "is a file")):
        assert main([str(tmp_path / name)]) == 2
        said = capsys.readouterr()
        assert says in said.err
        assert said.out == ""


def test_into_a_pipe_go_whole_lines_without_colours_or_spaces_at_their_ends(tmp_path: Path) -> None:
    reason = "x" * 300
    make_run(tmp_path, "run", "failed", reason=f"{reason}\nmore")
    make_run(tmp_path, "another-run-with-a-long-name")
    done = command([sys.executable, "-m", "distloop.status", str(tmp_path)], tmp_path, {"COLUMNS": "40"})
    lines = done.stdout.splitlines()
    assert len(lines) == 3
    assert lines[2].endswith(f"  {reason}")
    assert lines == [line.rstrip() for line in lines]
    assert "\x1b" not in done.stdout
    ascii_only = {"PYTHONIOENCODING": "ascii"}
    done = command([sys.executable, "-m", "distloop.status", str(tmp_path)], tmp_path, ascii_only)
    assert done.stdout.splitlines()[1].endswith("  -"), done.stdout


def test_a_reader_that_leaves_early_gets_no_traceback(tmp_path: Path) -> None:
    for number in range(300):  # more than a pipe's buffer and Python's own
        make_run(tmp_path, f"run-{number}", "failed", reason="x" * 400)
    line = f"{sys.executable} -m distloop.status {tmp_path} | head -1; echo ${{PIPESTATUS[0]}}"
    said = command(["bash", "-c", line], tmp_path).stdout.splitlines()
    assert len(said) == 2
    assert said[1] == "0"


@pytest.mark.parametrize("width", [40, 80, 160])
@pytest.mark.parametrize("sort", [[], ["--sort", "accuracy"]])
def test_a_terminal_is_filled_and_never_overflown(tmp_path: Path, width: int, sort: list[str]) -> None:
    long_name = "a-run-with-a-rather-long-name-as-sweeps-have-them-lr3e-4"
    for number, name in enumerate(("[red]run", long_name)):
        run = make_run(tmp_path, name, "failed", f"seed: {number}\n", reason=f"begin {'x' * 300}", slurm_job="48211")
        validated(run, accuracy=[0.5, 0.9])
    controller, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 40, width, 0, 0))
    environment = {**clean_environment(), "TERM": "xterm-256color"}
    environment = {key: value for key, value in environment.items() if key not in ("COLUMNS", "NO_COLOR")}
    words = [sys.executable, "-m", "distloop.status", str(tmp_path), *sort]
    process = subprocess.Popen(words, stdout=terminal, stderr=terminal, env=environment, cwd=REPOSITORY)
    os.close(terminal)
    output = b""
    while True:
        try:
            output += os.read(controller, 65536)
        except OSError:  # closed at the other end
            break
    os.close(controller)
    assert process.wait() == 0
    assert b"\x1b[31mfailed" in output
    lines = re.sub(r"\x1b\[[0-9;]*m", "", output.decode()).splitlines()
    assert max(map(len, lines)) <= width
    shown = "\n".join(lines)
    assert "[red]run" in shown
    assert "begin" in shown
    assert ("seed=1" in shown) == bool(sort)
    place = 1 if sort else 0
    first = next(index for index, line in enumerate(lines) if "a-run" in line)
    folded = [lines[first].split()[place]]  # where there is no room, but whole
    for line in lines[first + 1 :]:
        if not line.strip():
            break
        folded.append(line.split()[0])
    assert "".join(folded) == long_name
    assert ("Slurm job" in shown) == (width == 160)


@pytest.mark.parametrize("width", range(40, 240, 8))
def test_columns_fit_and_the_needed_ones_are_never_left_out(
    tmp_path: Path, terminal: Callable[..., list[str]], capsys: pytest.CaptureFixture[str], width: int
) -> None:
    make_run(tmp_path, "a-run-with-a-rather-long-name", "failed", reason="x" * 500, slurm_job="48211")
    assert main([str(tmp_path)]) == 0
    whole = capsys.readouterr().out.splitlines()
    lines = terminal(width, str(tmp_path))
    needed = {"run", "state", "step"} | ({"best"} if width >= 60 else set())
    assert needed <= set(lines[0].split())
    assert "40/100 40%" in lines[1]
    assert max(map(cell_len, lines)) <= width
    if width >= 130:  # the reason takes what is left
        assert lines[0].index("reason") == whole[0].index("reason")
        assert cell_len(lines[1].rstrip()) == width
    if "reason" not in lines[0]:
        assert width < 130
        assert "".join(lines[lines.index("") :]).count("x") == 500  # below the table it is whole


def test_wide_characters_have_their_room(tmp_path: Path, terminal: Callable[..., list[str]]) -> None:
    make_run(tmp_path, "漢字" * 5)
    title, line = terminal(62, str(tmp_path))
    assert line.startswith("漢字" * 5)  # 20 columns wide: another column is dropped, and the name not folded
    assert "attempt" not in title


NASTY = "[red]x\x1b[2J\r\n\u202e\udcff[bold]"
SHOWN = r"[red]x\x1b[2J\r\n\u202e\udcff[bold]"


@pytest.mark.parametrize("width", [0, 40, 80, 200])
def test_whatever_a_directory_says_is_shown_and_not_obeyed(
    tmp_path: Path, terminal: Callable[..., list[str]], capsys: pytest.CaptureFixture[str], width: int
) -> None:
    """A terminal does not do what names and texts of a run say, and a row stays a row; width 0: in a pipe."""
    run = make_run(tmp_path, NASTY, "failed", reason=NASTY, attempt=1, best={"step": 4, NASTY: 1.0})
    status = json.loads((run / "status.json").read_text())
    (run / "status.json").write_text(json.dumps({**status, "best_rule": [NASTY, "max"], "slurm_job": "\x1b[31m"}))
    (run / "failures" / "attempt_0001.json").write_text(json.dumps({"node": NASTY, "traceback": "\x1b]0;x\a\ty"}))
    with open(run / "metrics.jsonl", "w") as file:
        file.write(json.dumps({"kind": "validate", "step": 4, NASTY: 1.0}) + "\n")
    make_run(tmp_path, "漢字の名前" * 12, state="x" * 100, total_steps=10**30)

    def lines(*arguments: str) -> list[str]:
        if width:
            return terminal(width, *arguments)
        assert main(list(arguments)) == 0
        return capsys.readouterr().out.splitlines()

    for arguments in ([str(tmp_path)], [str(tmp_path), "--sort", NASTY], [str(run)]):
        shown = lines(*arguments)
        assert all(line.isprintable() for line in shown)
        if width:
            assert max(map(cell_len, shown)) <= width
            if arguments[-1] == str(tmp_path):  # what one run says leaves room for the names of others
                assert shown[0].index("state") >= 10
            assert width < 200 or SHOWN in shown[0] or arguments[-1] != NASTY
        else:
            assert SHOWN in "\n".join(shown)
    assert main([str(tmp_path), "--sort", "unknown"]) == 2
    assert SHOWN in capsys.readouterr().err


def test_neither_torch_nor_rich_is_imported_where_there_is_no_terminal(tmp_path: Path) -> None:
    validated(make_run(tmp_path, "run"), loss=[1.0])
    program = (
        "import sys; from distloop.commands.cli import main\n"
        "try: main()\nexcept SystemExit: pass\n"
        "print(sorted({'torch', 'numpy', 'accelerate', 'sklearn', 'rich'} & set(sys.modules)))"
    )
    for more in ([], ["--sort", "loss"], ["--json"]):
        done = command([sys.executable, "-c", program, "status", str(tmp_path), *more], tmp_path)
        assert done.stdout.splitlines()[-1] == "[]", done.stdout


def test_checkpoints_are_found_as_training_finds_them(tmp_path: Path) -> None:
    run = make_run(tmp_path, "run")
    for name in ("step_00000100", "step_100000000", "step_x", ".writing_step_00000200"):
        (run / "checkpoints" / name).mkdir()
    found = checkpoint.published_in(run / "checkpoints")
    assert runs.checkpoint_steps(run) == [checkpoint.step_of(path) for path in found] == [40, 100, 100000000]


def test_a_terminal_that_says_it_has_no_columns_still_gets_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "0")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    text, left_out = tables.table([tables.Column("run", ["digits"]), tables.Column("step", ["440"], align_right=True)])
    assert "digits" in text
    assert left_out == []
