"""What doctor thinks of what ranks have found: also where this machine cannot show it, such as with GPUs."""

from __future__ import annotations

import copy
import json
import re
import sys
from typing import Any

import pytest

from distloop.commands.doctor import checks
from distloop.commands.doctor.checks import GIB
from distloop.commands.doctor.facts import find_facts, unknown_interfaces
from distloop.commands.doctor.main import Report, advice_on_address
from distloop.commands.doctor.results import FAIL, OK, WARN, Result, judge, ranks_text, where
from distloop.commands.doctor.variables import variables
from distloop.tracking.wording import memory_size

HEALTHY: dict[str, Any] = {
    "rank": 0,
    "node": "n1",
    "host": "n1",
    "launch": "",
    "launch_warnings": [],
    "device": "cpu",
    "wants_device": "auto",
    "gpu": None,
    "versions": {"python": "3.11.7", "torch": "2.14.1", "CUDA": None},
    "driver": None,
    "code": {"folder": "/code", "digest": "abc", "commit": "1234567", "changed": False},
    "cpus": list(range(8)),
    "threads": 4,
    "slurm_cpus_per_task": None,
    "memory": 64 * GIB,
    "disks": {"run directory": {"path": "/runs", "free": 500 * GIB}, "/tmp": {"path": "/tmp", "free": 50 * GIB}},
    "shared_memory": 32 * GIB,
    "limits": {"open files": 65536, "processes": None, "locked memory": 65536},
    "rdma": False,
    "settings": {},
    "unknown_interfaces": {},
    "accelerate_config": None,
}
GPU = {"name": "H100", "free": 79 * GIB, "total": 80 * GIB, "visible": 2}


def facts(count: int, per_node: int = 2, **changes: Any) -> list[dict[str, Any]]:
    """Of healthy ranks, two a node, that share the node's CPUs; and with `changes`."""
    found = []
    for rank in range(count):
        node = f"n{rank // per_node + 1}"
        found.append({**copy.deepcopy(HEALTHY), "rank": rank, "node": node, "host": node, **copy.deepcopy(changes)})
    return found


def on_gpus(count: int) -> list[dict[str, Any]]:
    found = facts(count, device="cuda", gpu=GPU, driver="580.1")
    for rank, fact in enumerate(found):
        fact["gpu"]["uuid"] = f"GPU-{rank}"
    return found


def line_of(lines: list[Result], verdict: str) -> Result:
    (line,) = [line for line in lines if line.verdict == verdict]
    assert line.verdict == OK or line.advice
    return line


def test_healthy_ranks_are_ok_on_every_line() -> None:
    for found in (facts(1), facts(4), on_gpus(4)):
        lines = judge(checks.CHECKS, found)
        assert {line.verdict for line in lines} == {OK}, lines
        assert len({line.check for line in lines}) == 10
    assert checks.code(facts(1))[0].found == "commit 1234567, files abc in /code"


def test_what_a_rank_finds_is_plain_json_with_all_that_the_checks_read() -> None:
    found = find_facts({"NCCL_ALGO": "Ring", "AWS_SECRET_ACCESS_KEY": "x"}, "runs", "auto", None)
    assert set(found) == set(HEALTHY)
    assert json.loads(json.dumps(found)) == found
    assert found["settings"] == {"NCCL_ALGO": "Ring"}  # no secrets
    judge(checks.CHECKS, [found])


def test_ranks_are_named_in_spans_and_with_their_nodes() -> None:
    assert ranks_text([3]) == "rank 3"
    assert ranks_text([5, 0, 1, 2]) == "ranks 0-2, 5"
    assert where(facts(4)[1:3]) == "ranks 1-2 on n1, n2"
    assert where(facts(12)) == "ranks 0-11 on n1, n2, n3, n4 and 2 more"


@pytest.mark.parametrize(
    ("size", "text"), [(512, "512 bytes"), (4096, "4 KiB"), (1.5 * GIB, "1.5 GiB"), (2**42, "4.0 TiB")]
)
def test_sizes_are_shown_as_people_read_them(size: float, text: str) -> None:
    assert memory_size(size) == text


def test_a_driver_that_differs_is_a_warning_a_version_that_differs_a_fail() -> None:
    found = on_gpus(4)
    found[3]["driver"] = "535.2"
    assert "580.1 on ranks 0-2 on n1, n2; 535.2 on rank 3 on n2" in line_of(checks.versions(found), WARN).found
    found[2]["versions"]["torch"] = None
    assert (
        "torch differs: 2.14.1 on ranks 0-1, 3 on n1, n2; None on rank 2" in line_of(checks.versions(found), FAIL).found
    )


def test_two_ranks_on_one_gpu_are_a_fail_and_the_same_number_on_two_nodes_is_not() -> None:
    found = on_gpus(4)
    found[3]["gpu"]["uuid"] = found[2]["gpu"]["uuid"]
    assert "ranks 2-3 on n2 are on one GPU (GPU-2)" in line_of(checks.devices(found), FAIL).found
    found[3]["gpu"]["uuid"] = found[0]["gpu"]["uuid"]
    assert checks.devices(found)[0].verdict == OK


def test_ranks_without_a_gpu_are_a_fail_where_others_have_one_or_it_was_asked_for() -> None:
    found = on_gpus(4)
    found[2] |= {"gpu": None, "device": "cpu"}
    assert line_of(checks.devices(found), FAIL).found == "no GPU for rank 2 on n2"
    assert line_of(checks.devices(facts(2, wants_device="cuda")), FAIL).found == "no GPU for ranks 0-1 on n1"


def test_a_driver_without_a_gpu_that_torch_sees_is_a_warning() -> None:
    assert "sees no GPU" in line_of(checks.devices(facts(1, driver="580.1")), WARN).found
    assert checks.devices(facts(1, driver="580.1", wants_device="cpu"))[0].verdict == OK


@pytest.mark.parametrize(
    ("value", "says"),
    [("", "is set and empty for ranks 0-1 on n1"), ("-1", "is -1 for"), ("NoDevFiles", "is NoDevFiles for")],
)
def test_a_variable_that_hides_all_gpus_is_a_warning_unless_the_cpu_was_asked_for(value: str, says: str) -> None:
    hidden: dict[str, Any] = {"settings": {"CUDA_VISIBLE_DEVICES": value}}
    assert f"CUDA_VISIBLE_DEVICES {says}" in line_of(variables(facts(2, **hidden)), WARN).found
    assert variables(facts(2, wants_device="cpu", **hidden))[0].verdict == OK
    for shown in ("0", "1,0", "GPU-8932f937"):
        assert variables(facts(2, settings={"CUDA_VISIBLE_DEVICES": shown}))[0].verdict == OK


def test_gpus_that_are_other_used_or_idle_are_warnings() -> None:
    found = on_gpus(4)
    found[1]["gpu"] |= {"name": "A100", "free": 20 * GIB}
    found[3]["gpu"]["visible"] = 8
    lines = checks.devices(found)
    assert [line.verdict for line in lines] == [WARN] * 3
    assert "H100 on ranks 0, 2-3 on n1, n2; A100 on rank 1 on n1" in lines[0].found
    assert "8 GPUs are shown to 2 ranks: n2" in lines[1].found
    assert "in use by others for rank 1 on n1: 20 GiB free" in lines[2].found


@pytest.mark.parametrize(
    ("changes", "found", "advice"),
    [
        ({"threads": 8}, "2 ranks with 16 threads on 8 CPUs: n1, n2", "OMP_NUM_THREADS=4"),
        ({"threads": 1}, "2 ranks with 2 threads on 8 CPUs: n1, n2", "OMP_NUM_THREADS=4"),
        ({"threads": 1, "cpus": [0]}, "2 ranks with 2 threads on 1 CPUs: n1, n2", "--cpus-per-task"),
        ({"slurm_cpus_per_task": "16"}, "SLURM_CPUS_PER_TASK is 16, but ranks 0-3", "SRUN_CPUS_PER_TASK"),
    ],
)
def test_threads_that_do_not_fit_the_cpus_are_a_warning(changes: dict[str, Any], found: str, advice: str) -> None:
    line = line_of(checks.cpus(facts(4, **changes)), WARN)
    assert found in line.found
    assert advice in line.advice


def test_ranks_that_are_bound_to_cpus_of_their_own_count_them_all() -> None:
    bound = facts(2, threads=4)
    bound[0]["cpus"], bound[1]["cpus"] = [0, 1, 2, 3], [4, 5, 6, 7]
    assert checks.cpus(bound)[0].verdict == OK


@pytest.mark.parametrize(
    ("check", "changes", "says"),
    [
        (checks.memory, {"memory": GIB}, "1 GiB left on n2"),
        (checks.shared_memory, {"shared_memory": 64 * 2**20}, "64 MiB free in /dev/shm of n2"),
        (
            checks.disks,
            {"disks": {**HEALTHY["disks"], "/tmp": {"path": "/tmp", "free": 2**20}}},
            "1 MiB free in /tmp of n2",
        ),
        (checks.limits, {"limits": {**HEALTHY["limits"], "open files": 1024}}, "open files 1024 for rank 3 on n2"),
        (checks.limits, {"rdma": True}, "locked memory 64 KiB for rank 3 on n2"),
    ],
)
def test_what_is_short_on_one_node_is_a_warning_that_names_it(check: Any, changes: dict[str, Any], says: str) -> None:
    found = facts(4)
    found[3] |= changes
    if "memory" in changes:
        found[2] |= changes  # of the node
    line = line_of([line for line in check(found) if line.verdict != OK], WARN)
    assert line.found.startswith(says)


def test_interfaces_are_looked_up_as_gloo_and_nccl_do() -> None:
    there = ["lo", "eth0", "ib0"]
    for value in ("eth0", "eth", "ib,eth", "=eth0", "^docker0", ""):
        assert unknown_interfaces({"NCCL_SOCKET_IFNAME": value}, there) == {}
    assert unknown_interfaces({"NCCL_SOCKET_IFNAME": "=eth"}, there) == {"NCCL_SOCKET_IFNAME": "=eth"}
    assert unknown_interfaces({"NCCL_SOCKET_IFNAME": "ens"}, there) == {"NCCL_SOCKET_IFNAME": "ens"}
    assert unknown_interfaces({"GLOO_SOCKET_IFNAME": "eth0"}, there) == {}
    assert unknown_interfaces({"GLOO_SOCKET_IFNAME": "eth"}, there) == {"GLOO_SOCKET_IFNAME": "eth"}


def test_an_address_that_is_another_machine_on_each_node_is_pointed_out() -> None:
    variables = {"MASTER_ADDR": "127.0.0.1", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2"}
    assert "MASTER_ADDR=127.0.0.1" in advice_on_address(variables)
    assert advice_on_address({**variables, "MASTER_ADDR": "n1"}) == ""
    assert advice_on_address({**variables, "LOCAL_WORLD_SIZE": "4"}) == ""


def measured(found: list[dict[str, Any]], key: str, values: list[Any], device: str = "cpu") -> list[dict[str, Any]]:
    """Ranks that have measured these values."""
    return [{**fact, "measured_on": device, key: value} for fact, value in zip(found, values, strict=True)]


def test_the_slowest_rank_is_named_with_its_node() -> None:
    def speed(*seconds: float) -> list[Result]:
        return checks.speed(measured(facts(len(seconds)), "product_seconds", list(seconds)))

    assert speed(1.0, 1.1, 1.0, 1.2)[0].verdict == OK
    assert "slowest is rank 3 on n2, 2.00 times the median" in line_of(speed(1.0, 1.0, 1.0, 2.0), WARN).found
    assert "slowest is rank 1 on n1, 2.00" in line_of(speed(1.0, 2.0), WARN).found


def test_the_time_of_an_all_reduce_is_that_of_the_slowest_rank() -> None:
    answers = [
        {"seconds": {4096: 1e-4, 2**20: 1e-3}, "is_right": True},
        {"seconds": {4096: 2e-4, 2**20: 2e-3}, "is_right": True},
    ]
    line = checks.all_reduce(measured(facts(2), "all_reduce", answers))[0]
    assert line.found == "gloo, 2 ranks: 4 KiB in 200 µs; 1 MiB in 2 ms, 0.52 GB/s"
    assert line.verdict == OK
    on_cuda = checks.all_reduce(measured(on_gpus(2), "all_reduce", answers, "cuda"))
    assert line_of(on_cuda, WARN).found.startswith("NCCL, 2 ranks")
    answers[1]["is_right"] = False
    wrong = checks.all_reduce(measured(facts(2), "all_reduce", answers))
    assert line_of(wrong, FAIL).found == "the sum is wrong on rank 1 on n1"


def test_a_file_that_rank_0_does_not_see_is_a_fail() -> None:
    answers = [{"path": "/runs", "problem": "", "seconds": 0.1} for _ in range(4)]
    assert "within 100 ms" in checks.runs_dir(measured(facts(4), "runs_dir", answers))[0].found
    answers[2] |= {"problem": "is written to, but rank 0 does not see it", "seconds": 30.0}
    line = line_of(checks.runs_dir(measured(facts(4), "runs_dir", answers)), FAIL)
    assert line.found == "/runs is written to, but rank 0 does not see it: rank 2 on n2, after 30 s"


def test_the_table_is_shown_once_and_ends_with_the_sum(capsys: pytest.CaptureFixture[str]) -> None:
    report = Report(as_json=False)
    report.results = [
        Result(OK, "a", "fine"),
        Result(WARN, "longer", "so so", "do this\nor that"),
        Result(FAIL, "b", "bad", "x"),
    ]
    report.show()
    report.show()
    assert capsys.readouterr().out == (
        "  ok    a       fine\n"
        "  warn  longer  so so\n"
        "                -> do this\n"
        "                   or that\n"
        "  fail  b       bad\n"
        "                -> x\n"
        "distloop doctor: fail (1 fail, 1 warn, 1 ok)\n"
    )


@pytest.mark.parametrize("width", [40, 80, 160])
def test_on_a_terminal_the_table_fits_and_nothing_is_cut(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, width: int
) -> None:
    for variable, value in (("COLUMNS", str(width)), ("TERM", "xterm-256color"), ("NO_COLOR", "")):
        monkeypatch.setenv(variable, value)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    found = [f"word{number}" for number in range(60)]
    report = Report(as_json=False)
    report.results = [
        Result(OK, "shared memory", " ".join(found)),
        Result(FAIL, "b", "[red]\x1b[2J", f"{'x' * 200} last"),
        Result(WARN, "launch", "wrong", "right:\npython -m distloop.train " + "--word " * 40),
    ]
    report.show()
    output = capsys.readouterr().out
    assert "\x1b[32mok" in output
    assert "\x1b[31mfail" in output
    lines = re.sub(r"\x1b\[[0-9;]*m", "", output).splitlines()
    (command,) = [line for line in lines if line.endswith(" python -m distloop.train " + "--word " * 40)]
    lines.remove(command)  # whole on a line, to be copied
    assert lines.pop() == "distloop doctor: fail (1 fail, 1 warn, 1 ok)"
    assert max(map(len, lines)) <= width
    words = " ".join(lines).split()
    assert [word for word in words if word.startswith("word")] == found
    assert r"[red]\x1b[2J" in words
    assert "".join(lines).count("x") == 200 + 1
    assert words.index("last") > words.index("->")


@pytest.mark.parametrize(
    ("torchvision", "choice"),
    [(0.002, "take --data.args.decoder torchvision: 2,000 a second"), (0.0039, "take the default decoder, pil: 1,000")],
)
def test_pictures_name_the_decoder_that_is_faster_by_a_tenth(torchvision: float, choice: str) -> None:
    """Eight CPUs for two ranks: four of them load a rank's pictures. The slowest rank counts."""
    found = facts(4, pictures={"seconds": {"pil": 0.001, "torchvision": 0.001}, "problem": ""})
    found[2]["pictures"] = {"seconds": {"pil": 0.004, "torchvision": torchvision}, "problem": ""}
    (result,) = checks.pictures(found)
    assert result.verdict == OK
    assert choice in result.found
    assert "4 ms with pil" in result.found
    assert "rank 2 on n2" in result.found


def test_a_picture_that_cannot_be_loaded_fails_with_its_rank() -> None:
    found = facts(2, pictures={"seconds": {"pil": 0.001, "torchvision": 0.001}, "problem": ""})
    found[1]["pictures"] = {"seconds": {}, "problem": "/data/train/a/1.jpg cannot be loaded: OSError: truncated"}
    (result,) = checks.pictures(found)
    assert result.verdict == FAIL
    assert "rank 1 on n1: /data/train/a/1.jpg" in result.found
