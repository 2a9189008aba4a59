"""The gradient is divided by what the batches held: a weight that says otherwise is refused before a save."""

from __future__ import annotations

import itertools
import re
from pathlib import Path
from typing import Any

import pytest

from tests.tools.ranks import Outcome, train, write_config
from tests.tools.records import rows, weights

LAB = "tests.lab.weighing"
BASE: dict[str, Any] = {
    "device": "cpu",
    "data": {"name": f"{LAB}:make_data", "workers": 0},
    "model": {"name": "mlp", "args": {"hidden": 8, "num_outputs": 3}},
    "task": f"{LAB}:Weighing",
    "optim": {"name": "sgd", "lr": 0.1},
    "batch": {"global_size": 16},
    "train": {"steps": 2},
    "log": {"every_steps": 1},
    "validate": {"batch_size": 64},
}
RANKS = pytest.mark.parametrize("world_size", [1, 2])
RIGHT = ["int", "float", "tensor", "float tensor", "numpy", "numpy float"]
OFTEN = {
    "tensor",
    "numpy",
    ("Weighing", "none"),
    ("Weighing", "for each"),
    ("Views", "nan tensor"),
    ("Views", "negative"),
}
WRONG = {
    "none": "NoneType",
    "nan": "nan",
    "nan tensor": "nan",
    "negative": "-",
    "negative tensor": "-",
    "for each": "Tensor of shape [",
    "text": "str",
}


def run(folder: Path, settings: dict[str, Any], *words: str, world_size: int = 1) -> Outcome:
    return train(folder, ["--config", str(write_config(folder, {**BASE, **settings})), *words], world_size)


def refused(outcome: Outcome, *says: str) -> None:
    """Exit code 2, one message, no traceback."""
    assert outcome.codes == [2] * len(outcome.codes), outcome.output
    assert "Traceback" not in outcome.output
    assert len(re.findall(r"\ndistloop: (?!saved step)", outcome.output)) == 1, outcome.output
    for words in says:
        assert words in outcome.output, f"{words!r} is missing in: {outcome.output}"


def nothing_is_saved(folder: Path) -> None:
    assert not list(folder.glob("runs/*/checkpoints/step_*"))


@RANKS
@pytest.mark.parametrize(("collate", "holds"), [("doubling_many", 32), ("dropping_many", 12), ("padding_many", 21)])
def test_a_collate_that_changes_the_count_is_refused_with_both_numbers(
    tmp_path: Path, collate: str, holds: int, world_size: int
) -> None:
    data = {**BASE["data"], "collate": f"{LAB}:{collate}"}
    outcome = run(tmp_path, {"data": data, "batch": {"global_size": 16 * world_size}}, world_size=world_size)
    refused(outcome, f"the weight {holds}", "16 samples", "data.collate", 'weight = "', "reduction")
    nothing_is_saved(tmp_path)


@RANKS
@pytest.mark.parametrize("collate", ["doubling", "dropping", "padding"])
def test_with_another_word_the_real_weight_divides(tmp_path: Path, collate: str, world_size: int) -> None:
    """All samples are alike, so that the mean gradient and the accuracy are the same over any of them."""
    found = []
    for name in ("keeping", collate):
        data = {**BASE["data"], "args": {"alike": True}}
        settings = {"task": f"{LAB}:Views", "data": data | ({"collate": f"{LAB}:{name}"} if name == collate else {})}
        run(tmp_path, settings, "--name", name, world_size=world_size).check()
        trained, [validated] = (rows(tmp_path / "runs" / name, kind) for kind in ("train", "validate"))
        found.append([*(row[key] for row in trained for key in ("gradient_norm", "loss")), validated["accuracy"]])
        assert 0 <= validated["accuracy"] <= 1
    assert found[1] == pytest.approx(found[0], rel=1e-5)


@RANKS
@pytest.mark.parametrize("form", [pytest.param(f, marks=[] if f in OFTEN else pytest.mark.long) for f in RIGHT])
def test_a_right_weight_may_have_any_form_of_a_number(tmp_path: Path, form: str, world_size: int) -> None:
    for task in ("Weighing", "Views"):
        settings = {"task": {"name": f"{LAB}:{task}", "args": {"form": form}}}
        run(tmp_path, settings, "--name", task, world_size=world_size).check()
    assert weights(tmp_path / "runs" / "Weighing").keys() == weights(tmp_path / "runs" / "Views").keys()
    assert rows(tmp_path / "runs" / "Weighing", "train")[-1]["loss"] == pytest.approx(
        rows(tmp_path / "runs" / "Views", "train")[-1]["loss"], rel=1e-6
    )


@RANKS
@pytest.mark.parametrize(
    ("task", "form"),
    [
        pytest.param(*case, marks=[] if case in OFTEN else pytest.mark.long)
        for case in itertools.product(["Weighing", "Views"], WRONG)
    ],
)
def test_a_weight_that_counts_nothing_is_refused(tmp_path: Path, task: str, form: str, world_size: int) -> None:
    outcome = run(tmp_path, {"task": {"name": f"{LAB}:{task}", "args": {"form": form}}}, world_size=world_size)
    refused(outcome, "task.loss()", WRONG[form])
    nothing_is_saved(tmp_path)


@RANKS
def test_a_mean_with_the_weight_one_is_refused(tmp_path: Path, world_size: int) -> None:
    outcome = run(
        tmp_path, {"task": {"name": f"{LAB}:Weighing", "args": {"form": "one", "mean": True}}}, world_size=world_size
    )
    refused(outcome, f"the weight 1 for {16 // world_size} samples", "mean", 'reduction="sum"), len(targets)')
    assert not re.search(r"weight = |views|data\.collate", outcome.output), "a mean stays one under another word"
    nothing_is_saved(tmp_path)


def test_a_weight_that_is_no_word_is_refused(tmp_path: Path) -> None:
    refused(run(tmp_path, {"task": f"{LAB}:Numbered"}), "weight = 3", '"samples"')


@pytest.mark.parametrize(
    "more", [{"batch": {"global_size": 16, "micro_size": 4}}, {"train": {"steps": 2, "on_nonfinite": "skip"}}]
)
@RANKS
def test_the_right_weight_passes_when_steps_are_accumulated_or_skipped(
    tmp_path: Path, more: dict[str, Any], world_size: int
) -> None:
    run(
        tmp_path, {"task": {"name": f"{LAB}:Weighing", "args": {"form": "tensor"}}, **more}, world_size=world_size
    ).check()


@RANKS
def test_a_rank_without_a_sample_has_the_weight_of_the_one_that_stands_in(tmp_path: Path, world_size: int) -> None:
    """17 samples: one is left for the last step, of which rank 1 has none."""
    data = {**BASE["data"], "args": {"samples": 17}}
    settings = {"data": data, "batch": {"global_size": 16, "remainder": "train"}, "train": {"epochs": 2}}
    run(tmp_path, settings, world_size=world_size).check()
    assert [row["step"] for row in rows(tmp_path / "runs" / "run", "train")] == [1, 2, 3, 4]


def test_only_the_validation_drops_samples(tmp_path: Path) -> None:
    """The collate drops from batches of more than 16."""
    data = {**BASE["data"], "collate": f"{LAB}:dropping_in_validation"}
    refused(run(tmp_path, {"data": data}), "the weight 48", "64 samples", "data.collate")
