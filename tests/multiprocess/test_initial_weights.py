"""--init-from and --init-fit with files of other programs: a run begins with them once, the same on all ranks."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from distloop.training.models import mlp
from tests.tools.ranks import train, write_config
from tests.tools.records import largest_difference, run_of, status, steps_saved, weights

SETTINGS = {
    "data": "digits",
    "model": {"name": "mlp", "args": {"hidden": 8}},
    "device": "cpu",
    "optim": {"lr": 0.001},
    "batch": {"global_size": 16},
    "train": {"steps": 4},
    "checkpoint": {"every_steps": 2},
    "init_from": "model_3.pth",
}


def words_of(folder: Path, **changes: Any) -> list[str]:
    return ["--config", str(write_config(folder, {**SETTINGS, **changes}))]


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_run_begins_with_what_fits_of_a_pth_file_and_goes_on_without_it(tmp_path: Path, world_size: int) -> None:
    file = tmp_path / "model_3.pth"
    source = mlp((1, 8, 8), 5, hidden=8)
    state = {f"module.{name}": tensor for name, tensor in source.state_dict().items()}
    torch.save({"model": state, "optimizer": {}, "epoch": 3}, file)

    outcome = train(tmp_path, words_of(tmp_path), world_size)
    assert outcome.codes == [2] * world_size
    assert outcome.output.count("5.weight: [5, 8] in the file, [10, 8] in the model") == 1
    assert outcome.output.count("--init-fit begins with the tensors that fit") == 1

    words = [*words_of(tmp_path), "--init-fit"]
    outcome = train(tmp_path, words, world_size).check()
    run = run_of(tmp_path)
    assert outcome.output.count(f"starting from the weights in {file.name}") == 1
    for name, was, now in (("5.weight", [5, 8], [10, 8]), ("5.bias", [5], [10])):
        line = f"--init-fit: {name} starts fresh: {was} in {file.name}, {now} in the model\n"
        assert outcome.output.count(line) == 1, outcome.output
    assert outcome.output.count("--init-fit:") == 2
    whole = weights(run)
    body = {name: tensor for name, tensor in source.state_dict().items() if not name.startswith("5.")}
    assert 0 < largest_difference({name: whole[name] for name in body}, body) < 0.02, "4 steps of at most 0.001 each"

    # As if it had been killed after step 2: it goes on to the same bits, and does not ask for the file.
    assert steps_saved(run)[-2:] == [2, 4]
    shutil.rmtree(run / "checkpoints" / "step_00000004")
    (run / "status.json").write_text(json.dumps({**status(run), "state": "running"}))
    file.unlink()
    outcome = train(tmp_path, words, world_size).check()
    assert "--init-fit" not in outcome.output
    assert status(run)["first_step"] == 2
    assert largest_difference(weights(run), whole) == 0
    outcome = train(tmp_path, words_of(tmp_path), world_size)
    assert "init_fit: True there, False now" in outcome.output


def test_a_pickled_module_is_refused_once_on_two_ranks(tmp_path: Path) -> None:
    torch.save(mlp((1, 8, 8), 10, hidden=8), tmp_path / "model_3.pth")
    outcome = train(tmp_path, words_of(tmp_path), 2)
    assert outcome.codes == [2, 2]
    assert outcome.output.count("cannot be read without running code of the file") == 1
    assert outcome.output.count('torch.save(model.state_dict(), "plain.pth")') == 1
