"""The parts of a checkpoint: any modules, optimizers and objects, by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.optim.swa_utils import AveragedModel

from distloop.errors import UsageError
from distloop.run.best import EarlyEnd
from distloop.run.checkpoint import STATE, LoopState, Snapshot, publish, verify
from distloop.run.files import Start, read_json
from distloop.run.parts import check_parts, contents_of, load_parts, load_start
from distloop.run.saving import HostBuffers
from distloop.training.averaging import Average


class Patience:
    """An object of a loop: it stops early."""

    def __init__(self, waited: Any = 0) -> None:
        self.waited = waited

    def state_dict(self) -> dict[str, Any]:
        return {"waited": self.waited}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.waited = state["waited"]


def adversaries(seed: int, steps: int = 3) -> dict[str, Any]:
    """What a GAN trains, after some steps: two modules, an average, two optimizers; and two objects."""
    torch.manual_seed(seed)
    generator, discriminator = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3)), nn.Linear(3, 1)
    average = Average(generator, 0.9)
    optimizers = [
        torch.optim.AdamW(generator.parameters(), lr=0.1),
        torch.optim.SGD(discriminator.parameters(), lr=0.1, momentum=0.9),
    ]
    for _ in range(steps):
        discriminator(generator(torch.randn(4, 2))).square().sum().backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        average.update(generator)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**seed)
    parts: dict[str, Any] = {"generator": generator, "discriminator": discriminator}
    parts["generator_average"] = average.averaged
    parts |= {"g_optimizer": optimizers[0], "d_optimizer": optimizers[1], "nothing": None}
    return {**parts, "patience": Patience(seed), "d_scaler": scaler}


def save(folder: Path, parts: dict[str, Any], step: int = 3, **more: Any) -> Path:
    weights, others, state = contents_of(parts, HostBuffers())
    state = {"step": step, "epoch_sums": [0.0, 0.0], "best": None, "skipped_steps": 0, **more, **state}
    return publish(folder, step, Snapshot(weights, others, state, {"config_sha256": "abc", "dataset": {}}))


def load(path: Path, parts: dict[str, Any]) -> None:
    load_parts(path, parts, read_json(path / STATE))


def tensors_of(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    values = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
    return [tensor for inner in values for tensor in tensors_of(inner)]


def test_every_part_comes_back_to_the_bit(tmp_path: Path) -> None:
    before, after = adversaries(1), adversaries(2, steps=1)
    path = save(tmp_path, before)
    names = {file.name for file in path.iterdir()}
    assert names == {
        *(f"{name}.safetensors" for name in ("generator", "discriminator", "generator_average")),
        *(f"{name}.pt" for name in ("g_optimizer", "d_optimizer", "patience")),
        "state.json",
        "manifest.json",
    }
    verify(path)
    check_parts(after)
    load(path, after)
    for name, part in before.items():
        if part is None:
            continue
        for one, other in zip(tensors_of(part.state_dict()), tensors_of(after[name].state_dict()), strict=True):
            assert torch.equal(one, other), name
    assert after["patience"].waited == 1
    assert after["d_scaler"].get_scale() == before["d_scaler"].get_scale() == 2.0
    assert int(after["generator_average"].n_averaged) == 3


def test_a_truncated_part_is_no_whole_checkpoint(tmp_path: Path) -> None:
    path = save(tmp_path, adversaries(1))
    file = path / "d_optimizer.pt"
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(Exception, match=r"d_optimizer\.pt has \d+ bytes instead of \d+"):
        verify(path)


def test_of_a_model_in_ddp_the_model_is_saved(tmp_path: Path) -> None:
    import torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel

    bare = nn.Linear(2, 1)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)  # type: ignore[attr-defined]
    try:
        parts = {"model": DistributedDataParallel(bare), "optimizer": torch.optim.SGD(bare.parameters())}
        path = save(tmp_path, parts)
    finally:
        dist.destroy_process_group()
    other = nn.Linear(2, 1)
    load(path, {"model": other, "optimizer": torch.optim.SGD(other.parameters())})
    assert torch.equal(other.weight, bare.weight)


# ---- what does not fit -----------------------------------------------------------------------------------------


def refused(path: Path, parts: dict[str, Any]) -> str:
    with pytest.raises(UsageError) as refusal:
        load(path, parts)
    return str(refusal.value)


def linear(optimizer: Any = torch.optim.AdamW, groups: Any = None, size: int = 3, **settings: Any) -> dict[str, Any]:
    model = nn.Sequential(nn.Linear(size, 3), nn.Linear(3, 3))
    named = dict(model.named_parameters())
    chosen = [{"params": [named[name] for name in group]} for group in groups or [list(named)]]
    made = optimizer(chosen, lr=0.1, **settings)
    model(torch.ones(1, size)).sum().backward()
    made.step()
    return {"model": model, "optimizer": made}


ALL = ["0.weight", "0.bias", "1.weight", "1.bias"]


def test_another_optimizer_is_said_to_be_one(tmp_path: Path) -> None:
    path = save(tmp_path, linear())
    text = f"{path / 'optimizer.pt'} belongs to another optimizer: AdamW there, SGD here."
    assert refused(path, linear(torch.optim.SGD)) == text


def test_other_parameters_are_said_to_be_ones(tmp_path: Path) -> None:
    path = save(tmp_path, linear())
    found = refused(path, linear(groups=[ALL[:3]]))
    assert found == f"{path / 'optimizer.pt'} belongs to other parameters: model.1.bias only there or only here."


@pytest.mark.parametrize(
    "groups",
    [
        [ALL[:2], ALL[2:]],
        [["1.weight", "0.bias", "0.weight", "1.bias"]],  # of the same shapes: nothing else would show it
    ],
)
def test_other_groups_are_said_to_be_ones(tmp_path: Path, groups: Any) -> None:
    path = save(tmp_path, linear())
    assert f"{path / 'optimizer.pt'} belongs to other groups of parameters" in refused(path, linear(groups=groups))


def test_a_checkpoint_without_names_of_parameters_loads_by_its_groups(tmp_path: Path) -> None:
    """As those that distloop wrote before it wrote them."""
    before, after = linear(), linear()
    weights, others, state = contents_of(before, HostBuffers())
    for key in ("kind", "parameters"):
        del others["optimizer"][key]
    path = publish(tmp_path, 1, Snapshot(weights, others, {"step": 1, **state}, {}))
    load(path, after)
    assert torch.equal(
        after["optimizer"].state_dict()["state"][0]["exp_avg"], others["optimizer"]["state"][0]["exp_avg"]
    )
    assert "belongs to other groups" in refused(path, linear(groups=[ALL[:2], ALL[2:]]))
    assert "belongs to other parameters" in refused(path, linear(groups=[ALL[:2]]))


def test_another_module_is_said_to_be_one(tmp_path: Path) -> None:
    path = save(tmp_path, linear())
    assert f"{path / 'model.safetensors'} belongs to another model:\n" in refused(path, linear(size=4))


def test_a_part_that_only_the_checkpoint_or_only_the_loop_has_is_refused(tmp_path: Path) -> None:
    path = save(tmp_path, {**linear(), "teacher": nn.Linear(1, 1)})
    assert refused(path, linear()) == (
        f"{path} holds teacher, which this loop does not load: its parts are model, optimizer. "
        "Name it, as None if the loop does without, or use --name OTHER."
    )
    more = {**linear(), "teacher": nn.Linear(1, 1), "patience": Patience()}
    assert refused(path, more) == (
        f"{path} does not hold patience, which this loop loads, but model, optimizer, teacher. Use --name OTHER."
    )
    load(path, {**linear(), "teacher": None})  # the loop knows it, and does without


def test_an_average_that_the_checkpoint_lacks_begins_anew(tmp_path: Path) -> None:
    path = save(tmp_path, linear())
    after = linear()
    after["averaged"] = AveragedModel(after["model"], use_buffers=True)
    load(path, after)
    assert int(after["averaged"].n_averaged) == 0


# ---- refused before the first step -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["Model", "a/b", "..", "", "step", "best", "time", "finished", "skipped"])
def test_a_name_that_is_no_file_name_or_taken_is_refused(name: str) -> None:
    with pytest.raises(UsageError, match=f"parts: '{name}' cannot be a name"):
        check_parts({name: nn.Linear(1, 1)})


def test_an_optimizer_of_parameters_that_no_part_holds_is_refused() -> None:
    parts = {**linear(), "other": torch.optim.SGD(nn.Linear(1, 1).parameters())}
    with pytest.raises(UsageError, match=r"other updates parameters of a module that is not among the parts \(model, "):
        check_parts(parts)


def test_an_object_that_cannot_be_saved_is_refused() -> None:
    with pytest.raises(UsageError, match="parts: count is a int, which has no state_dict"):
        check_parts({"count": 3})
    with pytest.raises(UsageError, match=r"parts: patience\.state_dict\(\) is not plain data .* it holds numpy\.\S+$"):
        check_parts({"patience": Patience(np.zeros(3))})
    with pytest.raises(UsageError, match=r"parts: patience\.state_dict\(\) is not plain data .*: Can't pickle"):
        check_parts({"patience": Patience(lambda: 1)})
    check_parts({"patience": Patience({"a": [1, 2.5, None, "x", torch.ones(2)]})})


def test_parameters_that_no_optimizer_updates_are_named_where_one_updates_others() -> None:
    parts = linear(groups=[ALL[:1]])
    which = "model.0.bias, model.1.weight, model.1.bias"
    assert check_parts(parts) == [f"distloop: WARNING: no optimizer updates {which}, although they require a gradient"]
    for parameter in list(parts["model"].parameters())[1:]:
        parameter.requires_grad_(False)
    assert check_parts(parts) == []
    averaged = AveragedModel(parts["model"], use_buffers=True)
    assert check_parts({**linear(), "teacher": nn.Linear(1, 1), "averaged": averaged}) == []
    assert check_parts(adversaries(1)) == []


# ---- where an attempt starts -----------------------------------------------------------------------------------


def start(checkpoint: Path | None, weights: Path | None = None, config: str = "abc") -> Start:
    return Start(Path(), 2, checkpoint, weights, 3, False, [], {"config_sha256": config})


def test_an_early_end_is_remembered_for_the_same_config_only(tmp_path: Path) -> None:
    path = save(tmp_path, linear(), finished="no progress")
    for origin, reason in ((start(path), "no progress"), (start(path, config="another"), None), (start(None), None)):
        early_end = EarlyEnd(None, ("loss", "min"))
        assert load_start(origin, linear(), early_end=early_end) == LoopState(3 if origin.checkpoint else 0)
        assert early_end.reason == reason


def test_weights_to_start_from_are_those_of_the_part_model(tmp_path: Path) -> None:
    path = save(tmp_path, linear())
    after = linear()
    load_start(start(None, path / "model.safetensors"), after)
    assert torch.equal(load_file(path / "model.safetensors")["0.weight"], after["model"][0].weight)
    with pytest.raises(UsageError, match="init_from: this loop has no part named model, but generator"):
        load_start(start(None, path / "model.safetensors"), {"generator": nn.Linear(1, 1)})


def test_weights_to_start_from_fit_a_model_inside_ddp_and_not_a_part_that_is_none(tmp_path: Path) -> None:
    path = save(tmp_path, linear()) / "model.safetensors"
    with pytest.raises(UsageError, match="init_from: this loop has no part named model, but model, optimizer"):
        load_start(start(None, path), {**linear(), "model": None})


def test_a_scheduler_of_pytorch_is_refused() -> None:
    parts = linear()
    scheduler = torch.optim.lr_scheduler.ExponentialLR(parts["optimizer"], 0.5)
    with pytest.raises(UsageError, match="parts: scheduler is a learning-rate scheduler of PyTorch"):
        check_parts({**parts, "scheduler": scheduler})


def test_a_state_that_is_not_plain_any_more_is_refused_when_it_is_saved(tmp_path: Path) -> None:
    parts = {**linear(), "patience": Patience(0.5)}
    check_parts(parts)
    parts["patience"].waited = np.float64(0.5)
    with pytest.raises(UsageError, match=r"parts: patience\.state_dict\(\) is not plain data"):
        save(tmp_path, parts)


def test_another_file_in_a_checkpoint_is_nobodys_business(tmp_path: Path) -> None:
    path = save(tmp_path, linear())
    torch.save({}, path / "export.pt")
    verify(path)
    load(path, linear())
