"""What is typed in an interactive shell of a job."""

from __future__ import annotations

import os
import pty
import select
import sys
import time
from pathlib import Path

import pytest

from tests.tools.ranks import write_config
from tests.tools.slurm_cluster import Cluster

SETTINGS = {"data": "digits", "model": "linear", "train": {"steps": 3}, "device": "cpu"}
SECONDS = 90.0  # for a command that is typed


class Terminal:
    """A terminal with this command on it."""

    def __init__(self, folder: Path, environment: dict[str, str], *words: str) -> None:
        self.text, self.commands = "", 0
        self.process, self.end = pty.fork()
        if self.process == 0:
            os.chdir(folder)
            os.execvpe(words[0], words, environment)

    def read(self, word: str) -> None:
        """Read until the terminal has shown the word."""
        until = time.monotonic() + SECONDS
        while word not in self.text:
            assert time.monotonic() < until, f"{word} did not come:\n{self.text}"
            if select.select([self.end], [], [], 0.5)[0]:
                self.text += os.read(self.end, 65536).decode(errors="replace")

    def type(self, command: str) -> str:
        """What the command prints, with its exit code at the end, as "code 0"."""
        self.commands, before = self.commands + 1, len(self.text)
        # In pieces, since the terminal shows what is typed as well.
        os.write(self.end, f"{command}; echo code $? 'do''ne {self.commands}'\n".encode())
        self.read(f"done {self.commands}")
        return self.text[before:]

    def close(self) -> None:
        os.close(self.end)  # which hangs up
        os.waitpid(self.process, 0)


@pytest.mark.parametrize("tasks", ["-n2", pytest.param("-n1", marks=pytest.mark.long)])
def test_ranks_that_are_started_in_the_shell_of_a_step_train_but_the_shell_is_no_rank(
    cluster: Cluster, tmp_path: Path, tasks: str
) -> None:
    arguments = f"-m distloop.train --config {write_config(tmp_path, SETTINGS)} --tracking.no-report"
    shell = ["srun", tasks, "--pty", "bash", "--norc", "-i"]
    environment = {**cluster.environment, "TERM": "dumb"}
    terminal = Terminal(tmp_path, environment, "salloc", "-N1", "-n2", *shell)
    try:
        typed = terminal.type(f"{sys.executable} {arguments} --name typed")
        if tasks == "-n2":
            assert "This is the shell of a Slurm step of 2 tasks (srun --pty)" in typed
            assert "2 processes: srun --overlap --ntasks=2 python -m distloop.train" in typed
            assert "code 2" in typed
        else:
            assert "code 0" in typed
        ranks = terminal.type(f"srun --overlap --ntasks=2 {sys.executable} {arguments} --name ranks")
        assert "code 0" in ranks, ranks
        assert "2 processes" in ranks, ranks
    finally:
        terminal.close()
