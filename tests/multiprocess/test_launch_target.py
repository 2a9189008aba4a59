"""A loop of one's own: what is checked when it starts, what a run says of it, and how it ends early."""

from __future__ import annotations

import hashlib
import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from distloop import __version__
from distloop.commands.reading import read_run
from tests.tools import stage
from tests.tools.ranks import (
    REPOSITORY,
    accelerate_launch,
    clean_environment,
    command,
    free_port,
    rank_environment,
    train,
    write_config,
)
from tests.tools.records import found, rows, status

SMALL: dict[str, Any] = {
    "data": "tests.lab.points:points",
    "model": "linear",
    "task": "regression",
    "batch": {"global_size": 4},
    "train": {"steps": 20},
    "validate": {"every_steps": 4},
    "checkpoint": {"every_steps": 4},
    "log": {"every_steps": 1},
    "tracking": {"report": False},
}
PACKAGE_LOOP = (REPOSITORY / "distloop" / "train.py").read_text()


def loop_file(folder: Path, *changes: tuple[str, str], name: str = "my_train.py") -> Path:
    """A copy of the package's loop with changes, in another folder."""
    text = PACKAGE_LOOP
    for old, new in (("if not __package__:", "if False:"), *changes):
        assert text.count(old) == 1, f"{old!r} stands {text.count(old)} times in train.py"
        text = text.replace(old, new)
    (folder / name).write_text(text)
    return folder / name


def own(declared: str) -> tuple[str, str]:
    return "    start(train)\n", f"    start(train, own={declared})\n"


def stamp(version: str) -> tuple[str, str]:
    return "    prepare_process()", f"    prepare_process(copied_from={version!r})"


def start(file: Path, *arguments: str, ranks: int = 1) -> subprocess.CompletedProcess[str]:
    config = file.parent / "run.yaml"
    if not config.exists():
        write_config(file.parent, SMALL)
    words = [sys.executable, str(file)] if ranks == 1 else accelerate_launch(ranks, str(file))
    environment = {"ACCELERATE_USE_CPU": "true"} if ranks > 1 else {}
    return command([*words, "--config", str(config), *arguments], file.parent, environment)


# ---- the copy as it is written ------------------------------------------------------------------------------------

COPIED: dict[str, Any] = {
    "data": "digits",
    "model": "cnn",
    "train": {"steps": 30},
    "batch": {"global_size": 48, "micro_size": 12},
    "optim": {"ema_decay": 0.9, "clip_norm": 1.0},
    "checkpoint": {"every_steps": 8},
    "log": {"every_steps": 1},
    "tracking": {"report": False},
}


@pytest.mark.parametrize("ranks", [pytest.param(1, marks=pytest.mark.long), 2])
def test_the_untouched_copy_trains_to_the_packages_bits_through_a_stop_and_a_resume(tmp_path: Path, ranks: int) -> None:
    config = str(write_config(tmp_path, COPIED))
    train(tmp_path, ["--config", config], ranks).check()
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    done = command([sys.executable, "-m", "distloop.commands.cli", "copy", "my_train.py"], folder)
    assert done.returncode == 0, done.stdout
    stage.hold(folder, "update", count=13)
    waiting = write_config(folder, {**COPIED, "task": "tests.lab.crashing:Held"})
    words = [sys.executable, "my_train.py", "--config", str(waiting)]
    for attempt in (1, 2):
        port = free_port()
        processes = [
            subprocess.Popen(words, cwd=folder, env={**clean_environment(), **rank_environment(rank, ranks, port)})
            for rank in range(ranks)
        ]
        if attempt == 1:
            stage.arrived(folder, "update", range(ranks))
            processes[-1].send_signal(signal.SIGTERM)
            stage.let_go(folder, "update")
        assert [process.wait(60) for process in processes] == [0] * ranks
        if attempt == 1:
            assert status(folder / "runs" / "run")["state"] == "stopped"
            assert 13 <= status(folder / "runs" / "run")["step"] < 30
    one, other = tmp_path / "runs" / "run", folder / "runs" / "run"
    assert [found(row) for row in rows(one, "train")] == [found(row) for row in rows(other, "train")]
    newest = [run / "checkpoints" / "step_00000030" for run in (one, other)]
    for name in ("model.safetensors", "averaged.safetensors"):
        expected, tensors = (load_file(path / name) for path in newest)
        assert expected.keys() == tensors.keys()
        assert all(torch.equal(expected[key], tensors[key]) for key in expected), name
    assert (newest[0] / "optimizer.pt").read_bytes() == (newest[1] / "optimizer.pt").read_bytes()


# ---- before the first step -------------------------------------------------------------------------------------


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.long)])
def test_a_file_without_prepare_process_is_told_the_lines_to_add(tmp_path: Path, ranks: int) -> None:
    file = loop_file(tmp_path, ('if __name__ == "__main__":\n    prepare_process()', "if True:\n    pass"))
    outcome = start(file, ranks=ranks)
    assert outcome.returncode == (2 if ranks == 1 else 1)  # an elastic launcher turns it into 1
    assert outcome.stdout.count(f"{file} does not call prepare_process(). Before it imports torch, add") == 1
    assert 'if __name__ == "__main__":\n    prepare_process()' in outcome.stdout
    assert ranks > 1 or "Traceback" not in outcome.stdout
    assert not (tmp_path / "runs").exists()


def test_a_copy_of_another_version_runs_and_says_so_in_one_line(tmp_path: Path) -> None:
    outcome = start(loop_file(tmp_path, stamp("0.0.9")))
    assert outcome.returncode == 0, outcome.stdout
    said = [line for line in outcome.stdout.splitlines() if "0.0.9" in line]
    difference = f"is a copy of the loop of distloop 0.0.9, and this is distloop {__version__}: CHANGELOG.md says what"
    assert len(said) == 1
    assert difference in said[0]


def test_a_copy_of_this_version_says_nothing(tmp_path: Path) -> None:
    outcome = start(loop_file(tmp_path, stamp(__version__)))
    assert outcome.returncode == 0, outcome.stdout
    assert "copy of" not in outcome.stdout
    assert status(tmp_path / "runs" / "run")["reason"] == "all steps are done"


GONE = ("    set_lr,\n)", "    set_lr,\n    gone_since,\n)")


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.long)])
def test_a_name_that_is_missing_names_the_version_of_the_copy_and_where_the_change_is_described(
    tmp_path: Path, ranks: int
) -> None:
    outcome = start(loop_file(tmp_path, stamp("0.0.9"), GONE), ranks=ranks)
    assert outcome.returncode == (2 if ranks == 1 else 1)
    assert outcome.stdout.count("cannot import name 'gone_since' from 'distloop.training'") == 1
    assert "is a copy of the loop of distloop 0.0.9, and" in outcome.stdout
    assert ranks > 1 or "Traceback" not in outcome.stdout


def test_in_a_copy_of_this_version_a_missing_name_is_pythons_own_error(tmp_path: Path) -> None:
    outcome = start(loop_file(tmp_path, stamp(__version__), GONE))
    assert outcome.returncode == 1
    assert "ImportError: cannot import name 'gone_since'" in outcome.stdout


def test_a_method_that_is_missing_names_the_version_of_the_copy_as_well(tmp_path: Path) -> None:
    outcome = start(loop_file(tmp_path, stamp("0.0.9"), ("finite.begin_step()", "finite.gone_since()")))
    assert outcome.returncode == 1
    assert "my_train.py:" in outcome.stdout
    assert "object has no attribute 'gone_since'" in outcome.stdout
    failure = outcome.stdout[outcome.stdout.index("distloop: failed") :]
    assert "my_train.py is a copy of the loop of distloop 0.0.9" in failure


# ---- settings of one's own -------------------------------------------------------------------------------------


@pytest.mark.long
def test_own_settings_reach_the_loop_and_belong_to_what_the_run_trains(tmp_path: Path) -> None:
    scaled = ("            lr = learning_rate(step)\n", '            lr = learning_rate(step) * config.own["alpha"]\n')
    file = loop_file(tmp_path, own('{"alpha": 0.5, "note": "x"}'), scaled)
    assert start(file, "--own.alpha", "2").returncode == 0
    run = tmp_path / "runs" / "run"
    assert "own:\n  alpha: 2.0\n  note: x\n" in (run / "config.yaml").read_text()
    plain = start(loop_file(tmp_path, name="plain.py"), "--name", "plain")
    assert plain.returncode == 0
    pairs = zip(rows(run, "train"), rows(tmp_path / "runs" / "plain", "train"), strict=True)
    assert all(row["lr"] == 2 * other["lr"] for row, other in pairs)
    # The default is another value than the one that the run has: it trains differently.
    for arguments, line in (
        ([], "own.alpha: 2.0 there, 0.5 now"),
        (["--own.alpha", "3"], "own.alpha: 2.0 there, 3.0 now"),
    ):
        outcome = start(file, *arguments)
        assert outcome.returncode == 2
        assert line in outcome.stdout
        assert "Traceback" not in outcome.stdout
    # A key that the loop has not declared, in a resume.
    outcome = start(file, "--own.alpha", "2", "--own.alpah", "2")
    assert outcome.returncode == 2
    assert "own.alpah = 2: the loop declares no such setting. Did you mean 'alpha'?" in outcome.stdout
    # A key that the loop does not declare any more.
    outcome = start(loop_file(tmp_path, own('{"alpha": 2.0}'), scaled))
    assert outcome.returncode == 2
    assert "own.note: 'x' there, None now" in outcome.stdout
    outcome = start(loop_file(tmp_path, own('{"alpha": 2.0, "note": "x"}'), scaled))
    assert outcome.returncode == 0
    assert "is finished" in outcome.stdout


def test_an_extension_that_does_not_fit_the_checkpoint_changes_nothing(tmp_path: Path) -> None:
    parts = "        state = run.load(parts)"
    more = '        if config.own["more"]:\n            parts["more"] = build_model(config, data, task, device)\n'
    file = loop_file(tmp_path, own('{"more": False}'), (parts, more + parts))
    assert start(file).returncode == 0
    run = tmp_path / "runs" / "run"
    before = (run / "config.yaml").read_text()
    outcome = start(file, "--own.more", "true", "--train.steps", "30", "--resume", "extend")
    assert outcome.returncode == 2
    assert "does not hold more, which this loop loads" in outcome.stdout
    assert (run / "config.yaml").read_text() == before
    assert not (run / "config_changes.jsonl").exists()
    outcome = start(file)
    assert outcome.returncode == 0, outcome.stdout
    assert status(run)["state"] == "finished"


def test_the_packages_loop_has_no_settings_of_its_own(tmp_path: Path) -> None:
    words = [sys.executable, "-m", "distloop.train", "--own.alpha", "1", "--name", "x"]
    outcome = command(words, tmp_path)
    assert outcome.returncode == 2
    assert "own.alpha = 1: the loop declares no such setting. It declares none" in outcome.stdout


# ---- the source ------------------------------------------------------------------------------------------------


def test_the_source_is_recorded_and_another_one_in_a_resume_is_said_in_one_line(tmp_path: Path) -> None:
    file = loop_file(tmp_path)
    run = tmp_path / "runs" / "run"
    assert start(file, "--train.steps", "8").returncode == 0
    first = file.read_text()
    record = json.loads((run / "environment.json").read_text())
    assert record["loop_file"] == str(file)
    assert record["loop_sha256"] == hashlib.sha256(first.encode()).hexdigest()
    assert (run / "loop.py").read_text() == first
    token = "ghp_0123456789abcdefghijABCDEFGHIJ012345"
    loop_file(tmp_path, ("losses.begin_step()", f"losses.begin_step()  # changed; token = {token!r}"))
    outcome = start(file, "--train.steps", "12", "--resume", "extend")
    assert outcome.returncode == 0, outcome.stdout
    lines = [line for line in outcome.stdout.splitlines() if "another source" in line]
    kept = run / "loop_until_attempt_0001.py"
    where = kept.relative_to(tmp_path)
    assert lines == [f"the loop ({file}) has another source than in the attempt before, which is kept in {where}"]
    assert kept.read_text() == first
    assert "# changed" in (run / "loop.py").read_text()
    assert token not in (run / "loop.py").read_text()
    change = json.loads((run / "config_changes.jsonl").read_text().splitlines()[-1])
    now = hashlib.sha256(file.read_bytes()).hexdigest()
    assert change["changes"]["loop_sha256"] == [record["loop_sha256"], now]
    assert (change["after_attempt"], change["after_step"]) == (1, 8)
    outcome = start(file, "--train.steps", "16", "--resume", "extend")
    assert "another source" not in outcome.stdout


# ---- an early end ----------------------------------------------------------------------------------------------

BEST = "                metrics, stop_reason = validate(step, parts, state), run.stop_reason"
BEST += "  # train.early_stop may end it\n"
FINISH = '                if step == 12:\n                    stop_reason = run.finish("the loss is low enough")\n'
EARLY = (BEST, BEST + FINISH)
# It is killed after its last save, or in its first step, if there is a file of this name.
DIE = "def die(file):\n    import os\n    if Path(file).exists():\n        os.kill(os.getpid(), 9)\n\n\n"
KILLED = (
    ("def train(config", DIE + "def train(config"),
    ("        run.end(step", '        run.saver.finish()\n        die("at_the_end")\n        run.end(step'),
    ("            losses.begin_step()\n", '            losses.begin_step()\n            die("in_a_step")\n'),
)


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.long)])
def test_a_loop_may_end_early_as_finished(tmp_path: Path, ranks: int) -> None:
    file = loop_file(tmp_path, EARLY)
    run = tmp_path / "runs" / "run"
    outcome = start(file, ranks=ranks)
    assert outcome.returncode == 0, outcome.stdout
    assert "finished: runs/run\n  after step 12 of 20: the loss is low enough\n" in outcome.stdout
    ended = status(run)
    assert (ended["state"], ended["step"], ended["reason"]) == ("finished", 12, "the loss is low enough")
    assert [row["step"] for row in rows(run, "train")] == list(range(1, 13))
    assert max(path.name for path in (run / "checkpoints").iterdir()) == "step_00000012"
    assert (read_run(run).state, read_run(run).reason) == ("finished", "the loss is low enough")
    outcome = start(file, ranks=ranks)
    assert outcome.returncode == 0
    assert "runs/run is finished after step 12: the loss is low enough; its metrics are in" in outcome.stdout
    assert [row["step"] for row in rows(run, "train")] == list(range(1, 13))


@pytest.mark.long
def test_a_run_that_was_killed_when_it_had_finished_early_is_finished_and_trains_no_further(tmp_path: Path) -> None:
    file = loop_file(tmp_path, EARLY, *KILLED)
    run = tmp_path / "runs" / "run"
    (tmp_path / "at_the_end").touch()
    assert start(file).returncode == -9
    assert status(run)["state"] == "running"
    (tmp_path / "at_the_end").unlink()
    (tmp_path / "in_a_step").touch()
    outcome = start(file)
    assert outcome.returncode == 0, outcome.stdout
    assert "after step 12 of 20: the loss is low enough" in outcome.stdout
    assert (status(run)["state"], status(run)["step"]) == ("finished", 12)
    assert [row["step"] for row in rows(run, "train")] == list(range(1, 13))
    # Extended, the run goes on from there, also if the first such attempt is killed before it saves.
    extend = ("--train.steps", "24", "--resume", "extend")
    assert start(file, *extend).returncode == -9
    (tmp_path / "in_a_step").unlink()
    assert start(file, *extend).returncode == 0
    assert (status(run)["state"], status(run)["step"], status(run)["reason"]) == ("finished", 24, "all steps are done")
