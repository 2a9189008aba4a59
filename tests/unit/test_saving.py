"""Saving beside training: one write at a time, of what there was when it was asked for; failures are said."""

from __future__ import annotations

import errno
import json
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from distloop.config.settings import Checkpoint, Config, EarlyStop
from distloop.data.datasets import digits
from distloop.data.order import Plan
from distloop.errors import RunFailed
from distloop.ranks.digests import Digests
from distloop.ranks.places import Position
from distloop.ranks.ranks import Ranks
from distloop.ranks.stopping import StopReason, Watch
from distloop.ranks.verdicts import Verdict
from distloop.run import saving
from distloop.run.attempt import Attempt
from distloop.run.best import Best, EarlyEnd
from distloop.run.checkpoint import LoopState, Snapshot, newest_good, publish, published_in, verify
from distloop.run.lock import LOCK
from distloop.run.parts import load_parts
from distloop.run.saving import HostBuffers, Saver
from distloop.training.averaging import Average
from distloop.training.optimizers import SeveralOptimizers
from tests.tools.records import status

# ---- copies ----------------------------------------------------------------------------------------------------


def test_a_copy_is_contiguous_equal_and_apart() -> None:
    image = torch.arange(120.0).reshape(2, 3, 4, 5).to(memory_format=torch.channels_last)
    copy = HostBuffers().copy("image", image)
    assert torch.equal(copy, image)
    assert copy.is_contiguous()
    image.zero_()
    assert copy.sum() == sum(range(120))


def test_what_an_optimizer_keeps_is_copied_with_its_strides() -> None:
    moments = torch.arange(120.0).reshape(2, 3, 4, 5).to(memory_format=torch.channels_last)
    state = {"state": {0: {"exp_avg": moments, "step": torch.tensor(3.0)}}, "param_groups": [{"betas": (0.9, 0.99)}]}
    copy = HostBuffers().copy_tree("optimizer", state)
    assert copy["param_groups"] == state["param_groups"]
    assert isinstance(copy["param_groups"][0]["betas"], tuple)
    assert torch.equal(copy["state"][0]["exp_avg"], moments)
    assert copy["state"][0]["exp_avg"].stride() == moments.stride()
    assert float(copy["state"][0]["step"]) == 3


def test_nothing_in_a_copied_tree_is_shared_with_the_original() -> None:
    inner = [1, 2]
    state = {"state": {0: {"exp_avg": torch.ones(3)}}, "param_groups": [{"lr": 0.1, "params": inner}]}
    copy = HostBuffers().copy_tree("optimizer", state)
    state["state"][0]["exp_avg"].zero_()  # type: ignore[index]
    state["param_groups"][0]["lr"] = 7.0  # type: ignore[index]
    inner.append(3)
    assert torch.equal(copy["state"][0]["exp_avg"], torch.ones(3))
    assert copy["param_groups"] == [{"lr": 0.1, "params": [1, 2]}]


def test_memory_is_used_again_from_save_to_save() -> None:
    buffers = HostBuffers()
    tensor = torch.ones(4, 4)
    first = buffers.copy("weight", tensor)
    second = buffers.copy("weight", tensor * 2)
    assert second.data_ptr() == first.data_ptr()
    assert torch.equal(second, tensor * 2)
    assert buffers.copy("other", tensor).data_ptr() != first.data_ptr()
    trees = [buffers.copy_tree("o", {"state": {0: {"a": tensor * n}, 1: {"a": tensor}}}) for n in (1, 2)]
    assert trees[0]["state"][0]["a"].data_ptr() == trees[1]["state"][0]["a"].data_ptr()
    assert trees[0]["state"][0]["a"].data_ptr() != trees[0]["state"][1]["a"].data_ptr()


@pytest.mark.parametrize("other", [torch.ones(3, 2), torch.ones(2, 3, dtype=torch.float64), torch.ones(6)])
def test_a_tensor_of_another_kind_gets_other_memory(other: torch.Tensor) -> None:
    buffers = HostBuffers()
    buffers.copy("weight", torch.zeros(2, 3))
    copy = buffers.copy("weight", other)
    assert torch.equal(copy, other)
    assert copy.dtype == other.dtype


def test_a_parameter_is_copied_without_its_graph() -> None:
    copy = HostBuffers().copy("weight", nn.Parameter(torch.ones(2)))
    assert not copy.requires_grad


# ---- the saver -------------------------------------------------------------------------------------------------


class Heard:
    """In place of a Watch: what it was told."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.wishes: list[StopReason] = []
        self.times: list[str] = []

    def say(self, text: str) -> None:
        self.lines.append(text)

    def look_for(self, *_: Any) -> None:
        """It is not for this one to find a reason to stop."""

    def ask(self, wish: StopReason) -> None:
        self.wishes.append(wish)

    def took(self, what: str, seconds: float) -> None:
        assert seconds >= 0
        self.times.append(what)


class Run:
    """What a loop has at hand: a model, its average, an optimizer with moments, and a Saver."""

    def __init__(self, folder: Path, enabled: bool = True, **settings: Any) -> None:
        torch.manual_seed(0)
        self.folder = folder
        self.model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.1)
        self.average = Average(self.model, 0.9)
        self.parts: dict[str, Any] = {"model": self.model, "averaged": self.average.averaged}
        self.parts["optimizer"] = self.optimizer
        self.heard = Heard()
        self.published: list[int] = []
        watch = cast(Watch, self.heard)
        self.saver = Saver(
            folder,
            Checkpoint(**settings),
            {"dataset": {}},
            watch,
            lambda step, best: self.published.append(step),
            enabled,
        )

    def train(self) -> None:
        self.model(torch.randn(8, 3)).square().sum().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.average.update(self.model)

    def save(self, step: int, best: int | None = None) -> None:
        state = LoopState(step, best={"step": best} if best else None)
        self.saver.save(self.parts, state, {})


class Around(torch.optim.Optimizer):
    """A class around an optimizer, as users write them, that does not begin as torch's do: it has no hooks."""

    def __init__(self, base: torch.optim.Optimizer) -> None:
        self.base, self.param_groups, self.defaults, self.state = base, base.param_groups, base.defaults, base.state

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.base.step()

    def state_dict(self) -> dict[str, Any]:
        return self.base.state_dict()


def several(model: Any) -> torch.optim.Optimizer:
    first, last = model
    return SeveralOptimizers(
        [torch.optim.AdamW(first.parameters()), torch.optim.SGD(last.parameters(), lr=0.1, momentum=0.9)]
    )


@pytest.mark.parametrize("kind", [lambda model: torch.optim.AdamW(model.parameters()), several])
def test_after_the_first_step_the_buffers_of_a_save_are_there(tmp_path: Path, kind: Any) -> None:
    """So the first save waits for no memory. The optimizer's state does not exist before that step."""
    run = Run(tmp_path)
    run.optimizer = run.parts["optimizer"] = kind(run.model)
    run.saver.rehearse(run.parts, LoopState(0))
    run.train()
    run.saver.wait()
    made = {key: buffer.data_ptr() for key, buffer in run.saver.buffers.buffers.items()}
    assert any("exp_avg" in str(key) for key in made)
    run.train()
    assert not run.saver.making  # only once
    run.save(2)
    run.saver.finish()
    assert {key: buffer.data_ptr() for key, buffer in run.saver.buffers.buffers.items()} == made
    assert run.published == [2]


def test_an_optimizer_without_hooks_is_saved_as_others(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.parts["optimizer"] = Around(run.optimizer)
    run.saver.rehearse(run.parts, LoopState(0))
    run.train()
    run.save(1)
    run.saver.finish()
    assert run.published == [1]
    assert not run.heard.lines


class SlowDisk:
    """publish() that waits until it is let go; notes how many go on at once."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.go, self.begun = threading.Event(), threading.Event()
        self.now = self.most = 0
        self.steps: list[int] = []
        monkeypatch.setattr(saving, "publish", self.publish)

    def publish(self, folder: Path, step: int, snapshot: Snapshot, owned: Callable[[], None]) -> Path:
        self.now += 1
        self.most = max(self.most, self.now)
        self.steps.append(step)
        self.begun.set()
        assert self.go.wait(60)
        final = publish(folder, step, snapshot, owned)
        self.now -= 1
        return final


def test_a_checkpoint_holds_what_there_was_when_it_was_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = SlowDisk(monkeypatch)
    run = Run(tmp_path)
    run.train()
    then = {name: tensor.clone() for name, tensor in run.model.state_dict().items()}
    assert run.average.module is not None
    average = {name: tensor.clone() for name, tensor in run.average.module.state_dict().items()}
    moments = run.optimizer.state_dict()["state"][0]["exp_avg"].clone()
    run.save(1)
    for _ in range(3):  # goes on while the write waits
        run.train()
    assert not torch.equal(run.optimizer.state_dict()["state"][0]["exp_avg"], moments)
    disk.go.set()
    run.saver.finish()
    (path,) = published_in(tmp_path)
    verify(path)
    for name, expected in (("model", then), ("averaged", average)):
        stored = load_file(path / f"{name}.safetensors")
        assert all(torch.equal(stored[key], expected[key]) for key in expected), name
    stored = torch.load(path / "optimizer.pt", weights_only=True)["state"][0]
    assert torch.equal(stored["exp_avg"], moments)
    other = Run(tmp_path)
    assert other.average.averaged is not None
    state = json.loads((path / "state.json").read_text())
    load_parts(path, other.parts, state)
    assert state["step"] == 1
    assert int(other.average.averaged.n_averaged) == 1


def test_a_save_does_not_wait_for_its_write_but_for_the_one_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = SlowDisk(monkeypatch)
    run = Run(tmp_path)
    run.train()
    run.save(1)  # returns although nothing is written
    assert disk.begun.wait(60)
    assert published_in(tmp_path) == []
    first = {name: tensor.clone() for name, tensor in run.model.state_dict().items()}
    run.train()
    second = threading.Thread(target=run.save, args=(2,))
    second.start()
    second.join(0.3)
    assert second.is_alive(), "it overwrites the buffers that are being written"
    assert disk.steps == [1]
    disk.go.set()
    second.join(60)
    run.saver.finish()
    assert disk.steps == [1, 2]
    assert disk.most == 1
    assert [path.name for path in published_in(tmp_path)] == ["step_00000001", "step_00000002"]
    stored = load_file(tmp_path / "step_00000001" / "model.safetensors")
    assert all(torch.equal(stored[name], first[name]) for name in first)
    assert run.published == [1, 2]
    assert run.heard.times == ["save", "save"]


@pytest.mark.parametrize("wait", [Saver.finish, Saver.wait])
def test_whoever_waits_for_the_write_waits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wait: Callable[[Saver], None]
) -> None:
    disk = SlowDisk(monkeypatch)
    run = Run(tmp_path)
    run.save(1)
    assert disk.begun.wait(60)
    end = threading.Thread(target=wait, args=(run.saver,))
    end.start()
    end.join(0.2)
    assert end.is_alive()
    disk.go.set()
    end.join(60)
    assert not end.is_alive()
    assert newest_good(tmp_path)[0] == tmp_path / "step_00000001"


def saving_attempt(folder: Path) -> Attempt:
    """An attempt at folder/run, of one process, that has begun to save its first step."""
    ranks = SimpleNamespace(rank=0, world_size=1, is_main=True, position=Position(), watch=Heard(), digests=Digests())
    ranks.from_main = lambda function: function()
    ranks.report_failure = lambda error: Verdict(1, repr(error), "")
    data = digits()
    plan = Plan(len(data.train), 32, total_steps=9)
    config = Config(name="run", runs_dir=str(folder))
    attempt = Attempt(config, cast(Ranks, ranks), plan, data, torch.device("cpu"), Best(None, ("loss", "min")))
    attempt.__enter__()
    model = nn.Linear(2, 1)
    parts = {"model": model, "averaged": None, "optimizer": torch.optim.SGD(model.parameters()), "scaler": None}
    attempt.save(parts, LoopState(1))
    return attempt


@pytest.mark.parametrize("error", [None, ValueError("bad"), SystemExit(0)], ids=["end", "failure", "exit"])
def test_an_attempt_waits_for_the_write_before_it_gives_up_its_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException | None
) -> None:
    disk = SlowDisk(monkeypatch)
    attempt = saving_attempt(tmp_path)
    assert disk.begun.wait(60)
    end = threading.Thread(target=attempt.__exit__, args=(type(error) if error else None, error, None))
    end.start()
    end.join(0.2)
    assert end.is_alive()
    assert status(attempt.path)["state"] == "running"
    assert (attempt.path / LOCK).exists()
    disk.go.set()
    end.join(60)
    assert not end.is_alive()
    assert newest_good(attempt.path / "checkpoints")[0] is not None
    assert status(attempt.path)["step"] == 1
    assert status(attempt.path)["state"] == ("failed" if error else "running")  # Attempt.end says how it ended
    assert not (attempt.path / LOCK).exists()


def test_a_second_interrupt_does_not_wait(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = SlowDisk(monkeypatch)
    attempt = saving_attempt(tmp_path)
    assert disk.begun.wait(60)
    attempt.__exit__(KeyboardInterrupt, KeyboardInterrupt(), None)
    assert attempt.saver.thread is not None
    assert attempt.saver.thread.is_alive()
    assert published_in(attempt.path / "checkpoints") == []
    assert status(attempt.path)["state"] == "stopped"
    disk.go.set()
    attempt.saver.wait()
    assert status(attempt.path)["state"] == "stopped"  # although the save went on


def fail(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def publish_in_vain(folder: Path, step: int, snapshot: Snapshot, *rest: Any) -> Path:
        (folder / f".writing_step_{step:08d}").mkdir(parents=True)
        raise error

    monkeypatch.setattr(saving, "publish", publish_in_vain)


def test_a_failed_write_is_said_and_the_next_save_tries_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(tmp_path)
    run.save(1)
    run.saver.wait()
    with monkeypatch.context() as patch:
        fail(patch, OSError(errno.ENOSPC, "No space left on device"))
        run.save(2)
        run.saver.wait()
    (line,) = run.heard.lines
    for words in ("step 2", str(tmp_path), "No space left on device", "step_00000001, is whole", "tries again"):
        assert words in line
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000001"], "its leftovers are removed"
    assert run.published == [1]
    assert run.heard.wishes == []
    run.save(3)
    run.saver.finish()
    assert run.published == [1, 3]
    assert len(run.heard.lines) == 1


def test_a_failed_write_asks_for_a_stop_where_the_policy_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run(tmp_path, on_failure="stop")
    fail(monkeypatch, RuntimeError("[enforce fail at inline_container.cc:603] . unexpected pos\nand more"))
    run.save(1)
    run.saver.wait()
    assert run.heard.wishes == [StopReason.SAVE_FAILED]
    assert "There is none yet." in run.heard.lines[0]
    assert "unexpected pos" in run.heard.lines[0]
    assert "and more" not in run.heard.lines[0]


@pytest.mark.parametrize("policy", ["continue", "stop"])
def test_a_run_without_its_last_checkpoint_has_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, policy: str
) -> None:
    run = Run(tmp_path, on_failure=policy)
    run.save(1)
    run.saver.wait()
    fail(monkeypatch, PermissionError(errno.EACCES, "Permission denied"))
    run.save(2)
    with pytest.raises(RunFailed, match=r"last checkpoint is missing.*step 2.*Permission denied.*step_00000001"):
        run.saver.finish()


def test_an_earlier_failure_is_no_failure_of_a_run_whose_last_checkpoint_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run(tmp_path)
    with monkeypatch.context() as patch:
        fail(patch, OSError(errno.ENOSPC, "No space left on device"))
        run.save(1)
        run.saver.wait()
    run.save(2)
    run.saver.finish()


def test_the_last_the_best_and_those_for_keeps_stay(tmp_path: Path) -> None:
    run = Run(tmp_path, keep_last=2, keep_every_steps=5)
    for step in range(1, 13):
        run.save(step, best=3 if step >= 3 else None)
    run.saver.finish()
    assert [path.name for path in published_in(tmp_path)] == [f"step_{step:08d}" for step in (3, 5, 10, 11, 12)]


def test_what_was_the_best_goes_when_there_is_a_better_one(tmp_path: Path) -> None:
    run = Run(tmp_path, keep_last=2)
    for step, best in ((1, 1), (2, 1), (3, 1), (4, 4), (5, 4), (6, 4), (7, 4)):
        run.save(step, best)
        run.saver.wait()
    assert [path.name for path in published_in(tmp_path)] == [f"step_{step:08d}" for step in (4, 6, 7)]


def test_the_other_ranks_save_nothing(tmp_path: Path) -> None:
    run = Run(tmp_path / "checkpoints", enabled=False)
    run.save(1)
    run.saver.finish()
    assert not (tmp_path / "checkpoints").exists()
    assert run.published == []


def test_what_a_validation_finishes_is_finished_whatever_stop_was_agreed_before_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    attempt = saving_attempt(tmp_path)
    attempt.best.early_end = EarlyEnd(EarlyStop(patience=1), ("loss", "min"))
    monkeypatch.setattr(attempt.agreement, "reached", lambda: StopReason.SIGTERM)
    assert attempt.end_step(3) is StopReason.SIGTERM
    attempt.best.update(3, {"loss": 1.0})
    assert attempt.stop_reason is StopReason.SIGTERM
    attempt.best.update(4, {"loss": 1.0})
    assert attempt.stop_reason is StopReason.FINISHED
    attempt.__exit__(None, None, None)


def test_a_loop_that_goes_on_after_finish_stops_after_its_next_step(tmp_path: Path) -> None:
    attempt = saving_attempt(tmp_path)
    assert attempt.finish("no progress") is StopReason.FINISHED
    assert attempt.end_step(3) is StopReason.FINISHED
    attempt.__exit__(None, None, None)
