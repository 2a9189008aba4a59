"""Several validation sets with names: what is checked of one is checked of each. tests/multiprocess/ has ranks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from distloop.commands.report.curves import read_metrics
from distloop.config.settings import Config, Data
from distloop.data import DataSource, InMemory
from distloop.data.datasets import load_data
from distloop.data.fingerprint import refuse_short
from distloop.data.halves import halves
from distloop.data.lengths import refuse_other_length
from distloop.data.order import FixedBatchSampler
from distloop.data.seeded import name_of
from distloop.errors import RunFailed, UsageError
from distloop.run.best import Best
from distloop.run.identity import facts_of
from distloop.run.metrics import samples_in
from distloop.run.same import first_difference
from distloop.tasks import Classification
from distloop.tracking.progress import metrics_of
from distloop.training.trying import try_out
from distloop.training.validation import validate
from distloop.training.validation_sets import in_one_row, load_sets

CPU = torch.device("cpu")
FORMS: dict[str, Any] = {}  # what make() gives: the test sets it


def pictures(labels: list[int]) -> InMemory:
    return InMemory(torch.arange(float(len(labels)))[:, None], torch.tensor(labels))


class Broken:
    """Its last sample, number 3, cannot be loaded."""

    def __init__(self, error: Exception) -> None:
        self.error = error

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        if index == 3:
            raise self.error
        return torch.zeros(1), 0


def make() -> Any:
    return FORMS["data"]


def loaded(data: Any) -> DataSource:
    FORMS["data"] = data
    return load_data(Data(name=f"{__name__}:make"))


def several(night: Any) -> DataSource:
    return DataSource(pictures([0, 1]), {"day": pictures([1, 0]), "night": night})


# ---- forms -----------------------------------------------------------------------------------------------------


def test_a_pair_may_name_its_validation_sets_as_a_data_source_may() -> None:
    day, night = pictures([0]), pictures([1])
    for data in ((day, {"day": day, "night": night}), DataSource(day, {"day": day, "night": night})):
        assert list(halves(loaded(data))) == ["train", "day validation", "night validation"]
    assert list(halves(loaded((day, night)))) == ["train", "validation"]


def test_a_dict_of_samples_by_number_is_a_data_set() -> None:
    samples = {0: (torch.zeros(1), 0), 1: (torch.ones(1), 1)}
    assert halves(loaded((samples, samples)))["validation"] is samples


@pytest.mark.parametrize("name", ["", "night/day", "night day", "nächte", 3.5, None, ("night",)])
def test_other_names_are_refused(name: Any) -> None:
    with pytest.raises(UsageError, match=r"a data set with the name .*Use letters, digits, _ and - alone"):
        DataSource(pictures([0]), {"day": pictures([0]), name: pictures([0])})


class Columns(dict):
    """A data set of rows, which keeps its columns as a dict does."""

    def __len__(self) -> int:
        return len(self["inputs"])

    def __getitem__(self, key: Any) -> Any:
        if isinstance(key, str):
            return super().__getitem__(key)
        return tuple(column[key] for column in self.values())


def test_a_mapping_of_columns_is_a_data_set() -> None:
    columns = Columns(inputs=torch.zeros(7, 2), targets=torch.arange(7))
    assert list(halves(DataSource(pictures([0, 1]), columns))) == ["train", "validation"]


def test_a_mapping_without_a_set_and_a_set_without_samples_are_refused() -> None:
    with pytest.raises(UsageError, match="validation is an empty mapping"):
        loaded((pictures([0]), {}))
    with pytest.raises(UsageError, match=r"its validation\['night'\] half is empty"):
        loaded(several([]))
    with pytest.raises(UsageError, match=r"its validation\['night'\] half needs __len__ and __getitem__"):
        loaded(several(iter([])))


# ---- checks ----------------------------------------------------------------------------------------------------


def data_facts(source: DataSource) -> dict[str, Any]:
    return facts_of(Config(data=Data(workers=0)), source, CPU)["data"]


def test_the_facts_of_one_set_keep_their_names_and_each_of_several_has_its_own() -> None:
    samples = TensorDataset(torch.arange(3.0)[:, None])
    plain = data_facts(DataSource(samples, samples))
    expected = ["samples", "data", "sample 0", "sample 1", "sample 2"]
    assert list(plain) == [
        *(f"{half} {name}" for half in ("training", "validation") for name in expected),
        *("class names", "mean and std"),
    ]
    named = data_facts(DataSource(samples, {"day": samples, "night": samples}))
    for half in ("day validation", "night validation"):
        assert [named[f"{half} {name}"] for name in expected] == [plain[f"validation {name}"] for name in expected]


def test_ranks_with_another_set_are_told_which() -> None:
    facts = [{"data": data_facts(several(night))} for night in (pictures([1, 0]), pictures([1, 0, 1]))]
    message = first_difference(facts, ["node", "node"])
    assert message is not None
    assert "the data has 3 night validation samples on rank 1 (on node), but 2 on rank 0" in message
    facts = [{"data": data_facts(several(night))} for night in (pictures([1, 0]), pictures([1, 1]))]
    assert "the night validation data has other contents on rank 1" in str(first_difference(facts, ["node", "node"]))


def test_a_set_without_its_last_sample_is_named_before_training() -> None:
    source = several(Broken(IndexError("gone")))
    with pytest.raises(UsageError, match="The night validation data have the length 4, but sample 3 raises IndexError"):
        refuse_short(source, Data(workers=0), CPU)


def test_a_set_that_changes_its_length_is_named() -> None:
    with pytest.raises(UsageError, match="The night validation data had 2 samples at the start, and have 3 now"):
        refuse_other_length("night validation", [1, 2, 3], 2)


def test_targets_in_memory_of_each_set_are_checked() -> None:
    task, model = Classification(), nn.Linear(1, 2)
    with pytest.raises(UsageError, match="In the night validation data: Sample 1 has label 7"):
        try_out(task, model, (torch.zeros(1, 1), torch.zeros(1)), several(pictures([0, 7])))


def test_a_sample_that_cannot_be_loaded_is_told_with_its_set() -> None:
    source, task = several(Broken(ValueError("no such picture"))), Classification()
    task.classes = 2
    day, night = load_sets(Config(data=Data(workers=0)), source, task, CPU, 0, 1)
    assert (day.suffix, day.half, night.suffix, night.half) == ("", "day validation", "/night", "night validation")
    with pytest.raises(ValueError, match="no such picture") as error:
        list(night.loader)
    assert "loading sample 3 of the night validation data" in "".join(error.value.__notes__)
    assert "skip" not in "".join(error.value.__notes__)
    assert name_of(source.train, source, Data()).startswith("the training data")


def test_a_loader_that_ends_early_is_told_for_each_set() -> None:
    model, task = nn.Linear(1, 2), Classification()
    batch = (torch.zeros(1, 1), torch.zeros(1).long())
    with pytest.raises(RunFailed, match="got 1 batches in the place of 2"):
        validate(model, task, [batch], FixedBatchSampler(2, 1, 0, 1), half="night validation")


# ---- rows ------------------------------------------------------------------------------------------------------


def test_the_metrics_of_several_sets_stand_in_one_row_under_names_of_their_own() -> None:
    row = in_one_row({"": {"loss": 1.0, "samples": 5}, "/night": {"loss": 2.0, "samples": 3}})
    assert row == {"loss": 1.0, "samples": 5, "loss/night": 2.0, "samples/night": 3}
    assert samples_in(row) == "5 samples, 3 of night"
    assert metrics_of(row) == {"loss": 1.0, "loss/night": 2.0}
    with pytest.raises(UsageError, match=r"'loss/night' in a row, which task\.summary\(\) gives to a value of its own"):
        in_one_row({"": {"loss": 1.0, "loss/night": 5.0}, "/night": {"loss": 2.0}})


def test_the_best_may_be_that_of_any_set() -> None:
    best = Best("max accuracy/night", ("loss", "min"))
    best.update(1, {"accuracy": 1.0, "accuracy/night": 0.5})
    best.update(2, {"accuracy": 0.0, "accuracy/night": 0.6})
    assert best.step == 2
    with pytest.raises(UsageError, match=r"gives no 'accuracy/dusk', but accuracy, accuracy/night\. Let"):
        Best("max accuracy/dusk", ("loss", "min")).check(
            {"accuracy": 1.0, "samples": 5, "accuracy/night": 0.5, "samples/night": 3}
        )


def test_a_report_has_a_curve_for_each_metric_of_each_set(tmp_path: Path) -> None:
    row = {"kind": "validate", "step": 3, "loss": 1.0, "samples": 5, "loss/night": 2.0, "samples/night": 3}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    curves = read_metrics(tmp_path).validation
    assert {name: curve.all()[1].tolist() for name, curve in curves.items()} == {"loss": [1.0], "loss/night": [2.0]}
    assert np.isfinite(curves["loss/night"].all()).all()
