"""A user's own data sets, models and tasks, named in the config as module:callable, train as the built-in ones do."""

from __future__ import annotations

import math
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file
from torch.nn import functional

from distloop.data.datasets import digits
from distloop.data.order import Order
from distloop.data.seeding import seed_sample, uniforms
from distloop.run import checkpoint
from tests.lab import user_code
from tests.tools.documents import blocks_of
from tests.tools.ranks import REPOSITORY, command, train, write_config
from tests.tools.records import largest_difference, losses, rows, weights

CLIP_NORM = 0.6  # of the gradient of the mean over the tokens; some steps exceed it
LANGUAGE = {
    "data": {"name": "tests.lab.user_code:lines", "collate": "tests.lab.user_code:pad", "workers": 0},
    "model": {"name": "tests.lab.user_code:LanguageModel", "args": {"width": 16}},
    "task": "tests.lab.user_code:NextLetter",
    "optim": {"name": "sgd", "lr": 0.5, "momentum": 0.9, "weight_decay": 0, "clip_norm": CLIP_NORM},
    "schedule": "constant",
    "batch": {"global_size": 16},
    "train": {"steps": 30},
    "validate": {"batch_size": 5},
    "log": {"every_steps": 1},
}
SEGMENTATION = {
    "data": {"name": "tests.lab.user_code:shapes", "workers": 0},
    "model": {"name": "tests.lab.user_code:segmenter", "args": {"width": 8}},
    "task": "tests.lab.user_code:Segmentation",
    "optim": {"name": "sgd", "lr": 0.5, "momentum": 0.9, "weight_decay": 0},
    "schedule": "constant",
    "batch": {"global_size": 12},
    "train": {"steps": 60},
    "validate": {"batch_size": 5},
    "log": {"every_steps": 1},
}
# name -> (world size, extra arguments)
FORMS: dict[str, tuple[int, list[str]]] = {
    "one": (1, []),
    "one-accumulating": (1, ["--batch.micro-size", "4"]),
    "two": (2, []),
}


def train_forms(folder: Path, settings: dict[str, Any], forms: dict[str, tuple[int, list[str]]]) -> dict[str, Path]:
    """Train `settings` in each of `forms`; the run directories by name."""
    config = write_config(folder, settings)
    for name, (world_size, extra) in forms.items():
        train(folder, ["--config", str(config), "--name", name, *extra], world_size).check()
    return {name: folder / "runs" / name for name in forms}


# ---- a language model: tied weights, dicts, a collate function, tokens ---------------------------------------


@pytest.fixture(scope="module")
def language_runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """30 steps of the language model in float64 in each form."""
    return train_forms(tmp_path_factory.mktemp("language"), {**LANGUAGE, "dtype": "float64"}, FORMS)


def test_token_weighted_losses_do_not_depend_on_the_number_of_processes(
    tmp_path: Path, language_runs: dict[str, Path]
) -> None:
    reference = losses(language_runs["one"])
    assert len(reference) == 30
    assert reference[-1] < reference[0] - 0.5
    for run in language_runs.values():
        assert losses(run) == pytest.approx(reference, rel=1e-10)
        assert largest_difference(weights(run), weights(language_runs["one"])) < 1e-10
        assert [row["loss"] for row in rows(run, "epoch")] == pytest.approx(
            [row["loss"] for row in rows(language_runs["one"], "epoch")], rel=1e-10
        )
    for run in train_forms(tmp_path, LANGUAGE, FORMS).values():
        assert losses(run) == pytest.approx(reference, rel=1e-5)


def test_the_gradient_is_that_of_the_sum_of_losses_over_the_sum_of_tokens(language_runs: dict[str, Path]) -> None:
    source = user_code.lines()
    torch.manual_seed(0)
    model = user_code.LanguageModel(len(user_code.VOCABULARY)).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)
    order, history, uneven, clipped = Order(len(source.train), 0), [], 0, 0
    for step in range(30):
        epoch, start = step // 6, step % 6 * 16
        batch = user_code.pad([source.train[index] for index in order(epoch, start, start + 16).tolist()])
        keep = batch["targets"] != user_code.NO_TOKEN
        loss = functional.cross_entropy(model(batch["inputs"])[keep], batch["targets"][keep])
        loss.backward()
        clipped += float(torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP_NORM)) > CLIP_NORM
        optimizer.step()
        optimizer.zero_grad()
        history.append(loss.item())
        uneven += int(keep[:8].sum()) != int(keep[8:].sum())
    assert uneven > 20  # two ranks rarely have as many tokens as each other
    assert 0 < clipped < 30  # clipped is what the sum over all tokens of all ranks gives, and not a part of it
    for run in language_runs.values():
        assert losses(run) == pytest.approx(history, rel=1e-10)
        assert (
            largest_difference(weights(run), {"embedding.weight": model.embedding.weight.detach(), **recurrent(model)})
            < 1e-10
        )


def recurrent(model: user_code.LanguageModel) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in model.state_dict().items() if name.startswith("context")}


def test_token_metrics_are_sums_over_the_validation_set(language_runs: dict[str, Path]) -> None:
    source = user_code.lines()
    model = user_code.LanguageModel(len(user_code.VOCABULARY)).double()
    final = max((language_runs["two"] / "checkpoints").glob("step_*"))
    checkpoint.load_weights(final / checkpoint.MODEL, model)
    loss, correct, tokens = 0.0, 0, 0
    with torch.no_grad():
        for index in range(len(source.validation)):
            sample = source.validation[index]
            keep = sample["targets"] != user_code.NO_TOKEN
            outputs = model(sample["inputs"][None])[0][keep]
            loss += functional.cross_entropy(outputs, sample["targets"][keep], reduction="sum").item()
            correct += int((outputs.argmax(1) == sample["targets"][keep]).sum())
            tokens += int(keep.sum())
    for run in language_runs.values():
        row = rows(run, "validate")[-1]
        assert row["loss"] == pytest.approx(loss / tokens, rel=1e-9)
        assert row["perplexity"] == pytest.approx(math.exp(loss / tokens), rel=1e-9)
        assert (row["accuracy"], row["tokens"], row["samples"]) == (correct / tokens, tokens, 37)


def test_a_tied_weight_is_stored_once_and_is_tied_again_when_it_is_loaded(language_runs: dict[str, Path]) -> None:
    run = language_runs["two"]
    stored = load_file(max((run / "checkpoints").glob("step_*")) / checkpoint.MODEL)
    assert len({"embedding.weight", "output.weight"} & stored.keys()) == 1
    model = user_code.LanguageModel(len(user_code.VOCABULARY)).double()
    checkpoint.load_weights(max((run / "checkpoints").glob("step_*")) / checkpoint.MODEL, model)
    assert model.output.weight is model.embedding.weight
    assert torch.equal(model.output.weight, stored["embedding.weight"])


def test_a_model_with_tied_weights_continues_from_its_checkpoint(
    tmp_path: Path, language_runs: dict[str, Path]
) -> None:
    config = write_config(tmp_path, {**LANGUAGE, "dtype": "float64"})
    train(tmp_path, ["--config", str(config), "--train.steps", "10"], 2).check()
    train(tmp_path, ["--config", str(config), "--resume", "extend"], 1).check()
    run = tmp_path / "runs" / "run"
    assert [row["attempt"] for row in rows(run, "train")] == [1] * 10 + [2] * 20
    assert losses(run) == pytest.approx(losses(language_runs["one"]), rel=1e-10)
    assert largest_difference(weights(run), weights(language_runs["one"])) < 1e-10


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_step_without_any_token_changes_nothing(tmp_path: Path, world_size: int) -> None:
    order = Order(96, 0)
    mute = order(0, 16, 32).tolist() + order(0, 32, 40).tolist()  # all of step 1, the first half of step 2
    settings = {**LANGUAGE, "dtype": "float64", "checkpoint": {"every_steps": 1, "keep_last": 3}, "train": {"steps": 3}}
    settings["optim"] = {**LANGUAGE["optim"], "momentum": 0}  # type: ignore[dict-item]
    settings["data"] = {**LANGUAGE["data"], "args": {"mute": mute}}  # type: ignore[dict-item]
    train(tmp_path, ["--config", str(write_config(tmp_path, settings))], world_size).check()
    run = tmp_path / "runs" / "run"
    first, second, third = (load_file(path / checkpoint.MODEL) for path in sorted((run / "checkpoints").glob("step_*")))
    assert largest_difference(first, second) == 0
    assert all(tensor.isfinite().all() for tensor in third.values())
    assert largest_difference(second, third) > 0
    assert losses(run)[1] == 0
    assert math.isfinite(losses(run)[2])
    assert losses(run)[2] > 1


@pytest.mark.parametrize(
    ("collate", "arguments"), [("pad_after_texts", {}), ("pad_time_first", {"batch_first": False})]
)
def test_batches_need_no_tensor_with_the_samples_first(tmp_path: Path, collate: str, arguments: dict[str, Any]) -> None:
    settings = {
        **LANGUAGE,
        "train": {"steps": 2},
        "model": {"name": "tests.lab.user_code:LanguageModel", "args": arguments},
    }
    settings["data"] = {**LANGUAGE["data"], "collate": f"tests.lab.user_code:{collate}"}  # type: ignore[dict-item]
    train(tmp_path, ["--config", str(write_config(tmp_path, settings))]).check()
    assert rows(tmp_path / "runs" / "run", "validate")[-1]["samples"] == 37


# ---- segmentation: pixels, a confusion matrix, random transforms ---------------------------------------------


def test_segmentation_is_the_same_on_one_two_and_three_processes(tmp_path: Path) -> None:
    forms: dict[str, tuple[int, list[str]]] = {**FORMS, "three": (3, ["--batch.micro-size", "2"])}
    runs = train_forms(tmp_path, {**SEGMENTATION, "dtype": "float64"}, forms)
    reference = losses(runs["one"])
    final = rows(runs["one"], "validate")[-1]
    confusion = {name: count for name, count in final.items() if " as " in name}
    known = sum(
        int((mask != user_code.NO_PIXEL).sum()) for _, mask in map(user_code.shapes().validation.__getitem__, range(23))
    )
    assert (len(reference), len(confusion), sum(confusion.values())) == (60, 9, known)
    assert final["mean_iou"] > 0.8
    for run in runs.values():
        assert losses(run) == pytest.approx(reference, rel=1e-10)
        row = rows(run, "validate")[-1]
        assert {name: row[name] for name in confusion} == confusion
        assert (row["mean_iou"], row["samples"]) == (final["mean_iou"], 23)
        assert row["loss"] == pytest.approx(final["loss"], rel=1e-10)


def test_a_users_random_transforms_depend_on_seed_epoch_and_index_alone(tmp_path: Path) -> None:
    # 4 steps an epoch: one and a half epochs, so that the epochs' samples differ.
    settings = {
        **SEGMENTATION,
        "seed": 3,
        "train": {"steps": 6},
        "task": {"name": "tests.lab.user_code:RecordedSegmentation"},
    }
    source, order = user_code.shapes(), Order(48, 3)

    def seeded(dataset: user_code.Shapes, epoch: int, index: int) -> str:
        seed_sample(3, epoch, index)
        return user_code.digest(dataset[index][0])

    trained = [(epoch, index) for epoch, stop in ((0, 48), (1, 24)) for index in order(epoch, 0, stop).tolist()]
    expected = Counter((index, seeded(source.train, epoch, index)) for epoch, index in trained)
    assert len(expected) == 72  # no sample is augmented alike in both epochs
    validations = 2
    expected.update((index, seeded(source.validation, 0, index)) for index in list(range(23)) * validations)
    for name, form in recorded_forms(3).items():
        found = recorded(tmp_path, settings, "task", name, *form)
        assert found.keys() == expected.keys(), name
        assert found >= expected, name  # the rehearsal has the first batches once more


def test_the_digits_augmentation_depends_on_seed_epoch_and_index_alone(tmp_path: Path) -> None:
    settings = {
        "data": "tests.lab.user_code:recorded_digits",
        "model": "linear",
        "seed": 3,
        "batch": {"global_size": 240},
        "train": {"steps": 7},  # 5 an epoch
        "validate": {"every_steps": 100},
    }
    source, order = digits(), Order(1437, 3)

    def augmented(epoch: int, indices: NDArray[Any]) -> Counter[tuple[int, str]]:
        images, _ = source.train.batch(indices, uniforms(3, epoch, indices, source.train.draws))
        return Counter((int(index), user_code.digest(image)) for index, image in zip(indices, images, strict=True))

    expected = augmented(0, order(0, 0, 1200)) + augmented(1, order(1, 0, 480))
    expected.update((index, user_code.digest(image)) for index, image in enumerate(source.validation.inputs))
    for name, (world_size, extra) in recorded_forms(60).items():
        found = recorded(tmp_path, settings, "data", name, world_size, extra)
        # Loaded once more are the first sample, the batches of the rehearsal, and the mistakes that the report shows.
        assert found.keys() == expected.keys() | augmented(0, np.array([0])).keys(), name
        assert found >= expected, name


def recorded_forms(micro_size: int) -> dict[str, tuple[int, list[str]]]:
    return {
        "one": (1, ["--data.workers", "0"]),
        "one-accumulating-with-workers": (1, ["--data.workers", "2", "--batch.micro-size", str(micro_size)]),
        "two-accumulating-with-workers": (2, ["--data.workers", "2", "--batch.micro-size", str(micro_size)]),
    }


def recorded(
    folder: Path, settings: dict[str, Any], recorder: str, name: str, world_size: int, extra: list[str]
) -> Counter[tuple[int, str]]:
    """How often each (index, digest of the input) was loaded, over all ranks and loader processes of a run."""
    notes = folder / f"notes-{name}"
    notes.mkdir()
    arguments = ["--config", str(write_config(folder, settings)), "--name", name]
    arguments += [f"--{recorder}.args.folder", str(notes)]
    train(folder, [*arguments, *extra], world_size).check()
    lines = [line.split() for file in notes.iterdir() for line in file.read_text().splitlines()]
    return Counter((int(index), digest) for index, digest in lines)


def test_dropout_depends_on_the_place_of_the_micro_batch_in_the_global_batch(tmp_path: Path) -> None:
    settings = {**SEGMENTATION, "dtype": "float64", "train": {"steps": 8}}
    settings["model"] = {"name": "tests.lab.user_code:segmenter", "args": {"dropout": 0.5}}
    forms: dict[str, tuple[int, list[str]]] = {
        "one": (1, ["--batch.micro-size", "3"]),
        "one-with-workers": (1, ["--batch.micro-size", "3", "--data.workers", "1"]),
        "two": (2, ["--batch.micro-size", "3"]),
        "other-micro-batches": (1, []),
    }
    runs = train_forms(tmp_path, settings, forms)
    reference = losses(runs["one"])
    for name in ("one-with-workers", "two"):
        assert losses(runs[name]) == pytest.approx(reference, rel=1e-10), name
    assert abs(losses(runs["other-micro-batches"])[0] / reference[0] - 1) > 1e-6  # or nothing was dropped


def test_a_users_check_sees_the_batches_of_data_in_memory(tmp_path: Path) -> None:
    settings = {"data": "digits", "model": "linear", "task": "tests.lab.user_code:NoBlackImages", "train": {"steps": 2}}
    outcome = train(tmp_path, ["--config", str(write_config(tmp_path, settings))])
    assert outcome.codes == [2], outcome.output
    assert "has a black corner" in outcome.output


# ---- what ranks exchange ---------------------------------------------------------------------------------------


def test_ranks_exchange_gradients_once_a_step_however_many_micro_batches_it_has(tmp_path: Path) -> None:
    settings = {
        "model": "linear",
        "task": {"name": "tests.lab.user_code:RecordedExchange", "args": {"folder": str(tmp_path)}},
        "batch": {"global_size": 48, "micro_size": 8},  # three of each rank
        "train": {"steps": 4},
    }
    train(tmp_path, ["--config", str(write_config(tmp_path, settings))], 2).check()
    rehearsed, steps = ["1"] * 2, ["0", "0", "1"] * 4
    assert [(tmp_path / rank).read_text().split() for rank in "01"] == [rehearsed + steps] * 2


def test_a_model_that_leaves_parameters_out_trains_with_the_setting_for_it(tmp_path: Path) -> None:
    settings = {"model": "tests.lab.user_code:HalfUsed", "train": {"steps": 5}, "log": {"every_steps": 1}}
    arguments = ["--config", str(write_config(tmp_path, {**settings, "dtype": "float64"}))]
    train(tmp_path, [*arguments, "--name", "one"]).check()
    train(tmp_path, [*arguments, "--name", "two", "--ddp.find-unused-parameters"], 2).check()
    one, two = (tmp_path / "runs" / name for name in ("one", "two"))
    assert losses(two) == pytest.approx(losses(one), rel=1e-10)
    assert largest_difference(weights(two), weights(one)) < 1e-10
    outcome = train(tmp_path, [*arguments, "--name", "without"], 2)
    assert outcome.codes == [2, 2], outcome.output
    assert "ddp.find_unused_parameters" in outcome.output


# ---- where the code is found ---------------------------------------------------------------------------------


def test_a_module_in_the_current_folder_is_found_by_the_script(tmp_path: Path) -> None:
    (tmp_path / "my_model.py").write_text(
        "from torch import nn\n\n\ndef build(input_shape, num_outputs, hidden):\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(64, hidden), nn.Tanh(), nn.Linear(hidden, num_outputs))\n"
    )
    settings = {"model": {"name": "my_model:build", "args": {"hidden": 5}}, "train": {"steps": 2}}
    script = str(REPOSITORY / "distloop" / "train.py")
    done = command([sys.executable, script, "--config", str(write_config(tmp_path, settings))], tmp_path)
    assert done.returncode == 0, done.stdout
    assert weights(tmp_path / "runs" / "run")["1.weight"].shape == (5, 64)


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_sum_of_a_task_is_in_a_row_if_summary_returns_it_as_the_page_says(tmp_path: Path, world_size: int) -> None:
    page = blocks_of(REPOSITORY / "docs" / "own-code.md")
    [example] = [block.text for block in page if "class WithErrors" in block.text]
    example += "\n\nclass WithoutSummary(WithErrors):\n    summary = distloop.tasks.Regression.summary\n"
    (tmp_path / "own_metric.py").write_text(example)
    settings = {
        "data": "tests.lab.points:points",
        "model": "linear",
        "batch": {"global_size": 4},
        "train": {"steps": 2},
    }
    for task, shown in (("WithErrors", ["mean_error"]), ("WithoutSummary", [])):
        config = str(write_config(tmp_path, {**settings, "task": f"own_metric:{task}"}))
        outcome = train(tmp_path, ["--config", config, "--name", task], world_size).check()
        [row] = rows(tmp_path / "runs" / task, "validate")
        assert [name for name in row if "error" in name] == shown
        assert ("mean_error" in outcome.output) == bool(shown)
