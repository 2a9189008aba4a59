"""W&B for real: wandb and its own process, runs that are killed, stopped and go wrong, and a server that does, too."""

from __future__ import annotations

import base64
import io
import json
import math
import os
import pty
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from distloop.config.settings import Tracking
from distloop.config.yaml_text import dump_yaml
from distloop.tracking.wandb.mirror import only_mirror
from tests.lab.crashing import fill, make_read_only, mount, mount_is_allowed
from tests.tools import stage
from tests.tools.ranks import REPOSITORY, Outcome, Ranks, clean_environment, closed_port, command, train, wait_until
from tests.tools.records import all_rows, run_of, status, weights
from tests.tools.stopping import check_nothing_runs, kill_all, processes_of, waiting_run
from tests.tools.wandb_files import parts
from tests.tools.wandb_server import KEY, Run, Server

# 16 steps an epoch, a row each; a run waits in the seventh step of its attempt while a test says so.
STEPS = 40
SECRET = "hunter2hunter2"

pytestmark = pytest.mark.usefixtures("nothing_is_left")


@pytest.fixture
def nobody_listens() -> Iterator[int]:
    """The port of a server that is not there."""
    with closed_port() as port:
        yield port


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as one:
        yield one


@pytest.fixture
def rewinding() -> Iterator[Server]:
    with Server(rewinds=True) as one:
        yield one


def arguments(folder: Path, *more: str, tracking: dict[str, Any] | None = None, **changes: Any) -> list[str]:
    settings = {"wandb": "online", "report": False, "start_seconds": 60, **(tracking or {})}
    data = {"name": "tests.lab.stopping:points"}
    same = {"data": data, "batch": {"global_size": 4}, "train": {"steps": STEPS}, "checkpoint": {"every_steps": 4}}
    return [*waiting_run(folder, **{**same, "tracking": settings, **changes}), *more]


def environment(server: Server, folder: Path, **more: str) -> dict[str, str]:
    """Of a process that logs there."""
    home = folder / "home"
    home.mkdir(exist_ok=True)
    # What a job on a cluster may have: another run's.
    stray = {"WANDB_RUN_ID": "strayrun", "WANDB_RESUME": "must", "WANDB_PROJECT": "stray", "WANDB_DIR": str(home)}
    stray["WANDB_SILENT"] = "true"
    return {**server.environment(home), **stray, "MY_PASSWORD": SECRET, **more}


def told(row: dict[str, Any]) -> tuple[str, int, int, float]:
    """Kind, step, attempt and loss of a row of W&B."""
    kind = next(name for name in ("train", "validate", "epoch") if f"{name}/loss" in row)
    return kind, row["global_step"], row["attempt"], row[f"{kind}/loss"]


def in_file(run: Path) -> list[tuple[str, int, int, float]]:
    return [(row["kind"], row["step"], row["attempt"], row["loss"]) for row in all_rows(run)]


def check_rows(run: Run, path: Path) -> None:
    """Row n of the file is row n on the server."""
    assert [row["_step"] for row in run.history] == list(range(len(run.history)))
    assert [told(row) for row in run.history] == in_file(path)
    assert not any("redone" in row for row in run.history)


def sync(folder: Path, variables: dict[str, str], *runs: str) -> subprocess.CompletedProcess[str]:
    return command([sys.executable, "-m", "distloop.commands.cli", "sync", *(runs or ["runs/run"])], folder, variables)


def wandb_lines(outcome: Outcome) -> list[str]:
    """The lines about W&B, of all ranks; nothing else of it is said."""
    lines = [line for line in outcome.output.splitlines() if "W&B" in line]
    assert not [line for line in outcome.output.splitlines() if line.startswith("wandb") or "Traceback" in line]
    return lines


# ---- one run over all attempts -----------------------------------------------------------------------------------


def test_a_run_that_is_killed_and_goes_on_on_other_ranks_is_one_run(tmp_path: Path, rewinding: Server) -> None:
    variables = environment(rewinding, tmp_path)
    tracking = {"group": "some group", "tags": ["one", "two"], "notes": "what is new", "project": "my project"}
    words = arguments(tmp_path, tracking=tracking, precision="no")
    run = run_of(tmp_path)
    # Training alone is killed: W&B hears of it at once. Steps 5 and 6 are not saved.
    stage.hold(tmp_path, "step")
    with Ranks(tmp_path, words, 1, variables) as ranks:
        stage.arrived(tmp_path, "step")
        ranks.kill()
        ranks.join()
    check_nothing_runs(tmp_path, seconds=20)
    mirrored = rewinding.only_run()
    assert mirrored.exit_codes == [1]
    assert mirrored.summary["state"] == "failed"
    assert [row["global_step"] for row in mirrored.history] == [1, 2, 3, 4, 5, 6]
    # The whole machine dies, before anything has arrived.
    stage.forget(tmp_path, "step")
    with Ranks(tmp_path, words, 2, variables) as ranks:
        wait_until(lambda: mirrored.rewinds, "the server to take two rows back")
        rewinding.fault, rewinding.fault_in = "hang", "file_stream"
        stage.arrived(tmp_path, "step", range(2))
        wait_until(lambda: [len(part.history) >= 4 for part in parts(run)] == [True, True], "rows on the disk")
        kill_all(tmp_path)
        ranks.join()
    rewinding.fault = None
    rewinding.released.set()
    stage.let_go(tmp_path, "step")
    assert len(mirrored.history) < len(all_rows(run))
    outcome = train(tmp_path, words, 1, variables).check()
    assert wandb_lines(outcome) == [f"W&B: {rewinding.url}/somebody/my%20project/runs/{mirrored.name}"]
    check_rows(rewinding.only_run(), run)
    assert {row["attempt"] for row in mirrored.history} == {1, 2, 3}
    assert mirrored.rewinds[0] == 3
    assert mirrored.exit_codes[-1] == 0

    config = {key: value["value"] for key, value in mirrored.config.items() if key != "_wandb"}
    assert config["precision"] == "no"
    assert config["train"]["steps"] == STEPS
    assert config["tracking"]["tags"] == ["one", "two"]
    assert config["environment"]["world_size"] == 1
    assert mirrored.fields["displayName"] == "run"
    assert (mirrored.project, mirrored.fields["groupName"]) == ("my project", "some group")
    assert (mirrored.fields["tags"], mirrored.fields["notes"]) == (["one", "two"], "what is new")
    summary = mirrored.summary
    assert summary["state"] == "finished"
    assert 0 < summary["goodput"] < 1
    assert summary["best/step"] == status(run)["best"]["step"]
    assert summary["time/lost_seconds"] > 0
    sent = json.dumps([mirrored.config, mirrored.lines, mirrored.fields, list(map(str, mirrored.files.values()))])
    assert SECRET not in sent
    assert KEY not in sent
    if (run / "git.diff").exists():
        assert mirrored.files["git.diff"] == (run / "git.diff").read_bytes()
    assert "strayrun" not in (run / "wandb.json").read_text()
    check_nothing_runs(tmp_path, seconds=20)


@pytest.mark.long
def test_where_the_server_takes_no_row_back_rows_done_again_are_marked(tmp_path: Path, server: Server) -> None:
    variables = environment(server, tmp_path)
    run = run_of(tmp_path)
    words = arguments(tmp_path)
    stage.hold(tmp_path, "step")
    with Ranks(tmp_path, words, 1, variables) as ranks:
        stage.arrived(tmp_path, "step")
        ranks.kill()
        ranks.join()
    mirrored = server.only_run()
    wait_until(lambda: mirrored.exit_codes, "the end of the W&B run")
    first = [told(row) for row in mirrored.history]
    assert [row[1] for row in first] == [1, 2, 3, 4, 5, 6]
    # The next attempt is stopped.
    stage.forget(tmp_path, "step")
    with Ranks(tmp_path, words, 1, variables) as ranks:
        stage.arrived(tmp_path, "step")
        refused = sync(tmp_path, variables)
        assert refused.returncode == 2
        assert refused.stdout.startswith("distloop: runs/run is going on: wait for its end, or stop it (touch ")
        for pid in processes_of(tmp_path):  # as Slurm does: W&B's processes, too
            os.kill(pid, signal.SIGTERM)
        stage.let_go(tmp_path, "step")
        ranks.join().check()
    assert mirrored.exit_codes[-1] == 1
    assert mirrored.preempting
    assert mirrored.summary["state"] == "stopped"
    train(tmp_path, words, 1, variables).check()
    assert [told(row) for row in mirrored.history] == first + in_file(run)[4:]
    assert [row["_step"] for row in mirrored.history] == list(range(len(mirrored.history)))
    assert [(row["global_step"], row["attempt"]) for row in mirrored.history if "redone" in row] == [(5, 2), (6, 2)]
    assert mirrored.exit_codes[-1] == 0
    assert mirrored.summary["state"] == "finished"
    # Nothing is missing, so that nothing changes.
    done = sync(tmp_path, variables)
    assert done.returncode == 0, done.stdout
    assert f": 0 rows uploaded, {len(all_rows(run))} in all: http" in done.stdout
    assert len(mirrored.history) == len(all_rows(run)) + 2


@pytest.mark.long
@pytest.mark.parametrize("rewinds", [True, False])
def test_a_run_that_was_killed_before_it_had_saved_anything_begins_anew(tmp_path: Path, rewinds: bool) -> None:
    words = arguments(tmp_path, checkpoint={"every_steps": 1000})
    with Server(rewinds=rewinds) as server:
        variables = environment(server, tmp_path)
        stage.hold(tmp_path, "step")
        with Ranks(tmp_path, words, 1, variables) as ranks:
            stage.arrived(tmp_path, "step")
            ranks.kill()
            ranks.join()
        mirrored = server.only_run()
        wait_until(lambda: mirrored.exit_codes, "the end of the W&B run")
        assert len(mirrored.history) == 6
        stage.let_go(tmp_path, "step")
        train(tmp_path, words, 1, variables).check()
        history = server.only_run().history
        assert [row["_step"] for row in history] == list(range(len(history)))
        rows = [told(row) for row in history]
        if rewinds:  # one row has to stay
            assert rows[1:] == in_file(run_of(tmp_path))[1:]
            assert rows[0][:2] == ("train", 1)
        else:
            assert rows[6:] == in_file(run_of(tmp_path))
            assert [row["global_step"] for row in history if "redone" in row] == [1, 2, 3, 4, 5, 6]


@pytest.mark.long
@pytest.mark.parametrize("world_size", [1, 2])
def test_an_attempt_that_fails_is_shown_as_failed(tmp_path: Path, server: Server, world_size: int) -> None:
    """By an exception of the user's; on two ranks, since the other one was killed."""
    variables = environment(server, tmp_path)
    task = {"name": "tests.lab.failing:FailingTask"} if world_size == 1 else None
    words = arguments(tmp_path, **({"task": task} if task else {}))
    stage.hold(tmp_path, "step")
    with Ranks(tmp_path, words, world_size, variables) as ranks:
        if world_size == 2:
            stage.arrived(tmp_path, "step", range(2))
            os.kill(ranks.processes[1].pid or 0, signal.SIGKILL)
            stage.let_go(tmp_path, "step")
        outcome = ranks.join()
    assert outcome.codes[0] == 1
    mirrored = server.only_run()
    assert mirrored.exit_codes == [1]
    assert not mirrored.preempting
    assert mirrored.summary["state"] == "failed"
    check_rows(mirrored, run_of(tmp_path))
    check_nothing_runs(tmp_path, seconds=20)


# ---- what goes wrong with W&B ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def without(tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    """The weights of the run without W&B."""
    folder = tmp_path_factory.mktemp("without")
    train(folder, arguments(folder, tracking={"wandb": "off"})).check()
    return weights(run_of(folder))


def check_unhurt(folder: Path, outcome: Outcome, without: dict[str, torch.Tensor]) -> None:
    """Training has finished as if there were no W&B, and said one line of its trouble."""
    outcome.check()
    assert status(run_of(folder))["state"] == "finished"
    trained = weights(run_of(folder))
    assert all(torch.equal(trained[name], without[name]) for name in without)


def check_synced(folder: Path, server: Server, variables: dict[str, str], state: str = "finished") -> Run:
    """A sync with a healthy server brings everything there; returns the run."""
    server.fault = None
    done = sync(folder, variables)
    assert done.returncode == 0, done.stdout
    assert len(done.stdout.splitlines()) == 1
    mirrored = server.only_run()
    check_rows(mirrored, run_of(folder))
    assert mirrored.exit_codes[-1] == (0 if state == "finished" else 1)
    assert mirrored.summary["state"] == state
    assert mirrored.name == json.loads((run_of(folder) / "wandb.json").read_text())["id"]
    check_nothing_runs(folder, seconds=20)
    return mirrored


LONG = pytest.mark.long
TROUBLE_AT_START = {
    "refuse": "connection refused",
    "hang": "context deadline exceeded",
    "drop": "EOF",
    "500": "500",
    "401": "401",
    "no key": "No API key configured",
    "short key": "API key must have 40+ characters",
}


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize(
    "trouble", ["no key", *(pytest.param(t, marks=LONG) for t in TROUBLE_AT_START if t != "no key")]
)
def test_without_a_server_training_goes_on_offline_and_a_sync_brings_everything(
    tmp_path: Path, server: Server, without: dict[str, torch.Tensor], trouble: str, world_size: int, nobody_listens: int
) -> None:
    good = environment(server, tmp_path)
    keys = {"no key": "", "short key": "abc"}
    variables = {**good, "WANDB_API_KEY": keys.get(trouble, KEY)}
    if trouble == "refuse":
        variables["WANDB_BASE_URL"] = f"http://127.0.0.1:{nobody_listens}"
    server.fault = trouble
    outcome = train(tmp_path, arguments(tmp_path, tracking={"start_seconds": 12}), world_size, variables).check()
    assert outcome.codes == [0] * world_size
    (line,) = wandb_lines(outcome)
    assert line.startswith("W&B is offline, in runs/run/wandb: ")
    assert TROUBLE_AT_START[trouble] in line
    assert line.endswith("Later `distloop sync runs/run` uploads it")
    if world_size == 1:
        check_unhurt(tmp_path, outcome, without)
    (part,) = parts(run_of(tmp_path))
    assert [told(row) for row in part.history] == in_file(run_of(tmp_path))
    assert part.exit_code == 0
    assert not server.runs
    mirrored = check_synced(tmp_path, server, good)
    assert mirrored.name == part.run


TROUBLE_MEANWHILE = ("401", "500", "hang", "drop", "refuse", "mirror")


@pytest.mark.parametrize("trouble", [pytest.param(t, marks=() if t == "401" else LONG) for t in TROUBLE_MEANWHILE])
def test_a_server_that_goes_away_or_a_process_that_dies_does_not_hurt(
    tmp_path: Path, server: Server, without: dict[str, torch.Tensor], trouble: str
) -> None:
    variables = environment(server, tmp_path)
    stage.hold(tmp_path, "step")
    with Ranks(tmp_path, arguments(tmp_path, tracking={"end_seconds": 4}), 1, variables) as ranks:
        stage.arrived(tmp_path, "step")
        mirrored = server.only_run()
        if trouble != "401":  # else before anything has arrived: rows go there every 15 s
            wait_until(lambda: len(mirrored.history) == 6, "the rows of six steps")
        if trouble == "mirror":
            kill_all(tmp_path, "distloop.tracking.wandb.mirror")
        elif trouble == "refuse":
            server.__exit__()
        else:
            server.fault = trouble
        stage.let_go(tmp_path, "step")
        outcome = ranks.join()
    check_unhurt(tmp_path, outcome, without)
    first, last = wandb_lines(outcome)
    assert first == f"W&B: {server.url}/somebody/distloop/runs/{mirrored.name}"
    assert last.startswith("W&B: ")
    assert last.endswith("`distloop sync runs/run` uploads the rest"), last
    assert len(mirrored.history) == (0 if trouble == "401" else 6)
    check_nothing_runs(tmp_path, seconds=20)
    if trouble == "refuse":
        with Server(server.port) as again:
            again.runs = server.runs
            check_synced(tmp_path, again, variables)
    else:
        check_synced(tmp_path, server, variables)


@pytest.mark.long
@pytest.mark.parametrize("mode", ["online", "offline", "online, then the server is gone"])
def test_where_the_process_of_wandb_dies_another_goes_on(
    tmp_path: Path, server: Server, without: dict[str, torch.Tensor], mode: str
) -> None:
    variables, run = environment(server, tmp_path), run_of(tmp_path)
    tracking = {"wandb": mode.partition(",")[0], "start_seconds": 10, "end_seconds": 40}
    stage.hold(tmp_path, "step")
    with Ranks(tmp_path, arguments(tmp_path, tracking=tracking), 1, variables) as ranks:
        stage.arrived(tmp_path, "step")
        wait_until(lambda: sum(len(part.history) for part in parts(run)) == 6, "the rows of six steps")
        kill_all(tmp_path, "wandb-core")
        if "gone" in mode:
            server.fault = "drop"
        stage.let_go(tmp_path, "step")
        outcome = ranks.join()
    check_unhurt(tmp_path, outcome, without)
    assert len(wandb_lines(outcome)) == (2 if "gone" in mode else 1)
    if mode == "online":
        check_rows(server.only_run(), run)
        assert server.only_run().exit_codes == [0]
    else:
        one, two = parts(run)
        assert [told(row) for row in one.history + two.history] == in_file(run)
        assert (one.run, one.exit_code, two.exit_code) == (two.run, None, 0)
    check_synced(tmp_path, server, variables)


def test_a_stop_does_not_wait_for_a_server_that_hangs(tmp_path: Path, server: Server) -> None:
    server.fault = "hang"
    tracking = {"start_seconds": 600, "end_seconds": 1}
    with Ranks(tmp_path, arguments(tmp_path, tracking=tracking), 1, environment(server, tmp_path)) as ranks:
        wait_until(lambda: server.asked, "wandb's first request")
        os.kill(ranks.processes[0].pid or 0, signal.SIGTERM)
        outcome = ranks.join().check()
    assert status(run_of(tmp_path))["state"] == "stopped"
    first, last = wandb_lines(outcome)
    assert first == "W&B has not started yet; training goes on. `distloop sync runs/run` uploads it"
    assert last == "W&B: no answer within 1 s; `distloop sync runs/run` uploads the rest"
    check_nothing_runs(tmp_path, seconds=20)
    server.released.set()
    check_synced(tmp_path, server, environment(server, tmp_path), "stopped")


@pytest.mark.long
@pytest.mark.parametrize("when", ["start", "end"])
def test_with_the_default_limits_a_server_that_hangs_delays_two_ranks_by_a_minute_at_most(
    tmp_path: Path, server: Server, when: str
) -> None:
    variables = environment(server, tmp_path)
    # Shorter than these waits is how long a rank may keep the others waiting that does nothing.
    words = arguments(tmp_path, "--ddp.timeout-seconds", "5", tracking={"start_seconds": Tracking().start_seconds})
    assert (Tracking().start_seconds, Tracking().end_seconds) == (15, 60)
    server.fault = "hang" if when == "start" else None
    stage.hold(tmp_path, "step")
    with Ranks(tmp_path, words, 2, variables) as ranks:
        stage.arrived(tmp_path, "step", range(2))
        server.fault = "hang"
        stage.let_go(tmp_path, "step")
        outcome = ranks.join().check()  # within two minutes
    assert status(run_of(tmp_path))["state"] == "finished"
    assert "`distloop sync runs/run` uploads" in wandb_lines(outcome)[-1]
    check_nothing_runs(tmp_path, seconds=20)


@pytest.mark.long
@pytest.mark.parametrize("trouble", ["there is none", "it is broken"])
def test_without_wandb_training_goes_on(
    tmp_path: Path, server: Server, without: dict[str, torch.Tensor], trouble: str
) -> None:
    error = {"there is none": "ModuleNotFoundError(\"No module named 'wandb'\")", "it is broken": 'OSError("no libc")'}
    stub = tmp_path / "stub"
    stub.mkdir()
    (stub / "wandb.py").write_text(f"raise {error[trouble]}\n")
    variables = environment(server, tmp_path)
    path = os.pathsep.join([str(stub), str(REPOSITORY)])
    outcome = train(tmp_path, arguments(tmp_path), 1, {**variables, "PYTHONPATH": path})
    check_unhurt(tmp_path, outcome, without)
    (line,) = wandb_lines(outcome)
    why = {"there is none": "No module named 'wandb'", "it is broken": "no libc"}[trouble]
    assert line == f"W&B is off: wandb cannot be imported ({why}). Later `distloop sync runs/run` uploads it"
    check_synced(tmp_path, server, variables)


@pytest.mark.long
@pytest.mark.parametrize("trouble", ["full", "read-only"])
def test_a_disk_on_which_wandb_cannot_write_does_not_hurt(
    tmp_path: Path, server: Server, without: dict[str, torch.Tensor], trouble: str
) -> None:
    folder = run_of(tmp_path) / "wandb"
    folder.mkdir(parents=True)
    if not mount_is_allowed(folder):
        pytest.skip("no right to mount a file system here")
    variables = environment(server, tmp_path)
    if trouble == "full":
        mount("-t", "tmpfs", "-o", "size=64k", "distloop-test", str(folder))
        fill(folder)
    else:
        make_read_only(folder)
    try:
        outcome = train(tmp_path, arguments(tmp_path, tracking={"end_seconds": 5}), 1, variables)
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)
    check_unhurt(tmp_path, outcome, without)
    assert len(wandb_lines(outcome)) <= 2, outcome.output
    check_synced(tmp_path, server, variables)


# ---- offline -----------------------------------------------------------------------------------------------------


@pytest.mark.long
def test_an_offline_run_is_whole_on_the_disk_and_a_sync_uploads_it_once(
    tmp_path: Path, server: Server, nobody_listens: int
) -> None:
    """Without a key, a network or a home, and after everything was killed."""
    run = run_of(tmp_path)
    url = f"http://127.0.0.1:{nobody_listens}"
    nobody = {"HOME": "/proc/self/nowhere", "WANDB_BASE_URL": url, "WANDB_API_KEY": ""}
    stage.hold(tmp_path, "step")
    with Ranks(tmp_path, arguments(tmp_path, tracking={"wandb": "offline"}), 1, nobody) as ranks:
        stage.arrived(tmp_path, "step")
        wait_until(lambda: [len(part.history) for part in parts(run)] == [6], "the rows of six steps")
        kill_all(tmp_path)
        ranks.join()
    stage.let_go(tmp_path, "step")
    outcome = train(tmp_path, arguments(tmp_path), 2, {**nobody, "WANDB_MODE": "offline"}).check()
    assert wandb_lines(outcome) == ["W&B: offline, in runs/run/wandb; `distloop sync runs/run` uploads it"]
    first, second = parts(run)
    assert first.run == second.run == json.loads((run / "wandb.json").read_text())["id"]
    assert [row["global_step"] for row in first.history] == [1, 2, 3, 4, 5, 6]
    assert [told(row) for row in second.history] == in_file(run)[4:]
    assert [row["global_step"] for row in second.history if "redone" in row] == [5, 6]
    assert (first.exit_code, second.exit_code) == (None, 0)
    assert second.summary["state"] == "finished"
    assert "git.diff" in second.files or not (run / "git.diff").exists()
    check_nothing_runs(tmp_path, seconds=20)

    moved = tmp_path / "an archive" / "my run"
    moved.parent.mkdir()
    run.rename(moved)
    done = sync(tmp_path, nobody, str(moved))
    assert (done.returncode, len(done.stdout.splitlines())) == (1, 1), done.stdout
    assert done.stdout.startswith(f"distloop: {moved} was not synced: No API key configured")
    variables = {**environment(server, tmp_path), "HOME": nobody["HOME"]}
    rows = len(in_file(moved))
    for uploaded in (rows, 0):
        done = sync(tmp_path, variables, str(moved))
        assert f": {uploaded} rows uploaded, {rows} in all: {server.url}/" in done.stdout, done.stdout
        assert len(done.stdout.splitlines()) == 1
        mirrored = server.only_run()
        check_rows(mirrored, moved)
        assert mirrored.exit_codes[-1] == 0
    assert (mirrored.name, mirrored.fields["displayName"]) == (first.run, "my run")
    # Whatever became of wandb.json, a whole run is on the server after a sync.
    (moved / "wandb.json").write_text('{"id": "abc')
    assert sync(tmp_path, variables, str(moved)).returncode == 0
    (other,) = [run for run in server.runs.values() if run.name != mirrored.name]
    check_rows(other, moved)


def test_a_run_without_wandb_can_be_synced_later(tmp_path: Path, server: Server) -> None:
    variables = environment(server, tmp_path)
    outcome = train(tmp_path, arguments(tmp_path), 1, {**variables, "WANDB_MODE": "disabled"}).check()
    assert wandb_lines(outcome) == []
    assert not [path.name for path in run_of(tmp_path).iterdir() if "wandb" in path.name]
    assert server.asked == 0
    variables["WANDB_MODE"] = "disabled"
    check_synced(tmp_path, server, variables)


# ---- what people do ----------------------------------------------------------------------------------------------


def written_run(folder: Path, rows: list[Any], **more: str) -> Path:
    """A finished run's directory, written by hand."""
    folder.mkdir(parents=True)
    settings: dict[str, Any] = {
        "wandb": "off",
        "project": "p",
        "entity": None,
        "group": None,
        "tags": [],
        "notes": None,
    }
    config = {"precision": "no", "tracking": {**settings, "start_seconds": 15.0, "end_seconds": 60.0}}
    (folder / "config.yaml").write_text(dump_yaml(config))
    (folder / "status.json").write_text(json.dumps({"state": "finished", "step": 3, "best": None, "attempt": 1}))
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    (folder / "metrics.jsonl").write_text("".join(line + "\n" for line in lines))
    for name, text in more.items():
        (folder / name.replace("_json", ".json")).write_text(text)
    return folder


def test_any_row_keeps_its_place_and_pictures_come_with_the_last_validation(tmp_path: Path, server: Server) -> None:
    picture = io.BytesIO()
    Image.new("L", (8, 8)).save(picture, "png")
    pixels = f"data:image/png;base64,{base64.b64encode(picture.getvalue()).decode()}"
    details = {
        "step": 3,
        "per_class": [{"name": "a cat", "samples": 4, "correct": 3}, {"name": "dog", "samples": 0, "correct": 0}],
        "confusion": [[3, 1], [0, 0]],
        "mistakes": [{"index": 7, "label": 0, "predicted": 1, "confidence": 0.98, "picture": pixels}],
    }
    odd = {"top.5": 0.5, "ä metric, with words": 1, "a/b": 2, "": 3, 'quote"back\\slash': 4}
    rows = [
        {"kind": "train", "step": 1, "epoch": 1, "attempt": 1, "loss": None, "memory_gib": [0.5, None], "time": 1e9},
        {"kind": "validate", "step": 1, "epoch": 1, "attempt": 1, "loss": 2.0, **odd, "recall": [0.5, 1.0]},
        "[1, 2",
        {"loss": 1.0},
        {"kind": "validate", "step": 3, "epoch": 1, "attempt": 1, "loss": 1.5},
    ]
    run = written_run(tmp_path / "runs" / "run", rows, validation_json=json.dumps(details))
    done = sync(tmp_path, environment(server, tmp_path))
    assert done.returncode == 0, done.stdout
    history = server.only_run().history
    assert [row["_step"] for row in history] == [0, 1, 2, 3, 4]
    assert math.isnan(history[0]["train/loss"])
    assert history[0]["train/memory_gib/rank_0"] == 0.5
    assert math.isnan(history[0]["train/memory_gib/rank_1"])
    assert history[0]["_timestamp"] == 1e9
    for name, value in odd.items():
        assert history[1][f"validate/{name}"] == value
    assert (history[1]["validate/recall/0"], history[1]["validate/recall/1"]) == (0.5, 1.0)
    assert "validate/mistakes" not in history[1]
    assert history[4]["class_accuracy/a cat"] == 0.75
    assert "class_accuracy/dog" not in history[4]
    assert history[4]["validate/mistakes"]["captions"] == ["a cat, predicted dog (98%)"]
    pictures = [name for name in server.only_run().files if name.startswith("media/images/")]
    assert len(pictures) == 2, server.only_run().files
    assert run.name == server.only_run().fields["displayName"]


@pytest.mark.parametrize(
    ("words", "code", "text"),
    [
        ([], 2, "usage: distloop sync RUN"),
        (["--all"], 2, "usage: distloop sync RUN"),
        (["nowhere"], 2, "distloop: nowhere is no run's directory"),
        (["runs/old"], 2, "of a version without W&B"),
        (["runs/damaged"], 2, "cannot be read"),
        (["runs/run"], 1, "distloop: runs/run was not synced: "),
    ],
)
def test_a_sync_that_cannot_be_says_why_in_a_line_and_asks_nothing(
    tmp_path: Path, words: list[str], code: int, text: str, nobody_listens: int
) -> None:
    """On a terminal, without a key: wandb would ask for one."""
    for name in ("run", "old", "damaged"):
        written_run(tmp_path / "runs" / name, [])
    (tmp_path / "runs" / "old" / "config.yaml").write_text("seed: 1\n")
    (tmp_path / "runs" / "damaged" / "config.yaml").write_text("seed: [1\n")
    terminal, end = pty.openpty()
    variables = {**clean_environment(), "WANDB_BASE_URL": f"http://127.0.0.1:{nobody_listens}", "WANDB_API_KEY": ""}
    variables |= {"HOME": str(tmp_path), "TERM": "xterm"}
    done = subprocess.run(
        [sys.executable, "-m", "distloop.commands.cli", "sync", *words],
        cwd=tmp_path,
        env=variables,
        timeout=100,
        stdin=end,
        stdout=end,
        stderr=end,
        check=False,
    )
    os.close(end)
    output = os.read(terminal, 65536).decode()
    os.close(terminal)
    assert done.returncode == code, output
    assert text in output
    assert len(output.splitlines()) == 1
    check_nothing_runs(tmp_path)


@pytest.mark.long
def test_while_a_sync_is_at_it_an_attempt_goes_without_wandb(tmp_path: Path, server: Server) -> None:
    variables = environment(server, tmp_path)
    run_of(tmp_path).mkdir(parents=True)
    with only_mirror(run_of(tmp_path), 0.0):
        outcome = train(tmp_path, arguments(tmp_path), 1, variables).check()
        (line,) = wandb_lines(outcome)
        assert line.startswith("W&B is off: a sync, or the W&B process of an earlier attempt, is still at it. Later ")
        refused = sync(tmp_path, variables)
        assert (refused.returncode, len(refused.stdout.splitlines())) == (2, 1)
        assert "is being uploaded already" in refused.stdout
    check_synced(tmp_path, server, variables)


@pytest.mark.long
def test_two_runs_side_by_side_are_two_and_a_run_begun_anew_is_another(tmp_path: Path, server: Server) -> None:
    """In a folder with a space in its name."""
    variables = environment(server, tmp_path)
    words = {name: arguments(tmp_path, "--name", name, "--runs-dir", "some runs") for name in ("one", "two")}
    with Ranks(tmp_path, words["one"], 1, variables) as one:
        (tmp_path / "two").mkdir()
        two = Ranks(tmp_path / "two", words["two"], 1, variables)
        assert wandb_lines(one.join().check())[0].startswith("W&B: http")
        two.join().check()
    assert len(server.runs) == 2
    for run in server.runs.values():
        name = run.fields["displayName"]
        check_rows(run, (tmp_path / "two" if name == "two" else tmp_path) / "some runs" / name)
    train(tmp_path, [*words["one"], "--resume", "never"], 1, variables).check()
    assert len(server.runs) == 3
    last = list(server.runs.values())[-1]
    check_rows(last, tmp_path / "some runs" / "one")
    train(tmp_path, [*words["one"], "--resume", "extend", "--train.steps", "60"], 1, variables).check()
    assert len(server.runs) == 3
    check_rows(last, tmp_path / "some runs" / "one")
    assert last.history[-1]["global_step"] == 60
    assert last.exit_codes == [0, 0]
    done = sync(tmp_path, variables, "some runs/one.old-1", "some runs/one")
    assert done.stdout.count(": 0 rows uploaded") == 2, done.stdout


@pytest.mark.long
def test_a_run_that_is_stopped_before_its_first_row_is_there_and_goes_on(tmp_path: Path, server: Server) -> None:
    variables = environment(server, tmp_path)
    words = arguments(tmp_path, log={"every_steps": 1000}, validate={"every_steps": 1000, "every_epochs": None})
    stage.hold(tmp_path, "any-step")
    with Ranks(tmp_path, words, 1, variables) as ranks:
        stage.arrived(tmp_path, "any-step")
        os.kill(ranks.processes[0].pid or 0, signal.SIGTERM)
        stage.let_go(tmp_path, "any-step")
        ranks.join().check()
    mirrored = server.only_run()
    assert (mirrored.history, mirrored.exit_codes, mirrored.preempting) == ([], [1], True)
    train(tmp_path, words, 1, variables).check()
    check_rows(mirrored, run_of(tmp_path))
    assert mirrored.exit_codes == [1, 0]


@pytest.mark.long
def test_ending_at_once_by_ctrl_c_leaves_no_process_behind(tmp_path: Path, server: Server) -> None:
    """Also where the server hangs."""
    stage.hold(tmp_path, "step", in_c=True)
    with Ranks(tmp_path, arguments(tmp_path), 1, environment(server, tmp_path)) as ranks:
        stage.arrived(tmp_path, "step")
        server.fault = "hang"
        pid = ranks.processes[0].pid or 0
        os.kill(pid, signal.SIGINT)
        wait_until(lambda: "Ctrl-C again" in ranks.outputs[0].read_text(), "the notice")
        while ranks.processes[0].is_alive():
            os.kill(pid, signal.SIGINT)
            time.sleep(0.5)
        assert ranks.join().codes == [130]
    check_nothing_runs(tmp_path, seconds=20)


@pytest.mark.long
def test_a_server_that_has_lost_the_run_gets_all_of_it(tmp_path: Path, server: Server) -> None:
    """Or another server; also where an attempt that was offline lies between, and what it did again."""
    variables = environment(server, tmp_path)
    stage.hold(tmp_path, "step")
    with Ranks(tmp_path, arguments(tmp_path), 1, variables) as ranks:
        stage.arrived(tmp_path, "step")
        ranks.kill()
        ranks.join()
    wait_until(lambda: server.only_run().exit_codes, "the end of the W&B run")
    stage.let_go(tmp_path, "step")
    assert [row["global_step"] for row in server.only_run().history] == [1, 2, 3, 4, 5, 6]
    # Goes on with a row every two steps, and without W&B.
    words = arguments(tmp_path, log={"every_steps": 2}, tracking={"wandb": "off"})
    train(tmp_path, words, 1, variables).check()
    before = [told(row) for row in server.only_run().history]
    assert sync(tmp_path, variables).returncode == 0
    history = server.only_run().history
    assert [told(row) for row in history] == before + in_file(run_of(tmp_path))[4:]
    assert json.loads((run_of(tmp_path) / "wandb.json").read_text())["surplus"] == 2
    server.runs.clear()
    check_synced(tmp_path, server, variables)
