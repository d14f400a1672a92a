"""Nets for tables, recommendation, points and graphs, and small nets for text; drawn here."""

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional

from zoo_nets.blocks import conv, conv1d
from zoo_nets.net import SAMPLES, Example, Net, example, images, tokens

TABLES, TEXT, POINTS = "tables and recommendation", "small text nets", "points, graphs and pairs"
WORDS, LENGTH, OTHER_LENGTHS = 2000, 12, (7, 19)


def mlp(*widths: int) -> nn.Sequential:
    """Return linear layers with ReLU between them."""
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(widths):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


class Dlrm(nn.Module):
    """DLRM: an embedding per category, the products of all pairs, a net on top."""

    pairs: Tensor

    def __init__(self, categories: int = 5, width: int = 16) -> None:
        super().__init__()
        self.tables = nn.ModuleList(nn.EmbeddingBag(1000, width, mode="sum") for _ in range(categories))
        self.bottom = mlp(13, 64, width)
        pairs = (categories + 1) * categories // 2
        self.top = mlp(width + pairs, 64, 32, 1)
        self.register_buffer("pairs", torch.tril_indices(categories + 1, categories + 1, -1))

    def forward(self, dense: Tensor, sparse: Tensor) -> Tensor:
        x = self.bottom(dense)
        features = [x, *(table(sparse[:, i]) for i, table in enumerate(self.tables))]
        stacked = torch.stack(features, 1)
        products = stacked @ stacked.transpose(1, 2)
        out: Tensor = self.top(torch.cat([x, products[:, self.pairs[0], self.pairs[1]]], 1)).sigmoid()
        return out


class DeepFm(nn.Module):
    """DeepFM: a factorization machine beside a deep net on the same embeddings."""

    def __init__(self, fields: int = 8, width: int = 16) -> None:
        super().__init__()
        self.embedding, self.linear = nn.Embedding(3000, width), nn.Embedding(3000, 1)
        self.deep = mlp(fields * width, 64, 32, 1)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)
        second = (x.sum(1) ** 2 - (x**2).sum(1)).sum(1, keepdim=True) / 2
        out: Tensor = (self.linear(ids).sum(1) + second + self.deep(x.flatten(1))).sigmoid()
        return out


class Ncf(nn.Module):
    """Neural collaborative filtering: a product and a net of two embeddings of users and items."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.users, self.items = nn.Embedding(2000, 2 * width), nn.Embedding(3000, 2 * width)
        self.net, self.last, self.width = mlp(2 * width, 32, 16), nn.Linear(16 + width, 1), width

    def forward(self, user: Tensor, item: Tensor) -> Tensor:
        (a, b), (c, d) = self.users(user).split(self.width, 1), self.items(item).split(self.width, 1)
        out: Tensor = self.last(torch.cat([a * c, self.net(torch.cat([b, d], 1))], 1)).sigmoid()
        return out


class FtTransformer(nn.Module):
    """FT-Transformer with its default widths: a token per column, a class token, a transformer."""

    offsets: Tensor

    def __init__(self, numbers: int = 6, categories: int = 4, width: int = 192) -> None:
        super().__init__()
        self.scale, self.shift = nn.Parameter(torch.randn(numbers, width)), nn.Parameter(torch.randn(numbers, width))
        self.embedding, self.token = nn.Embedding(categories * 20, width), nn.Parameter(torch.randn(1, 1, width))
        self.register_buffer("offsets", torch.arange(categories) * 20)
        layer = nn.TransformerEncoderLayer(width, 8, 256, 0.0, "gelu", batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)
        self.last = nn.Linear(width, 3)

    def forward(self, numbers: Tensor, categories: Tensor) -> Tensor:
        columns = numbers[:, :, None] * self.scale + self.shift
        token = self.token.expand(numbers.shape[0], -1, -1)
        x = torch.cat([token, columns, self.embedding(categories + self.offsets)], 1)
        out: Tensor = self.last(self.encoder(x)[:, 0])
        return out


class TabNet(nn.Module):
    """TabNet of the size for Forest Cover: steps that choose columns by attention (a softmax), with gated layers."""

    def __init__(self, columns: int = 54, width: int = 64, steps: int = 5) -> None:
        super().__init__()
        self.norm, self.shared = nn.BatchNorm1d(columns), nn.Linear(columns, 4 * width)
        self.own = nn.ModuleList(nn.Linear(2 * width, 4 * width) for _ in range(steps + 1))
        self.choice = nn.ModuleList(
            nn.Sequential(nn.Linear(width, columns), nn.BatchNorm1d(columns)) for _ in range(steps)
        )
        self.last, self.width = nn.Linear(width, 7), width

    def features(self, step: int, x: Tensor) -> tuple[Tensor, Tensor]:
        hidden = functional.glu(self.shared(x), 1)
        hidden = (hidden + functional.glu(self.own[step](hidden), 1)) * 0.5**0.5
        return hidden[:, : self.width], hidden[:, self.width :]

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        prior, total = torch.ones_like(x), torch.zeros_like(x[:, :1])
        _, attended = self.features(0, x)
        for step, choice in enumerate(self.choice):
            mask = (choice(attended) * prior).softmax(1)
            prior = prior * (1.3 - mask)
            decided, attended = self.features(step + 1, mask * x)
            total = total + decided.relu()
        out: Tensor = self.last(total)
        return out


class TiedLstm(nn.Module):
    """A language model of two LSTM layers whose output layer is its embedding."""

    def __init__(self, width: int = 128) -> None:
        super().__init__()
        self.embedding, self.lstm = nn.Embedding(WORDS, width), nn.LSTM(width, width, 2, batch_first=True)
        self.last = nn.Linear(width, WORDS)
        self.last.weight = self.embedding.weight

    def forward(self, ids: Tensor) -> Tensor:
        out: Tensor = self.last(self.lstm(self.embedding(ids))[0])
        return out


class Tagger(nn.Module):
    """A bidirectional LSTM that tags each word, or the sentence as a whole."""

    def __init__(self, width: int = 96, classes: int = 9, *, whole: bool = False) -> None:
        super().__init__()
        self.embedding, self.whole = nn.Embedding(WORDS, width), whole
        self.lstm = nn.LSTM(width, width, bidirectional=True, batch_first=True)
        self.last = nn.Linear(2 * width, classes)

    def forward(self, ids: Tensor) -> Tensor:
        hidden = self.lstm(self.embedding(ids))[0]
        out: Tensor = self.last(hidden.amax(1) if self.whole else hidden)
        return out


class TextCnn(nn.Module):
    """Kim's net: convolutions of three widths over words, the largest value of each."""

    def __init__(self, width: int = 96) -> None:
        super().__init__()
        self.embedding = nn.Embedding(WORDS, width)
        self.convs = nn.ModuleList(nn.Conv1d(width, 64, k, padding=k // 2) for k in (3, 4, 5))
        self.last = nn.Linear(192, 2)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids).transpose(1, 2)
        out: Tensor = self.last(torch.cat([conv(x).relu().amax(2) for conv in self.convs], 1))
        return out


class Translator(nn.Module):
    """nn.Transformer as a translator, by teacher forcing."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.embedding, self.last = nn.Embedding(WORDS, width), nn.Linear(width, WORDS)
        self.transformer = nn.Transformer(width, 4, 2, 2, 128, 0.0, batch_first=True)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        n = target.shape[1]
        mask = torch.ones(n, n, dtype=torch.bool, device=target.device).triu(1)
        hidden = self.transformer(self.embedding(source), self.embedding(target), tgt_mask=mask, tgt_is_causal=True)
        out: Tensor = self.last(hidden)
        return out


class PointNet(nn.Module):
    """PointNet: a net per point, the largest value over all of them, a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.points = nn.Sequential(conv1d(3, 64, 1), conv1d(64, 128, 1), conv1d(128, 256, 1))
        self.last = mlp(256, 128, 10)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.last(self.points(x).amax(2))
        return out


class DenseGcn(nn.Module):
    """A graph convolutional net on a dense adjacency matrix, normalized by degrees."""

    def __init__(self, width: int = 128) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(i, width) for i in (32, width, width))
        self.last = nn.Linear(width, 7)

    def forward(self, x: Tensor, adjacency: Tensor) -> Tensor:
        weights = adjacency / adjacency.sum(2, keepdim=True).clamp(min=1)
        for layer in self.layers:
            x = (weights @ layer(x)).relu()
        out: Tensor = self.last(x)
        return out


class Siamese(nn.Module):
    """The distance of two images, which pass through one net."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(conv(1, 32, 3, 2), conv(32, 64, 3, 2), conv(64, 64, 3, 2), nn.Flatten(), mlp(1024, 64))

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        out: Tensor = (self.net(a) - self.net(b)).abs().sum(1, keepdim=True)
        return out


def _text(name: str, make: Callable[[], Example]) -> Net:
    return Net(name, TEXT, make, lengths=OTHER_LENGTHS, length_axes={"ids": 1})


NETS = (
    Net("DLRM (5 tables)", TABLES,
        lambda: example(Dlrm(), dense=torch.randn(SAMPLES, 13), sparse=torch.randint(0, 1000, (SAMPLES, 5, 3)))),
    Net("DeepFM", TABLES, lambda: example(DeepFm(), ids=torch.randint(0, 3000, (SAMPLES, 8)))),
    Net("NCF", TABLES,
        lambda: example(Ncf(), user=torch.randint(0, 2000, (SAMPLES,)), item=torch.randint(0, 3000, (SAMPLES,)))),
    Net("FT-Transformer", TABLES,
        lambda: example(FtTransformer(), numbers=torch.randn(SAMPLES, 6),
                        categories=torch.randint(0, 20, (SAMPLES, 4)))),
    Net("TabNet (softmax masks)", TABLES, lambda: example(TabNet(), x=torch.randn(SAMPLES, 54))),
    Net("MLP autoencoder", TABLES, lambda: example(mlp(64, 128, 32, 128, 64), input=torch.randn(SAMPLES, 64))),
    _text("LSTM language model, tied weights", lambda: example(TiedLstm(), ids=tokens(WORDS, LENGTH))),
    _text("BiLSTM tagger", lambda: example(Tagger(), ids=tokens(WORDS, LENGTH))),
    _text("LSTM classifier", lambda: example(Tagger(classes=2, whole=True), ids=tokens(WORDS, LENGTH))),
    _text("TextCNN", lambda: example(TextCnn(), ids=tokens(WORDS, LENGTH))),
    Net("nn.Transformer translator (2 + 2 layers)", TEXT,
        lambda: example(Translator(), source=tokens(WORDS, LENGTH), target=tokens(WORDS, 9)),
        lengths=OTHER_LENGTHS, length_axes={"source": 1, "target": 1}),
    Net("PointNet", POINTS, lambda: example(PointNet(), x=torch.randn(SAMPLES, 3, 64)),
        lengths=(50, 100), length_axes={"x": 2}),
    Net("GCN on dense graphs", POINTS,
        lambda: example(DenseGcn(), x=torch.randn(SAMPLES, 20, 32),
                        adjacency=(torch.rand(SAMPLES, 20, 20) < 0.3).float())),
    Net("Siamese net", POINTS, lambda: example(Siamese(), a=images(32, 1), b=images(32, 1)), convolutional=True),
)  # fmt: skip
