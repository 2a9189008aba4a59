"""Who am I: Slurm's variables, the CPUs of a rank, and who says a mistake."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest

from distloop.errors import UsageError
from distloop.ranks import environment, talking
from distloop.ranks.attempt_base import AttemptBase
from distloop.ranks.environment import adopt_slurm, first_host, share_cpus
from distloop.ranks.roll_call import RollCall
from distloop.ranks.stopping import Watch
from tests.tools.ranks import command

NO_WATCH = cast(Watch, SimpleNamespace(attempt=AttemptBase(), wish=None))

# The third of five tasks under srun: two nodes with two tasks each, then one with one.
STEP = {
    "SLURM_JOB_ID": "4711",
    "SLURM_STEP_ID": "2",
    "SLURM_NTASKS": "64",
    "SLURM_STEP_NUM_TASKS": "5",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2),1",
    "SLURM_STEP_NODELIST": "gpu[03-04,07]",
    "SLURM_JOB_NODELIST": "gpu[01-09]",
}


# ---- Slurm -----------------------------------------------------------------------------------------------------


def test_a_task_of_srun_takes_its_rank_from_the_step() -> None:
    environ = dict(STEP)
    assert adopt_slurm(environ)
    added = {key: value for key, value in environ.items() if key not in STEP}
    assert added == {
        "RANK": "3",
        "WORLD_SIZE": "5",
        "LOCAL_RANK": "1",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "gpu03",
        "MASTER_PORT": str(10000 + (4711 * 16 + 2) % 20000),
    }


@pytest.mark.parametrize(
    "environ",
    [
        {},
        {"SLURM_NTASKS": "8", "SLURM_PROCID": "0", "SLURM_JOB_ID": "1"},  # an interactive shell in an allocation
        {**STEP, "SLURM_STEP_NUM_TASKS": "1"},
        {key: value for key, value in STEP.items() if key != "SLURM_PROCID"},
        {**STEP, "RANK": "0"},  # a launcher under srun
    ],
    ids=["no Slurm", "an allocation's shell", "one task", "no task", "another launcher"],
)
def test_anything_but_a_step_of_several_tasks_changes_nothing(environ: dict[str, str]) -> None:
    before = dict(environ)
    assert not adopt_slurm(environ)
    assert environ == before


SHELL = {**STEP, "SLURM_PROCID": "0", "SLURM_PTY_PORT": "40000", "SLURM_TASK_PID": "10"}


def leads(monkeypatch: pytest.MonkeyPatch, group: int, session: int) -> None:
    monkeypatch.setattr(os, "getpgrp", lambda: group)
    monkeypatch.setattr(os, "getsid", lambda _: session)


def test_what_is_typed_in_the_shell_of_a_step_is_no_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    leads(monkeypatch, group=20, session=10)  # a job of the shell that leads the session
    environ = dict(SHELL)
    with pytest.raises(UsageError) as refusal:
        adopt_slurm(environ)
    assert environ == SHELL
    first, *commands = str(refusal.value).splitlines()
    assert "the shell of a Slurm step of 5 tasks (srun --pty)" in first
    assert commands[0].startswith("5 processes: srun --overlap --ntasks=5 python ")
    assert commands[1].startswith("One process: SLURM_STEP_NUM_TASKS=1 python ")
    assert not adopt_slurm({**SHELL, "SLURM_STEP_NUM_TASKS": "1"})  # as the message says


@pytest.mark.parametrize(
    ("changes", "group", "session"),
    [
        ({}, 10, 10),  # srun --pty python: it leads the session itself
        ({"SLURM_PROCID": "1"}, 20, 10),  # another task of it, without a terminal
        ({"SLURM_TASK_PID": "20"}, 20, 16),  # srun in that shell: a step without a terminal, with its variable
    ],
)
def test_the_ranks_of_a_step_with_a_terminal_are_ranks(
    monkeypatch: pytest.MonkeyPatch, changes: dict[str, str], group: int, session: int
) -> None:
    leads(monkeypatch, group, session)
    environ = {**SHELL, **changes}
    assert adopt_slurm(environ)
    assert environ["RANK"] == environ["SLURM_PROCID"]


def test_an_address_and_a_port_that_were_set_are_kept() -> None:
    environ = {**STEP, "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "12345"}
    assert adopt_slurm(environ)
    assert (environ["MASTER_ADDR"], environ["MASTER_PORT"]) == ("10.0.0.1", "12345")


def test_the_port_is_the_same_for_all_tasks_and_another_for_other_steps_and_jobs() -> None:
    def port(**changes: str) -> int:
        environ = {**STEP, **changes}
        adopt_slurm(environ)
        return int(environ["MASTER_PORT"])

    assert port(SLURM_PROCID="0", SLURM_NODEID="0") == port(SLURM_PROCID="4", SLURM_NODEID="2")
    assert len({port(SLURM_STEP_ID=str(step)) for step in range(16)}) == 16
    assert port(SLURM_JOB_ID="4711") != port(SLURM_JOB_ID="4712")
    ports = [port(SLURM_JOB_ID=str(job)) for job in (0, 1, 1249, 1250, 9_999_999)]
    assert all(10000 <= number < 30000 for number in ports)


@pytest.mark.parametrize(
    ("nodelist", "host"),
    [
        ("a", "a"),
        ("a,b", "a"),
        ("gpu[03-07,11],cpu1", "gpu03"),
        ("gpu[3,11-12]", "gpu3"),
        ("n[1-2]", "n1"),
        ("n[5]", "n5"),
        ("rack1-node[001-010]-ib,x", "rack1-node001-ib"),
        ("a,n[1-2]", "a"),
        ("r[1-2]n[3-4],x", "r1n3"),
        ("node-1.cluster.org,node-2.cluster.org", "node-1.cluster.org"),
        ("n[1-2].cluster.org", "n1.cluster.org"),
        ("10.0.0.1", "10.0.0.1"),
    ],
)
def test_the_first_host_of_a_node_list(nodelist: str, host: str) -> None:
    assert first_host(nodelist) == host


@pytest.mark.parametrize("nodelist", ["", ",a", "[1-2]"])
def test_what_is_not_a_node_list_is_refused(nodelist: str) -> None:
    with pytest.raises(UsageError, match="set MASTER_ADDR"):
        first_host(nodelist)


@pytest.mark.parametrize(
    ("counts", "expected"), [("4", [4]), ("2(x3),1", [2, 2, 2, 1]), ("1,3(x2)", [1, 3, 3]), ("16(x2)", [16, 16])]
)
def test_tasks_per_node_are_expanded(counts: str, expected: list[int]) -> None:
    assert [environment._tasks_on_node(counts, node) for node in range(len(expected))] == expected
    assert environment._tasks_on_node(counts, len(expected)) == 1


def test_the_tasks_of_a_node_are_all_of_them_where_slurm_says_nothing_else() -> None:
    environ = {key: value for key, value in STEP.items() if key not in ("SLURM_STEP_TASKS_PER_NODE", "SLURM_NODEID")}
    adopt_slurm(environ)
    assert environ["LOCAL_WORLD_SIZE"] == "5"


# ---- CPUs ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("local", "cpus", "threads"), [("4", 16, "4"), ("3", 16, "5"), ("8", 4, "1"), ("1", 16, None), (None, 16, None)]
)
def test_ranks_that_share_a_machine_share_its_cpus(
    local: str | None, cpus: int, threads: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cpus)))
    environ = {"LOCAL_WORLD_SIZE": local} if local else {}
    share_cpus(environ)
    assert environ.get("OMP_NUM_THREADS") == threads


def test_a_thread_count_that_was_set_is_kept() -> None:
    environ = {"LOCAL_WORLD_SIZE": "2", "OMP_NUM_THREADS": "7"}
    share_cpus(environ)
    assert environ["OMP_NUM_THREADS"] == "7"


# ---- what one process says for all -----------------------------------------------------------------------------


def test_a_single_process_decides_for_itself() -> None:
    assert talking.from_main(lambda: 42) == 42
    with pytest.raises(UsageError, match="mine"):
        talking.from_main(lambda: (_ for _ in ()).throw(UsageError("mine")))


@pytest.mark.parametrize(("rank", "said"), [(None, True), ("0", True), ("1", False)])
def test_a_mistake_is_said_once_on_a_machine_where_ranks_cannot_talk(
    rank: str | None, said: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("RANK", raising=False)
    if rank is not None:
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("LOCAL_RANK", rank)
    assert RollCall(NO_WATCH).report_failure(UsageError("do this instead")).code == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err == ("\ndistloop: do this instead\n" if said else "")


def test_a_mistake_on_another_machine_is_said_with_its_name(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "4")
    monkeypatch.setenv("LOCAL_RANK", "0")
    RollCall(NO_WATCH).report_failure(UsageError("do this instead"))
    assert capsys.readouterr().err == f"\ndistloop: do this instead (rank 4 on {os.uname().nodename})\n"


WARNS = """
import warnings
from distloop.ranks import talking
talking.speak_clearly()
for step in range(3):
    with warnings.catch_warnings():  # after which Python's own filter would show it again
        warnings.warn("the first", UserWarning)
        warnings.warn("the second", UserWarning)
"""


@pytest.mark.parametrize(("rank", "times"), [({}, 1), ({"RANK": "0"}, 1), ({"RANK": "1"}, 0)])
def test_a_warning_is_shown_once_for_all_steps_and_ranks(tmp_path: Path, rank: dict[str, str], times: int) -> None:
    done = command([sys.executable, "-W", "always", "-c", WARNS], tmp_path, rank)
    assert done.returncode == 0, done.stdout
    assert [done.stdout.count(f"UserWarning: {text}") for text in ("the first", "the second")] == [times, times]


@pytest.mark.parametrize("code", [0, 1, 2])
def test_leaving_ends_the_process_with_the_code(tmp_path: Path, code: int) -> None:
    program = (
        f"import atexit; from distloop.ranks.leaving import leave; atexit.register(print, 'the end'); leave({code})"
    )
    done = command([sys.executable, "-c", program], tmp_path)
    assert (done.returncode, done.stdout) == (code, "the end\n")
