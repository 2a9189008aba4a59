"""The checksums of the checkpoint from which a run may go on, computed beside all that comes before it is opened."""

import contextlib
import hashlib
import os
import threading
from pathlib import Path

BLOCK_BYTES = 1 << 24  # large: between two, the thread waits until the one that imports gives it the interpreter

State = tuple[int, ...]


class Digests:
    """The SHA-256 of files. Those of a checkpoint are computed in a thread, once begin() was called; a file that has
    changed since is read again."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._left: list[Path] = []  # the files that the thread has not begun yet
        self._begun: dict[Path, threading.Event] = {}  # set once the thread is done with the file
        self._found: dict[Path, tuple[State, str]] = {}  # the file as it was, and its SHA-256

    def begin(self, folder: Path) -> None:
        """Begin with the newest checkpoint in `folder`, a run's folder of checkpoints, if there is one."""
        with contextlib.suppress(OSError):  # whoever opens the folder meets it again
            steps = [path for path in folder.glob("step_*") if path.name.removeprefix("step_").isdecimal()]
            newest = max(steps, key=lambda path: int(path.name.removeprefix("step_")), default=None)
            self._left = sorted(newest.iterdir(), reverse=True) if newest else []  # they are asked for by name
        if self._left:
            threading.Thread(target=self._work, name="checksums", daemon=True).start()

    def of(self, path: Path) -> str:
        """The SHA-256 of a file, in hexadecimal. Raises OSError."""
        with self._lock:
            begun = self._begun.get(path)
            if path in self._left:
                self._left.remove(path)
        if begun is not None:
            begun.wait()
            state, sha256 = self._found.get(path, ((), ""))
            if state == _state(path.stat()):
                return sha256
        return _digest(path)[1]

    def _work(self) -> None:
        while True:
            with self._lock:
                if not self._left:
                    return
                path = self._left.pop()
                begun = self._begun[path] = threading.Event()
            try:
                with contextlib.suppress(OSError):  # of() meets it again
                    self._found[path] = _digest(path)
            finally:
                begun.set()


def _digest(path: Path) -> tuple[State, str]:
    """(the state of a file before it was read, its SHA-256)."""
    found, buffer = hashlib.sha256(), memoryview(bytearray(BLOCK_BYTES))
    with open(path, "rb", buffering=0) as file:
        state = _state(os.fstat(file.fileno()))
        while size := file.readinto(buffer):
            found.update(buffer[:size])
    return state, found.hexdigest()


def _state(of_file: os.stat_result) -> State:
    """What changes with the contents of a file, and if another one takes its place."""
    return of_file.st_dev, of_file.st_ino, of_file.st_size, of_file.st_mtime_ns, of_file.st_ctime_ns
