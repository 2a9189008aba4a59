"""The built-in task `language_modelling`: the next token at each place."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from distloop.data.batches import inputs_of, targets_of
from distloop.errors import UsageError
from distloop.training.cross_entropy import is_number, summed_loss, summed_weight
from distloop.training.tasks import Sums, Task

NEEDS = "task language_modelling needs"


class LanguageModelling(Task):
    """The next token at each place: cross-entropy over the tokens that count, perplexity, accuracy.

    Inputs and targets: integers [batch, length]; the target of a place is the token after it. Outputs: logits [batch,
    length, vocabulary], also as `logits` of a dict or an object, as Hugging Face's models give them.
    """

    weight = "tokens"
    vocabulary: int = 0
    """The number of tokens in the outputs; probe() finds it."""

    def __init__(self, ignore_index: int = -100, bytes_per_token: float | None = None) -> None:
        """`ignore_index`: the target of places that do not count, such as padding. `bytes_per_token`: how many bytes of
        text a token of the data stands for, on average; with it the metrics have bits_per_byte. Raises UsageError."""
        super().__init__()  # of a subclass that is an nn.Module as well
        if type(ignore_index) is not int:
            raise UsageError(f"task.args.ignore_index = {ignore_index!r}: give a whole number, such as -100.")
        if bytes_per_token is not None and not (is_number(bytes_per_token, 0) and bytes_per_token):
            raise UsageError(
                f"task.args.bytes_per_token = {bytes_per_token!r}: give how many bytes of text a token stands for, on "
                "average over the validation data: 1 if tokens are bytes."
            )
        self.ignore_index, self.bytes_per_token = ignore_index, bytes_per_token

    def forward(self, model: nn.Module, batch: Any) -> Any:
        tokens = _as_tokens("inputs", inputs_of(batch))
        if not self.vocabulary and not torch.is_grad_enabled():  # the very first pass, which nothing has checked
            _refuse_without_embedding(model, tokens)
        return model(tokens)

    def loss(self, outputs: Any, batch: Any) -> tuple[Tensor, Tensor | int]:
        logits, targets = _logits(outputs), targets_of(batch)
        if logits.shape[:-1] != targets.shape:
            raise UsageError(
                f"{NEEDS} outputs [batch, length, vocabulary] for targets [batch, length]; the model gave "
                f"{list(logits.shape)}, the data {list(targets.shape)}. Let the model return the logits of all places."
            )
        logits, targets = logits.flatten(0, -2), targets.flatten()
        loss = summed_loss(logits, targets, ignore_index=self.ignore_index)
        return loss, summed_weight(logits, targets, ignore_index=self.ignore_index)

    def metrics(self, outputs: Any, batch: Any) -> Sums:
        targets = targets_of(batch).long()
        is_right = _logits(outputs).argmax(-1) == targets
        return {"correct": (is_right & (targets != self.ignore_index)).sum()}

    def summary(self, sums: dict[str, Tensor]) -> dict[str, float]:
        """perplexity is e to the loss, infinity where no float holds that. The loss is in nats, not in bits."""
        loss = sums["loss"].double() / sums["weight"]
        values = {"perplexity": float(loss.exp()), "accuracy": float(sums["correct"].double() / sums["weight"])}
        if self.bytes_per_token is not None:
            values["bits_per_byte"] = float(loss) / math.log(2) / self.bytes_per_token
        return {**super().summary(sums), **values}

    def probe(self, outputs: Any) -> None:
        logits = _logits(outputs)
        if logits.ndim != 3:
            _refuse(str(list(logits.shape)))
        self.vocabulary = logits.shape[-1]

    def check(self, batch: Any, indices: Sequence[int]) -> None:
        """Tokens without a place in the vocabulary would end in an error of the embedding: on a GPU, of the process."""
        inputs, targets = (_as_tokens(what, of(batch)) for what, of in (("inputs", inputs_of), ("targets", targets_of)))
        if inputs.shape != targets.shape:
            raise UsageError(
                f"{NEEDS} a target for each input; the data gave inputs {list(inputs.shape)} and targets "
                f"{list(targets.shape)}. Of a piece of length + 1 tokens: inputs = piece[:-1], targets = piece[1:]."
            )
        counted = targets != self.ignore_index
        for what, tokens, relevant in (("inputs", inputs, True), ("targets", targets, counted)):
            wrong = ((tokens < 0) | (tokens >= self.vocabulary)) & relevant
            if self.vocabulary and wrong.any():
                sample, place = wrong.nonzero()[0].tolist()
                raise UsageError(
                    f"Sample {int(indices[sample])} has the token {int(tokens[sample, place])} at place {place} of its "
                    f"{what}, but the model has {self.vocabulary} tokens (0 to {self.vocabulary - 1}). Give the model "
                    "the vocabulary of the tokenizer that made the data, in an argument of its own (model.args); "
                    f"targets that do not count are {self.ignore_index} (task.args.ignore_index)."
                )
        if not (counted & (inputs != targets)).any() and (counted[:, :-1] & (targets[:, :-1] != inputs[:, 1:])).any():
            raise UsageError(
                f"The targets are the inputs themselves, as in sample {int(indices[0])}: a model would learn to repeat "
                f"its input. {NEEDS} the next token at each place, and does not shift: of a piece of length + 1 "
                "tokens, inputs = piece[:-1], targets = piece[1:]."
            )


def _as_tokens(what: str, tokens: Any) -> Tensor:
    """The tokens as int64. Raises UsageError for what is no batch of them."""
    if isinstance(tokens, Tensor) and tokens.ndim == 2 and not (tokens.is_floating_point() or tokens.is_complex()):
        return tokens.long()
    given = f"{tokens.dtype} {list(tokens.shape)}" if isinstance(tokens, Tensor) else f"a {type(tokens).__name__}"
    raise UsageError(f"{NEEDS} {what} of integers, [batch, length]; the data gave {given}.")


def _logits(outputs: Any) -> Tensor:
    """The logits, or those of a dict or an object. Raises UsageError for outputs of another form."""
    found = outputs.get("logits") if isinstance(outputs, Mapping) else getattr(outputs, "logits", outputs)
    if not isinstance(found, Tensor):
        kind = type(outputs).__name__
        _refuse(f"a {kind} of {', '.join(map(str, outputs))}" if isinstance(outputs, Mapping) else f"a {kind}")
    return found


def _refuse(given: str) -> NoReturn:
    """Raise UsageError for outputs that language modelling has no loss for."""
    raise UsageError(
        f"{NEEDS} outputs of shape [batch, length, vocabulary], or a dict or an object with these as 'logits'; the "
        f"model gave {given}. Let it return the logits alone, or write a task with a loss() of your own "
        "(docs/own-code.md)."
    )


def _refuse_without_embedding(model: nn.Module, tokens: Tensor) -> None:
    """Raise UsageError for a token that is too large for each embedding of the model. (One that is small enough for one
    of places, and not for that of tokens, passes.)"""
    sizes = [module.num_embeddings for module in model.modules() if isinstance(module, nn.Embedding)]
    if sizes and tokens.numel() and int(tokens.max()) >= max(sizes):
        raise UsageError(
            f"The first sample has the token {int(tokens.max())}, and the largest embedding of the model has "
            f"{max(sizes)} rows. Give the model the vocabulary of the tokenizer that made the data, in an argument of "
            "its own (model.args)."
        )
