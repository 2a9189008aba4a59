"""JSON over a connection, one object a line, that notices when the other side is gone."""

from __future__ import annotations

import json
import socket
import threading
from typing import Any

LOST_SECONDS = 60  # after so long without an answer from its kernel a machine counts as gone


class JsonLines:
    """A connection over which JSON goes, one object a line."""

    def __init__(self, connection: socket.socket) -> None:
        self.socket = connection
        self.rest = b""
        self.sending = threading.Lock()
        connection.settimeout(5)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        # A machine that is gone closes nothing: its kernel is asked now and then.
        for name, value in (("TCP_KEEPIDLE", LOST_SECONDS // 4), ("TCP_KEEPINTVL", LOST_SECONDS // 4)):
            if hasattr(socket, name):
                connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
        if hasattr(socket, "TCP_USER_TIMEOUT"):
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 1000 * LOST_SECONDS)

    def fileno(self) -> int:
        return self.socket.fileno()

    def send(self, **message: Any) -> bool:
        """Whether it could be sent."""
        try:
            with self.sending:
                self.socket.sendall(json.dumps(message).encode() + b"\n")
            return True
        except OSError:
            return False

    def receive(self) -> list[dict[str, Any]] | None:
        """What has arrived; None: the other side is gone."""
        try:
            data = self.socket.recv(65536)
        except TimeoutError:
            return []
        except OSError:
            data = b""
        if not data:
            return None
        *lines, self.rest = (self.rest + data).split(b"\n")
        return [json.loads(line) for line in lines]
