"""One part of the GPU tests: a file of tests, run by pytest in a process of its own, and what came of it."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
LOG_BYTES = 200_000


@dataclass
class Part:
    """A part's entry in gpu_results.json."""

    name: str
    state: str = "not run"  # or passed, skipped, failed, crashed, out of time, missing
    why: str = ""
    seconds: float = 0.0
    tests: list[dict[str, Any]] = field(default_factory=list)


class Running:
    """A part's process, from its start to end(). `limit`: in seconds from now."""

    def __init__(self, part: Part, file: Path, device: str, out: Path, scratch: Path, limit: float) -> None:
        self.part, self.limit, self.began = part, limit, time.time()
        self.deadline = self.began + limit
        self.results, self.log = scratch / f"{part.name}.jsonl", out / f"{part.name}.log"
        # -s: pytest would keep output in a file without a limit, and lose it when it is killed.
        words = [sys.executable, "-m", "pytest", "-q", "-s", "-p", "no:cacheprovider"]
        words += [f"--basetemp={scratch / part.name}", str(file)]
        environment = {
            **{name: value for name, value in os.environ.items() if name != "PYTEST_ADDOPTS"},
            "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",  # a machine has plugins of its own, or a limit for each test
            **({"CUDA_VISIBLE_DEVICES": ""} if device == "cpu" else {}),  # `device: auto` takes the CPU, too
            "GPU_DEVICE": device,
            "GPU_OUT": str(out),
            "GPU_RESULTS": str(self.results),
            "GPU_DEADLINE": str(self.deadline),
        }
        pipes: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        self.process = subprocess.Popen(words, cwd=ROOT, env=environment, start_new_session=True, **pipes)
        self.reader = threading.Thread(target=keep_end, args=(self.process.stdout, self.log), daemon=True)
        self.reader.start()

    def is_over(self) -> bool:
        return self.process.poll() is not None or time.time() > self.deadline

    def end(self, stopped: bool = False) -> None:
        """Take what the part has left, whether it has ended by itself or is ended here."""
        part, code = self.part, self.process.poll()
        self._kill()
        part.seconds = round(time.time() - self.began, 1)
        begun = read_results(self.results, part)
        at = f" in {begun}" if begun else ""
        outcomes = {test["outcome"] for test in part.tests}
        if code is None and stopped:
            part.state, part.why = "not run", f"stopped{at}"
        elif code is None:
            part.state, part.why = "out of time", f"took more than {self.limit:.0f} s, and was killed{at}"
        elif code < 0:
            part.state, part.why = "crashed", f"ended by {signal.Signals(-code).name}{at}"
        elif code == 1 and "failed" in outcomes:
            part.state = "failed"
        elif code or not part.tests:
            part.state, part.why = "crashed", f"exit code {code}{at}: {last_words(self.log)}"
        else:
            part.state = "skipped" if outcomes == {"skipped"} else "passed"

    def _kill(self) -> None:
        """End all processes of the part; those in sessions of their own are known by a variable of the part's."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        mark, give_up = f"GPU_RESULTS={self.results}".encode(), time.monotonic() + 5
        while (left := list(processes_with(mark))) and time.monotonic() < give_up:
            for pid in left:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.01)
        self.process.wait()
        self.reader.join(5)


def processes_with(mark: bytes) -> Iterator[int]:
    """The processes that were started with this "NAME=value" in their environment."""
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended meanwhile, or is another user's
            if mark in (folder / "environ").read_bytes().split(b"\0"):
                yield int(folder.name)


def keep_end(stream: Any, path: Path) -> None:
    """Copy a stream to a file, in which only the last LOG_BYTES stay, however much comes."""
    with open(path, "w+b", buffering=0) as file:
        while chunk := stream.read1(65536):
            file.write(chunk)
            if file.tell() > 2 * LOG_BYTES:
                cut(file)
        cut(file)


def cut(file: Any) -> None:
    file.seek(max(0, file.tell() - LOG_BYTES))
    end = file.read()
    file.seek(0)
    file.write(end)
    file.truncate()


def read_results(path: Path, part: Part) -> str:
    """Add the tests that have ended to the part. Returns the name of one that has begun and not ended, or ""."""
    begun = ""
    for line in path.read_text().splitlines() if path.exists() else []:
        with contextlib.suppress(json.JSONDecodeError):  # a line that a kill has cut
            row = json.loads(line)
            begun = row.get("begun", "")
            if not begun:
                part.tests.append(row)
    return begun


def last_words(log: Path) -> str:
    """The error in a part's output: pytest begins the lines of one with E; else the last line."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    errors = [line.removeprefix("E  ").strip() for line in lines if re.match(r"E  |\w*Error: ", line)]
    return (errors or lines or ["no output"])[-1]
