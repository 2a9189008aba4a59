"""From the config's model to a module with the right weights."""

from __future__ import annotations

import dataclasses
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision import models

from distloop.config.settings import Config, Model
from distloop.data.datasets import digits
from distloop.errors import UsageError
from distloop.tasks import Classification
from distloop.training.gpt import gpt
from distloop.training.models import build_model, cnn, make_model, resnet18_small

CPU = torch.device("cpu")
NAME = "squeezenet1_1"  # a small one of torchvision's


def built(**settings: Any) -> nn.Module:
    config = dataclasses.replace(Config(), **{"model": Model("mlp"), **settings})
    return build_model(config, digits(), Classification(), CPU)


def test_the_initial_weights_depend_on_the_seed_alone() -> None:
    torch.manual_seed(7)
    one = built(seed=1).state_dict()
    torch.manual_seed(8)
    again, other = built(seed=1).state_dict(), built(seed=2).state_dict()
    assert all(torch.equal(one[name], again[name]) for name in one)
    assert not torch.equal(one["1.weight"], other["1.weight"])


def test_the_model_is_compiled_in_place_where_the_config_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[nn.Module] = []
    monkeypatch.setattr(nn.Module, "compile", lambda module: compiled.append(module))
    plain = built()
    assert compiled == []
    model = built(compile=True)
    assert compiled == [model]
    assert list(model.state_dict()) == list(plain.state_dict())
    own = built(compile=True, model=Model("tests.lab.bordering:Compiles"))  # its compile() is another one's
    assert compiled == [model, own]


@pytest.mark.parametrize(("norm", "kind"), [("group", nn.GroupNorm), ("batch", nn.BatchNorm2d), ("none", nn.Identity)])
def test_the_cnn_has_the_norm_that_was_asked_for(norm: str, kind: type[nn.Module]) -> None:
    model = cnn((1, 8, 8), 10, width=8, norm=norm)
    assert sum(isinstance(module, kind) for module in model.modules()) == 4
    assert model(torch.zeros(2, 1, 8, 8)).shape == (2, 10)


def test_the_cnn_drops_out_as_much_as_was_asked_for() -> None:
    (dropout,) = [module for module in cnn((1, 8, 8), 10, dropout=0.3).modules() if isinstance(module, nn.Dropout)]
    assert dropout.p == 0.3


def test_small_images_keep_their_size_at_the_beginning_of_resnet18_small() -> None:
    model = resnet18_small(10)
    sizes: list[torch.Size] = []
    model.get_submodule("layer1").register_forward_pre_hook(lambda module, inputs: sizes.append(inputs[0].shape[2:]))
    assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 10)
    assert sizes == [(32, 32)]


# ---- pretrained ------------------------------------------------------------------------------------------------


def pretend_weights(monkeypatch: pytest.MonkeyPatch, state: dict[str, Tensor] | OSError) -> None:
    """Let torchvision give this state, or fail as a download does, instead of downloading weights."""

    def get_state_dict(check_hash: bool) -> dict[str, Tensor]:
        assert check_hash
        if isinstance(state, OSError):
            raise state
        return state

    default = SimpleNamespace(get_state_dict=get_state_dict, url="https://example.invalid/weights.pth")
    monkeypatch.setattr(models, "get_model_weights", lambda name: SimpleNamespace(DEFAULT=default))


def test_pretrained_weights_are_taken_but_for_a_head_of_another_shape(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    state = {name: torch.full_like(tensor, 0.5) for name, tensor in models.get_model(NAME).state_dict().items()}
    pretend_weights(monkeypatch, state)
    model = make_model(Model(NAME, pretrained=True), {"num_classes": 3}).state_dict()
    fresh = [name for name in model if not torch.equal(model[name], torch.full_like(model[name], 0.5))]
    assert fresh == ["classifier.1.weight", "classifier.1.bias"]
    assert model["classifier.1.weight"].shape[0] == 3


def test_without_pretrained_no_weights_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_weights(monkeypatch, OSError("asked"))
    make_model(Model(NAME), {"num_classes": 3})


def test_weights_that_cannot_be_downloaded_are_explained(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    pretend_weights(monkeypatch, OSError("no route to host"))
    with pytest.raises(UsageError, match=r"no route to host.*https://example\.invalid/weights\.pth.*pretrained: false"):
        make_model(Model(NAME, pretrained=True), {"num_classes": 3})


def test_models_without_pretrained_weights_say_so() -> None:
    with pytest.raises(UsageError, match="there are no weights for 'mlp'"):
        make_model(Model("mlp", pretrained=True), {"input_shape": (8,), "num_outputs": 3})


ready = nn.Linear(3, 2)


def test_an_object_in_place_of_its_class_is_refused() -> None:
    with pytest.raises(UsageError, match=r":ready' is a model already \(a Linear\).*a function that returns the model"):
        make_model(Model(f"{__name__}:ready"), {})


# ---- gpt ---------------------------------------------------------------------------------------------------------


def small_gpt(**arguments: Any) -> Any:
    torch.manual_seed(0)
    return gpt(11, (6,), **{"width": 8, "layers": 2, "heads": 2, **arguments})


def test_gpt_is_pytorchs_transformer_with_a_causal_mask_and_tied_embeddings() -> None:
    model = small_gpt().double()
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    layer = nn.TransformerEncoderLayer(8, 2, 32, 0.0, "gelu", batch_first=True, norm_first=True, bias=False)
    names = {"norm1": "norm_1", "norm2": "norm_2", "self_attn.in_proj_": "attend.", "self_attn.out_proj": "attended"}
    names |= {"linear1": "expand", "linear2": "contract"}
    tokens = torch.randint(11, (3, 6))
    hidden = model.tokens(tokens) + model.places.weight
    mask = nn.Transformer.generate_square_subsequent_mask(6, dtype=torch.float64)
    for block in model.blocks:
        own = block.state_dict()
        state = {}
        for theirs in layer.state_dict():
            name = theirs
            for before, after in names.items():
                name = name.replace(before, after)
            state[theirs] = own.pop(name)
        assert own == {}
        layer.double().load_state_dict(state)
        hidden = layer(hidden, src_mask=mask, is_causal=True)
    torch.testing.assert_close(model(tokens), model.norm(hidden) @ model.tokens.weight.T)


def test_gpt_begins_near_the_loss_of_guessing_and_drops_out_in_training_only() -> None:
    model = small_gpt(dropout=0.5, length=9)
    assert model.places.weight.shape == (9, 8)
    tokens = torch.randint(11, (64, 6))
    loss = nn.functional.cross_entropy(model(tokens).flatten(0, 1), tokens.roll(1, 1).flatten())
    assert abs(float(loss.detach()) - math.log(11)) < 0.05
    assert not torch.equal(model(tokens), model(tokens))
    model.eval()
    assert torch.equal(model(tokens), model(tokens))
    wide = small_gpt(width=256, layers=8)
    added = [block.contract.weight for block in wide.blocks] + [block.attended.weight for block in wide.blocks]
    assert [float(weight.std()) for weight in added] == pytest.approx([0.02 / 4] * 16, rel=0.02)
    assert float(wide.blocks[0].expand.weight.std()) == pytest.approx(0.02, rel=0.02)


@pytest.mark.parametrize(
    ("arguments", "offered", "said"),
    [
        ({"width": 10, "heads": 4}, {}, "width = 10 cannot be divided among 4 heads"),
        ({"length": 5}, {}, r"samples have the shape \[6\]; gpt takes 5 tokens at most"),
        ({}, {"input_shape": (3, 8, 8)}, r"samples have the shape \[3, 8, 8\]; gpt takes"),
        ({}, {"num_classes": None}, "missing a required argument: 'num_classes'.*--model.args.num_classes VALUE"),
    ],
)
def test_what_gpt_cannot_be_made_of_is_said(arguments: dict[str, Any], offered: dict[str, Any], said: str) -> None:
    given = {"input_shape": (6,), "num_classes": 11, **offered}
    given = {name: value for name, value in given.items() if value is not None}
    with pytest.raises(UsageError, match=said):
        make_model(Model("gpt", args=arguments), given)
