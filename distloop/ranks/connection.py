"""Connections between ranks. They carry JSON messages, one a line, and notice when the other side is gone."""

import contextlib
import json
import secrets
import socket
import threading
import time
from collections.abc import Sequence
from multiprocessing.connection import wait
from typing import Any

from distloop.errors import UsageError
from distloop.ranks.places import Place

LONGEST_GREETING = 4096  # bytes, before the token
LOST_SECONDS = 60  # a machine whose kernel does not answer for so long counts as gone
CLOSE_SECONDS = 1.0  # for the other ranks to read the last messages


class Connection:
    """A connection to another rank. One thread receives; any thread may send."""

    def __init__(self, connected: socket.socket) -> None:
        self.socket = connected
        self.place: Place | None = None  # of the other rank; None until its greeting has arrived
        self.unread = b""  # the beginning of a message whose end has not arrived
        self._sending = threading.Lock()
        connected.settimeout(5)
        connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connected.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        # A machine that loses its power closes nothing: only its kernel's silence shows that it is gone.
        quarter = LOST_SECONDS // 4
        options = {"TCP_KEEPIDLE": quarter, "TCP_KEEPINTVL": quarter, "TCP_USER_TIMEOUT": 1000 * LOST_SECONDS}
        for name, value in options.items():
            if hasattr(socket, name):  # not on every operating system
                connected.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)

    def fileno(self) -> int:
        return self.socket.fileno()

    def send(self, **message: Any) -> None:
        """Send a message. It is lost if the other side is gone."""
        with contextlib.suppress(OSError), self._sending:
            self.socket.sendall(json.dumps(message).encode() + b"\n")

    def receive(self) -> list[dict[str, Any]] | None:
        """The messages that have arrived; None if the other side is gone. Raises ValueError if one is no JSON."""
        try:
            data = self.socket.recv(65536)
        except TimeoutError:
            return []
        except OSError:
            data = b""
        if not data:
            return None
        *lines, self.unread = (self.unread + data).split(b"\n")
        return [json.loads(line) for line in lines]


class Connections:
    """The connections of one rank: rank 0 has one to each other rank, the others have one to rank 0. Other programs,
    such as port scanners, may connect to rank 0 as well. It closes a connection that does not begin with the token."""

    def __init__(self) -> None:
        self._connections: list[Connection] = []
        self._places: Sequence[Place] = ()
        self._listener: socket.socket | None = None  # until all ranks have connected
        self.listening_since: float | None = None  # by time.monotonic(); None without a listener
        self._token = ""
        self._wake_read, self._wake_write = socket.socketpair()

    def listen(self, places: Sequence[Place]) -> tuple[int, str]:
        """On rank 0: let the ranks at `places` connect; returns the port and the token that they have to send."""
        self._places, self._token = places, secrets.token_hex(16)
        both = socket.has_dualstack_ipv6()  # IPv4 and IPv6: only the others know by which they reach this machine
        family = socket.AF_INET6 if both else socket.AF_INET
        self._listener = socket.create_server(("", 0), family=family, backlog=len(places), dualstack_ipv6=both)
        self.listening_since = time.monotonic()
        return self._listener.getsockname()[1], self._token

    def connect(self, host: str, port: int, token: str, rank_0: Place, own: Place) -> None:
        """On another rank: connect to rank 0. Raises UsageError if it cannot be reached."""
        try:
            connection = Connection(socket.create_connection((host, port), timeout=30))
        except OSError as error:
            raise UsageError(
                f"Rank {own.rank} on {own.node} reaches rank 0 at {host}, but not on its port {port}: "
                f"{error.strerror or error}. The machines of a run must reach each other on all ports."
            ) from None
        connection.place = rank_0
        connection.send(token=token, rank=own.rank, node=own.node, pid=own.pid)
        self._connections = [connection]

    def ranks(self) -> set[int]:
        """The ranks that have connected and are not gone."""
        return {connection.place.rank for connection in list(self._connections) if connection.place is not None}

    def send(self, **message: Any) -> None:
        """Send a message to all ranks that are connected."""
        for connection in list(self._connections):  # the thread that reads may remove some meanwhile
            if connection.place is not None:
                connection.send(**message)

    def someone_waits(self) -> bool:
        """True if read() would find a rank that has come, but has not been greeted: it would not receive a message."""
        unknown: list[Any] = [connection for connection in list(self._connections) if connection.place is None]
        listener = self._listener
        return bool(wait([*unknown, *filter(None, (listener,))], 0))

    def wake(self) -> None:
        """Let read() return at once."""
        with contextlib.suppress(OSError):
            self._wake_write.send(b"!")

    def read(self, seconds: float) -> list[tuple[Place, dict[str, Any] | None]]:
        """Wait so many seconds at most for messages: (sender, message); the message of a rank that is gone is None."""
        sources: list[Any] = list(filter(None, (self._wake_read, *self._connections, self._listener)))
        heard: list[tuple[Place, dict[str, Any] | None]] = []
        source: Any
        for source in wait(sources, max(0.0, seconds)):
            try:
                if source is self._wake_read:
                    self._wake_read.recv(4096)
                elif source is self._listener:
                    self._connections.append(Connection(self._listener.accept()[0]))
                else:
                    heard += self._read(source)
            except Exception:  # another program may send anything, and must not end the thread that reads
                if source in self._connections and source.place is None:
                    self._remove(source)
        return heard

    def _read(self, connection: Connection) -> list[tuple[Place, dict[str, Any] | None]]:
        """Raises an exception of any kind for another program's connection."""
        if (messages := connection.receive()) is None:
            self._remove(connection)
            return [(connection.place, None)] if connection.place is not None else []
        if connection.place is None and messages:
            self._greet(connection, messages.pop(0))
        if connection.place is None:
            if len(connection.unread) > LONGEST_GREETING:
                raise ValueError("not a rank of this run")
            return []
        return [(connection.place, message) for message in messages]

    def _greet(self, connection: Connection, message: dict[str, Any]) -> None:
        """Learn which rank has connected; stop listening once all ranks have."""
        if not secrets.compare_digest(message["token"], self._token):
            raise ValueError("not a rank of this run")
        place = connection.place = self._places[message["rank"]]
        place.node, place.pid = message["node"], message["pid"]
        if self._listener is not None and len(self.ranks()) == len(self._places) - 1:
            self._listener.close()
            self._listener = self.listening_since = None

    def _remove(self, connection: Connection) -> None:
        self._connections.remove(connection)
        connection.socket.close()

    def close(self) -> None:
        """Close all connections once the other ranks have read the last messages, or after CLOSE_SECONDS. A socket that
        is closed with unread data resets the connection, and its last messages are lost."""
        for connection in self._connections:
            with contextlib.suppress(OSError):
                connection.socket.settimeout(0.5)
                connection.socket.shutdown(socket.SHUT_WR)
        until = time.monotonic() + CLOSE_SECONDS
        for connection in self._connections:
            with contextlib.suppress(ValueError, RecursionError):  # from another program
                while time.monotonic() < until and connection.receive():
                    pass
        self.drop()
        for other in filter(None, (self._listener, self._wake_read, self._wake_write)):
            other.close()

    def drop(self) -> None:
        """Close all connections at once, as the kernel does for a killed process."""
        for connection in list(self._connections):
            self._remove(connection)
