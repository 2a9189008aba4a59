"""What a data set opens at its first sample is open in loader processes alone: no process that has loaded a sample
forks."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch

from distloop.config.settings import Config, Data
from distloop.data.datasets import DataSource
from distloop.data.order import Plan
from distloop.training.gradients import trial_batches
from tests.lab import open_early
from tests.lab.handles import make_data, write_files
from tests.tools.ranks import Ranks, command, train, write_config

SETTINGS = {
    "device": "cpu",
    "data": {"name": "tests.lab.handles:make_data", "root": ".", "workers": 2},
    "model": {"name": "mlp", "args": {"hidden": 8, "num_outputs": 3}},
    "batch": {"global_size": 16},
    "train": {"epochs": 2},
}


@pytest.mark.parametrize("world_size", [1, 2])
def test_no_rank_that_starts_loader_processes_loads_a_sample_itself(tmp_path: Path, world_size: int) -> None:
    write_files(tmp_path)
    config = write_config(tmp_path, SETTINGS)
    with Ranks(tmp_path, ["--config", str(config)], world_size) as ranks:
        ranks.join().check()
        trainers = {str(process.pid) for process in ranks.processes}
    assert not list(tmp_path.glob("forked-*"))
    opened = set((tmp_path / "opened").read_text().split())
    assert opened, "loader processes open them"
    # Rank 0 draws the validation's mistakes when all of its loader processes run.
    assert not opened & trainers - {str(ranks.processes[0].pid)}


def test_evaluate_loads_no_sample_before_its_loader_processes_start(tmp_path: Path) -> None:
    write_files(tmp_path)
    train(tmp_path, ["--config", str(write_config(tmp_path, SETTINGS)), "--name", "run"]).check()
    for leftover in (*tmp_path.glob("forked-*"), tmp_path / "opened"):
        leftover.unlink()
    done = command([sys.executable, "-m", "distloop.evaluate", "runs/run"], tmp_path)
    assert done.returncode == 0, done.stdout
    assert not list(tmp_path.glob("forked-*"))


def test_the_batches_of_trial_passes_are_loaded_by_a_loader_process(tmp_path: Path) -> None:
    write_files(tmp_path)
    config = Config(data=Data("tests.lab.handles:make_data", root=str(tmp_path), workers=2))
    plan = Plan(80, 16, 2)
    batches = trial_batches(config, DataSource(*make_data(str(tmp_path))), plan, torch.device("cpu"), torch.nn.Module())
    assert [len(inputs) for inputs, _ in batches] == [8, 8]
    assert str(os.getpid()) not in (tmp_path / "opened").read_text().split()


# ---- what is open before ---------------------------------------------------------------------------------------------

EARLY = SETTINGS | {"data": {"name": "tests.lab.open_early:make_data", "root": ".", "workers": 2}}


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("kind", ["a_file", "an_npz_file"])
def test_a_file_that_loader_processes_would_share_is_refused_and_the_way_out_trains(
    tmp_path: Path, kind: str, world_size: int
) -> None:
    open_early.write_all(tmp_path)
    words = ["--config", str(write_config(tmp_path, EARLY)), "--data.args.kind", kind]
    done = train(tmp_path, words, world_size, environment={"MIXED_UP": str(tmp_path)})
    assert done.codes == [2] * world_size, done.output
    assert done.output.count("share one position in the file") == 1, done.output
    assert "Traceback" not in done.output
    train(tmp_path, [*words, "--data.workers", "0"], world_size, environment={"MIXED_UP": str(tmp_path)}).check()
    assert not (tmp_path / "mixed-up").exists()


@pytest.mark.parametrize("kind", ["a_database", "a_map_of_a_file"])
def test_what_is_open_and_has_no_common_position_gives_the_rows_that_were_asked_for(tmp_path: Path, kind: str) -> None:
    open_early.write_all(tmp_path)
    words = ["--config", str(write_config(tmp_path, EARLY)), "--data.args.kind", kind]
    train(tmp_path, words, environment={"MIXED_UP": str(tmp_path)}).check()
    assert not (tmp_path / "mixed-up").exists()
