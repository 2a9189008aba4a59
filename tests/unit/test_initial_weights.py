"""Files of weights that other programs wrote: how --init-from and --init-fit read them."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from distloop.errors import UsageError
from distloop.run.checkpoint import weights_of, write_weights
from distloop.run.initial_weights import load_initial_weights
from distloop.run.same import digest_of_start


def net(classes: int = 3) -> nn.Module:
    """With a norm's buffers, among them a count without dimensions."""
    return nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4), nn.Linear(4, classes))


class Wrapped(nn.Module):
    """Whose own names begin with model."""

    def __init__(self) -> None:
        super().__init__()
        self.model = net()


def trained(model: nn.Module | None = None) -> nn.Module:
    model = model or net()
    with torch.no_grad():
        for number, tensor in enumerate(model.state_dict().values()):
            tensor.copy_(torch.arange(tensor.numel()).reshape(tensor.shape) + 100 * number)
    return model


def with_prefix(prefix: str, state: dict[str, Any]) -> dict[str, Any]:
    return {prefix + name: value for name, value in state.items()}


def torchvision(model: nn.Module) -> dict[str, Any]:
    """As references/classification/train.py saves it, with the command line's arguments."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 30)
    args = argparse.Namespace(lr=0.1, model="resnet50", output_dir=Path("out"))
    return {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "lr_scheduler": schedule.state_dict(),
        "epoch": 3,
        "args": args,
        "model_ema": with_prefix("module.", torch.optim.swa_utils.AveragedModel(net()).module.state_dict()),
    }


def timm(model: nn.Module) -> dict[str, Any]:
    """As CheckpointSaver saves it."""
    state = {"epoch": 3, "arch": "vit", "state_dict": model.state_dict(), "optimizer": {}, "version": 2}
    return {**state, "args": argparse.Namespace(lr=0.1), "state_dict_ema": net().state_dict(), "metric": 0.5}


def lightning(model: nn.Module) -> dict[str, Any]:
    state = {"epoch": 3, "global_step": 12, "pytorch-lightning_version": "2.5.0", "loops": {}, "callbacks": {}}
    return {**state, "state_dict": with_prefix("model.", model.state_dict()), "hyper_parameters": {"lr": 0.1}}


FORMS: dict[str, tuple[str, Callable[[nn.Module], Any]]] = {
    "a state dict": ("a.pth", lambda model: model.state_dict()),
    "of DDP": ("a.pt", lambda model: with_prefix("module.", model.state_dict())),
    "of a compiled model": ("a.pt", lambda model: with_prefix("_orig_mod.", model.state_dict())),
    "of a compiled model in DDP": ("a.pt", lambda model: with_prefix("module._orig_mod.", model.state_dict())),
    "torchvision": ("model_3.pth", torchvision),
    "timm": ("checkpoint-3.pth.tar", timm),
    "Lightning": ("last.ckpt", lightning),
    "another": ("a.bin", lambda model: {"model_state_dict": model.state_dict(), "step": torch.tensor(4)}),
}


def same(one: nn.Module, other: nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True))


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "before torch 1.6"])
@pytest.mark.parametrize(("name", "form"), FORMS.values(), ids=FORMS.keys())
def test_files_of_other_programs_are_read(tmp_path: Path, name: str, form: Callable[..., Any], legacy: bool) -> None:
    source, model = trained(), net()
    torch.save(form(source), tmp_path / name, _use_new_zipfile_serialization=not legacy)
    assert load_initial_weights(tmp_path / name, model, fit=False) == []
    assert same(model, source)
    fitted = net()
    assert load_initial_weights(tmp_path / name, fitted, fit=True) == []
    assert same(fitted, source)


def test_a_prefix_that_the_model_has_itself_is_no_prefix(tmp_path: Path) -> None:
    source, model = trained(Wrapped()), Wrapped()
    torch.save(with_prefix("module.", source.state_dict()), tmp_path / "a.pth")
    load_initial_weights(tmp_path / "a.pth", model, fit=False)
    assert same(model, source)
    save_file(with_prefix("module.", source.state_dict()), tmp_path / "a.safetensors")
    load_initial_weights(tmp_path / "a.safetensors", other := Wrapped(), fit=False)
    assert same(other, source)
    mixed = {**with_prefix("module.", net().state_dict()), "criterion.weight": torch.ones(3)}
    torch.save(mixed, tmp_path / "mixed.pth")
    with pytest.raises(UsageError, match=r"module\.0\.weight: only in the file"):
        load_initial_weights(tmp_path / "mixed.pth", net(), fit=False)


@pytest.mark.parametrize("kind", ["a.pth", "a.safetensors", "a run's"])
def test_another_head_is_refused_with_a_hint_and_starts_fresh_with_init_fit(tmp_path: Path, kind: str) -> None:
    source = trained(net(5))
    source.register_buffer("scale", torch.ones(2))
    path = tmp_path / ("model.safetensors" if kind == "a run's" else kind)
    if kind == "a.pth":
        torch.save(source.state_dict(), path)
    elif kind == "a.safetensors":
        save_file(source.state_dict(), path)
    else:
        write_weights(weights_of(source, lambda _, tensor: tensor), path)
    model = net(3)
    model.register_parameter("extra", nn.Parameter(torch.ones(1)))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(UsageError, match=r"(?s)belongs to another model:.*2\.weight: \[5, 4\] in the.*\n--init-fit "):
        load_initial_weights(path, model, fit=False)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert load_initial_weights(path, model, fit=True) == [
        f"--init-fit: 2.weight starts fresh: [5, 4] in {path}, [3, 4] in the model",
        f"--init-fit: 2.bias starts fresh: [5] in {path}, [3] in the model",
        f"--init-fit: extra starts fresh: {path} lacks it",
        "--init-fit: scale is not used: the model has no such tensor",
    ]
    fresh = ("2.weight", "2.bias", "extra")
    for name, tensor in model.state_dict().items():
        expected = before[name] if name in fresh else source.state_dict()[name]
        assert torch.equal(tensor, expected), name


def test_a_file_of_which_nothing_fits_is_refused(tmp_path: Path) -> None:
    torch.save({"other.weight": torch.ones(2)}, tmp_path / "a.pth")
    with pytest.raises(UsageError, match=r"(?s)no tensor of .*a\.pth fits the model:.*other\.weight: only in the file"):
        load_initial_weights(tmp_path / "a.pth", net(), fit=True)


def test_of_tied_weights_one_name_in_the_file_is_enough(tmp_path: Path) -> None:
    embedding, head = nn.Embedding(4, 2), nn.Linear(2, 4)
    head.weight = embedding.weight
    model = nn.ModuleDict({"embedding": embedding, "head": head})
    for name in ("embedding.weight", "head.weight"):
        torch.save({name: torch.full((4, 2), 7.0), "head.bias": torch.ones(4)}, tmp_path / "a.pth")
        with torch.no_grad():
            head.weight.zero_()
        assert load_initial_weights(tmp_path / "a.pth", model, fit=True) == []
        assert float(embedding.weight.detach().min()) == 7


class Counting(nn.Module):
    """With an extra state, as the user's module may have one."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.count = nn.Linear(1, 1), 0

    def get_extra_state(self) -> dict[str, int]:
        return {"count": self.count}

    def set_extra_state(self, state: dict[str, int]) -> None:
        self.count = state["count"]


@pytest.mark.parametrize("fit", [False, True])
def test_extra_state_comes_along(tmp_path: Path, fit: bool) -> None:
    source, model = Counting(), Counting()
    source.count = 5
    torch.save({"state_dict": with_prefix("model.", source.state_dict())}, tmp_path / "a.ckpt")
    load_initial_weights(tmp_path / "a.ckpt", model, fit)
    assert model.count == 5


# ---- what is refused -------------------------------------------------------------------------------------------------


class Trap:
    """Unpickled without care, it makes a file."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.file),)


def test_a_whole_module_is_refused_with_the_way_out(tmp_path: Path) -> None:
    for number, content in enumerate((net(), {"model": Counting()})):
        torch.save(content, tmp_path / f"{number}.pth")
        with pytest.raises(
            UsageError, match=r"cannot be read without running code.*torch\.save\(model\.state_dict\(\)"
        ):
            load_initial_weights(tmp_path / f"{number}.pth", net(), fit=True)


def test_code_in_a_file_is_not_run(tmp_path: Path) -> None:
    torch.save({"state_dict": net().state_dict(), "args": Trap(tmp_path / "sprung")}, tmp_path / "a.pth")
    with pytest.raises(UsageError, match=r"a\.pth holds an object of \w+\.mkdir, which cannot be read without running"):
        load_initial_weights(tmp_path / "a.pth", net(), fit=True)
    assert not (tmp_path / "sprung").exists()
    torch.load(tmp_path / "a.pth", weights_only=False)
    assert (tmp_path / "sprung").exists(), "the trap would not have sprung, so that this test shows nothing"


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ({"epoch": 3, "net": net().state_dict()}, "is no state dict .* It holds: epoch, net"),
        ([torch.ones(1)], "It holds: a list"),
        ({}, "It holds: nothing"),
        ({"model": {}, "epoch": 3}, "It holds: nothing"),
        (b"no file of torch", "cannot be read"),
        (b"", "cannot be read"),
        (b"PK\3\4 cut off", "cannot be read as a file of torch"),
    ],
)
def test_other_contents_are_refused(tmp_path: Path, content: Any, says: str) -> None:
    path = tmp_path / "a.pth"
    path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
    with pytest.raises(UsageError, match=says):
        load_initial_weights(path, net(), fit=False)


def of_one_file(path: Path, change: Callable[[Tensor], Any]) -> str:
    tensor = torch.zeros(1 << 16)
    change(tensor)
    torch.save({"model": {"weight": tensor}}, path)
    return digest_of_start(path)


def test_other_weights_in_a_pth_file_are_told_apart(tmp_path: Path) -> None:
    path = tmp_path / "a.pth"
    assert of_one_file(path, lambda tensor: None) == of_one_file(path, lambda tensor: None)
    assert of_one_file(path, lambda tensor: None) != of_one_file(path, lambda tensor: tensor[30_000].fill_(1e-7))
