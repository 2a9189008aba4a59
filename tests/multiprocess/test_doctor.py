"""`distloop doctor` under every launcher: what it sees on all ranks, and what it says where something is wrong."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.lab.crashing import make_read_only, make_writable, mount_is_allowed
from tests.multiprocess.test_launch_forms import ACCELERATE, QUIET, WRONG_FORMS
from tests.tools.image_files import write_pictures
from tests.tools.ranks import (
    REPOSITORY,
    accelerate_launch,
    clean_environment,
    command,
    free_port,
    rank_environment,
    wait_until,
    write_config,
)

SCRIPT = str(REPOSITORY / "distloop" / "doctor.py")
MODULE = [sys.executable, "-m", "distloop.doctor"]
NO_GPU_FORM = "--multi_gpu without a GPU"  # two ranks; the other forms are one
CHECKS = ["launch", "versions", "code", "devices", "CPUs", "memory", "disk", "shared memory", "limits", "environment"]
CHECKS += ["run directory", "speed", "all-reduce"]


def start(
    folder: Path,
    world_size: int,
    *arguments: str,
    words: dict[int, list[str]] | None = None,
    environment: dict[int, dict[str, str]] | None = None,
    folders: dict[int, Path] | None = None,
    absent: tuple[int, ...] = (),
) -> list[subprocess.CompletedProcess[str]]:
    """doctor on ranks of this machine, some of which have words, variables or folders of their own."""
    port = free_port()

    def rank(number: int) -> subprocess.CompletedProcess[str]:
        variables = {"HF_HOME": str(folder / "none"), **rank_environment(number, world_size, port)}
        variables |= (environment or {}).get(number, {})
        own = (words or {}).get(number, MODULE)
        return command([*own, *arguments], (folders or {}).get(number, folder), variables)

    present = [number for number in range(world_size) if number not in absent]
    with ThreadPoolExecutor(len(present)) as pool:
        return list(pool.map(rank, present))


def lines_of(done: subprocess.CompletedProcess[str], verdict: str | None = None) -> dict[str, str]:
    """The lines of a table with this verdict, or all: what is checked -> what was found and advised, by --json."""
    table = json.loads(done.stdout[done.stdout.index("{") : done.stdout.rindex("}") + 1])
    lines: dict[str, str] = {}
    for line in table["lines"]:
        if verdict in (None, line["verdict"]):
            text = f"{line['found']}\n{line['advice']}"
            lines[line["check"]] = f"{lines.get(line['check'], '')}{text}\n"
    return lines


def rank_that(does: str, check: str = "matrix_product_seconds") -> list[str]:
    """The words for a rank to which this happens in the middle of a check."""
    program = (
        "import os, signal, sys, time\n"
        "from distloop.commands.doctor import main, measure\n"
        "from distloop.ranks.leaving import leave\n"
        f"measure.{check} = lambda *_: {does}\n"
        "leave(main.main())"
    )
    return [sys.executable, "-c", program]


def test_alone_it_prints_a_line_for_each_check_and_leaves_nothing(tmp_path: Path) -> None:
    (done,) = start(tmp_path, 1)
    assert done.returncode == 0, done.stdout
    table = done.stdout.splitlines()
    for check in CHECKS:
        assert any(line.startswith(("  ok    " + check, "  warn  " + check)) for line in table), done.stdout
    assert "one process: nothing to reduce" in done.stdout
    assert table[-1].startswith("distloop doctor: ")
    assert "\033" not in done.stdout  # no terminal, no colours
    assert list(tmp_path.iterdir()) == []  # neither token files nor the folder in which they were


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_by_environment_are_one_table(tmp_path: Path, world_size: int) -> None:
    runs = tmp_path / "runs"
    runs.mkdir()
    (runs / "mine").mkdir()
    ranks = start(tmp_path, world_size, "--expect-world", str(world_size), "--json")
    assert [rank.returncode for rank in ranks] == [0] * world_size, ranks[0].stdout
    said = [line for rank in ranks[1:] for line in rank.stdout.splitlines() if not line.startswith("[Gloo]")]
    assert said == []
    lines = lines_of(ranks[0])
    assert f"ranks 0-{world_size - 1} on {os.uname().nodename}" in lines["launch"]
    assert "the same on all ranks" in lines["versions"]
    assert "shared by all ranks" in lines["run directory"]
    assert f"gloo, {world_size} ranks: 4 KiB in" in lines["all-reduce"]
    assert "32 MiB in" in lines["all-reduce"]
    assert "slowest is rank" in lines["speed"]
    table = json.loads(ranks[0].stdout[ranks[0].stdout.index("{") :])
    assert (table["world_size"], len(table["ranks"])) == (world_size, world_size)
    assert table["ranks"][1]["rank"] == 1
    assert [path.name for path in runs.iterdir()] == ["mine"]


def test_accelerate_launch_from_any_folder(tmp_path: Path) -> None:
    # distloop is neither installed for the tests nor in the folder they run in.
    environment = {"ACCELERATE_USE_CPU": "true", "PYTHONPATH": "", "CUDA_VISIBLE_DEVICES": "", "HF_HOME": str(tmp_path)}
    done = command([*accelerate_launch(2, SCRIPT), "--expect-world", "2"], tmp_path, environment)
    assert done.returncode == 0, done.stdout
    assert done.stdout.count("distloop doctor: ") == 1
    assert "gloo, 2 ranks" in done.stdout
    assert "fail" not in done.stdout
    assert "ok    environment" in done.stdout  # without GPUs, an empty CUDA_VISIBLE_DEVICES hides none


@pytest.mark.parametrize(
    ("options", "settings"),
    [
        pytest.param(*form, id=name, marks=[] if name in ("--cpu --num_processes 2", NO_GPU_FORM) else pytest.mark.long)
        for name, form in WRONG_FORMS.items()
    ],
)
def test_a_launch_that_would_silently_not_be_distributed_is_explained(
    tmp_path: Path, options: list[str], settings: dict[str, object] | None
) -> None:
    file = ["--config_file", str(write_config(tmp_path, settings, "launcher"))] if settings else []
    words = [ACCELERATE, "launch", *file, *options, *QUIET, SCRIPT]
    done = command(words, tmp_path, {"CUDA_VISIBLE_DEVICES": ""})
    assert done.returncode != 0, done.stdout
    assert done.stdout.count("  fail  launch") == 1, done.stdout
    shown = " ".join(accelerate_launch(2, SCRIPT)[3:])  # the words that a test above has seen to be right
    assert f"ACCELERATE_USE_CPU=true accelerate launch {shown} …" in done.stdout
    assert "  all-reduce" in done.stdout  # the rest is checked all the same
    assert done.stdout.count("distloop doctor: fail (1 fail") == 1
    assert f'File "{SCRIPT}"' not in done.stdout


@pytest.mark.parametrize(
    ("words", "environment", "says"),
    [
        (["--expect-world", "2"], {}, "--expect-world says 2 processes, but the run has 1"),
        ([], {"SLURM_STEP_NUM_TASKS": "2"}, "srun started 2 tasks"),
        ([], {"WORLD_SIZE": "2"}, "RANK, LOCAL_RANK, MASTER_ADDR, MASTER_PORT is not set"),
        ([], {"RANK": "1", "WORLD_SIZE": "2"}, "LOCAL_RANK, MASTER_ADDR, MASTER_PORT is not set"),
    ],
)
def test_one_process_that_should_be_one_of_two_is_a_fail(
    tmp_path: Path, words: list[str], environment: dict[str, str], says: str
) -> None:
    (done,) = start(tmp_path, 1, *words, environment={0: environment})
    assert done.returncode == 1, done.stdout
    assert "  fail  launch" in done.stdout
    assert says in done.stdout
    assert "Traceback" not in done.stdout


def test_wrong_usage_ends_with_code_2_and_is_said_once(tmp_path: Path) -> None:
    for world_size in (1, 2):
        ranks = start(tmp_path, world_size, "--expect-world", "none")
        assert [rank.returncode for rank in ranks] == [2] * world_size
        assert "'none' is not a positive whole number" in ranks[0].stdout
        assert [rank.stdout for rank in ranks[1:]] == [""] * (world_size - 1)


def test_a_version_that_differs_is_a_fail_that_names_rank_and_package(tmp_path: Path) -> None:
    (tmp_path / "other" / "torchvision-0.1.2.dist-info").mkdir(parents=True)
    (tmp_path / "other" / "torchvision-0.1.2.dist-info" / "METADATA").write_text("Name: torchvision\nVersion: 0.1.2\n")
    path = {1: {"PYTHONPATH": f"{tmp_path / 'other'}:{REPOSITORY}"}}
    ranks = start(tmp_path, 3, "--json", environment=path)
    assert [rank.returncode for rank in ranks] == [1, 1, 1]
    failed = lines_of(ranks[0], "fail")
    assert list(failed) == ["versions"]
    here = os.uname().nodename
    assert "torchvision differs: " in failed["versions"]
    assert f"on ranks 0, 2 on {here}; 0.1.2 on rank 1 on {here}" in failed["versions"]


@pytest.mark.long
def test_another_copy_of_the_code_is_a_fail(tmp_path: Path) -> None:
    shutil.copytree(REPOSITORY / "distloop", tmp_path / "copy" / "distloop", ignore=shutil.ignore_patterns("*.pyc"))
    same = start(tmp_path, 2, "--json", environment={1: {"PYTHONPATH": str(tmp_path / "copy")}})
    assert "code" not in lines_of(same[0], "fail")
    with open(tmp_path / "copy" / "distloop" / "optim.py", "a") as file:
        file.write("# changed\n")
    ranks = start(tmp_path, 2, "--json", environment={1: {"PYTHONPATH": str(tmp_path / "copy")}})
    assert ranks[0].returncode == 1
    assert f"in {tmp_path / 'copy' / 'distloop'} on rank 1" in lines_of(ranks[0], "fail")["code"]


def test_a_run_directory_that_is_not_shared_is_a_fail_that_names_the_rank(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    other = {1: {"SLURMD_NODENAME": "other"}}
    limit = ["--check-seconds", "4", "--json"]
    ranks = start(tmp_path, 2, *limit, folders={1: tmp_path / "other"}, environment=other)
    assert [rank.returncode for rank in ranks] == [1, 1]
    text = lines_of(ranks[0], "fail")["run directory"]
    assert f"{tmp_path}/other/runs does not show what rank 0 wrote: rank 1 on other, after 2 s" in text
    assert f"rank 0 on {os.uname().nodename} has {tmp_path}/runs" in text
    assert [path.name for path in tmp_path.iterdir()] == ["other"]
    assert list((tmp_path / "other").iterdir()) == []


def test_a_run_directory_that_cannot_be_written_is_a_fail(tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    runs.mkdir()
    if os.geteuid() == 0 and not mount_is_allowed(runs):
        pytest.skip("root, who may write anything, and no right to mount")
    make_read_only(runs)
    try:
        (alone,) = start(tmp_path, 1, "--json")
        ranks = start(tmp_path, 2, "--json")
    finally:
        make_writable(runs)
        if os.geteuid() == 0:
            subprocess.run(["umount", "--lazy", str(runs)], check=False, capture_output=True)
    assert [rank.returncode for rank in (alone, *ranks)] == [1, 1, 1]
    for done in (alone, ranks[0]):
        text = lines_of(done, "fail")["run directory"]
        assert f"{runs} cannot be written: " in text
        assert f"rank 0 on {os.uname().nodename}" in text


def test_settings_that_are_known_to_be_bad_are_named(tmp_path: Path) -> None:
    (tmp_path / "accelerate").mkdir()
    (tmp_path / "accelerate" / "default_config.yaml").write_text(yaml.safe_dump({"num_processes": 2}))
    bad = {"CUDA_LAUNCH_BLOCKING": "1", "NCCL_DEBUG": "TRACE", "NCCL_P2P_DISABLE": "1", "NCCL_IB_DISABLE": "1"}
    bad |= {"TORCH_DISTRIBUTED_DEBUG": "DETAIL", "PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "CUDA_VISIBLE_DEVICES": ""}
    both = {**bad, "HF_HOME": str(tmp_path), "SLURM_CPUS_PER_TASK": "500"}
    ranks = start(tmp_path, 2, "--json", environment={0: both, 1: {**both, "NCCL_ALGO": "Ring"}})
    assert [rank.returncode for rank in ranks] == [0, 0], ranks[0].stdout  # warnings
    warned = lines_of(ranks[0], "warn")
    for name in bad:
        assert name in warned["environment"]
    assert f"{tmp_path}/accelerate/default_config.yaml" in warned["environment"]
    assert "NCCL_ALGO differs: unset on rank 0" in warned["environment"]
    assert "SLURM_CPUS_PER_TASK is 500" in warned["CPUs"]
    (alone,) = start(tmp_path, 1, "--json", environment={0: {**bad, "NCCL_DEBUG": "INFO", "NCCL_IB_DISABLE": "0"}})
    assert "NCCL_DEBUG" not in lines_of(alone, "warn")["environment"]
    assert "NCCL_IB_DISABLE" not in lines_of(alone, "warn")["environment"]


def test_an_interface_that_does_not_exist_is_a_fail_and_the_ranks_meet_all_the_same(tmp_path: Path) -> None:
    ranks = start(tmp_path, 2, "--json", environment={1: {"GLOO_SOCKET_IFNAME": "nothere7"}})
    assert [rank.returncode for rank in ranks] == [1, 1]
    failed = lines_of(ranks[0], "fail")
    assert list(failed) == ["environment"]
    assert "GLOO_SOCKET_IFNAME=nothere7 names no network interface of rank 1" in failed["environment"]
    assert "gloo, 2 ranks" in lines_of(ranks[0])["all-reduce"]


def test_ranks_that_do_not_come_are_named_within_the_limit(tmp_path: Path) -> None:
    # As on two machines with two ranks each, of which the second cannot reach the address.
    several = {0: {"LOCAL_WORLD_SIZE": "2"}, 1: {"LOCAL_WORLD_SIZE": "2"}}
    ranks = start(tmp_path, 4, "--join-seconds", "5", environment=several, absent=(2, 3))
    assert [rank.returncode for rank in ranks] == [1, 1]
    assert "  fail  ranks" in ranks[0].stdout
    assert "Rank 2, 3 of 4 did not come within 5 s" in ranks[0].stdout
    assert "-> MASTER_ADDR=127.0.0.1 means another machine on each node" in ranks[0].stdout
    assert "no group: not measured" in ranks[0].stdout  # what rank 0 can see alone is shown
    assert "Traceback" not in ranks[0].stdout


@pytest.mark.parametrize(
    ("does", "check", "says"),
    [
        ("os.kill(os.getpid(), signal.SIGKILL)", "matrix_product_seconds", "was the first to end, without a word"),
        pytest.param(
            "os.kill(os.getpid(), signal.SIGKILL)",
            "all_reduce_seconds",
            "was the first to end, without a word",
            marks=pytest.mark.long,
        ),
        pytest.param("1 / 0", "matrix_product_seconds", "ZeroDivisionError", marks=pytest.mark.long),
        pytest.param(
            "os.kill(os.getpid(), signal.SIGSTOP)",
            "matrix_product_seconds",
            "has not been heard of for 5 s",
            marks=pytest.mark.long,
        ),
        pytest.param(
            "time.sleep(1000)", "matrix_product_seconds", "has kept the others waiting for 5 s", marks=pytest.mark.long
        ),
    ],
    ids=["killed", "killed in a collective", "raises", "suspended", "hangs"],
)
def test_a_rank_that_dies_or_hangs_is_named_in_the_table(tmp_path: Path, does: str, check: str, says: str) -> None:
    port = free_port()
    processes = []
    for rank in range(3):
        words = rank_that(does, check) if rank == 1 else MODULE
        processes.append(
            subprocess.Popen(
                [*words, "--check-seconds", "5"],
                cwd=tmp_path,
                env={**clean_environment(), **rank_environment(rank, 3, port)},
                text=True,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
            )
        )
    try:
        others = [processes[0].communicate(timeout=90)[0], processes[2].communicate(timeout=90)[0]]
        assert [processes[0].returncode, processes[2].returncode] == [1, 1]
        (line,) = [line for line in others[0].splitlines() if line.startswith("  fail  ranks")]
        assert f"rank 1 on {os.uname().nodename}" in line
        assert says in line
        assert "  ok    versions" in others[0]  # what was found before
        assert others[0].count("distloop doctor: fail") == 1
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def test_a_signal_ends_it_and_shows_what_was_found(tmp_path: Path) -> None:
    words: Any = rank_that("(open('there', 'w').close(), time.sleep(1000))")
    with subprocess.Popen(words, cwd=tmp_path, env=clean_environment(), text=True, stdout=subprocess.PIPE) as process:
        wait_until((tmp_path / "there").exists, "the matrix product")
        begun = time.monotonic()
        process.send_signal(signal.SIGTERM)
        output = process.communicate(timeout=60)[0]
    assert process.returncode == 128 + signal.SIGTERM
    assert time.monotonic() - begun < 60
    assert "  ok    versions" in output
    assert "ended by SIGTERM" in output


def test_pictures_are_measured_with_each_decoder(tmp_path: Path) -> None:
    """A broken one is named, and fails."""
    write_pictures(tmp_path / "data", train=3, validation=1)
    (done,) = start(tmp_path, 1, "--pictures", "data", "--json")
    assert done.returncode == 0, done.stdout
    (rank,) = json.loads(done.stdout)["ranks"]
    assert set(rank["pictures"]["seconds"]) == {"pil", "torchvision"}
    assert all(0 < seconds < 10 for seconds in rank["pictures"]["seconds"].values())

    broken = tmp_path / "data" / "train" / "cat" / "00.jpg"
    broken.write_bytes(broken.read_bytes()[:200])
    (done,) = start(tmp_path, 1, "--pictures", "data")
    assert done.returncode == 1
    assert re.search("fail +pictures +rank 0 .*cat/00.jpg cannot be loaded", done.stdout), done.stdout
