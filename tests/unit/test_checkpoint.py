"""Checkpoints: what is saved comes back; what is damaged is named and passed over; nothing in them is run."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, load_model, save_file
from torch import Tensor, nn

from distloop.config.settings import Optim
from distloop.errors import UsageError
from distloop.run import checkpoint
from distloop.run import files as run_files
from distloop.run.checkpoint import (
    MANIFEST,
    MODEL,
    OPTIMIZER,
    STATE,
    DamagedCheckpoint,
    LoopState,
    Snapshot,
    Weights,
    clean,
    load_weights,
    newest_good,
    prune,
    publish,
    verify,
    weights_of,
    write_weights,
)
from distloop.run.initial_weights import weights_file
from distloop.run.parts import contents_of, load_parts
from distloop.run.same import digest_of_start
from distloop.run.saving import HostBuffers
from distloop.training.optimizers import build_optimizer
from tests.tools.trap import Trap

FILES = (MODEL, OPTIMIZER, STATE)


def save(
    folder: Path,
    step: int,
    model: nn.Module,
    optimizer: Any,
    keep_last: int,
    state: LoopState | None = None,
    scaler: dict[str, Any] | None = None,
) -> Path:
    """What a Saver does, without its thread."""
    weights, others, more = contents_of({"model": model, "optimizer": optimizer}, HostBuffers())
    own = {**dataclasses.asdict(state or LoopState(step)), **more, "scaler": scaler}
    snapshot = Snapshot(weights, others, own, {"dataset": {}})
    final = publish(folder, step, snapshot)
    prune(folder, final, keep_last, lambda step: False)
    return final


def load(path: Path, model: nn.Module, optimizer: Any) -> dict[str, Any]:
    """What an attempt does; returns the contents of state.json."""
    state = run_files.read_json(path / STATE)
    load_parts(path, {"model": model, "optimizer": optimizer}, state)
    return state


def save_weights(model: nn.Module, path: Path) -> None:
    write_weights(weights_of(model, HostBuffers().copy), path)


class Net(nn.Module):
    """A convolution in channels_last, buffers, and two layers that share one weight."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(3, width, 3, padding=1)
        self.norm = nn.BatchNorm2d(width)
        self.encode = nn.Linear(width, width, bias=False)
        self.decode = nn.Linear(width, width)
        self.decode.weight = self.encode.weight
        self.to(memory_format=torch.channels_last)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        features = self.norm(self.convolution(images)).mean((2, 3))
        return self.decode(self.encode(features).relu())


def trained(seed: int = 0, steps: int = 3, optim: Optim | None = None) -> tuple[Net, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    model = Net()
    optimizer = build_optimizer(model, optim or Optim(lr=0.01), torch.device("cpu"), "no")
    for _ in range(steps):
        model(torch.randn(5, 3, 6, 6)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


def saved(folder: Path, *steps: int, keep_last: int = 9) -> Path:
    """Checkpoints of these steps in `folder`; the path of the last."""
    model, optimizer = trained()
    for step in steps:
        path = save(folder, step, model, optimizer, keep_last)
    return path


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def rewrite_manifest(path: Path, **changes: Any) -> None:
    """A manifest that matches the files as they are now."""
    manifest = json.loads((path / MANIFEST).read_text())
    for name in manifest["files"]:
        contents = (path / name).read_bytes()
        manifest["files"][name] = {"size": len(contents), "sha256": hashlib.sha256(contents).hexdigest()}
    del manifest["sha256"]
    manifest.update(changes)
    (path / MANIFEST).write_text(json.dumps({**manifest, "sha256": checkpoint.digest_of(manifest)}))


# ---- what is saved comes back ----------------------------------------------------------------------------------


def test_a_published_checkpoint_is_whole_and_nothing_else_is_left(tmp_path: Path) -> None:
    path = saved(tmp_path / "checkpoints", 12)
    assert path == tmp_path / "checkpoints" / "step_00000012"
    assert names(path.parent) == ["step_00000012"]
    assert names(path) == sorted([*FILES, MANIFEST])
    verify(path)
    assert newest_good(path.parent) == (path, [])
    manifest = json.loads((path / MANIFEST).read_text())
    assert manifest["schema"] == 2
    assert manifest["step"] == 12
    assert manifest["files"][MODEL]["sha256"] == hashlib.sha256((path / MODEL).read_bytes()).hexdigest()


def test_model_optimizer_and_state_come_back(tmp_path: Path) -> None:
    model, optimizer = trained(seed=1)
    state = LoopState(3, (1.5, 0.1 + 0.2), {"step": 2, "loss": 0.1 + 0.2, "accuracy": None}, skipped_steps=4)
    path = save(tmp_path, 3, model, optimizer, 2, state, {"scale": 128.0})
    other, its_optimizer = trained(seed=2)
    found = load(path, other, its_optimizer)
    assert found.pop("scaler") == {"scale": 128.0}
    assert found.pop("averaged_steps") == 0
    assert LoopState(**{**found, "epoch_sums": tuple(found["epoch_sums"])}) == state  # JSON knows lists only
    for name, tensor in model.state_dict().items():
        assert torch.equal(other.state_dict()[name], tensor), name
    for mine, its in zip(model.parameters(), other.parameters(), strict=True):
        for key in ("step", "exp_avg", "exp_avg_sq"):
            assert torch.equal(optimizer.state[mine][key], its_optimizer.state[its][key])


def test_a_loaded_run_goes_on_bit_for_bit(tmp_path: Path) -> None:
    def steps(model: Net, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
        torch.manual_seed(9)
        for _ in range(3):
            model(torch.randn(5, 3, 6, 6)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        return dict(model.state_dict())

    model, optimizer = trained(seed=1)
    path = save(tmp_path, 3, model, optimizer, 2)
    other, its_optimizer = trained(seed=2, steps=0)
    load(path, other, its_optimizer)
    expected, found = steps(model, optimizer), steps(other, its_optimizer)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_loading_keeps_the_parameters_themselves_and_their_memory_format(tmp_path: Path) -> None:
    path = saved(tmp_path, 1)
    model, optimizer = trained(seed=2)
    before = {name: (id(p), p.data_ptr(), p.stride()) for name, p in model.named_parameters()}
    buffers = {name: b.data_ptr() for name, b in model.named_buffers()}
    load(path, model, optimizer)
    assert {name: (id(p), p.data_ptr(), p.stride()) for name, p in model.named_parameters()} == before
    assert {name: b.data_ptr() for name, b in model.named_buffers()} == buffers
    assert model.convolution.weight.is_contiguous(memory_format=torch.channels_last)
    assert not model.convolution.weight.is_contiguous()
    assert model.decode.weight is model.encode.weight
    assert {id(p) for group in optimizer.param_groups for p in group["params"]} == {id(p) for p in model.parameters()}


def test_weights_are_stored_once_by_their_plain_names_and_readable_elsewhere(tmp_path: Path) -> None:
    model, _ = trained()
    save_weights(model, tmp_path / MODEL)
    tensors = load_file(tmp_path / MODEL)
    assert set(tensors) == set(model.state_dict()) - {"decode.weight"}
    with safe_open(tmp_path / MODEL, framework="pt") as file:
        assert json.loads(file.metadata()["aliases"]) == {"decode.weight": "encode.weight"}
        assert file.metadata()["format"] == "pt"
    for name, tensor in tensors.items():
        assert torch.equal(tensor, model.state_dict()[name])
    elsewhere = Net()
    elsewhere.load_state_dict({**tensors, "decode.weight": tensors["encode.weight"]})


def test_equal_weights_make_equal_files(tmp_path: Path) -> None:
    tensors = {'a "name" of größe': torch.arange(5.0), "b": torch.ones(2, 3, dtype=torch.int64)}
    for number in range(8):  # the order of two entries is right by chance in every second file
        write_weights(Weights(tensors, {"c": "b"}), tmp_path / f"{number}.safetensors")
    assert len({path.read_bytes() for path in tmp_path.iterdir()}) == 1
    assert load_file(tmp_path / "0.safetensors").keys() == tensors.keys()


def test_tied_weights_come_back_tied(tmp_path: Path) -> None:
    model, _ = trained(seed=1)
    save_weights(model, tmp_path / MODEL)
    other, _ = trained(seed=2)
    load_weights(tmp_path / MODEL, other)
    assert other.decode.weight is other.encode.weight
    assert torch.equal(other.decode.weight, model.encode.weight)


@pytest.mark.parametrize("tied", [False, True])
def test_equal_weights_are_equal_files(tmp_path: Path, tied: bool) -> None:
    """safetensors itself writes its metadata in another order each time."""
    files = set()
    for number in range(24):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.BatchNorm1d(3))
        model.register_buffer('größe "\n\x7f\\', torch.ones(1))
        if tied:
            model[1].weight = model[0].weight
        save_weights(model, path := tmp_path / f"{number}.safetensors")
        files.add(path.read_bytes())
        assert set(load_file(path)) == set(model.state_dict()) - ({"1.weight"} if tied else set())
    assert len(files) == 1


@pytest.mark.parametrize("kind", ["tied", "plain"])
def test_plain_pytorch_reads_the_weights_as_the_documents_say(tmp_path: Path, kind: str) -> None:
    def net() -> nn.Module:
        model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
        if kind == "tied":
            model[1].weight = model[0].weight
        return model

    model, other = net(), net()
    save_weights(model, tmp_path / "model.safetensors")
    assert load_model(other, tmp_path / "model.safetensors") == (set(), [])
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in other.state_dict().items())


def test_equal_weights_in_different_places_are_both_stored(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].load_state_dict(model[0].state_dict())
    save_weights(model, tmp_path / MODEL)
    assert len(load_file(tmp_path / MODEL)) == 4


class Views(nn.Module):
    """A buffer that is a part of another one."""

    def __init__(self, start: float) -> None:
        super().__init__()
        whole = torch.arange(start, start + 6)
        self.register_buffer("whole", whole)
        self.register_buffer("part", whole[:3])


def test_a_buffer_that_is_a_view_of_another_comes_back(tmp_path: Path) -> None:
    save_weights(Views(0.0), tmp_path / MODEL)
    other = Views(9.0)
    load_weights(tmp_path / MODEL, other)
    assert {name: buffer.tolist() for name, buffer in other.named_buffers()} == {
        "whole": [0, 1, 2, 3, 4, 5],
        "part": [0, 1, 2],
    }


def test_weights_may_come_from_a_file_without_our_metadata(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    model = nn.Linear(3, 2)
    save_file({"weight": torch.ones(2, 3), "bias": torch.zeros(2)}, tmp_path / "foreign.safetensors")
    load_weights(tmp_path / "foreign.safetensors", model)
    assert torch.equal(model.weight, torch.ones(2, 3))


def test_the_optimizer_keeps_the_hyperparameters_of_the_config(tmp_path: Path) -> None:
    model, optimizer = trained(optim=Optim(lr=0.01, weight_decay=0.1, betas=(0.8, 0.9), eps=1e-3))
    path = save(tmp_path, 3, model, optimizer, 2)
    other, its_optimizer = trained(seed=2, optim=Optim(lr=0.5, weight_decay=0.7, betas=(0.1, 0.2), eps=1e-6))
    load(path, other, its_optimizer)
    decayed, plain = its_optimizer.param_groups
    for group in (decayed, plain):
        assert (group["lr"], group["betas"], group["eps"]) == (0.5, (0.1, 0.2), 1e-6)
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.7, 0.0)
    first = model.convolution.weight
    assert torch.equal(
        its_optimizer.state[other.convolution.weight]["exp_avg"], optimizer.state[first]["exp_avg"]
    )  # but the moments are the checkpoint's


@pytest.mark.parametrize("name", ["sgd", "adam", "adamw"])
def test_every_optimizers_state_is_readable_without_running_code(tmp_path: Path, name: Any) -> None:
    model, optimizer = trained(optim=Optim(name, lr=0.01))
    path = save(tmp_path, 3, model, optimizer, 2)
    other, its_optimizer = trained(seed=2, steps=0, optim=Optim(name, lr=0.01))
    load(path, other, its_optimizer)
    assert len(its_optimizer.state) == len(optimizer.state)


# ---- retention and leftovers -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("keep_last", "kept"), [(1, [40]), (2, [30, 40]), (9, [10, 20, 30, 40])])
def test_the_last_so_many_are_kept(tmp_path: Path, keep_last: int, kept: list[int]) -> None:
    saved(tmp_path, 10, 20, 30, 40, keep_last=keep_last)
    assert names(tmp_path) == [f"step_{step:08d}" for step in kept]


def test_nothing_is_removed_before_its_successor_is_published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved(tmp_path, 10)
    present_at_removal: list[bool] = []
    original = shutil.rmtree

    def watched(path: Path, *rest: Any, **options: Any) -> None:
        if Path(path).name.startswith("step_"):
            present_at_removal.append((tmp_path / "step_00000020").is_dir())
        original(path, *rest, **options)

    monkeypatch.setattr(shutil, "rmtree", watched)
    saved(tmp_path, 20, keep_last=1)
    assert present_at_removal == [True]


def test_a_checkpoint_that_cannot_be_written_publishes_and_removes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved(tmp_path, 10)

    def full(*_: Any) -> None:
        raise OSError("no space left on device")

    model, optimizer = trained()
    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", full)
        with pytest.raises(OSError, match="no space"):
            save(tmp_path, 20, model, optimizer, 1)
    assert newest_good(tmp_path) == (tmp_path / "step_00000010", [])
    # What is left of the attempt is not in the way of the next.
    save(tmp_path, 20, model, optimizer, 1)
    assert names(tmp_path) == ["step_00000020"]


def test_files_are_synced_before_the_checkpoint_is_published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    original, rename = run_files.sync, Path.rename

    def synced(path: Path) -> None:
        events.append(path.name)
        original(path)

    def renamed(path: Path, target: Path) -> Path:
        events.append(f"rename {path.name}")
        return rename(path, target)

    monkeypatch.setattr(checkpoint, "sync", synced)
    monkeypatch.setattr(Path, "rename", renamed)
    saved(tmp_path, 1)
    before, after = events[: events.index("rename .writing_step_00000001")], events[-1]
    assert {*FILES, MANIFEST, ".writing_step_00000001"} <= set(before)
    assert after == tmp_path.name


def test_what_a_killed_attempt_left_behind_is_no_checkpoint_and_not_in_the_way(tmp_path: Path) -> None:
    path = saved(tmp_path, 10)
    leftover = tmp_path / ".writing_step_00000020"
    shutil.copytree(path, leftover)
    (leftover / "rubbish").write_text("")
    assert newest_good(tmp_path) == (path, [])
    new = saved(tmp_path, 20)
    assert names(tmp_path) == ["step_00000010", "step_00000020"]
    assert names(new) == sorted([*FILES, MANIFEST])


def test_a_damaged_checkpoint_of_the_same_step_is_replaced(tmp_path: Path) -> None:
    saved(tmp_path, 10, 20)
    (tmp_path / "step_00000020" / STATE).unlink()
    (tmp_path / ".replaced_step_00000020").mkdir()  # left by an attempt that was killed while it replaced one
    path = saved(tmp_path, 20)
    verify(path)
    assert names(tmp_path) == ["step_00000010", "step_00000020"]


# ---- damage ----------------------------------------------------------------------------------------------------


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def grow(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\0")


def flip_first(path: Path) -> None:
    flip(path, 0)


def flip_middle(path: Path) -> None:
    flip(path, path.stat().st_size // 2)


def flip_last(path: Path) -> None:
    flip(path, -1)


def flip(path: Path, place: int) -> None:
    contents = bytearray(path.read_bytes())
    contents[place] ^= 1
    path.write_bytes(contents)


def passed_over(folder: Path) -> str:
    """Of the checkpoints of steps 10 and 20 the older is taken; why the newer was not."""
    found, (reason,) = newest_good(folder)
    assert found == folder / "step_00000010"
    assert reason.startswith(f"{folder / 'step_00000020'}: ")
    with pytest.raises(DamagedCheckpoint):
        verify(folder / "step_00000020")
    return reason


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", [truncate, grow, flip_first, flip_middle, flip_last, Path.unlink])
def test_a_damaged_file_is_named_and_the_older_checkpoint_taken(
    tmp_path: Path, name: str, damage: Callable[[Path], None]
) -> None:
    newer = saved(tmp_path, 10, 20)
    damage(newer / name)
    assert name in passed_over(tmp_path)


@pytest.mark.parametrize("damage", [truncate, flip_first, Path.unlink, lambda path: path.write_bytes(b"\xff\xfe")])
def test_a_damaged_manifest_is_named_and_the_older_checkpoint_taken(
    tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    newer = saved(tmp_path, 10, 20)
    if damage is truncate:  # the last byte is a newline
        truncate(newer / MANIFEST)
    damage(newer / MANIFEST)
    assert MANIFEST in passed_over(tmp_path)


@pytest.mark.parametrize(
    "text",
    ["", "null", "[]", "3", "{}", '{"schema": 2}', '{"schema": 2, "files": []}', '{"schema": 2, "files": {"a": 1}}'],
)
def test_a_manifest_of_another_form_is_named_and_the_older_checkpoint_taken(tmp_path: Path, text: str) -> None:
    newer = saved(tmp_path, 10, 20)
    (newer / MANIFEST).write_text(text)
    assert MANIFEST in passed_over(tmp_path)


def test_a_manifest_whose_own_contents_have_changed_is_named_and_the_older_checkpoint_taken(tmp_path: Path) -> None:
    newer = saved(tmp_path, 10, 20)
    manifest = json.loads((newer / MANIFEST).read_text())
    (newer / MANIFEST).write_text(json.dumps({**manifest, "config_sha256": "another"}))
    assert f"{MANIFEST} does not have the contents that were written" in passed_over(tmp_path)


def test_a_checkpoint_under_the_name_of_another_step_is_passed_over(tmp_path: Path) -> None:
    saved(tmp_path, 10, 30).rename(tmp_path / "step_00000020")
    assert MANIFEST in passed_over(tmp_path)


def test_a_file_of_another_size_is_told_with_both_sizes(tmp_path: Path) -> None:
    newer = saved(tmp_path, 10, 20)
    size = (newer / MODEL).stat().st_size
    truncate(newer / MODEL)
    assert f"{MODEL} has {size - 1} bytes instead of {size}" in passed_over(tmp_path)


@pytest.mark.parametrize("name", FILES)
def test_a_manifest_that_leaves_a_file_out_does_not_vouch_for_it(tmp_path: Path, name: str) -> None:
    newer = saved(tmp_path, 10, 20)
    manifest = json.loads((newer / MANIFEST).read_text())
    files = manifest["files"]
    del files[name]
    rewrite_manifest(newer, files=files)
    assert f"{name} is missing" in passed_over(tmp_path)


def test_another_schema_is_passed_over_with_both_versions(tmp_path: Path) -> None:
    newer = saved(tmp_path, 10, 20)
    rewrite_manifest(newer, schema=3)
    reason = passed_over(tmp_path)
    assert "version 3" in reason
    assert "version 2" in reason


def test_an_empty_directory_is_passed_over(tmp_path: Path) -> None:
    saved(tmp_path, 10)
    (tmp_path / "step_00000020").mkdir()
    assert f"{MANIFEST} is missing" in passed_over(tmp_path)


def test_a_file_in_place_of_a_checkpoint_is_passed_over(tmp_path: Path) -> None:
    saved(tmp_path, 10)
    (tmp_path / "step_00000020").write_text("")
    assert MANIFEST in passed_over(tmp_path)


def test_a_folder_that_only_begins_like_a_checkpoint_is_none(tmp_path: Path) -> None:
    path = saved(tmp_path, 10)
    shutil.copytree(path, tmp_path / f"{path.name}_backup")
    assert newest_good(tmp_path) == (path, [])


def test_every_damaged_checkpoint_is_named_from_the_latest_on(tmp_path: Path) -> None:
    saved(tmp_path, 10, 20, 30)
    for path in tmp_path.iterdir():
        (path / MODEL).unlink()
    found, reasons = newest_good(tmp_path)
    assert found is None
    assert [Path(reason.split(":")[0]).name for reason in reasons] == [
        "step_00000030",
        "step_00000020",
        "step_00000010",
    ]


def test_a_folder_without_checkpoints_has_no_newest(tmp_path: Path) -> None:
    assert newest_good(tmp_path) == (None, [])
    assert newest_good(tmp_path / "nowhere") == (None, [])


# ---- other models, and files that are not to be trusted --------------------------------------------------------


def test_another_models_weights_are_refused_with_what_differs(tmp_path: Path) -> None:
    save_weights(nn.Sequential(nn.Linear(3, 2), nn.ReLU(), nn.Linear(2, 2)), tmp_path / MODEL)
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2, bias=False))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(UsageError) as refusal:
        load_weights(tmp_path / MODEL, model)
    message = str(refusal.value)
    assert f"{tmp_path / MODEL} belongs to another model" in message
    assert "2.weight: only in the file, [2, 2]" in message
    assert "1.weight: only in the model, [2, 4]" in message
    assert "0.weight: [2, 3] in the file, [4, 3] in the model" in message
    assert all(torch.equal(model.state_dict()[name], before[name]) for name in before)


def test_the_list_of_what_differs_is_short(tmp_path: Path) -> None:
    save_weights(nn.Sequential(*(nn.Linear(3, 3) for _ in range(20))), tmp_path / MODEL)
    with pytest.raises(UsageError) as refusal:
        load_weights(tmp_path / MODEL, nn.Sequential(nn.Linear(3, 3)))
    lines = str(refusal.value).splitlines()
    assert len(lines) == 8
    assert lines[-1] == "  and 32 more"


def test_another_optimizers_state_is_refused(tmp_path: Path) -> None:
    model, optimizer = trained()
    path = save(tmp_path, 1, model, optimizer, 1)
    only_some = torch.optim.AdamW(list(model.parameters())[:2])
    with pytest.raises(UsageError, match=rf"{OPTIMIZER} belongs to other parameters: model\..* only there"):
        load(path, model, only_some)


@pytest.mark.parametrize("contents", [b"", b"not safetensors at all", None])
def test_what_is_not_safetensors_is_refused(tmp_path: Path, contents: bytes | None) -> None:
    path = tmp_path / "weights.safetensors"
    if contents is not None:
        path.write_bytes(contents)
    with pytest.raises(UsageError, match=rf"{path} cannot be read as safetensors"):
        load_weights(path, Net())


def test_code_in_an_optimizers_file_is_not_run(tmp_path: Path) -> None:
    path = saved(tmp_path / "checkpoints", 10)
    trap = tmp_path / "sprung"
    torch.save({"state": Trap(trap), "param_groups": []}, path / OPTIMIZER)
    rewrite_manifest(path)
    verify(path)  # the checksum is no protection: whoever writes the file writes the manifest
    model, optimizer = trained()
    with pytest.raises(UsageError, match="cannot be read as plain data, and is not run"):
        load(path, model, optimizer)
    assert not trap.exists()
    torch.load(path / OPTIMIZER, weights_only=False)
    assert trap.exists(), "the trap would not have sprung, so that this test shows nothing"


# ---- --init-from -----------------------------------------------------------------------------------------------


def test_weights_are_found_by_run_by_checkpoint_and_by_file(tmp_path: Path) -> None:
    newest = saved(tmp_path / "run" / "checkpoints", 10, 20)
    assert weights_file(str(tmp_path / "run")) == newest / MODEL
    assert weights_file(str(newest.parent / "step_00000010")) == newest.parent / "step_00000010" / MODEL
    assert weights_file(str(newest / MODEL)) == newest / MODEL


def test_a_runs_weights_are_those_of_its_newest_good_checkpoint(tmp_path: Path) -> None:
    newest = saved(tmp_path / "checkpoints", 10, 20)
    (newest / STATE).unlink()
    assert weights_file(str(tmp_path)) == tmp_path / "checkpoints" / "step_00000010" / MODEL


def test_where_there_are_no_weights_is_told_with_what_was_passed_over(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=rf"init_from = '{tmp_path}/none': no run, checkpoint or \.safetensors"):
        weights_file(str(tmp_path / "none"))
    newest = saved(tmp_path / "checkpoints", 10)
    (newest / STATE).unlink()
    with pytest.raises(UsageError, match=rf"step_00000010: {STATE} is missing"):
        weights_file(str(tmp_path))


def test_a_whole_checkpoint_that_was_to_be_replaced_comes_back_after_a_kill(tmp_path: Path) -> None:
    model = nn.Linear(2, 2)
    final = save(tmp_path, 3, model, build_optimizer(model, Optim(), torch.device("cpu"), "no"), keep_last=2)
    aside = final.with_name(f".replaced_{final.name}")
    final.rename(aside)
    clean(tmp_path)
    verify(final)
    assert not aside.exists()
    (final / MODEL).write_bytes(b"damaged")
    final.rename(aside)
    clean(tmp_path)
    assert list(tmp_path.iterdir()) == []


def of_two_layers(folder: Path, large: int, change: Callable[[dict[str, Tensor]], None] = lambda tensors: None) -> str:
    tensors = {"body.weight": torch.zeros(large), "head.weight": torch.zeros(10, 4), "head.bias": torch.zeros(10)}
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return digest_of_start(folder / "model.safetensors")


OTHER: dict[str, Callable[[dict[str, Tensor]], Any]] = {
    "a head": lambda tensors: tensors["head.weight"][3].fill_(1),
    "one number of a bias": lambda tensors: tensors["head.bias"][9].fill_(1e-7),
    "the end of a body": lambda tensors: tensors["body.weight"][-100:].fill_(1),
    "the middle of a body": lambda tensors: tensors["body.weight"][1 << 19 :].fill_(1),
    "a name": lambda tensors: tensors.update(other=tensors.pop("head.bias")),
    "a shape": lambda tensors: tensors.update({"head.weight": torch.zeros(4, 10)}),
}


@pytest.mark.parametrize("other", OTHER.values(), ids=OTHER.keys())
def test_other_weights_to_start_from_are_told_apart(tmp_path: Path, other: Any) -> None:
    assert of_two_layers(tmp_path, 1 << 20) == of_two_layers(tmp_path, 1 << 20)
    assert of_two_layers(tmp_path, 1 << 20) != of_two_layers(tmp_path, 1 << 20, other)


def bytes_read() -> int:
    return int(Path("/proc/self/io").read_text().split()[1])


def test_of_a_large_file_of_weights_a_small_part_is_read_and_of_any_other_all(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    of_two_layers(tmp_path, 1 << 22)
    before = bytes_read()
    assert digest_of_start(file) == digest_of_start(file)
    assert bytes_read() - before < file.stat().st_size / 20
    brackets = (size + bytes(7) + text for size, text in ((b"\3", b"[1]"), (b"\2", b"{]   ")))
    for content in (b"", b"{}", b'{"schema": 2, "step": 3}', *brackets):
        file.write_bytes(content)
        digests = {digest_of_start(file)}
        file.write_bytes(content + b" ")
        assert digest_of_start(file) not in digests
    file.unlink()
    with pytest.raises(OSError, match="model"):
        digest_of_start(file)
