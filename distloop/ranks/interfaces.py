"""The network interface by which ranks on several machines reach each other."""

import contextlib
import ipaddress
import os
import socket
from collections.abc import Mapping
from typing import Any

VARIABLE = "GLOO_SOCKET_IFNAME"


def choose_interface(store: Any, rank: int, world_size: int, host: str, environ: Mapping[str, str]) -> str | None:
    """The interface that gloo has to be told of on this machine; None if it finds one itself, or if there is none.
    Collective. gloo takes the address that the machine's own name has. Debian's /etc/hosts makes it 127.0.1.1, where no
    other machine finds it. `store`: a torch store of all ranks. `host`: rank 0's."""
    keys = [f"address/{number}" for number in range(world_size)]
    own = address_towards(host)
    store.set(keys[rank], own)
    store.wait(keys)
    others = [found.decode() for found in store.multi_get(keys) if not is_loopback(found.decode())]
    several_machines = int(environ.get("LOCAL_WORLD_SIZE", world_size)) < world_size
    if VARIABLE in environ or not several_machines or not others or not is_loopback(os.uname().nodename):
        return None
    if is_loopback(own):  # this is rank 0's machine, which reaches itself
        own = address_towards(others[0])
    return interface_of(own)


def address_towards(host: str) -> str:
    """This machine's address on the way to `host`; "" if there is no way."""
    with contextlib.suppress(OSError):
        family, _, _, _, address = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect(address)  # sends nothing
            return str(probe.getsockname()[0])
    return ""


def interface_of(address: str) -> str | None:
    """The name of the interface with this address; None for none and for the loopback interface."""
    import psutil

    if is_loopback(address):
        return None
    names = psutil.net_if_addrs().items()
    return next((name for name, found in names if address in [one.address.partition("%")[0] for one in found]), None)


def is_loopback(host: str) -> bool:
    """True for a name or address that is each machine's own, and for a name that this machine does not know."""
    try:
        addresses = [found[4][0] for found in socket.getaddrinfo(host or "localhost", None)]
        return all(ipaddress.ip_address(str(address).partition("%")[0]).is_loopback for address in addresses)
    except socket.gaierror:
        return True
