"""No secret of the command line, the config, the environment, the code or an exception reaches a run's directory."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from distloop.commands.evaluate import config_of
from distloop.errors import UsageError
from distloop.ranks.roll_call import RollCall
from distloop.ranks.stopping import WatchWithoutSaving
from tests.tools.ranks import Outcome, command, train, write_config
from tests.tools.records import status
from tests.tools.wandb_server import Server

ARGV = {
    "planted-argv-7f3a": ["--data.args.token", "planted-argv-7f3a"],
    "planted-equals-91bc": ["--data.args.api-key=planted-equals-91bc"],
    "planted-yaml-5d2e": ["--task.args", "{password: planted-yaml-5d2e, scale: 1}"],
}
ENVIRONMENT = {
    "MY_API_KEY": "planted variable/8e11",
    "AWS_SECRET_ACCESS_KEY": "wJalrXUtnFEMI/K7MDENG/bPxRfiCYplanted",
    "WANDB_API_KEY": "0123456789abcdefdeadbeef0123456789abcdef",
}
FILE = {
    "token": "planted-file-0b0b",
    "login": {"user": "me", "password": "planted-file-33aa"},
    "more": ["https://me:planted-url-88ab@host/x", "hf_planted0123456789planted", ENVIRONMENT["MY_API_KEY"]],
}
IN_FILE = ["planted-file-0b0b", "planted-file-33aa", "planted-url-88ab", "hf_planted0123456789planted"]
IN_CODE = ["planted-code-77f0", "sk-planted0123456789", "f" * 40]
IN_ERROR = ["planted-error-c0de"]
SECRETS = [*ARGV, *ENVIRONMENT.values(), *IN_FILE, *IN_CODE, *IN_ERROR]

CODE = """
import os

import torch

import distloop.tasks
from tests.lab.points import points


def make(token, login, more, api_key=""):
    Mine.secrets = [token, login["password"], api_key, *more]
    return points()


class Mine(distloop.tasks.Regression):
    secrets, steps = [], 0

    def __init__(self, password="", scale=1):
        self.password, self.scale = password, scale

    def loss(self, outputs, batch):
        Mine.steps += torch.is_grad_enabled()  # of the class, which the rehearsal does not put back
        if os.environ.get("BREAK") == f"{os.environ.get('RANK', 0)} {Mine.steps}":
            key = os.environ["AWS_SECRET_ACCESS_KEY"]
            raise PermissionError(f"no access: {self.secrets} {self.password} {key} password=planted-error-c0de")
        loss, weight = super().loss(outputs, batch)
        return loss * self.scale, weight
"""
UNCOMMITTED = f"""
login(password="planted-code-77f0")
# {IN_CODE[1]} {IN_CODE[2]} {ENVIRONMENT["MY_API_KEY"]}
"""


def assert_nowhere(folder: Path, secrets: list[str]) -> None:
    """No file below `folder`, whatever it is, holds or is named by one of the secrets."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert files
    for path in files:
        text = path.read_bytes()
        found = [secret for secret in secrets if secret.encode() in text or secret in str(path.relative_to(folder))]
        assert not found, f"{path} holds {found}"


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A folder with code in a repository, an uncommitted change of it, and run.yaml."""
    for words in (["init", "-q"], ["add", "mine.py"], ["commit", "-q", "-m", "first"]):
        (tmp_path / "mine.py").write_text(CODE)
        subprocess.run(["git", "-c", "user.name=x", "-c", "user.email=x@x", *words], cwd=tmp_path, check=True)
    (tmp_path / "mine.py").write_text(CODE + f'"""{UNCOMMITTED}"""\n')
    settings = {"data": {"name": "mine:make", "args": FILE}, "model": "linear", "task": "mine:Mine"}
    settings |= {"batch": {"global_size": 4}, "train": {"steps": 8}, "checkpoint": {"every_steps": 2}}
    write_config(tmp_path, settings)
    return tmp_path


def start(
    project: Path,
    *words: str,
    world_size: int = 1,
    token: str = "another-token",
    at: str = "",
    environment: dict[str, str] | None = None,
) -> Outcome:
    """Start the run with this token; it fails `at` a rank and step, as in "1 5"."""
    arguments = ["--config", "run.yaml", "--data.args.token", token, *words]
    return train(project, arguments, world_size, {**ENVIRONMENT, "BREAK": at, **(environment or {})})


def test_no_secret_reaches_what_a_run_records_or_shows(project: Path) -> None:
    run = project / "runs" / "run"
    words = [sys.executable, "-m", "distloop.train", "--config", "run.yaml", "--tracking.wandb", "offline"]
    words += [word for one in ARGV.values() for word in one]
    failed = command(words, project, {**ENVIRONMENT, "BREAK": "0 5"})
    assert failed.returncode == 1, failed.stdout
    assert "no access: ['***', " in failed.stdout
    shown = [failed.stdout]

    # That they are not there says nothing of a place where nothing is.
    for name, parts in {
        "config.yaml": ["token: '***'", "api_key: '***'", "password: '***'", "https://***@host/x"],
        "environment.json": ['"--data.args.token",\n  "***"', "--data.args.api-key=***", "{password: '***', scale: 1}"],
        "git.diff": ['+login(password="***")\n', "+# *** *** ***\n"],
        "status.json": ["no access: ['***', "],
        "failures/attempt_0001.json": ["no access: ['***', ", "PermissionError", "Traceback"],
    }.items():
        text = (run / name).read_text()
        assert not [part for part in parts if part not in text], text
    assert_nowhere(run, SECRETS)

    # Other attempts, with another token and on other numbers of ranks, fail and are refused as silently.
    failed_again = start(project, *ARGV["planted-yaml-5d2e"], "--data.args.api-key", "x", world_size=2, at="1 3")
    assert failed_again.codes == [1, 1]
    assert "continuing after step" in failed_again.outputs[0]
    assert "rank 1" in status(run)["reason"]
    other = ["--data.args.api-key=y", "--task.args", "{password: planted-yaml-5d2e, scale: 2}"]
    refused = start(project, *other)
    assert refused.codes == [2]
    assert "{'password': '***', 'scale': 2} now" in refused.output
    assert "data.args" not in refused.output
    with Server() as server:
        words = [*other, "--resume", "extend", "--tracking.report", "--tracking.wandb", "online"]
        extended = start(project, *words, environment={"WANDB_BASE_URL": server.url}).check()
    assert server.only_run().exit_codes == [0]
    sent = b"".join(server.bodies)
    assert b"***" in sent
    assert not [secret for secret in SECRETS if secret.encode() in sent]
    assert json.loads((run / "config_changes.jsonl").read_text())["changes"] == {
        "task.args": [{"password": "***", "scale": 1}, {"password": "***", "scale": 2}]
    }
    assert status(run)["state"] == "finished"
    assert "***" in (run / "report.html").read_text()
    assert all(b"***" in part.read_bytes() for part in run.glob("wandb/*run-2*/*.wandb"))
    assert len(list(run.glob("wandb/*run-2*/*.wandb"))) == 2
    finished = start(project, *other, token="yet-another-token").check()
    assert "is finished" in finished.output
    shown += [failed_again.output, refused.output, extended.output, finished.output]
    assert_nowhere(run, [*SECRETS, "another-token", "yet-another-token"])
    for secret in [*SECRETS, "another-token"]:
        assert secret not in "\n".join(shown)


def test_the_copy_of_the_config_wants_its_secrets_back(project: Path) -> None:
    start(project).check()
    copy = ["--config", str(project / "runs" / "run" / "config.yaml")]
    refused = train(project, [*copy, "--name", "other"])
    assert refused.codes == [2]
    assert "In place of data.args.login.password, data.args.more, data.args.token the config has ***" in refused.output
    assert "with --data.args.login, --data.args.more, --data.args.token, or" in refused.output
    assert not (project / "runs" / "other").exists()
    given: list[Any] = [word for key, value in FILE.items() for word in (f"--data.args.{key}", json.dumps(value))]
    train(project, [*copy, *given, "--name", "other"], environment=ENVIRONMENT).check()
    with pytest.raises(UsageError, match=r"data\.args\.token"):
        config_of(project / "runs" / "run", [], True)
    assert config_of(project / "runs" / "run", given, True).data.args == FILE


def test_the_stack_of_a_rank_that_stands_still_shows_no_secret_of_the_code() -> None:
    roll_call = RollCall(WatchWithoutSaving())
    roll_call.limit = 0
    roll_call._note_own_place()  # as if it had just called login(password="planted-code-77f0")
    assert 'login(password="***")' in roll_call.places[0].stack
    assert "planted-code" not in roll_call.places[0].stack
    roll_call.close()
