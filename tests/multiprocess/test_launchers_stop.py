"""Stopping by way of what started the run: Accelerate's launcher, launch/*.sh, a shell that goes away, a terminal."""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from distloop.run.checkpoint import published_in, step_of, verify
from tests.tools import stage
from tests.tools.launching import machines, script
from tests.tools.ranks import accelerate_launch, clean_environment, wait_until
from tests.tools.records import rows, run_of, status
from tests.tools.stopping import NOTICE, check_nothing_runs, processes_of, reached, waiting_run

TRAIN = [sys.executable, "-m", "distloop.train"]
CPU = {"CUDA_VISIBLE_DEVICES": "", "ACCELERATE_USE_CPU": "true"}
GONE = "its launcher is gone"
# (processes, signal to the launcher) -> why the run says that it stopped. An elastic launcher, of several
# processes, passes some signals on; the plain one is ended by them, as both are by those they do not know.
LAUNCHERS = {
    (1, "SIGTERM"): GONE,
    (1, "SIGINT"): GONE,
    (1, "SIGHUP"): GONE,
    (1, "SIGUSR1"): GONE,
    (1, "SIGKILL"): GONE,
    (2, "SIGTERM"): "SIGTERM",
    (2, "SIGINT"): "SIGINT",
    (2, "SIGHUP"): "SIGHUP",
    (2, "SIGUSR1"): GONE,
    (2, "SIGKILL"): GONE,
}
COVERING = {(1, "SIGTERM"), (2, "SIGINT"), (2, "SIGHUP"), (2, "SIGKILL")}

Start = Callable[..., subprocess.Popen]


@pytest.fixture
def marker(tmp_path: Path) -> Iterator[str]:
    """Stands in the environment of all that a test starts; what is left at its end is killed."""
    text = uuid.uuid4().hex
    yield text
    for pid in processes_of(tmp_path, text):
        os.kill(pid, signal.SIGKILL)


@pytest.fixture
def start(tmp_path: Path, marker: str) -> Start:
    """Start a command in the test's folder, with its output in a file there."""

    def start(words: list[str], file: str = "output") -> subprocess.Popen:
        environment = {**clean_environment(), **CPU, "DISTLOOP_TEST": marker}
        with open(tmp_path / file, "w") as output:
            return subprocess.Popen(words, cwd=tmp_path, env=environment, stdout=output, stderr=output)

    return start


def endless(folder: Path) -> list[str]:
    return [*waiting_run(folder), "--train.steps", "100000", "--data.workers", "2"]


def check_saved(folder: Path, reason: str, file: str = "output") -> int:
    """The run is stopped for this reason and its last step is saved; returns which."""
    run = run_of(folder)
    assert (status(run)["state"], status(run)["reason"]) == ("stopped", reason), (folder / file).read_text()
    newest = published_in(run / "checkpoints")[-1]
    verify(newest)
    assert step_of(newest) == status(run)["step"] == rows(run, "train")[-1]["step"]
    return step_of(newest)


@pytest.mark.parametrize(
    ("processes", "name"),
    [pytest.param(*case, marks=() if case in COVERING else pytest.mark.long) for case in LAUNCHERS],
)
def test_a_run_is_saved_and_gone_when_its_launcher_is_stopped_or_killed(
    tmp_path: Path, start: Start, marker: str, processes: int, name: str
) -> None:
    launcher = start([*accelerate_launch(processes), *endless(tmp_path)])
    reached(tmp_path, 4)
    assert len(processes_of(tmp_path, marker)) >= 1 + processes * 3, "launcher, trainers and their loader workers"
    launcher.send_signal(signal.Signals[name])
    check_nothing_runs_but_the_dead(tmp_path, marker, launcher)
    check_saved(tmp_path, LAUNCHERS[processes, name])
    assert (tmp_path / "output").read_text().count(NOTICE) == 1


def check_nothing_runs_but_the_dead(folder: Path, marker: str, launcher: subprocess.Popen) -> None:
    check_nothing_runs(folder, marker)
    launcher.wait(1)


@pytest.mark.long
def test_a_trainer_that_hangs_does_not_outlive_its_launcher(tmp_path: Path, start: Start, marker: str) -> None:
    launcher = start([*accelerate_launch(1), *endless(tmp_path)])
    reached(tmp_path, 4)
    stage.hold(tmp_path, "step", in_c=True)
    stage.arrived(tmp_path, "step")
    launcher.kill()
    check_nothing_runs_but_the_dead(tmp_path, marker, launcher)
    run = run_of(tmp_path)
    verify(published_in(run / "checkpoints")[-1])
    assert "ended without saving" in (tmp_path / "output").read_text()


def test_a_trainer_whose_launcher_died_before_it_could_look_does_not_run_on(
    tmp_path: Path, start: Start, marker: str
) -> None:
    # The launcher's variables, and a parent that is gone before Python has started.
    words = ["env", "TORCHELASTIC_RUN_ID=none", "ACCELERATE_MIXED_PRECISION=no", "ACCELERATE_DYNAMO_BACKEND=no"]
    script = 'while kill -0 $PPID_OF_SHELL 2>/dev/null; do :; done; exec "$@"'
    inner = ["bash", "-c", script, "bash", *words, *TRAIN, *endless(tmp_path)]
    shell = start(["bash", "-c", 'PPID_OF_SHELL=$$ "$@" & exit', "bash", *inner])
    shell.wait(10)
    wait_until(lambda: (tmp_path / "runs").exists() or NOTICE in (tmp_path / "output").read_text(), "the trainer")
    check_nothing_runs(tmp_path, marker, seconds=20)  # it had to be imported first


@pytest.mark.parametrize("how", ["nohup", pytest.param("setsid", marks=pytest.mark.long)])
def test_a_trainer_started_from_a_shell_goes_on_when_the_shell_is_killed(
    tmp_path: Path, start: Start, marker: str, how: str
) -> None:
    arguments = [*waiting_run(tmp_path), "--train.steps", "200"]  # two seconds: several looks at the parent
    shell = start(["bash", "-c", f'{how} "$@" & sleep 1000', "bash", *TRAIN, *arguments])
    reached(tmp_path, 4)
    shell.kill()
    shell.wait()
    wait_until(lambda: status(run_of(tmp_path))["state"] != "running", "the end")
    assert status(run_of(tmp_path))["state"] == "finished"
    assert status(run_of(tmp_path))["step"] == 200
    assert NOTICE not in (tmp_path / "output").read_text()


# ---- launch/*.sh ---------------------------------------------------------------------------------------------

# script -> its words on each machine, and why the run says that it stopped where that is not the signal's name:
# one process has a launcher that hands nothing on, and 8 seconds after its end.
SCRIPTS: dict[str, tuple[Callable[[], list[list[str]]], str | None]] = {
    "debug.sh": (lambda: [script("debug.sh")], GONE),
    "single_node.sh, one rank": (lambda: [script("single_node.sh", PROCESSES=1)], None),
    "single_node.sh, two ranks": (lambda: [script("single_node.sh", PROCESSES=2)], None),
    "multi_node.sh": (lambda: machines(1), None),
}
SIGNALLED_MACHINE = {"SIGTERM": 1, "SIGINT": 0, "SIGHUP": 1, "SIGUSR1": 1, "SIGUSR2": 0}  # of several, one
COVERING_SCRIPTS = {("debug.sh", "SIGTERM"), ("multi_node.sh", "SIGUSR1")}


@pytest.mark.parametrize(
    ("name", "signal_name"),
    [
        pytest.param(name, number, marks=() if (name, number) in COVERING_SCRIPTS else pytest.mark.long)
        for name in SCRIPTS
        for number in SIGNALLED_MACHINE
    ],
)
def test_a_signal_to_one_script_saves_the_run_and_ends_it_on_all_machines(
    tmp_path: Path, start: Start, marker: str, name: str, signal_name: str
) -> None:
    commands, reason = SCRIPTS[name]
    arguments = [*endless(tmp_path), "--runs-dir", "runs"]  # debug.sh would take a temporary one
    started = [start([*words, *arguments], f"output-{machine}") for machine, words in enumerate(commands())]
    reached(tmp_path, 4)
    number = SIGNALLED_MACHINE[signal_name] % len(started)
    started[number].send_signal(signal.Signals[signal_name])
    # Nor launchers of other machines, which would wait for the one that ended, for five minutes.
    check_nothing_runs(tmp_path, marker, seconds=60)
    check_saved(tmp_path, reason or signal_name, "output-0")
    assert (tmp_path / f"output-{number}").read_text().count(NOTICE) == 1


@pytest.mark.parametrize(
    ("words", "launched"),
    [
        (TRAIN, "python"),
        pytest.param(script("single_node.sh", PROCESSES=2), "single_node.sh", marks=pytest.mark.long),
        pytest.param(script("single_node.sh", PROCESSES=1), "single_node.sh, one rank", marks=pytest.mark.long),
        pytest.param(accelerate_launch(1), "accelerate launch", marks=pytest.mark.long),
    ],
)
def test_nohup_keeps_a_hangup_from_the_run(
    tmp_path: Path, start: Start, marker: str, words: list[str], launched: str
) -> None:
    arguments = [*waiting_run(tmp_path), "--train.steps", "300", "--runs-dir", "runs"]
    started = start(["setsid", "nohup", *words, *arguments])
    reached(tmp_path, 4)
    for pid in processes_of(tmp_path, marker):  # a terminal that is closed reaches its session, a closed ssh all of it
        os.kill(pid, signal.SIGHUP)
    wait_until(lambda: status(run_of(tmp_path))["state"] != "running", f"the end under {launched}")
    assert (status(run_of(tmp_path))["state"], status(run_of(tmp_path))["step"]) == ("finished", 300)
    assert NOTICE not in (tmp_path / "output").read_text()
    started.wait(60)


def test_a_script_that_is_ended_while_it_waits_for_other_machines_leaves_nothing_behind(
    tmp_path: Path, start: Start, marker: str
) -> None:
    waiting = start([*machines(1)[0], *endless(tmp_path)])
    wait_until(lambda: "waiting for the others" in (tmp_path / "output").read_text(), "the wait for machine 1")
    waiting.terminate()
    check_nothing_runs_but_the_dead(tmp_path, marker, waiting)


# ---- in a terminal -------------------------------------------------------------------------------------------

needs_tmux = pytest.mark.skipif(shutil.which("tmux") is None, reason="tmux is not installed")


class Terminal:
    """A terminal of tmux with a shell in `folder`."""

    def __init__(self, folder: Path, marker: str) -> None:
        self.socket = str(folder / "tmux")
        (folder / "bashrc").write_text("PS1='ready> '\n")
        environment = {**clean_environment(), **CPU, "DISTLOOP_TEST": marker, "TERM": "screen"}
        words = ["tmux", "-S", self.socket, "-f", "/dev/null", "new-session", "-d", "-x", "250", "-y", "50"]
        subprocess.run([*words, "bash --rcfile bashrc"], cwd=folder, env=environment, check=True)
        wait_until(lambda: "ready>" in self.screen(), "the shell")

    def _tmux(self, *words: str) -> str:
        return subprocess.run(["tmux", "-S", self.socket, *words], check=True, stdout=subprocess.PIPE, text=True).stdout

    def screen(self) -> str:
        """What has been shown, with what has scrolled away."""
        return self._tmux("capture-pane", "-p", "-J", "-S", "-")

    def type(self, text: str) -> None:
        self._tmux("send-keys", "-l", text)
        self._tmux("send-keys", "Enter")

    def interrupt(self) -> None:
        self._tmux("send-keys", "C-c")

    def shows(self, text: str) -> None:
        wait_until(lambda: text in self.screen(), f"{text!r} on the screen")

    def prompt_is_back(self) -> None:
        wait_until(lambda: self.screen().rstrip().endswith("ready>"), "the prompt")

    def kill(self) -> None:
        """kill -9 the server, with all of its terminals."""
        os.kill(int(self._tmux("display-message", "-p", "#{pid}")), signal.SIGKILL)


@pytest.fixture
def terminal(tmp_path: Path, marker: str) -> Terminal:
    return Terminal(tmp_path, marker)  # the marker's fixture kills it


@needs_tmux
@pytest.mark.parametrize(
    "words",
    [
        TRAIN,
        pytest.param(accelerate_launch(1), marks=pytest.mark.long),
        pytest.param(accelerate_launch(2), marks=pytest.mark.long),
        pytest.param(script("debug.sh"), marks=pytest.mark.long),
        pytest.param(script("single_node.sh", PROCESSES=2), marks=pytest.mark.long),
    ],
    ids=["python", "accelerate launch", "accelerate launch, two processes", "debug.sh", "single_node.sh, two ranks"],
)
def test_ctrl_c_in_a_terminal_saves_and_the_same_command_says_where_it_goes_on(
    tmp_path: Path, terminal: Terminal, words: list[str]
) -> None:
    command = shlex.join([*words, *waiting_run(tmp_path), "--train.steps", "250", "--runs-dir", "runs"])
    terminal.type(command)
    reached(tmp_path, 4)
    terminal.interrupt()
    terminal.shows(NOTICE)
    terminal.shows("(Ctrl-C again: end at once)")
    terminal.shows("stopped after step")
    terminal.prompt_is_back()
    step = check_saved_in_terminal(tmp_path, terminal.screen())
    if words == TRAIN:
        terminal.type("echo code=$?")
        terminal.shows("code=0")
    terminal.type(command)
    terminal.shows(f"continuing after step {step} of 250")
    terminal.shows("finished: ")
    terminal.prompt_is_back()
    assert [row["step"] for row in rows(run_of(tmp_path), "train")] == list(range(1, 251))


def check_saved_in_terminal(folder: Path, screen: str) -> int:
    reason = status(run_of(folder))["reason"]
    assert reason in ("SIGINT", GONE), screen  # a launcher is interrupted as well, and may be gone first
    assert status(run_of(folder))["state"] == "stopped", screen
    newest = published_in(run_of(folder) / "checkpoints")[-1]
    verify(newest)
    assert step_of(newest) == status(run_of(folder))["step"]
    assert f"stopped after step {step_of(newest)} of 250 ({reason}), saved in" in screen
    return step_of(newest)


@needs_tmux
@pytest.mark.parametrize(
    "words",
    [TRAIN, pytest.param(script("single_node.sh", PROCESSES=2), marks=pytest.mark.long)],
    ids=["python", "script"],
)
def test_a_run_whose_terminal_is_closed_is_saved(
    tmp_path: Path, terminal: Terminal, marker: str, words: list[str]
) -> None:
    terminal.type(shlex.join([*words, *waiting_run(tmp_path), "--train.steps", "100000", "--runs-dir", "runs"]))
    reached(tmp_path, 4)
    terminal.kill()
    check_nothing_runs(tmp_path, marker, seconds=30)
    run = run_of(tmp_path)
    assert (status(run)["state"], status(run)["reason"]) == ("stopped", "SIGHUP")
    verify(published_in(run / "checkpoints")[-1])
    assert step_of(published_in(run / "checkpoints")[-1]) == status(run)["step"]


@needs_tmux
@pytest.mark.long
def test_a_trainer_under_nohup_goes_on_when_its_terminal_is_killed(tmp_path: Path, terminal: Terminal) -> None:
    arguments = [*waiting_run(tmp_path), "--train.steps", "200"]
    terminal.type(" ".join(["nohup", *TRAIN, *arguments, "> output 2>&1 &"]))
    reached(tmp_path, 4)
    terminal.kill()
    wait_until(lambda: status(run_of(tmp_path))["state"] != "running", "the end")
    assert status(run_of(tmp_path))["state"] == "finished"
    assert NOTICE not in (tmp_path / "output").read_text()
