"""The built-in model `gpt`: a decoder-only transformer for tokens, after Radford et al. 2019 ("Language models are
unsupervised multitask learners"), without biases."""

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, scaled_dot_product_attention


class Block(nn.Module):
    """Attention to this place and those before it, then two layers for each place alone; each is added to what comes
    in, and normalised before."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.norm_1, self.norm_2 = nn.LayerNorm(width, bias=False), nn.LayerNorm(width, bias=False)
        self.attend, self.attended = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
        self.expand, self.contract = nn.Linear(width, 4 * width, bias=False), nn.Linear(4 * width, width, bias=False)
        self.drop = nn.Dropout(dropout)

    def forward(self, hidden: Tensor) -> Tensor:
        """[batch, length, width] to the same."""
        parts = self.attend(self.norm_1(hidden)).chunk(3, -1)
        queries, keys, values = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in parts)
        dropout = self.dropout if self.training else 0.0
        mixed = scaled_dot_product_attention(queries, keys, values, dropout_p=dropout, is_causal=True)
        hidden = hidden + self.drop(self.attended(mixed.transpose(1, 2).flatten(2)))
        return hidden + self.drop(self.contract(nn.functional.gelu(self.expand(self.norm_2(hidden)))))


class GPT(nn.Module):
    """Tokens [batch, length] to logits [batch, length, vocabulary]. The embedding of tokens is the last layer, too."""

    def __init__(self, vocabulary: int, length: int, width: int, layers: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(vocabulary, width), nn.Embedding(length, width)
        self.drop = nn.Dropout(dropout)
        self.blocks = nn.Sequential(*(Block(width, heads, dropout) for _ in range(layers)))
        self.norm = nn.LayerNorm(width, bias=False)
        for name, parameter in self.named_parameters():
            if parameter.ndim > 1:  # 2 · layers of the last kind are added up
                is_added = name.endswith(("attended.weight", "contract.weight"))
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * layers) if is_added else 0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        places = torch.arange(tokens.shape[1], device=tokens.device)
        hidden = self.blocks(self.drop(self.tokens(tokens) + self.places(places)))
        return linear(self.norm(hidden), self.tokens.weight)


def gpt(
    num_classes: int,
    input_shape: tuple[int, ...],
    length: int | None = None,
    width: int = 384,
    layers: int = 6,
    heads: int = 6,
    dropout: float = 0.0,
) -> nn.Module:
    """A GPT. `num_classes`: the vocabulary; `length`: the most tokens of a sequence, by default those of the data.
    Raises ValueError for sizes that do not fit together."""
    if width % heads:
        raise ValueError(f"width = {width} cannot be divided among {heads} heads")
    if len(input_shape) != 1 or (length or input_shape[0]) < input_shape[0]:
        raise ValueError(f"samples have the shape {list(input_shape)}; gpt takes {length or 'some'} tokens at most")
    return GPT(num_classes, length or input_shape[0], width, layers, heads, dropout)
