"""Small networks that take sequences of tokens, and inputs of any length for them."""

from typing import Any

import numpy as np
import torch
from torch import nn

VOCABULARY = 30
POSITIONS = 24  # rows of the tables of positions
_WIDTH = 16


class Encoder(nn.Module):
    """An encoder with a table of positions and a mask of padding, as BERT."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, _WIDTH)
        self.positions = nn.Embedding(POSITIONS, _WIDTH)
        self.register_buffer("places", torch.arange(POSITIONS)[None])
        layer = nn.TransformerEncoderLayer(_WIDTH, 2, 24, batch_first=True)
        self.layers = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
        self.pooler = nn.Linear(_WIDTH, 5)

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> dict[str, torch.Tensor]:
        x = self.tokens(ids) + self.positions(self.places[:, : ids.shape[1]])
        hidden = self.layers(x, src_key_padding_mask=mask == 0)
        return {"hidden": hidden, "pooled": self.pooler(hidden[:, 0]).tanh()}


class Causal(nn.Module):
    """A causal language model that computes its positions and its mask, as GPT."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, _WIDTH)
        self.positions = nn.Embedding(POSITIONS, _WIDTH)
        self.qkv = nn.Linear(_WIDTH, 3 * _WIDTH)
        self.out = nn.Linear(_WIDTH, _WIDTH)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        batch, length = ids.shape
        x = self.tokens(ids) + self.positions(torch.arange(length, device=ids.device))
        q, k, v = (part.view(batch, length, 2, -1).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
        future = torch.ones(length, length, dtype=torch.bool, device=ids.device).triu(1)
        weights = (q @ k.mT / 3).masked_fill(future, -1e9).softmax(-1)
        y = (weights @ v).transpose(1, 2).reshape(batch, length, -1)
        return (x + self.out(y)) @ self.tokens.weight.T


class Tagger(nn.Module):
    """A recurrent net without any limit of length."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, _WIDTH)
        self.layers = nn.LSTM(_WIDTH, 8, batch_first=True, bidirectional=True)
        self.head = nn.Linear(16, 5)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.layers(self.tokens(ids))[0])


class Translator(nn.Module):
    """An encoder and a decoder, each with its own length."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, _WIDTH)
        self.cross = nn.MultiheadAttention(_WIDTH, 2, batch_first=True)
        self.head = nn.Linear(_WIDTH, VOCABULARY)

    def forward(self, ids: torch.Tensor, mask: torch.Tensor, decoder_ids: torch.Tensor) -> torch.Tensor:
        seen = self.tokens(ids) * mask[..., None]
        asked = self.tokens(decoder_ids)
        return self.head(asked + self.cross(asked, seen, seen, key_padding_mask=mask == 0)[0])


class FixedLength(nn.Module):
    """It joins all tokens of a sequence of 16."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, 4)
        self.head = nn.Linear(16 * 4, 3)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.tokens(ids).view(-1, 16 * 4))


class Columns(nn.Module):
    """It reads columns of categories one by one: they are no sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.tables = nn.ModuleList(nn.Embedding(VOCABULARY, 4) for _ in range(6))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return torch.cat([table(ids[:, i]) for i, table in enumerate(self.tables)], 1)


def tokens(batch: int, length: int, seed: int = 0) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Return random tokens."""
    return np.random.default_rng(seed).integers(0, VOCABULARY, (batch, length))


def padded(batch: int, length: int) -> dict[str, np.ndarray[Any, Any]]:
    """Return random tokens and their mask, in which the last sample ends early."""
    mask = np.ones((batch, length), np.int64)
    mask[-1, length // 2 :] = 0
    return {"ids": tokens(batch, length), "mask": mask}


def example(net: nn.Module, batch: int, length: int, other: int = 5) -> dict[str, np.ndarray[Any, Any]]:
    """Return inputs of one of these nets; `other` is the length of a decoder's tokens."""
    if isinstance(net, Translator):
        return padded(batch, length) | {"decoder_ids": tokens(batch, other, seed=1)}
    return padded(batch, length) if isinstance(net, Encoder) else {"ids": tokens(batch, length)}
