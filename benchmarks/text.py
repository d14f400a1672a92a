"""Compresses a small text encoder to 2 and 1 bits, with and without training, and compares the exported files.

    python benchmarks/text.py --data DIR --work DIR [--rows "LSQ W2" …] [--seeds 3] [--epochs 6] [--rate 3e-4]
                              [--json FILE]

The data is SST-2: `sst2_train.tsv` and `sst2_dev.tsv`, a label and a sentence of separate words on each line. The float
net has word embeddings and two transformer layers; it is trained from scratch and kept under --work. Every row
compresses all matrices and both embeddings. Post-hoc rows get training sentences without labels. Trained rows all start
from the float net, learn its outputs, and have the same epochs, rate and batches; a seed sets the order of the
sentences and the words that are hidden.

Files are run in onnxruntime. The difference is the row's accuracy minus that of the best baseline with as many bits: it
is paired by sentence, averaged over seeds first, and its 95 % interval is over the sentences. `agree` is the share of
sentences that get the float net's class, KL the divergence from its outputs in nats. CPU seconds are those of
compressing or training, on one thread.

--json writes each result as soon as it is there; results that FILE holds already are not measured again.
"""

import argparse
import collections
import json
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from _training import Row, Shuffled, Task, logits, named, tensors, trained
from _transformer import PADDING, Encoder, Shape

from qcompress.artifacts.digest import short_digest
from qcompress.data.dataset import Dataset
from qcompress.finetune import LoopConfig, distillation, train
from qcompress.finetune.attach import prepare
from qcompress.metrics.intervals import of_scores
from qcompress.plan.plan import Plan
from qcompress.plan.settings import Settings
from qcompress.posthoc.compress import compress
from qcompress.posthoc.settings import Effort
from qcompress_exporters import build

UNKNOWN = 1  # the id of words that are not in the vocabulary
SHAPE = Shape(vocabulary=8000, length=40, width=128, layers=2, heads=4, inner=256)
FLOAT_EPOCHS, FLOAT_RATE = 6, 1e-3
DROPOUT = 0.3  # of the float net's training; compressed nets learn its outputs without dropout
HIDDEN = 0.1  # share of words that training replaces by UNKNOWN
CALIBRATION = 512  # sentences


@dataclass(frozen=True)
class Posthoc:
    """Compression without training.

    Args:
        name: its name in the table.
        bits: bits per weight; None leaves the net in float.
        effort: effort of `compress`.
    """

    name: str
    bits: int | None
    effort: Effort = "fast"


FLOAT = Posthoc("float", None)
ROWS: tuple[Row | Posthoc, ...] = (
    FLOAT,
    *(Posthoc(f"{effort} W{bits}", bits, effort) for bits in (2, 1) for effort in ("fast", "balanced", "best")),
    Row("LSQ W2", 2, None, named()),
    Row("DKM W2", 2, None, named("dkm")),
    Row("DoReFa W1", 1, None, named("dorefa")),
    Row("N2UQ W1", 1, None, named("n2uq")),
    Row("DKM W1", 1, None, named("dkm")),
)
BASELINES = ("LSQ W2", "DoReFa W1", "N2UQ W1")


@dataclass(frozen=True)
class Result:
    """The file of one row and seed.

    Args:
        row: name of the row.
        seed: the seed; 0 for rows without training.
        nbytes: size of the file.
        cpu_s: CPU seconds of compressing or training.
        kl: mean Kullback-Leibler divergence from the float net's outputs, nats.
        classes: the predicted classes of the test sentences, a digit each.
    """

    row: str
    seed: int
    nbytes: int
    cpu_s: float
    kl: float
    classes: str

    @property
    def predicted(self) -> npt.NDArray[np.int64]:
        """Return the predicted classes."""
        return np.array([*self.classes], np.int64)


def main() -> None:
    """Measure what is missing, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--rows", nargs="+", choices=[row.name for row in ROWS], default=[row.name for row in ROWS])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--rate", type=float, default=3e-4)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    task = text_task(args.data, args.work, args.epochs, args.rate)
    state = [value.numpy().tobytes() for value in task.module.state_dict().values()]
    setting = {"float_net": short_digest(*state), "epochs": args.epochs, "rate": args.rate}
    results = {} if args.json is None else earlier(args.json, setting)
    for row, seed in asked({FLOAT.name, *args.rows}, args.seeds):
        if (row.name, seed) in results:
            continue
        results[row.name, seed] = measured(task, row, seed)
        print(f"{row.name}, seed {seed}: done", flush=True)
        if args.json is not None:
            document = {**setting, "results": [asdict(result) for result in results.values()]}
            args.json.write_text(json.dumps(document, indent=1) + "\n")
    assert task.test.labels is not None
    show([*results.values()], task.test.labels)


def earlier(path: Path, setting: dict[str, Any]) -> dict[tuple[str, int], Result]:
    """Return the results that a JSON file holds, by row and seed; exit if they were measured in another setting."""
    if not path.exists():
        return {}
    document = json.loads(path.read_text())
    found = {name: document[name] for name in setting}
    if found != setting:
        raise SystemExit(f"{path} was measured with {found}, but this run has {setting}; give it another --json file.")
    return {(entry["row"], entry["seed"]): Result(**entry) for entry in document["results"]}


def asked(names: set[str], seeds: int) -> Iterator[tuple[Row | Posthoc, int]]:
    """Yield the rows with these names and their seeds: all rows with the first seed, then with the next."""
    for seed in range(seeds):
        yield from ((row, seed) for row in ROWS if row.name in names and (seed == 0 or isinstance(row, Row)))


def measured(task: Task, row: Row | Posthoc, seed: int) -> Result:
    """Make the file of a row and run it on the test sentences."""
    file, cpu_s = made(task, row, seed)
    found = torch.from_numpy(logits(file, task.test))
    with torch.no_grad():
        kl = distillation(found, task.module(tensors(task.test)[0]))
    return Result(row.name, seed, len(file), cpu_s, float(kl), "".join(map(str, found.argmax(1).tolist())))


def made(task: Task, row: Row | Posthoc, seed: int) -> tuple[bytes, float]:
    """Return the file of a row and the CPU seconds of compressing or training."""
    if isinstance(row, Row):
        return trained(task, row, seed)
    plan = Plan(default=Settings(skip=True)) if row.bits is None else Plan.from_flags(bits=row.bits)
    unlabelled = Dataset(inputs=task.training.inputs).head(CALIBRATION)
    start = time.process_time()
    small = compress(task.module, plan, calibration=unlabelled, effort=row.effort)
    return build(small).data, time.process_time() - start


def text_task(data: Path, work: Path, epochs: int, rate: float) -> Task:
    """Return the trained float net with its sentences."""
    (train_words, train_labels), (test_words, test_labels) = (
        sentences(data / f"sst2_{part}.tsv") for part in ("train", "dev")
    )
    known = vocabulary(train_words, SHAPE.vocabulary)
    training = Dataset(inputs={"ids": token_ids(train_words, known, SHAPE.length)}, labels=train_labels)
    test = Dataset(inputs={"ids": token_ids(test_words, known, SHAPE.length)}, labels=test_labels)
    net = float_net(training, work / "encoder.pt")
    return Task(net, training, test, epochs=epochs, rate=rate, augment=with_hidden_words, teacher=net)


def sentences(path: Path) -> tuple[list[list[str]], npt.NDArray[np.int64]]:
    """Return the words of each sentence in lower case, and the labels."""
    lines = [line.split("\t") for line in path.read_text(encoding="utf-8").splitlines()]
    return [text.lower().split() for _, text in lines], np.array([label for label, _ in lines], np.int64)


def vocabulary(texts: Iterable[list[str]], size: int) -> dict[str, int]:
    """Return the ids of the most frequent words; PADDING and UNKNOWN are not among them.

    >>> vocabulary([["b", "a"], ["c", "b"]], size=4)
    {'b': 2, 'a': 3}
    """
    counts = collections.Counter(word for text in texts for word in text)
    frequent = sorted(counts, key=lambda word: (-counts[word], word))
    return {word: i for i, word in enumerate(frequent[: size - 2], start=2)}


def token_ids(texts: list[list[str]], known: dict[str, int], length: int) -> npt.NDArray[np.int64]:
    """Return ids [sentences, length]: long sentences lose their end, short ones are padded.

    >>> token_ids([["b", "z"], ["b", "a", "a", "b"]], {"b": 2, "a": 3}, length=3).tolist()
    [[2, 1, 0], [2, 3, 3]]
    """
    ids = np.full((len(texts), length), PADDING)
    for row, text in zip(ids, texts, strict=True):
        row[: len(text)] = [known.get(word, UNKNOWN) for word in text[:length]]
    return ids


def with_hidden_words(ids: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Return the ids with a share of the words replaced by UNKNOWN at random."""
    hidden = torch.rand(ids.shape, generator=generator) < HIDDEN
    return torch.where(hidden & (ids != PADDING), UNKNOWN, ids)


def float_net(training: Dataset, path: Path) -> Encoder:
    """Return the float net in eval mode, trained if the file does not hold it yet."""
    if not path.exists():
        torch.manual_seed(0)
        net, batches = Encoder(replace(SHAPE, dropout=DROPOUT)), Shuffled(training, augment=with_hidden_words)
        tuned = prepare(net, Plan(default=Settings(skip=True)), example_inputs=next(iter(batches))[0])
        config = LoopConfig(epochs=FLOAT_EPOCHS, rate=FLOAT_RATE, warm_up=0.1, weight_decay=0.01)
        for record in train(tuned, batches, config):
            if (record.step + 1) % len(batches) == 0:
                print(f"float net, epoch {record.epoch}: loss {record.loss:.3f}", flush=True)
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(net.state_dict(), path)
    net = Encoder(SHAPE)
    net.load_state_dict(torch.load(path, weights_only=True))
    return net.eval()


def show(results: list[Result], labels: npt.NDArray[Any]) -> None:
    """Print a line for each row, averaged over its seeds."""
    by_row = collections.defaultdict[str, list[Result]](list)
    for result in results:
        by_row[result.row].append(result)
    right = {name: np.mean([found.predicted == labels for found in group], 0) for name, group in by_row.items()}
    (original,) = by_row[FLOAT.name]
    print(f"\n{'':11} seeds accuracy  difference to the baseline, 95 %           agree     KL     bytes  CPU s")
    for row in (row for row in ROWS if row.name in by_row):
        group = by_row[row.name]
        agree = np.mean([found.predicted == original.predicted for found in group])
        nbytes, cpu_s, kl = (np.mean([getattr(r, figure) for r in group]) for figure in ("nbytes", "cpu_s", "kl"))
        print(
            f"{row.name:11} {len(group):5} {right[row.name].mean():8.2%}  {difference(row, right):42} {agree:8.2%} "
            f"{kl:6.3f} {nbytes:9,.0f} {cpu_s:6.0f}"
        )


def difference(row: Row | Posthoc, right: dict[str, npt.NDArray[np.float64]]) -> str:
    """Return a row's accuracy minus that of the best baseline with its bits, in points; empty without a baseline.

    Args:
        row: the row.
        right: for each measured row and each sentence, the share of seeds that are right.
    """
    same_bits = [other.name for other in ROWS if other.bits == row.bits and other.name in right]
    best = max((name for name in same_bits if name in BASELINES), key=lambda name: right[name].mean(), default=None)
    if best is None or best == row.name:
        return ""
    better = right[row.name] - right[best]
    zero_one = all(np.isin(right[name], (0, 1)).all() for name in (row.name, best))
    interval = of_scores(better, zero_one=zero_one)
    assert interval is not None
    return f"{100 * better.mean():+6.2f} ({100 * interval[0]:+.2f} to {100 * interval[1]:+.2f}) against {best}"


if __name__ == "__main__":
    main()
