"""Task language_modelling against torch, and what it refuses."""

from __future__ import annotations

import dataclasses
import math
import types
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from distloop.config.settings import Task as TaskConfig
from distloop.errors import UsageError
from distloop.tasks import LanguageModelling
from distloop.training.builtin_tasks import build_task
from distloop.training.trying import try_out

VOCABULARY, SAMPLES, LENGTH = 11, 8, 7
SPLITS = [[8], [3, 5], [1] * 8]


@pytest.fixture
def scores() -> tuple[Tensor, Tensor]:
    """Outputs [8, 7, 11] in float64, and targets [8, 7]: of one sample nothing counts, of the next more and more."""
    generator = torch.Generator().manual_seed(0)
    shape = (SAMPLES, LENGTH, VOCABULARY)
    outputs = torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(0, VOCABULARY, shape[:2], generator=generator)
    for sample, row in enumerate(targets):
        row[: LENGTH - sample] = -100
    return outputs, targets


def pieces(samples: int = 4) -> tuple[Tensor, Tensor]:
    """(inputs, targets) of different tokens."""
    piece = torch.arange(samples)[:, None] + torch.arange(LENGTH + 1)
    return piece[:, :-1] % VOCABULARY, piece[:, 1:] % VOCABULARY


def probed(vocabulary: Any = VOCABULARY, **arguments: Any) -> LanguageModelling:
    task = LanguageModelling(**arguments)
    task.probe(torch.zeros(1, LENGTH, vocabulary))
    return task


def sums_over(task: LanguageModelling, outputs: Tensor, targets: Tensor, split: list[int]) -> dict[str, Tensor]:
    """What validation adds up where the samples come in batches of these sizes."""
    sums: dict[str, Tensor] = {}
    for some, of in zip(outputs.split(split), targets.split(split), strict=True):
        loss, weight = task.loss(some, (None, of))
        row = {"loss": loss, "weight": torch.as_tensor(weight), "samples": torch.tensor(len(of))}
        for name, value in {**row, **task.metrics(some, (None, of))}.items():
            assert value.is_floating_point() == (name == "loss")
            sums[name] = sums[name] + value if name in sums else value
    return sums


# ---- loss and metrics --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_sum_of_outputs_of_16_bits_has_more_digits_than_these(
    scores: tuple[Tensor, Tensor], dtype: torch.dtype
) -> None:
    outputs, targets = scores[0].detach().to(dtype), scores[1]
    loss, _ = probed().loss(types.SimpleNamespace(logits=outputs), (None, targets))
    exact, _ = probed().loss(outputs.double(), (None, targets))
    assert loss.dtype == torch.float32
    assert float(loss) == pytest.approx(float(exact), rel=1e-6)


@pytest.mark.parametrize("split", SPLITS)
def test_the_loss_is_torchs_mean_over_the_tokens_that_count_however_the_batch_is_split(
    scores: tuple[Tensor, Tensor], split: list[int]
) -> None:
    outputs, targets = scores
    sums = sums_over(probed(), outputs, targets, split)
    loss, expected = sums["loss"] / sums["weight"], cross_entropy(outputs.flatten(0, 1), targets.flatten())
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)
    found, reference = (torch.autograd.grad(each, outputs, retain_graph=True)[0] for each in (loss, expected))
    assert torch.allclose(found, reference, rtol=1e-10, atol=1e-14)
    assert int(sums["weight"]) == sum(range(SAMPLES))
    assert LanguageModelling.weight == "tokens"  # so that the loop adds the weights up over the ranks


@pytest.mark.parametrize("split", SPLITS)
def test_the_metrics_are_those_of_all_tokens_that_count(scores: tuple[Tensor, Tensor], split: list[int]) -> None:
    outputs, targets = scores[0].detach(), scores[1]
    targets = torch.where(torch.arange(LENGTH) % 2 == 0, outputs.argmax(-1), targets)  # some are right
    targets[1] = -100
    task = probed(bytes_per_token=4.5)
    summary, counted = task.summary(sums_over(task, outputs, targets, split)), targets != -100
    loss = cross_entropy(outputs.flatten(0, 1), targets.flatten()).item()
    assert summary["loss"] == pytest.approx(loss)
    assert summary["perplexity"] == pytest.approx(math.exp(loss))
    assert summary["bits_per_byte"] == pytest.approx(loss / math.log(2) / 4.5)
    assert summary["accuracy"] == float((outputs.argmax(-1) == targets)[counted].double().mean())
    assert 0.5 < summary["accuracy"] < 1


def test_bits_per_byte_are_told_only_where_the_bytes_of_a_token_are_known(scores: tuple[Tensor, Tensor]) -> None:
    summary = probed().summary(sums_over(probed(), scores[0].detach(), scores[1], [8]))
    assert summary.keys() == {"loss", "perplexity", "accuracy"}
    assert LanguageModelling.best == ("loss", "min")


def test_a_uniform_guess_of_bytes_is_8_bits_and_a_perplexity_of_256() -> None:
    task = probed(256, bytes_per_token=1)
    summary = task.summary(sums_over(task, torch.zeros(4, 3, 256).double(), torch.full((4, 3), 7), [4]))
    assert summary["bits_per_byte"] == pytest.approx(8, rel=1e-12)
    assert summary["perplexity"] == pytest.approx(256, rel=1e-12)


def test_a_perplexity_that_no_float_holds_is_infinite() -> None:
    one = torch.tensor(1)
    sums = {"loss": torch.tensor(1e5), "weight": one, "samples": one, "correct": one}
    assert LanguageModelling().summary(sums)["perplexity"] == math.inf
    nothing = {"loss": torch.tensor(0.0), "weight": 0 * one, "samples": one, "correct": 0 * one}
    assert all(math.isnan(value) for value in LanguageModelling().summary(nothing).values())


def test_another_target_may_be_the_one_that_does_not_count(scores: tuple[Tensor, Tensor]) -> None:
    outputs, targets = scores
    other = torch.where(targets == -100, 0, targets)
    loss, weight = probed(ignore_index=0).loss(outputs, (None, other))
    expected = cross_entropy(outputs.flatten(0, 1), other.flatten(), ignore_index=0)
    assert (loss / weight).item() == pytest.approx(expected.item(), rel=1e-12)
    assert int(probed(ignore_index=0).metrics(0 * outputs, (None, other))["correct"]) == 0  # which guess 0 everywhere


@dataclasses.dataclass
class Answer:
    logits: Tensor
    past: None = None


@pytest.mark.parametrize("form", [lambda logits: {"logits": logits, "past": None}, Answer], ids=["dict", "object"])
def test_logits_are_found_in_a_dict_or_an_object(scores: tuple[Tensor, Tensor], form: Any) -> None:
    outputs, batch, task = scores[0], (None, scores[1]), LanguageModelling()
    task.probe(form(outputs[:1]))
    assert task.vocabulary == VOCABULARY
    assert torch.equal(task.loss(form(outputs), batch)[0], task.loss(outputs, batch)[0])
    assert torch.equal(task.metrics(form(outputs), batch)["correct"], task.metrics(outputs, batch)["correct"])


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.uint16])
def test_tokens_may_be_of_any_integer_type(dtype: torch.dtype) -> None:
    model = nn.Sequential(nn.Embedding(VOCABULARY, 4), nn.Linear(4, VOCABULARY))
    task, batch = probed(), pieces()
    same = (batch[0].to(dtype), batch[1].to(dtype))
    task.check(same, range(4))
    outputs = task.forward(model, same)
    assert torch.equal(outputs, model(batch[0]))
    assert torch.equal(task.loss(outputs, same)[0], task.loss(outputs, batch)[0])


# ---- what is refused ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("token", [VOCABULARY, -1, 50256])
@pytest.mark.parametrize("what", ["inputs", "targets"])
def test_a_token_outside_of_the_vocabulary_is_told_with_its_sample(what: str, token: int) -> None:
    batch = dict(zip(("inputs", "targets"), pieces(), strict=True))
    probed().check(batch, [70, 71, 72, 73])
    batch[what][2, 5] = token
    with pytest.raises(UsageError) as refusal:
        probed().check(batch, [70, 71, 72, 73])
    assert f"Sample 72 has the token {token} at place 5 of its {what}" in str(refusal.value)
    assert "the model has 11 tokens (0 to 10)" in str(refusal.value)


def test_a_target_that_does_not_count_is_no_token_and_no_input() -> None:
    inputs, targets = pieces()
    targets[1, :3] = -100
    probed().check((inputs, targets), range(4))
    inputs[1, 0] = -100
    with pytest.raises(UsageError, match="Sample 1 has the token -100 at place 0 of its inputs"):
        probed().check((inputs, targets), range(4))


def test_a_token_of_the_first_sample_without_an_embedding_is_told_before_the_model_meets_it() -> None:
    model = nn.Sequential(nn.Embedding(VOCABULARY, 4), nn.Linear(4, VOCABULARY))
    inputs, targets = pieces(1)
    inputs[0, 0] = VOCABULARY
    with pytest.raises(UsageError, match=r"first sample has the token 11, and the largest embedding .* 11 rows"):
        try_out(LanguageModelling(), model, (inputs, targets), types.SimpleNamespace(train=[], validation=[]))


@pytest.mark.parametrize("ignored", [0, 3])
def test_targets_that_are_the_inputs_are_refused(ignored: int) -> None:
    inputs, _ = pieces()
    targets = inputs.clone()
    targets[:, :ignored] = -100
    with pytest.raises(UsageError, match=r"targets are the inputs themselves.*sample 70.*targets = piece\[1:\]"):
        probed().check((inputs, targets), range(70, 74))


def test_pieces_of_one_token_are_their_own_targets_and_are_taken() -> None:
    tokens = torch.full((4, LENGTH), 3)
    probed().check((tokens, tokens.clone()), range(4))
    probed().check((tokens, torch.full_like(tokens, -100)), range(4))


@pytest.mark.parametrize(
    ("inputs", "targets", "said"),
    [
        (torch.zeros(4, 7), pieces()[1], r"inputs of integers, \[batch, length\]; the data gave torch\.float32"),
        (pieces()[0], torch.zeros(4, 7), r"targets of integers, \[batch, length\]; the data gave torch\.float32"),
        (pieces()[0], torch.zeros(4).long(), r"targets of integers.*torch\.int64 \[4\]"),
        (["text"], pieces()[1], "inputs of integers.*a list"),
        (pieces()[0], pieces()[1][:, :-1], r"inputs \[4, 7\] and targets \[4, 6\].*piece\[1:\]"),
    ],
)
def test_a_batch_of_another_form_is_refused(inputs: Any, targets: Any, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        probed().check((inputs, targets), range(4))


def test_inputs_of_another_form_are_refused_before_the_model_gets_them() -> None:
    with pytest.raises(UsageError, match=r"inputs of integers.*a dict"):
        LanguageModelling().forward(nn.Identity(), ({"input_ids": torch.zeros(1, 3)}, None))


@pytest.mark.parametrize("shape", [(4, VOCABULARY), (4, 1, VOCABULARY), (28, VOCABULARY), (4, VOCABULARY, LENGTH)])
def test_outputs_of_other_places_than_the_targets_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(UsageError, match=r"\[batch, length, vocabulary\] .* logits of all places") as refusal:
        probed().loss(torch.zeros(shape), pieces())
    assert f"the model gave {list(shape)}, the data [4, 7]" in str(refusal.value)


@pytest.mark.parametrize(
    ("outputs", "given"),
    [
        (torch.zeros(1, VOCABULARY), r"\[1, 11\]"),
        ((torch.zeros(1, LENGTH, VOCABULARY), None), "a tuple"),
        ({"scores": torch.zeros(1)}, "a dict of scores"),
        (types.SimpleNamespace(logits=None), "a SimpleNamespace"),
    ],
)
def test_outputs_of_another_form_are_refused(outputs: Any, given: str) -> None:
    with pytest.raises(UsageError, match=rf"\[batch, length, vocabulary\].*the model gave {given}"):
        LanguageModelling().probe(outputs)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"ignore_index": None}, "ignore_index = None.*whole number"),
        ({"bytes_per_token": 0}, "bytes_per_token = 0.*1 if tokens are bytes"),
        ({"bytes_per_token": float("inf")}, "bytes_per_token = inf"),
        ({"bytes_per_token": True}, "bytes_per_token = True"),
    ],
)
def test_arguments_that_mean_nothing_are_refused(arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        build_task(TaskConfig("language_modelling", arguments))
