"""By which interface ranks reach each other."""

from __future__ import annotations

import os
import threading

import psutil
import pytest
from torch.distributed import HashStore  # type: ignore[attr-defined]

from distloop.ranks import interfaces
from distloop.ranks.interfaces import address_towards, choose_interface, interface_of, is_loopback


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("127.0.0.1", True),
        ("127.0.1.1", True),
        ("::1", True),
        ("localhost", True),
        ("no-such-machine.invalid", True),
        ("", True),
        ("10.0.0.1", False),
        ("fd00::1", False),
        ("fe80::1%lo", False),
    ],
)
def test_what_no_other_machine_can_reach_is_known(host: str, expected: bool) -> None:
    assert is_loopback(host) == expected


def test_the_address_towards_this_machine_is_its_loopback_and_has_no_interface_to_tell() -> None:
    assert address_towards("127.0.1.1").startswith("127.")
    assert address_towards("no-such-machine.invalid") == ""
    assert interface_of("127.0.0.1") is None
    assert interface_of("") is None


def test_an_interface_is_known_by_each_of_its_addresses() -> None:
    for name, found in psutil.net_if_addrs().items():
        for one in found:
            if one.family.name in ("AF_INET", "AF_INET6") and not is_loopback(one.address):
                assert interface_of(one.address.partition("%")[0]) == name


# (host, towards whom) -> its address on that way. Rank 0's name is a loopback address on its own machine.
WAYS = {(0, "head"): "127.0.1.1", (0, "10.0.0.2"): "10.0.0.1", (1, "head"): "10.0.0.2"}


def chosen(monkeypatch: pytest.MonkeyPatch, environ: dict[str, str], is_own_name_loopback: bool = True) -> list:
    """What each of two ranks, on a machine each, chooses."""
    rank_of = threading.local()
    loopback = interfaces.is_loopback
    monkeypatch.setattr(interfaces, "address_towards", lambda host: WAYS[rank_of.number, host])
    monkeypatch.setattr(interfaces, "interface_of", lambda address: f"the one with {address}")
    own = os.uname().nodename
    monkeypatch.setattr(interfaces, "is_loopback", lambda host: is_own_name_loopback if host == own else loopback(host))
    store, found = HashStore(), {}

    def choose(rank: int) -> None:
        rank_of.number = rank
        found[rank] = choose_interface(store, rank, 2, "head", environ)

    threads = [threading.Thread(target=choose, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [found[0], found[1]]


def test_gloo_is_told_of_the_interface_by_which_machines_reach_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    assert chosen(monkeypatch, {"LOCAL_WORLD_SIZE": "1"}) == ["the one with 10.0.0.1", "the one with 10.0.0.2"]


@pytest.mark.parametrize(
    ("environ", "is_own_name_loopback"),
    [
        ({"LOCAL_WORLD_SIZE": "1", "GLOO_SOCKET_IFNAME": "ib0"}, True),
        ({"LOCAL_WORLD_SIZE": "1"}, False),
        ({"LOCAL_WORLD_SIZE": "2"}, True),
    ],
    ids=["the user's own", "a name that others reach", "one machine"],
)
def test_gloo_is_told_nothing_where_it_need_not_be(
    monkeypatch: pytest.MonkeyPatch, environ: dict[str, str], is_own_name_loopback: bool
) -> None:
    assert chosen(monkeypatch, environ, is_own_name_loopback) == [None, None]
