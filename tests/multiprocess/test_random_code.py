"""Generated user code either trains as the same training written by hand in plain PyTorch, or is refused before step 1.

tests/tools/habits/ makes the cases, each from its number alone, with what has to become of it, and
tests/tools/by_hand.py trains by hand. `python -m tests.tools.habits 17` prints case 17.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.tools.by_hand import ByHand, imported
from tests.tools.habits import case_of
from tests.tools.habits.draft import Case
from tests.tools.ranks import REPOSITORY, Outcome, train, write_config
from tests.tools.records import rows, status, weights

FEW, ALL = 20, 240  # cases of `make test`, and of `make test-all`
# How far a run may be from the training by hand, relative and absolute: sums are added in another order.
CLOSE = {"float64": (1e-9, 1e-11), "float32": (2e-5, 2e-6)}


@pytest.mark.parametrize("number", [*range(FEW), *(pytest.param(n, marks=pytest.mark.long) for n in range(FEW, ALL))])
def test_users_code_trains_as_it_would_by_hand_or_is_refused(
    tmp_path: Path, number: int, request: pytest.FixtureRequest
) -> None:
    case = case_of(number)
    outcomes: list[Outcome] = []
    try:
        hold(tmp_path, case, outcomes)
    except AssertionError as error:
        printed = "\n\n".join(outcome.output for outcome in outcomes)
        again = f"python -m pytest '{Path(__file__).relative_to(REPOSITORY)}::{request.node.name}'"
        pytest.fail(
            f"{case}\n# ---- what the ranks printed\n{printed}\n# ---- repeat it: {again}\n{error}", pytrace=False
        )


def hold(folder: Path, case: Case, outcomes: list[Outcome]) -> None:
    """Start the case, once or twice, and hold what is expected of it. `outcomes`: gets how each start ended."""
    file = folder / "mine.py"
    file.write_text(case.source)
    with imported(file) as module:
        getattr(module, "prepare", lambda: None)()
    arguments = ["--config", str(write_config(folder, case.settings))]
    run = folder / "runs" / "run"

    def start(stop: str | None = None) -> Outcome:
        signalled = {"STOP": f"{stop} {case.stop_at} {case.number // 16 % case.world_size}"} if stop else {}
        outcomes.append(train(folder, arguments, case.world_size, signalled, "tests.lab.interrupted"))
        return outcomes[-1]

    outcome = start(case.stop)
    if case.outcome == "refused" or (case.outcome == "either" and 2 in outcome.codes):
        refused(outcome, case.says)
        assert steps_of(run) == [], "there are rows of training"
        return
    if case.stop == "SIGKILL":
        assert outcome.codes in ([-9], [0])
    else:
        outcome.check()
    if case.stop:
        before = steps_of(run)
        outcome = start()
        if case.outcome == "refused when continued":
            refused(outcome, case.says)
            assert steps_of(run) == before
            return
        outcome.check()
    if case.outcome == "not repeatable":
        assert status(run)["state"] == "finished"
        return
    equal_to(ByHand(file, case.settings, case.world_size), run, CLOSE[case.settings["dtype"]])


def steps_of(run: Path) -> list[int]:
    """The steps of which there are rows of training."""
    return [row["step"] for row in rows(run, "train")] if (run / "metrics.jsonl").exists() else []


def refused(outcome: Outcome, says: str) -> None:
    """Exit code 2 on all ranks, and one message."""
    assert outcome.codes == [2] * len(outcome.codes), f"exit codes {outcome.codes}, not 2"
    assert "Traceback" not in outcome.output
    messages = re.findall(r"^distloop: (?!WARNING)", outcome.output, re.M)
    assert len(messages) == 1, f"{len(messages)} messages, not 1"
    assert re.search(says, outcome.output, re.I), f"the message does not say {says!r}"


def equal_to(by_hand: ByHand, run: Path, close: tuple[float, float]) -> None:
    """Rows and weights of a run are those of the training by hand."""
    for kind, expected in (("train", by_hand.train), ("validate", by_hand.validations)):
        found = rows(run, kind)
        assert [row["step"] for row in found] == [row["step"] for row in expected], f"the steps of {kind} rows"
        for row, numbers in zip(found, expected, strict=True):
            same_numbers(row, numbers, close, f"{kind} row of step {row['step']}")
    epochs = [row["loss"] for row in rows(run, "epoch")]
    assert epochs == pytest.approx(by_hand.epochs, rel=close[0], abs=close[1]), "the epochs' losses"
    same_weights(weights(run), by_hand.weights, close)


def same_numbers(row: Mapping[str, Any], expected: Mapping[str, Any], close: tuple[float, float], where: str) -> None:
    for name, value in expected.items():
        assert name in row, f"{where}: {name} is missing"
        assert row[name] == pytest.approx(float(value), rel=close[0], abs=close[1]), f"{where}: {name}"


def same_weights(found: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor], close: Any) -> None:
    """The tensors of a checkpoint are the expected ones; of those that are the same tensor it may hold one only."""
    kept = {expected[name].data_ptr() for name in found}
    assert kept == {value.data_ptr() for value in expected.values()}, f"the checkpoint holds {sorted(found)}"
    for name, value in found.items():
        assert value.shape == expected[name].shape, name
        assert torch.allclose(value, expected[name].to(value.dtype), rtol=close[0], atol=close[1]), (
            f"{name} differs by {float((value - expected[name]).abs().max()):.3g}"
        )
