"""Addresses of several machines: IPv6, own names that are loopback addresses, interfaces."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.tools.launching import at_once, machines
from tests.tools.ranks import clean_environment, free_port, train
from tests.tools.records import rows, run_of, status
from tests.tools.stopping import waiting_run

pytestmark = pytest.mark.usefixtures("nothing_is_left")
needs_ipv6 = pytest.mark.skipif(not socket.has_dualstack_ipv6(), reason="no IPv6 here")


def short_run(folder: Path) -> list[str]:
    return [*waiting_run(folder), "--train.steps", "3", "--data.workers", "0", "--runs-dir", "runs"]


@needs_ipv6
@pytest.mark.parametrize("address", ["::1", "[::1]"])
def test_ranks_meet_at_an_ipv6_address(tmp_path: Path, address: str) -> None:
    train(tmp_path, short_run(tmp_path), 2, {"MASTER_ADDR": address}).check()
    assert [row["step"] for row in rows(run_of(tmp_path), "train")] == [1, 2, 3]


@needs_ipv6
@pytest.mark.parametrize("address", ["::1", pytest.param("[::1]", marks=pytest.mark.long)])
def test_the_script_takes_an_ipv6_address(tmp_path: Path, address: str) -> None:
    commands = [[*words, *short_run(tmp_path)] for words in machines(1, MASTER_ADDR=address)]
    for done in at_once(commands, tmp_path):
        assert done.returncode == 0, done.stdout
        assert "waiting for the others at [::1]:" in done.stdout
    assert status(run_of(tmp_path))["state"] == "finished"


@pytest.fixture
def two_machines() -> Iterator[list[str]]:
    """Two network namespaces with a cable between them: each has a loopback address and those of the cable."""
    names = [f"m{number}{uuid.uuid4().hex[:6]}" for number in range(2)]
    ends = [f"v{name[1:]}" for name in names]  # at most 15 characters
    commands = [f"ip netns add {name}" for name in names]
    commands += [f"ip link add {ends[0]} netns {names[0]} type veth peer name {ends[1]} netns {names[1]}"]
    for number, (name, end) in enumerate(zip(names, ends, strict=True)):
        commands += [f"ip -n {name} addr add 10.9.0.1{number}/24 dev {end}"]
        commands += [f"ip -n {name} addr add fd00:9::1{number}/64 dev {end} nodad"]
        commands += [f"ip -n {name} link set {link} up" for link in (end, "lo")]
    try:
        for command in commands:
            try:
                subprocess.run(command.split(), check=True, capture_output=True)
            except (OSError, subprocess.CalledProcessError) as error:
                pytest.skip(f"no network namespaces here: {error}")
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)


@pytest.mark.skipif(os.getuid() != 0, reason="network namespaces need root")
@pytest.mark.parametrize("head", ["10.9.0.10", "fd00:9::10"])
def test_machines_whose_own_name_is_a_loopback_address_train_together(
    tmp_path: Path, two_machines: list[str], head: str
) -> None:
    name = os.uname().nodename
    own = {found[4][0] for found in socket.getaddrinfo(name, None)}
    if not own <= {"127.0.0.1", "127.0.1.1", "::1"}:
        pytest.skip(f"{name} is {own} here")
    port, started = free_port(), []
    for rank, machine in enumerate(two_machines):
        variables = {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
        environment = {**clean_environment(), **variables, "MASTER_ADDR": head, "MASTER_PORT": str(port)}
        words = ["ip", "netns", "exec", machine, sys.executable, "-m", "distloop.train", *short_run(tmp_path)]
        with open(tmp_path / f"output-{rank}", "w") as file:
            started.append(subprocess.Popen(words, cwd=tmp_path, env=environment, stdout=file, stderr=file))
    try:
        codes = [process.wait(120) for process in started]
    finally:
        for process in started:
            process.kill()
    outputs = [(tmp_path / f"output-{rank}").read_text() for rank in range(2)]
    assert codes == [0, 0], outputs
    for number, output in enumerate(outputs):
        interface = f"v{two_machines[number][1:]}"
        assert output.count(f"gloo uses {interface}, by which ranks reach each other (GLOO_SOCKET_IFNAME)") == 1
