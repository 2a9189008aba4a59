"""A run whose settings are env:NAME has the values, and leaves no trace of them."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from distloop.commands.evaluate import config_of
from tests.tools.ranks import Outcome, command, train, write_config
from tests.tools.records import status
from tests.tools.wandb_server import Server

# No name or value of these looks like a secret.
VALUES = {"PLACE": "planted-place-5a1d", "LOGIN": "planted login/77 ü", "WHAT": "planted-what-90ff"}
ROTATED = {"PLACE": "rotated-place-1b2c", "LOGIN": "rotated login/88 ü", "WHAT": "rotated-what-33cc"}
PLANTED = [*VALUES.values(), *ROTATED.values()]

CODE = """
import os

import torch

import distloop.tasks
from tests.lab.points import points


def make(root, place, login):
    assert [root, place, *login["words"]] == [os.environ[name] for name in ("PLACE", "PLACE", "LOGIN")], "other values"
    return points()


class Mine(distloop.tasks.Regression):
    steps = 0

    def __init__(self, what, more=None):
        self.what = what
        assert what == os.environ["WHAT"], "another value"

    def loss(self, outputs, batch):
        Mine.steps += torch.is_grad_enabled()  # of the class, which the rehearsal does not put back
        if os.environ.get("BREAK") == f"{os.environ.get('RANK', 0)} {Mine.steps}":
            raise PermissionError(f"no access: {self.what} {[self.what]} with {os.environ['LOGIN']}")
        return super().loss(outputs, batch)
"""


@pytest.fixture
def project(tmp_path: Path) -> Path:
    (tmp_path / "mine.py").write_text(CODE)
    data = {"name": "mine:make", "root": "env:PLACE", "args": {"place": "env:PLACE", "login": {"words": ["env:LOGIN"]}}}
    settings = {"data": data, "model": "linear", "task": "mine:Mine", "batch": {"global_size": 4}}
    settings |= {"optim": {"lr": "env:RATE"}, "train": {"steps": 8}, "checkpoint": {"every_steps": 2}}
    write_config(tmp_path, settings)
    return tmp_path


def start(project: Path, *words: str, world_size: Any = 1, **environment: str) -> Outcome:
    arguments = ["--config", "run.yaml", "--task.args.what", "env:WHAT", *words]
    return train(project, arguments, world_size, {**VALUES, "RATE": "0.05", **environment})


def assert_nowhere(run: Path, texts: list[str]) -> None:
    files = [path for path in run.rglob("*") if path.is_file()]
    assert files
    for planted in PLANTED:
        forms = {planted.encode(), json.dumps(planted).encode()[1:-1]}
        assert [path for path in files if any(form in path.read_bytes() for form in forms)] == []
        assert not [text for text in texts if planted in text]


@pytest.mark.long
def test_a_run_has_the_values_and_records_the_names(project: Path) -> None:
    run = project / "runs" / "run"
    words = [sys.executable, "-m", "distloop.train", "--config", "run.yaml", "--task.args", "{what: env:WHAT}"]
    failed = command(words, project, {**VALUES, "RATE": "0.05", "BREAK": "0 5"})
    assert failed.returncode == 1
    assert "PermissionError: no access: *** ['env:WHAT'] with ***" in failed.stdout
    for name, parts in {
        "config.yaml": ["root: env:PLACE", "place: env:PLACE", "- env:LOGIN", "what: env:WHAT", "lr: 0.05"],
        "environment.json": ['"{what: env:WHAT}"'],
        "status.json": ["no access: *** ['env:WHAT'] with ***"],
        "failures/attempt_0001.json": ["no access: *** ['env:WHAT'] with ***"],
    }.items():
        text = (run / name).read_text()
        assert not [part for part in parts if part not in text], text

    # Rotated keys are no other training; another name, or another number, is.
    failed_again = start(project, world_size=2, BREAK="1 3", **ROTATED)
    assert failed_again.codes == [1, 1]
    assert "continuing after step" in failed_again.outputs[0]
    refused = start(project, "--task.args.more", "env:PLACE")
    assert refused.codes == [2]
    assert "task.args: {'what': 'env:WHAT'} there, {'what': 'env:WHAT', 'more': 'env:PLACE'} now" in refused.output
    other_rate = start(project, RATE="0.1")
    assert other_rate.codes == [2]
    assert "optim.lr: 0.05 there, 0.1 now" in other_rate.output
    with Server() as server:
        words = ["--tracking.report", "--tracking.wandb", "online"]
        finished = start(project, *words, **ROTATED, WANDB_BASE_URL=server.url, WANDB_API_KEY="0" * 40).check()
    assert status(run)["state"] == "finished"
    assert server.only_run().config["task"]["value"]["args"] == {"what": "env:WHAT"}
    assert not [planted for planted in PLANTED if planted.encode() in b"".join(server.bodies)]
    assert "env:WHAT" in (run / "report.html").read_text()
    shown = command([sys.executable, "-m", "distloop.status", "runs"], project)
    assert shown.returncode == 0
    outputs = [failed.stdout, failed_again.output, refused.output, other_rate.output, finished.output, shown.stdout]
    assert_nowhere(run, outputs)

    # Commands that read the run's config read the variables, too.
    evaluated = command([sys.executable, "-m", "distloop.evaluate", "runs/run", "--json"], project, VALUES)
    assert evaluated.returncode == 0, evaluated.stdout
    assert json.loads(evaluated.stdout.splitlines()[-1])["step"] == 8
    unset = command([sys.executable, "-m", "distloop.evaluate", "runs/run"], project)
    assert unset.returncode == 2
    assert "distloop: data.root = 'env:PLACE': there is no environment variable PLACE." in unset.stdout
    assert "Traceback" not in unset.stdout
    copied = ["--config", str(run / "config.yaml"), "--name", "again"]
    train(project, copied, environment=VALUES).check()
    assert_nowhere(project / "runs" / "again", [])


def test_each_rank_tells_a_variable_that_it_lacks_once(project: Path) -> None:
    outcome = start(project, "--tracking.notes", "env:NOT_SET", world_size=2)
    assert outcome.codes == [2, 2]
    assert outcome.output.count("tracking.notes = 'env:NOT_SET': there is no environment variable NOT_SET") == 1
    assert not (project / "runs").exists()


def test_the_folder_and_the_name_of_a_run_may_be_from_the_environment(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["--runs-dir", "env:FOLDER", "--name", "env:WHO"]
    start(project, *words, FOLDER="all", WHO="mine-1").check()
    assert "name: env:WHO\nruns_dir: env:FOLDER\n" in (project / "all" / "mine-1" / "config.yaml").read_text()
    for name, value in VALUES.items():
        monkeypatch.setenv(name, value)
    config_of(project / "all" / "mine-1", [], True)  # evaluate needs neither folder nor name
    asked = "JobId=7 JobState=RUNNING"
    requeue = [sys.executable, "-m", "distloop.commands.requeue", "answer", "--config", "run.yaml", *words]
    variables = {**os.environ, "RATE": "1", "FOLDER": "all", "WHO": "mine-1"}
    done = command(["bash", "-c", f"echo '{asked}' | {' '.join(requeue)}"], project, variables)
    assert (done.returncode, done.stdout) == (3, "")


def test_wandb_gets_the_values_of_its_own_settings(project: Path) -> None:
    with Server() as server:
        words = ["--tracking.project", "env:WHERE", "--tracking.tags", "env:TEAM", "b", "--tracking.notes", "env:WHY"]
        wandb = {"WANDB_BASE_URL": server.url, "WANDB_API_KEY": "0" * 40}
        own = {"WHERE": "where-it-belongs", "TEAM": "our-team", "WHY": "because"}
        start(project, *words, "--tracking.wandb", "offline", **own).check()
        synced = command([sys.executable, "-m", "distloop.commands.cli", "sync", "runs/run"], project, {**wandb, **own})
        assert synced.returncode == 0, synced.stdout
    run = server.only_run()
    assert (run.project, run.fields["tags"], run.fields["notes"]) == ("where-it-belongs", ["our-team", "b"], "because")
    tracking = run.config["tracking"]["value"]
    assert (tracking["project"], tracking["tags"], tracking["notes"]) == ("env:WHERE", ["env:TEAM", "b"], "env:WHY")
    unset = command([sys.executable, "-m", "distloop.commands.cli", "sync", "runs/run"], project, wandb)
    assert unset.returncode != 0
    assert "tracking.project = 'env:WHERE': there is no environment variable WHERE" in unset.stdout
