"""A small W&B backend on loopback: what wandb-core asks of a server to log a run, and ways to misbehave.

    with Server() as server:                       # or: python -m tests.tools.wandb_server PORT
        environment = server.environment(home)     # for a process that logs to it

What arrived is in `server.runs`. Faults are set at any time: `server.fault = "hang" | "500" | "401" | "drop"`.
"""

from __future__ import annotations

import contextlib
import json
import re
import socket
import sys
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

KEY = "0123456789abcdef" * 2 + "deadbeef"  # wandb wants 40 characters
ENTITY = "somebody"


@dataclass
class Run:
    """What the server holds of a run."""

    name: str
    project: str
    config: dict[str, Any] = field(default_factory=dict)
    lines: dict[str, list[str]] = field(default_factory=dict)  # file name -> its lines, such as wandb-history.jsonl
    exit_codes: list[int | None] = field(default_factory=list)  # of the attempts that ended
    preempting: bool = False
    fields: dict[str, Any] = field(default_factory=dict)  # display name, group, tags, notes, …
    files: dict[str, bytes] = field(default_factory=dict)
    upserts: int = 0
    rewinds: list[float] = field(default_factory=list)

    @property
    def history(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.lines.get("wandb-history.jsonl", [])]

    @property
    def summary(self) -> dict[str, Any]:
        lines = self.lines.get("wandb-summary.json", [])
        return json.loads(lines[-1]) if lines else {}


class Server:
    """The backend, in a thread of this process. Use as a context."""

    def __init__(self, port: int = 0, rewinds: bool = False) -> None:
        self.runs: dict[str, Run] = {}
        self.rewinds = rewinds  # whether it can truncate a run's history
        self.fault: str | None = None
        self.fault_in = ""  # only requests whose path holds this
        self.requests: list[str] = []
        self.bodies: list[bytes] = []  # all that it was sent
        self.asked = 0  # how often, whatever became of it
        self.released = threading.Event()  # ends what hangs
        handler = type("Handler", (_Handler,), {"backend": self})
        self.http = _Quiet(("127.0.0.1", port), handler)
        self.port = self.http.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.lock = threading.Lock()

    def __enter__(self) -> Server:
        self.thread = threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        self.thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.released.set()
        self.http.shutdown()
        self.http.server_close()

    def environment(self, home: Path) -> dict[str, str]:
        """The variables of a process that logs here; `home` is an empty folder."""
        return {"WANDB_BASE_URL": self.url, "WANDB_API_KEY": KEY, "HOME": str(home), "NO_PROXY": "127.0.0.1"}

    def only_run(self) -> Run:
        assert len(self.runs) == 1, list(self.runs)
        return next(iter(self.runs.values()))

    # ---- what it answers -------------------------------------------------------------------------------------

    def graphql(self, query: str, variables: dict[str, Any]) -> dict[str, Any]:
        found = re.search(r"(?:query|mutation)\s+(\w+)", query)
        name = found[1] if found else query[:40]
        self.requests.append(name)
        if name == "Viewer":
            return {
                "viewer": {
                    "id": "1",
                    "entity": ENTITY,
                    "username": ENTITY,
                    "flags": "{}",
                    "email": "",
                    "teams": {"edges": []},
                }
            }
        if name == "UpsertBucket":
            return {"upsertBucket": self.upsert(variables)}
        if name == "RunResumeStatus":
            run = self.runs.get(variables.get("name", ""))
            return {
                "model": {
                    "id": "p",
                    "name": variables.get("project"),
                    "entity": {"id": "e", "name": ENTITY},
                    "bucket": self.bucket(run) if run else None,
                }
            }
        if name == "RewindRun" and self.rewinds:
            run = self.runs[variables["runName"]]
            kept = [
                line
                for line in run.lines.get("wandb-history.jsonl", [])
                if json.loads(line)["_step"] <= variables["metricValue"]
            ]
            run.lines["wandb-history.jsonl"] = kept
            run.rewinds.append(variables["metricValue"])
            return {"rewindRun": {"rewoundRun": self.bucket(run)}}
        if name == "CreateRunFiles":
            return {
                "createRunFiles": {
                    "runID": "1",
                    "uploadHeaders": [],
                    "files": [
                        {"name": file, "uploadUrl": f"{self.url}/upload/{variables['run']}/{file}"}
                        for file in variables["files"]
                    ],
                }
            }
        if name == "ServerFeaturesQuery":
            return {"serverInfo": {"features": []}}
        if name == "OrganizationCoreWeaveOrganizationID":
            return {}
        return {}

    def upsert(self, variables: dict[str, Any]) -> dict[str, Any]:
        name = variables["name"]
        with self.lock:
            inserted = name not in self.runs
            run = self.runs.setdefault(name, Run(name, variables.get("project") or "uncategorized"))
        run.upserts += 1
        if variables.get("config"):
            run.config = json.loads(variables["config"])
        run.fields.update(
            {
                key: value
                for key, value in variables.items()
                if value is not None and key not in ("config", "summaryMetrics")
            }
        )
        return {"bucket": self.bucket(run), "inserted": inserted}

    def bucket(self, run: Run) -> dict[str, Any]:
        def tail(name: str) -> str:
            return json.dumps(run.lines.get(name, [])[-1:])

        return {
            "id": f"id-{run.name}",
            "name": run.name,
            "displayName": run.fields.get("displayName") or run.name,
            "description": None,
            "sweepName": None,
            "config": json.dumps(run.config),
            "summaryMetrics": json.dumps(run.summary),
            "historyLineCount": len(run.lines.get("wandb-history.jsonl", [])),
            "eventsLineCount": len(run.lines.get("wandb-events.jsonl", [])),
            "logLineCount": len(run.lines.get("output.log", [])),
            "historyTail": tail("wandb-history.jsonl"),
            "eventsTail": tail("wandb-events.jsonl"),
            "wandbConfig": json.dumps({"t": 1, **{key: value for key, value in run.config.items() if key == "_wandb"}}),
            "tags": run.fields.get("tags") or [],
            "project": {"id": "p", "name": run.project, "entity": {"id": "e", "name": ENTITY}},
        }

    def stream(self, name: str, body: dict[str, Any]) -> dict[str, Any]:
        run = self.runs[name]
        with self.lock:
            for file, part in (body.get("files") or {}).items():
                lines = run.lines.setdefault(file, [])
                if isinstance(part["content"], list) and file != "wandb-summary.json":
                    del lines[part["offset"] :]
                    assert len(lines) == part["offset"], f"{file}: {len(lines)} lines, new ones from {part['offset']}"
                    lines += part["content"]
                else:
                    lines[:] = part["content"]
            if body.get("preempting"):
                run.preempting = True
            if body.get("complete"):
                run.exit_codes.append(body.get("exitcode"))
        return {"exitcode": None, "limits": {}}


class _Quiet(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exc_info()[1], OSError):  # a client that is gone
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    backend: Server

    def log_message(self, *arguments: Any) -> None:
        pass

    def answer(self) -> None:
        backend = self.backend
        backend.asked += 1
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        backend.bodies.append(body)
        fault = backend.fault if backend.fault_in in self.path else None
        if fault == "hang":
            backend.released.wait()
        if fault in ("drop", "hang"):
            with contextlib.suppress(OSError):
                self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True
            return
        if fault in ("500", "401"):
            self.reply(int(fault), {"error": "as asked for"})
            return
        if self.path == "/graphql":
            message = json.loads(body)
            self.reply(200, {"data": backend.graphql(message["query"], message.get("variables") or {})})
        elif found := re.fullmatch(r"/files/[^/]+/[^/]+/([^/]+)/file_stream", self.path):
            self.reply(200, backend.stream(found[1], json.loads(body)))
        elif found := re.fullmatch(r"/upload/([^/]+)/(.+)", self.path):
            backend.runs[found[1]].files[found[2]] = body
            self.reply(200, {})
        else:
            backend.requests.append(self.path)
            self.reply(200, {})

    do_GET = do_POST = do_PUT = answer

    def reply(self, status: int, value: Any) -> None:
        text = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)


if __name__ == "__main__":
    with Server(int(sys.argv[1])) as server:
        print(f"export WANDB_BASE_URL={server.url} WANDB_API_KEY={KEY}", flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            while True:
                time.sleep(3600)
