"""A loop that logs numbers and pictures of its own: on two ranks, killed, continued on one, in all that shows them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from distloop.commands.report.page import main as report
from distloop.run.figures import STEPS_KEPT
from tests.lab.own_numbers import SHADE
from tests.tools import stage
from tests.tools.ranks import Ranks, train, wait_until
from tests.tools.records import all_rows, rows, run_of, status
from tests.tools.stopping import check_nothing_runs, kill_all, waiting_run
from tests.tools.wandb_server import Server

LOOP = "tests.lab.own_numbers"
STEPS = 16  # of four samples, an epoch; a save every four steps, a validation every two


def arguments(folder: Path, *more: str, steps: int = STEPS, **changes: Any) -> list[str]:
    settings: dict[str, Any] = {"data": {"name": "tests.lab.stopping:points"}, "batch": {"global_size": 4}}
    settings |= {"validate": {"every_steps": 2, "batch_size": 4}, "checkpoint": {"every_steps": 4}}
    return [*waiting_run(folder, **{**settings, "train": {"steps": steps}, **changes}), *more]


def check_rows(run: Path, steps: int, ranks_at: dict[int, int]) -> None:
    """Each step once, with what the loop has logged. `ranks_at`: attempt -> its number of ranks."""
    trained = rows(run, "train")
    assert [row["step"] for row in trained] == list(range(1, steps + 1))
    for row in trained:
        step, ranks = row["step"], ranks_at[row["attempt"]]
        assert (row["samples"], row["rank"], row["who"]) == (4, sum(range(ranks)), 0)
        assert row["thirds"] == sum([float(np.float32(1 / 3))] * ranks)
        assert row["temperature"] == pytest.approx(0.5 / step)
        assert row["rates"] == [0.1, 0.01 * step]
        assert row["is_even"] is (step % 2 == 0)
    for row in rows(run, "validate"):
        assert row["extra"] == row["step"]
    assert [row["share"] for row in rows(run, "epoch")] == [row["step"] / steps for row in rows(run, "epoch")]
    figures = [(row["step"], row["name"]) for row in rows(run, "figure")]
    assert figures == [(step, name) for step in range(2, steps + 1, 2) for name in ("shade", "drawn")]


def check_pictures(run: Path, steps: int) -> None:
    kept = list(range(2, steps + 1, 2))[-STEPS_KEPT:]
    files = sorted(str(path.relative_to(run)) for path in (run / "figures").rglob("*") if path.is_file())
    assert files == [f"figures/step_{step:08d}/{name}.png" for step in kept for name in ("drawn", "shade")]
    assert {row["file"] for row in rows(run, "figure") if row["step"] in kept} == set(files)
    for step in kept:
        shade = np.asarray(Image.open(run / "figures" / f"step_{step:08d}" / "shade.png"))
        assert (shade.shape, set(shade.flat)) == ((20, 30), {SHADE * step})


@pytest.mark.long
def test_own_numbers_and_pictures_are_in_rows_report_and_wandb_after_a_kill(tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    words = arguments(tmp_path, tracking={"wandb": "online", "start_seconds": 60})
    run = run_of(tmp_path)
    with Server(rewinds=True) as server:
        variables = server.environment(tmp_path / "home")
        stage.hold(tmp_path, "step")
        with Ranks(tmp_path, words, 2, variables, LOOP) as ranks:
            stage.arrived(tmp_path, "step", range(2))
            # Done are steps 1 to 6, of which 5 and 6 are not saved; W&B has heard of all of them.
            mirrored = server.only_run()
            wait_until(lambda: len(mirrored.history) == len(all_rows(run)) > 6, "the rows at W&B")
            assert sorted(path.name for path in (run / "figures").iterdir())[-1] == "step_00000006"
            kill_all(tmp_path)
            ranks.join()
        stage.let_go(tmp_path, "step")
        (run / "figures" / "step_00000006" / "left_over.png").write_bytes(b"of a loop that was changed meanwhile")
        outcome = train(tmp_path, words, 1, variables, LOOP).check()
        assert "Traceback" not in outcome.output
        check_nothing_runs(tmp_path, seconds=20)
    assert status(run)["state"] == "finished"
    check_rows(run, STEPS, {1: 2, 2: 1})
    check_pictures(run, STEPS)
    assert "samples 4 · thirds 0.3333 · rank 0 · temperature 0.03125 · rates [0.1, 0.16]" in outcome.output

    history, in_file = mirrored.history, all_rows(run)
    assert [row["_step"] for row in history] == list(range(len(in_file)))
    for logged, row in zip(history, in_file, strict=True):
        assert (logged["global_step"], logged["attempt"]) == (row["step"], row["attempt"])
        if row["kind"] == "train":
            assert logged["train/samples"] == 4
            assert (logged["train/rates/0"], logged["train/rates/1"]) == tuple(row["rates"])
            assert logged["train/memory_gib/rank_0"] == row["memory_gib"][0]
        elif row["kind"] == "figure":
            picture = logged[f"figures/{row['name']}"]
            assert picture["_type"] == "image-file"
            assert (run / row["file"]).read_bytes() == mirrored.files[picture["path"]]
            assert not any(key.startswith("figure/") for key in logged)

    assert report([str(run)]) == 0
    page = (run / "report.html").read_text()
    for title in ("Training thirds", "Training temperature", "Training rates/0", "Training rates/1", "Epoch share"):
        assert f"<h3>{title}</h3>" in page
    figures = page.partition("<h2>Figures</h2>")[2].partition("</section>")[0]
    assert re.findall(r'alt="(\w+)"', figures) == ["drawn", "shade"]
    assert figures.count(f"step {STEPS}<") == 2


def test_the_pictures_of_the_last_steps_are_kept_and_every_row_stays(tmp_path: Path) -> None:
    steps = 2 * (STEPS_KEPT + 3)
    train(tmp_path, arguments(tmp_path, steps=steps), loop=LOOP).check()
    check_rows(run_of(tmp_path), steps, {1: 1})
    check_pictures(run_of(tmp_path), steps)


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        ("names", "sum_over_ranks(): ranks give values of other names, or in another order. "),
        ("number of names", "sum_over_ranks(): ranks give values of other names, or in another order. "),
        ("sum", "sum_over_ranks(): table is a Tensor of shape [2]; it takes numbers, and tensors of no dimension."),
        ("value", "trackers.log('train', …): table is a Tensor of shape [2]. A row takes numbers, and lists of them; "),
        ("key", "trackers.log('train', …): epoch is a key of its own in every row. Give your value another name, "),
        ("kind", "trackers.log('test', …): no such kind of row. Known: train, epoch, validate."),
        ("picture", "trackers.figure('sound', 3, …): the picture is a ndarray of shape [8]. It takes a figure of "),
    ],
)
def test_a_mistake_in_the_loop_is_one_message(tmp_path: Path, world_size: int, mistake: str, message: str) -> None:
    outcome = train(tmp_path, arguments(tmp_path), world_size, {"OWN_MISTAKE": mistake}, LOOP)
    if world_size == 1 and "names" in mistake:
        outcome.check()  # one process agrees with itself
        return
    assert outcome.codes == [2] * world_size, outcome.output
    assert outcome.output.count(f"distloop: {message}") == 1
    assert "Traceback" not in outcome.output
    assert status(run_of(tmp_path))["state"] == "failed"
