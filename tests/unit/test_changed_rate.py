"""What --resume extend says of the learning rate, where the schedule of before is the user's own."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from distloop.config.settings import Config, Optim, Schedule, Train
from distloop.training.changed_rate import say_changed_rate


def half(step: int, total_steps: int) -> float:
    return 0.5


def broken(step: int, total_steps: int) -> float:
    raise RuntimeError("edited since")


@pytest.mark.parametrize(
    ("name", "said"), [("half", ["the learning rate at step 3 goes from 0.05 to 0.1"]), ("broken", []), ("gone", [])]
)
def test_an_old_schedule_that_cannot_be_asked_any_more_stops_nobody(name: str, said: list[str], tmp_path: Path) -> None:
    settings = {"optim": {"lr": 0.1}, "schedule": {"name": f"{__name__}:{name}"}, "train": {"steps": 4}}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(settings))
    start = SimpleNamespace(checkpoint=tmp_path, changes={"schedule.name": 1}, step=2, messages=[])
    run: Any = SimpleNamespace(ranks=SimpleNamespace(is_main=True), start=start, path=tmp_path)
    run.config = Config(optim=Optim(lr=0.1), schedule=Schedule("constant"), train=Train(steps=4))
    run.plan = SimpleNamespace(steps_per_epoch=4, total_steps=4)
    say_changed_rate(run)
    assert start.messages == said
