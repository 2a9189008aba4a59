"""What users bring in forms of their own trains what it says, or is refused: names, types, dtypes and states.

The user code is that of tests/lab/bordering.py. The reference is the same code in the plainest form.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.lab.bordering import BUFFERS, VALIDATED
from tests.tools.ranks import Outcome, train, write_config
from tests.tools.records import largest_difference, rows, weights

LAB = "tests.lab.bordering"
BOTH = pytest.mark.parametrize("world_size", [1, 2])
RANKS = pytest.mark.parametrize("world_size", [1, pytest.param(2, marks=pytest.mark.long)])
SETTINGS: dict[str, Any] = {
    "data": {"name": f"{LAB}:make_data", "workers": 0},
    "model": {"name": "mlp", "args": {"hidden": 4, "num_outputs": 2}},
    "task": "classification",
    "optim": {"name": "sgd", "lr": 0.3, "momentum": 0, "weight_decay": 0},
    "schedule": "constant",
    "batch": {"global_size": 16},
    "train": {"steps": 6},
    "validate": {"every_steps": 3, "batch_size": 4},
    "log": {"every_steps": 1},
    "tracking": {"report": False},
    "device": "cpu",
}


class Runs:
    """Runs in a folder, one a name."""

    def __init__(self, folder: Path, **settings: Any) -> None:
        self.folder, self.config = folder, str(write_config(folder, {**SETTINGS, **settings}))

    def start(self, name: str, world_size: int, *more: str) -> Outcome:
        return train(self.folder, ["--config", self.config, "--name", name, *more], world_size)

    def train(self, name: str, world_size: int, *more: str) -> Path:
        self.start(name, world_size, *more).check()
        return self.folder / "runs" / name

    def refused(self, world_size: int, *more: str) -> str:
        """The one message of a run that is refused before its first step."""
        outcome = self.start("refused", world_size, *more)
        assert outcome.codes == [2] * world_size, outcome.output
        assert "Traceback" not in outcome.output
        assert not (metrics := self.folder / "runs" / "refused" / "metrics.jsonl").exists() or not metrics.read_text()
        said = [line for output in outcome.outputs for line in output.splitlines() if line.startswith("distloop: ")]
        assert len(said) == 1, outcome.output
        return said[0]


# ---- names and types -------------------------------------------------------------------------------------------------


@RANKS
@pytest.mark.parametrize("habit", ["Attributes", "Methods", "Wrapper", "Derived", "Declared"])
def test_a_data_set_is_asked_for_what_its_type_says(tmp_path: Path, habit: str, world_size: int) -> None:
    runs = Runs(tmp_path)
    plain, other = runs.train("plain", world_size), runs.train("other", world_size, "--data.args.habit", habit)
    assert largest_difference(weights(plain), weights(other)) == 0
    assert rows(other, "validate")[-1]["loss"] == rows(plain, "validate")[-1]["loss"]


@RANKS
@pytest.mark.parametrize(
    ("habit", "says"),
    [
        ("Undeclared", "class Undeclared(distloop.data.WholeBatches)"),
        ("Augmented", "__getitem__ of its own"),
        ("Swapped", "Swapped(val, train)"),
    ],
)
def test_data_that_can_be_taken_for_something_else_is_refused(
    tmp_path: Path, habit: str, says: str, world_size: int
) -> None:
    assert says in Runs(tmp_path).refused(world_size, "--data.args.habit", habit)


@RANKS
@pytest.mark.parametrize("collate", ["as_record", "as_named", "as_tokens"])
@pytest.mark.parametrize("dtype", [pytest.param("float32", marks=pytest.mark.long), "float64"])
def test_a_batch_of_any_form_is_the_same_batch(tmp_path: Path, collate: str, dtype: str, world_size: int) -> None:
    runs = Runs(tmp_path, dtype=dtype)
    plain = runs.train("plain", world_size)
    other = runs.train("other", world_size, "--data.collate", f"{LAB}:{collate}")
    assert largest_difference(weights(plain), weights(other)) == 0


@RANKS
def test_a_batch_of_a_class_whose_tensors_nobody_would_move_is_refused(tmp_path: Path, world_size: int) -> None:
    said = Runs(tmp_path).refused(world_size, "--data.collate", f"{LAB}:as_plain")
    assert all(words in said for words in ("Plain", "inputs, targets", "dataclass", "to(device)"))


@RANKS
@pytest.mark.parametrize("name", ["loss", "weight", "samples"])
def test_a_sum_cannot_take_the_place_of_one_of_validation(tmp_path: Path, name: str, world_size: int) -> None:
    runs = Runs(tmp_path, task={"name": f"{LAB}:Sums"})
    outcome = runs.start("run", world_size, "--task.args.sum", name)
    assert outcome.codes == [2] * world_size
    assert outcome.output.count(f"task.metrics(): '{name}' is a name that distloop uses itself") == 1
    assert "Traceback" not in outcome.output
    assert not (tmp_path / "runs" / "run" / "metrics.jsonl").exists(), "before the first step"


@pytest.mark.parametrize("name", ["samples", "step", "epoch", "kind", "time", "attempt"])
def test_a_metric_cannot_take_the_place_of_a_key_of_its_row(tmp_path: Path, name: str) -> None:
    runs = Runs(tmp_path, task={"name": f"{LAB}:Sums"})
    outcome = runs.start("run", 1, "--task.args.summary", name)
    assert outcome.codes == [2]
    assert f"task.summary(): '{name}' is a name that distloop uses itself, as it does kind, step" in outcome.output
    assert not (tmp_path / "runs" / "run" / "metrics.jsonl").exists(), "before the first step"


@pytest.mark.parametrize("name", ["weight", "loss", "gradient_norm", "mistakes"])
def test_other_names_are_free(tmp_path: Path, name: str) -> None:
    run = Runs(tmp_path, task={"name": f"{LAB}:Sums"}).train("run", 1, "--task.args.summary", name)
    assert rows(run, "validate")[-1][name] == 0.5


@RANKS
@pytest.mark.parametrize("name", ["classes", "weight", "best", "metrics", "summary", "loss"])
def test_a_tasks_own_value_under_a_name_of_ours_is_refused(tmp_path: Path, name: str, world_size: int) -> None:
    said = Runs(tmp_path, task={"name": f"{LAB}:Attribute"}).refused(world_size, "--task.args.name", name)
    assert f"Attribute.{name} " in said


@BOTH
def test_a_model_may_use_the_names_of_others(tmp_path: Path, world_size: int) -> None:
    runs = Runs(tmp_path, optim={**SETTINGS["optim"], "ema_decay": 0.9}, batch={"global_size": 16, "micro_size": 4})
    plain = runs.train("plain", world_size, "--model", f"{LAB}:Net", "--model.args", "{}")
    alike = runs.train("alike", world_size, "--model", f"{LAB}:Alike", "--model.args", "{}")
    for one, other in zip(weights(plain).values(), weights(alike).values(), strict=True):
        assert torch.equal(one, other)


# ---- conversions -----------------------------------------------------------------------------------------------------


@BOTH
def test_sums_and_metrics_are_the_numbers_that_they_are(tmp_path: Path, world_size: int) -> None:
    row = rows(Runs(tmp_path, task=f"{LAB}:Numbers").train("run", world_size), "validate")[-1]
    batches = -(-VALIDATED // 4)
    assert row["python"] == row["numpy"] == pytest.approx(0.1 * batches, rel=1e-15)
    assert row["backwards"] == [2 * batches, batches, 0]
    assert row["large"] == (2**53 + 1) * batches
    assert 0 < row["evens"] < batches
    assert row["mixed"] == 0.5 * row["evens"]
    assert (row["one"], row["another"], row["samples"]) == (0.5, 1.0, VALIDATED)


@RANKS
def test_labels_of_one_byte_with_more_classes_than_it_counts_are_refused(tmp_path: Path, world_size: int) -> None:
    runs = Runs(tmp_path, data={"name": f"{LAB}:many_classes"}, model={"name": "mlp", "args": {"hidden": 4}})
    said = runs.refused(world_size)
    assert all(words in said for words in ("uint8", "256", "300", "int64"))


@RANKS
@pytest.mark.parametrize("dtype", ["int64", "int16", "uint8", "uint16", "bool"])
def test_inputs_that_the_model_does_not_take_are_refused_with_their_dtype(
    tmp_path: Path, dtype: str, world_size: int
) -> None:
    data = {"name": f"{LAB}:typed", "args": {"dtype": dtype}}
    said = Runs(tmp_path, data=data).refused(world_size)
    assert all(words in said for words in (f"{dtype} [1, 3]", "int64 [1]", "float32", ".float()", ".long()"))


@RANKS
@pytest.mark.parametrize(
    ("what", "says"),
    [
        ("sparse", "graph is a tensor of layout sparse_coo"),
        ("meta", "layer.weight has no values"),
        ("lazy", "unused.weight is not initialised"),
        ("quantised", "table is quantised"),
        ("beyond", "count is float64 and holds 16777217, which the config's dtype, float32, makes 16777216"),
        ("hidden", "attribute buffers of its own"),
    ],
)
def test_a_model_with_what_cannot_be_kept_is_refused_by_name(
    tmp_path: Path, what: str, says: str, world_size: int
) -> None:
    assert says in Runs(tmp_path, model={"name": f"{LAB}:NotSaved"}).refused(world_size, "--model.args.what", what)


def test_extra_state_that_could_not_be_read_again_is_refused(tmp_path: Path) -> None:
    said = Runs(tmp_path).refused(1, "--model", f"{LAB}:Unsaveable", "--model.args", "{}")
    assert "get_extra_state() is not plain data" in said


# ---- states ----------------------------------------------------------------------------------------------------------

HABITS = ["nested", "complex", "spectral", "weight", "orthogonal", "lazy", "views", "none", "fleeting", *BUFFERS]
AVERAGED: dict[str, Any] = {
    "dtype": "float64",
    "optim": {"name": "adamw", "lr": 0.01, "ema_decay": 0.5, "clip_norm": 0.5},
    "train": {"on_nonfinite": "skip", "steps": 6},
}


@pytest.mark.parametrize(
    ("habit", "world_size", "more"),
    [("nested", 1, {}), ("complex", 2, AVERAGED), ("int16", 2, {}), ("expanded", 2, AVERAGED)],
)
def test_states_of_a_module_come_back(tmp_path: Path, habit: str, world_size: int, more: dict[str, Any]) -> None:
    check_states(tmp_path, world_size, habit, **more)


@pytest.mark.long
@BOTH
@pytest.mark.parametrize("more", [{}, AVERAGED], ids=["plain", "averaged"])
@pytest.mark.parametrize("habit", HABITS)
def test_all_states_of_a_module_come_back(tmp_path: Path, habit: str, world_size: int, more: dict[str, Any]) -> None:
    check_states(tmp_path, world_size, habit, **more)


def check_states(folder: Path, world_size: int, habit: str, **settings: Any) -> None:
    """A run that is stopped in mid-epoch and continued has the bits of one that is not."""
    runs = Runs(folder, model={"name": f"{LAB}:Net", "args": {"habit": habit}}, **settings)
    whole = runs.train("whole", world_size)
    runs.train("stopped", world_size, "--train.steps", "4")
    stopped = runs.train("stopped", world_size, "--resume", "extend")
    one, other = weights(whole), weights(stopped)
    assert one.keys() == other.keys()
    assert all(
        torch.equal(one[name].view(torch.uint8), other[name].view(torch.uint8)) for name in one if one[name].ndim
    )
    assert [row["loss"] for row in rows(whole, "train")] == [row["loss"] for row in rows(stopped, "train")]
    assert rows(whole, "validate")[-1]["loss"] == rows(stopped, "validate")[-1]["loss"]
    assert "cache" not in one  # persistent=False


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.reshape(-1).view(torch.uint8)


@BOTH
@pytest.mark.parametrize("bag", ["false", "true"])
def test_sparse_gradients_train_as_whole_ones(tmp_path: Path, bag: str, world_size: int) -> None:
    model = {"name": f"{LAB}:Words", "args": {"bag": bag == "true"}}
    optim = {**SETTINGS["optim"], "clip_norm": 0.5}
    runs = Runs(tmp_path, model=model, optim=optim, dtype="float64", train={"steps": 6, "on_nonfinite": "skip"})
    whole = runs.train("whole", world_size, "--model.args.sparse", "false")
    sparse = runs.train("sparse", world_size)
    assert largest_difference(weights(whole), weights(sparse)) < 1e-12
    norms = [[row["gradient_norm"] for row in rows(run, "train")] for run in (whole, sparse)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-12)


@RANKS
@pytest.mark.parametrize(
    "words", [["--optim.name", "adamw"], ["--optim.momentum", "0.9"], ["--optim.weight-decay", "1"]]
)
def test_an_optimizer_that_cannot_take_sparse_gradients_is_refused_by_name(
    tmp_path: Path, words: list[str], world_size: int
) -> None:
    said = Runs(tmp_path, model=f"{LAB}:Words").refused(world_size, *words)
    assert all(
        text in said for text in ("words.weight is sparse", "--optim.name sgd --optim.momentum 0", "sparse=True")
    )


@pytest.mark.parametrize(
    ("how", "world_size"), [("embedding", 1), ("embedding", 2), ("bag", 1), ("gather", 2), ("frozen", 1)]
)
def test_sparse_gradients_that_no_module_announces_are_refused_by_name(
    tmp_path: Path, how: str, world_size: int
) -> None:
    runs = Runs(tmp_path, model={"name": f"{LAB}:LooksUp", "args": {"how": how}})
    said = runs.refused(world_size)
    assert all(text in said for text in ("model's table is sparse", "Leave out sparse=True (or sparse_grad=True)"))
    runs.train("run", world_size, "--model.args.sparse", "false")
