"""kill -9, at any moment and of any rank: the same command continues, to the bits of the run that nobody disturbed."""

from __future__ import annotations

import random
from functools import partial
from pathlib import Path

import pytest

from distloop.run.checkpoint import verify
from tests.tools.kills import await_moment, has_reached, last_row, newest_step, saves_under_way, started_from
from tests.tools.ranks import Ranks, train, wait_until, write_config
from tests.tools.records import found, largest_difference, rows, status, weights

KILLS, IN_START_UP, IN_SAVE = 20, 4, 9  # of the last ones a few may come too late, when the save has just ended
STEPS = 300

# Saves long and frequent enough to be hit: some MB each, with an averaged model, after every 8 steps and at each best.
SETTINGS = {
    "data": "digits",
    "model": {"name": "mlp", "args": {"hidden": 512}},
    "optim": {"name": "adamw", "ema_decay": 0.99},
    "batch": {"global_size": 32},
    "train": {"steps": STEPS},
    "validate": {"every_epochs": None, "every_steps": 30},
    "log": {"every_steps": 1},
    "checkpoint": {"every_steps": 8},
}


@pytest.mark.parametrize("world_size", [1, pytest.param(2, marks=pytest.mark.long)])
def test_a_run_that_is_killed_20_times_ends_with_the_bits_of_the_one_that_was_not(
    tmp_path: Path, world_size: int
) -> None:
    config = ["--config", str(write_config(tmp_path, SETTINGS))]
    train(tmp_path, [*config, "--name", "whole"], world_size).check()
    whole, killed = tmp_path / "runs" / "whole", tmp_path / "runs" / "killed"

    chance = random.Random(world_size)
    kinds = ["start-up"] * IN_START_UP + ["save"] * IN_SAVE + ["anywhere"] * (KILLS - IN_START_UP - IN_SAVE)
    chance.shuffle(kinds)
    # The moments lie all over the run, and in order, so that every attempt has something left to do.
    steps = sorted(chance.sample(range(1, STEPS - 60), KILLS))
    inside_saves, newest = 0, 0
    for kind, step in zip(kinds, steps, strict=True):
        attempt, _ = last_row(killed)
        ranks = Ranks(tmp_path, [*config, "--name", "killed"], world_size)
        await_moment(kind, killed, ranks, attempt, step, chance)
        ranks.kill()
        outcome = ranks.join()
        assert outcome.codes == [-9] * world_size, outcome.output  # nothing had ended by itself
        # What its kill left is what counts: the moment was inside a save if the save is unfinished for ever.
        inside_saves += bool(saves_under_way(killed))
        assert started_from(outcome.outputs[0]) in (None, newest), "the newest checkpoint was not continued from"
        assert newest_step(killed) >= newest, "a published checkpoint was lost"
        newest = newest_step(killed)
        if newest:
            verify(killed / "checkpoints" / f"step_{newest:08d}")
    assert inside_saves >= 5

    outcome = train(tmp_path, [*config, "--name", "killed"], world_size).check()
    assert started_from(outcome.outputs[0]) == newest
    assert "passed over" not in outcome.output
    assert largest_difference(weights(killed), weights(whole)) == 0
    assert [row["step"] for row in rows(killed, "train")] == list(range(1, STEPS + 1))
    for kind in ("train", "epoch", "validate"):
        assert list(map(found, rows(killed, kind))) == list(map(found, rows(whole, kind))), kind
    kept = sorted(path.name for path in (killed / "checkpoints").iterdir())
    assert kept == sorted(path.name for path in (whole / "checkpoints").iterdir())  # and nothing unfinished
    assert status(killed)["state"] == "finished"
    assert not (killed / "lock.json").exists()


def test_when_one_of_two_ranks_is_killed_the_other_ends_and_the_run_continues_to_the_same_bits(tmp_path: Path) -> None:
    config = ["--config", str(write_config(tmp_path, SETTINGS))]
    train(tmp_path, [*config, "--name", "whole"], 2).check()
    whole, killed = tmp_path / "runs" / "whole", tmp_path / "runs" / "killed"
    for attempt, (victim, step) in enumerate(((0, 20), (1, 60))):
        ranks = Ranks(tmp_path, [*config, "--name", "killed"], 2)
        wait_until(partial(has_reached, killed, attempt, step), f"step {step}")
        ranks.processes[victim].kill()
        other = ranks.processes[1 - victim]
        other.join(20)
        assert other.exitcode == 1, "the other rank is still there"
        ranks.join()
        assert (
            newest_step(killed) >= step - 16
        )  # the last save that was due may have been under way, the one before not
        assert status(killed)["state"] == "failed"  # said by the rank that lives
        assert f"rank {victim} on" in status(killed)["reason"]
        # A rank 0 that lives brings the save to its end.
        assert victim == 0 or not saves_under_way(killed)
    newest = newest_step(killed)
    outcome = train(tmp_path, [*config, "--name", "killed"], 2).check()
    assert started_from(outcome.outputs[0]) == newest
    assert largest_difference(weights(killed), weights(whole)) == 0
    assert [row["step"] for row in rows(killed, "train")] == list(range(1, STEPS + 1))
    assert status(killed)["attempt"] == 3
