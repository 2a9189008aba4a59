"""Before the first step all that a run does is done once, on one batch: what is wrong ends the run there, with one
message for all ranks, and nothing of the rehearsal stays."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from distloop.errors import UsageError
from distloop.training.rehearsal import is_mean
from distloop.training.task_model import TaskModel
from tests.lab.rehearsed import Encoder
from tests.tools.ranks import Outcome, train, write_config
from tests.tools.records import rows

SETTINGS: dict[str, Any] = {
    "device": "cpu",
    "data": "digits",
    "model": {"name": "mlp", "args": {"hidden": 8}},
    "batch": {"global_size": 64},
    "train": {"epochs": 1},
    "log": {"every_steps": 1},
}

NOTHING_TRAINED = "this start has trained nothing yet"


def start(folder: Path, task: str, ranks: int = 1, /, **settings: Any) -> Outcome:
    config = {**SETTINGS, "task": f"tests.lab.rehearsed:{task}", **settings}
    return train(folder, ["--config", str(write_config(folder, config)), "--name", "run"], ranks)


def is_refused(outcome: Outcome, folder: Path, *words: str, code: int = 2) -> None:
    """One message, said once, before anything was trained or written."""
    assert set(outcome.codes) == {code}, outcome.output
    for word in words:
        assert word in outcome.output, outcome.output
    said = [line for line in outcome.output.splitlines() if line.startswith("distloop: ")]
    notes = ("all 2 ranks", "(task.name = ", NOTHING_TRAINED)
    lines = [line for line in said if not any(note in line for note in notes)]
    assert len(lines) == 1, outcome.output
    assert code == 1 or "Traceback" not in outcome.output
    assert not (folder / "runs/run/metrics.jsonl").exists()
    assert not list((folder / "runs/run/checkpoints").iterdir())


# ---- a loss that is a mean -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("task", "ranks"),
    [("Mean", 1), ("Mean", 2), ("MeanOfTokens", 1), ("MeanOfSquares", 2), ("OfClasses", 1), ("WithoutSome", 2)],
)
def test_a_loss_that_is_a_mean_is_refused_with_the_numbers_and_the_line(tmp_path: Path, task: str, ranks: int) -> None:
    outcome = start(tmp_path, task, ranks, data={"name": "digits", "args": {"shift": 0}})
    is_refused(outcome, tmp_path, f"{task}.loss() returns a mean", 'reduction="sum"', "has each of them twice")


@pytest.mark.parametrize("task", ["Contrastive", "Zero", "OfPairs"])
def test_a_loss_that_is_no_mean_of_halves_trains(tmp_path: Path, task: str) -> None:
    start(tmp_path, task, train={"steps": 2}).check()


@pytest.mark.parametrize(
    ("once", "twice", "expected"),
    [
        ((2.3, 32), (2.3, 64), True),
        ((2.3, 32), (2.3004, 64), True),  # up to rounding
        ((2.3, 32.0), (4.6, 64.0), False),  # a sum
        ((2.3, 1), (2.3, 1), False),  # of one batch, whatever it holds: its weight says so
        ((0.0, 32), (0.0, 64), False),  # says nothing
        ((-0.5, 7), (-0.5, 14), True),
        ((3.1, 32), (3.3, 64), False),  # contrastive
        ((2.3, 0), (2.3, 0), False),
    ],
)
def test_what_counts_as_a_mean(once: Any, twice: Any, expected: bool) -> None:
    assert is_mean(once, twice) is expected


def test_one_sample_is_enough(tmp_path: Path) -> None:
    batch = {"global_size": 8, "micro_size": 1}
    start(tmp_path, "Contrastive", batch=batch, train={"steps": 1}).check()
    (tmp_path / "mean").mkdir()
    outcome = start(tmp_path / "mean", "Mean", batch=batch, train={"steps": 1})
    assert outcome.codes == [2]
    assert "Mean.loss() returns a mean" in outcome.output


@pytest.mark.parametrize("task", ["SummedMetric", "OfBatches"])
def test_a_metric_that_is_a_sum_or_beside_a_count_of_batches_trains(tmp_path: Path, task: str) -> None:
    start(tmp_path, task, train={"steps": 1}).check()


# ---- what only validation meets --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("task", "ranks", "words", "code"),
    [
        ("NoKey", 1, ["before the first step, in the rehearsal: ", "task.summary()", "correct_top5", "Traceback"], 1),
        ("NoKey", 2, ["before the first step, in the rehearsal: ", "task.summary()", "correct_top5"], 1),
        ("Metrics", 1, ["before the first step, in the rehearsal: ", "task.metrics()", "Traceback"], 1),
        ("OutOfMemory", 2, ["before the first step, in the rehearsal: ", "task.forward()", "out of memory"], 1),
        ("Text", 1, ["task.summary()", "model is a str"], 2),
        ("NoSuchBest", 2, ["('f1', 'max')", "but loss, accuracy"], 2),
        ("Guesses", 1, ["task.guesses()", "[64]"], 2),
        ("MeanMetric", 1, ["MeanMetric.metrics() returns 'confidence'", "let summary(sums) divide them"], 2),
        ("MeanMetrics", 1, ["MeanMetrics.metrics() returns 'errors'"], 2),
        ("MeanByName", 1, ["MeanByName.loss() returns 'logits' = ", "{'logits': value * len(targets)}"], 2),
        ("MeanBesideIds", 1, ["MeanBesideIds.loss() returns a mean"], 2),
        ("MeanMetric", 2, ["MeanMetric.metrics() returns 'confidence'", "let summary(sums) divide them"], 2),
        ("OnlyLoss", 2, ["OnlyLoss.loss() returned a tensor of shape []", "of how many samples"], 2),
        ("AsNumber", 1, ["AsNumber.loss() returned a float and", "a tensor, the sum of the losses", ".item()"], 2),
        ("Detached", 2, ["Detached.loss() returned a loss without a gradient", "detach()"], 2),
    ],
)
def test_a_mistake_of_a_task_is_found_before_the_first_step(
    tmp_path: Path, task: str, ranks: int, words: list[str], code: int
) -> None:
    outcome = start(tmp_path, task, ranks, validate={"batch_size": 64})
    is_refused(outcome, tmp_path, *words, code=code)
    assert outcome.output.count(NOTHING_TRAINED) == (code == 1), "a note of the traceback, and nowhere else"


def test_a_metric_that_checkpoint_best_names_and_validation_lacks_is_refused(tmp_path: Path) -> None:
    outcome = start(tmp_path, "Contrastive", checkpoint={"best": "max acuracy"})
    is_refused(outcome, tmp_path, "checkpoint.best: validation gives no 'acuracy', but loss, accuracy.")


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_metric_that_a_batch_has_not_is_refused_with_a_way_out_that_trains(tmp_path: Path, ranks: int) -> None:
    outcome = start(tmp_path, "Sometimes", ranks, validate={"batch_size": 64})
    is_refused(
        outcome,
        tmp_path,
        "the task's best = ('recall', 'max'): validation gives no 'recall', but loss, accuracy.",
        "metrics of 64 of 360 samples",
        'let it give float("nan") there',
    )
    task = {"name": "tests.lab.rehearsed:Sometimes", "args": {"otherwise": float("nan")}}
    start(tmp_path, "", ranks, task=task, validate={"batch_size": 64}, train={"steps": 2}).check()
    [row] = rows(tmp_path / "runs" / "run", "validate")
    assert row["recall"] == row["accuracy"]
    start(tmp_path, "Sometimes", ranks, validate={"batch_size": 500}, train={"steps": 4}, resume="extend").check()


def test_a_summary_that_needs_more_samples_than_a_batch_has_is_one_line(tmp_path: Path) -> None:
    outcome = start(tmp_path, "ManyNeeded", validate={"batch_size": 64}).check()
    assert (
        outcome.output.count("distloop: WARNING: task.summary() raises ValueError (too few samples for a quantile)")
        == 1
    )


# ---- a save ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_state_that_cannot_be_saved_is_refused(tmp_path: Path, ranks: int) -> None:
    outcome = start(tmp_path, "AsItShould", ranks, model="tests.lab.rehearsed:Strange", task="classification")
    is_refused(outcome, tmp_path, "get_extra_state()", "is not plain data")


# ---- methods of the model --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize(
    ("task", "word"),
    [
        ("CallsMethod", "model.head"),
        ("ReadsNumber", "model.num_classes"),
        pytest.param("AsksFirst", "model.encode", marks=pytest.mark.long),
        pytest.param("Unwraps", "model.module", marks=pytest.mark.long),
        pytest.param("TakesLayers", "model[…]", marks=pytest.mark.long),
        ("PassesBy", "does not call `model(…)`"),
    ],
)
def test_what_only_one_process_offers_is_refused_on_one_as_on_two(
    tmp_path: Path, task: str, word: str, ranks: int
) -> None:
    model = "linear" if task == "TakesLayers" else "tests.lab.rehearsed:Encoder"
    outcome = start(tmp_path, task, ranks, model=model)
    is_refused(outcome, tmp_path, task, word, 'model(inputs, mode="encode")')


def test_what_torch_does_with_a_module_works_with_the_one_of_tasks() -> None:
    model = Encoder(10)
    offered: Any = TaskModel(model, model)
    images = torch.ones(2, 1, 8, 8)
    halved = {name: parameter / 2 for name, parameter in offered.named_parameters()}
    assert list(halved) == [name for name, _ in model.named_parameters()]
    assert not torch.func.functional_call(offered, halved, (images,)).equal(offered(images))
    offered.eval()
    assert not model.training
    assert isinstance(offered, Encoder)
    assert type(copy.deepcopy(offered)) is Encoder
    offered.scale = torch.tensor(3)  # as the bare model has it in validation, and in its own forward()
    assert model.scale == 3
    del offered.scale
    assert not hasattr(model, "scale")
    assert offered._missed == []


def test_what_a_module_gives_itself_as_goes_through_the_prepared_model_too() -> None:
    model, called = Encoder(10), []

    class Prepared(torch.nn.Module):  # as DistributedDataParallel
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            called.append(len(images))
            return model(images)

    offered: Any = TaskModel(Prepared(), model)
    for number, same in enumerate([offered.train(), offered.eval(), offered.requires_grad_(), offered.float()], 1):
        assert same is offered
        same(torch.ones(number, 1, 8, 8))
    assert called == [1, 2, 3, 4]


def test_a_task_reads_what_it_has_set_and_nothing_else_of_the_models_own() -> None:
    model = Encoder(10)
    offered: Any = TaskModel(model, model)
    assert not hasattr(offered, "hooked")
    offered.hooked = torch.tensor(1)
    assert getattr(offered, "hooked", None) is model.hooked
    for name in ("num_classes", "head"):  # a default would be taken in silence
        with pytest.raises(UsageError, match=rf"The task uses `model\.{name}`"):
            getattr(offered, name, None)


def test_a_task_sees_the_models_names_and_sets_its_attributes_on_any_number_of_ranks(tmp_path: Path) -> None:
    weights = []
    for ranks in (1, 2):
        folder = tmp_path / str(ranks)
        folder.mkdir()
        batch = {"global_size": 64, "micro_size": 32}
        settings = {"model": "tests.lab.rehearsed:Scaled", "train": {"steps": 5}, "batch": batch, "dtype": "float64"}
        start(folder, "ByName", ranks, **settings).check()
        [file] = folder.glob("runs/*/checkpoints/step_00000005/model.safetensors")
        weights.append(load_file(file))
    for name, value in weights[0].items():
        torch.testing.assert_close(weights[1][name], value, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_layer_that_is_made_while_training_is_refused(tmp_path: Path, ranks: int) -> None:
    outcome = start(tmp_path, "AsItShould", ranks, model="tests.lab.rehearsed:Late", task="classification")
    is_refused(outcome, tmp_path, "makes parameters in its first forward pass", "more.weight, more.bias")


@pytest.mark.parametrize("ranks", [1, 2])
def test_what_the_message_says_trains(tmp_path: Path, ranks: int) -> None:
    start(tmp_path, "AsItShould", ranks, model="tests.lab.rehearsed:Encoder", train={"steps": 2}).check()


# ---- nothing stays ---------------------------------------------------------------------------------------------------


def trained(folder: Path, name: str, *arguments: str, loop: str, ranks: int) -> tuple[dict[str, Any], list[Any]]:
    """The weights and the rows of a run with a model and a task that change with each pass."""
    settings = {**SETTINGS, "model": "tests.lab.rehearsed:Restless", "task": "tests.lab.rehearsed:Restful"}
    settings |= {"train": {"steps": 8}, "validate": {"every_steps": 4}, "checkpoint": {"every_steps": 4}}
    arguments = ("--config", str(write_config(folder, settings)), "--name", name, *arguments)
    train(folder, list(arguments), ranks, loop=loop).check()
    run = folder / "runs" / name
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    kept = ("kind", "step", "loss", "gradient_norm", "accuracy", "batches")
    weights = {path.name: load_file(path) for path in (run / "checkpoints/step_00000008").glob("*.safetensors")}
    return weights, [{key: row[key] for key in kept if key in row} for row in rows]


AVERAGED = ("--optim.ema_decay", "0.9", "--model.args.creates_later", "false")


@pytest.mark.parametrize(("ranks", "arguments"), [(1, ()), (2, ()), (1, AVERAGED), (2, AVERAGED)])
def test_a_run_that_rehearses_trains_what_one_that_does_not_would(
    tmp_path: Path, ranks: int, arguments: tuple[str, ...]
) -> None:
    (weights, rows), (others, other_rows) = (
        trained(tmp_path, loop.rpartition(".")[2], *arguments, loop=loop, ranks=ranks)
        for loop in ("distloop.train", "tests.lab.unrehearsed")
    )
    assert rows == other_rows
    assert weights.keys() == others.keys() >= {"model.safetensors"}
    for file, tensors in weights.items():
        assert tensors.keys() == others[file].keys()
        assert all(tensors[name].equal(others[file][name]) for name in tensors), file
