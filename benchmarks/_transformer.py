"""A transformer encoder in BERT's form, made of plain modules: token ids in, logits out."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

PADDING = 0  # the id that fills a sentence up to its length


@dataclass(frozen=True)
class Shape:
    """The sizes of an encoder.

    Args:
        vocabulary: number of token ids.
        length: largest number of tokens in a sentence.
        width: elements of a token's vector.
        layers: number of layers.
        heads: attention heads in a layer.
        inner: width of the hidden layer behind each attention.
        dropout: share of values that training drops from embeddings and from the output of each block.
        classes: number of logits.
    """

    vocabulary: int
    length: int
    width: int
    layers: int
    heads: int
    inner: int
    dropout: float = 0.0
    classes: int = 2


MINILM = Shape(30522, 512, width=384, layers=6, heads=12, inner=1536)


class Encoder(nn.Module):
    """Classifies sentences: embeddings, layers of attention, the mean over the tokens, and a linear head.

    Args:
        shape: its sizes.
    """

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.tokens = nn.Embedding(shape.vocabulary, shape.width)
        self.positions = nn.Embedding(shape.length, shape.width)
        self.norm, self.dropout = nn.LayerNorm(shape.width), nn.Dropout(shape.dropout)
        self.layers = nn.ModuleList(Layer(shape) for _ in range(shape.layers))
        self.head = nn.Linear(shape.width, shape.classes)
        for table in (self.tokens, self.positions):
            nn.init.normal_(table.weight, std=0.02)

    def forward(self, ids: Tensor) -> Tensor:
        """Return logits [batch, classes] for token ids [batch, tokens], int64."""
        padded = ids == PADDING
        x = self.tokens(ids) + self.positions(torch.arange(ids.shape[1], device=ids.device))
        x = self.dropout(self.norm(x))
        for layer in self.layers:
            x = layer(x, padded)
        kept = (~padded).to(x.dtype).unsqueeze(-1)
        logits: Tensor = self.head((x * kept).sum(1) / kept.sum(1).clamp(min=1))
        return logits


class Layer(nn.Module):
    """Attention and two linear layers, each with a residual connection and a LayerNorm behind it."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.attention = Attention(shape.width, shape.heads)
        self.wider, self.narrower = nn.Linear(shape.width, shape.inner), nn.Linear(shape.inner, shape.width)
        self.norms = nn.ModuleList(nn.LayerNorm(shape.width) for _ in range(2))
        self.activation, self.dropout = nn.GELU(), nn.Dropout(shape.dropout)

    def forward(self, x: Tensor, padded: Tensor) -> Tensor:
        x = self.norms[0](x + self.dropout(self.attention(x, padded)))
        found: Tensor = self.norms[1](x + self.dropout(self.narrower(self.activation(self.wider(x)))))
        return found


class Attention(nn.Module):
    """Self-attention that ignores padding."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: Tensor, padded: Tensor) -> Tensor:
        query, key, value = (
            part(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in (self.query, self.key, self.value)
        )
        scores = query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1])
        shares = scores.masked_fill(padded[:, None, None], -1e9).softmax(-1)
        found: Tensor = self.out((shares @ value).transpose(1, 2).flatten(2))
        return found
