"""Trains the encoder on sentences of an invented language and writes the input files for the commands of qcompress.

Each sentence holds two words that count, of the kinds 0 and 1, among others that do not. Its class says of which kinds
they are, in their order: 2 * first + second.

Writes to the folder `--out`: `model/` (as `save_pretrained` writes it), `train.npz` (input_ids, attention_mask) and
`test.npz` (the same, and labels y). Takes less than a minute on a CPU.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
from torch import nn

from encoder import CLASSES, LENGTH, PADDING, WORDS, encoder

SEED = 0
TRAINING_SENTENCES = 4096
TEST_SENTENCES = 1024
SHORTEST = 10  # words
START = 1  # the word that each sentence begins with
KIND_WORDS = 4  # words of each kind; those of kind 0 are 4 to 7, those of kind 1 are 8 to 11
FIRST_OTHER = 12
EPOCHS = 6
BATCH = 64
LEARNING_RATE = 2e-3
LEAST_ACCURACY = 0.97


def main() -> int:
    """Train the encoder, write the files and print the accuracy; return 1 if it is too low."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(), help="folder to write to (default: the working directory)")
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)

    torch.manual_seed(SEED)
    torch.set_num_threads(1)  # sums do not depend on the number of cores
    random = np.random.default_rng(SEED)
    training, labels = sentences(random, TRAINING_SENTENCES)
    test, test_labels = sentences(random, TEST_SENTENCES)

    net = encoder()
    train(net, training, labels)
    net.eval()
    with torch.no_grad():
        logits = net(**{name: torch.tensor(values) for name, values in test.items()}).logits
    accuracy = float((logits.argmax(1).numpy() == test_labels).mean())

    net.save_pretrained(out / "model")
    np.savez(out / "train.npz", **training)
    np.savez(out / "test.npz", **test, y=test_labels)

    print(f"test accuracy {accuracy:.2%} on {len(test_labels)} sentences; wrote model, train.npz, test.npz")
    if accuracy < LEAST_ACCURACY:
        print(f"the accuracy must be at least {LEAST_ACCURACY:.0%}", file=sys.stderr)
        return 1
    return 0


def sentences(random: np.random.Generator, count: int) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Return the encoder's inputs for random sentences, and their classes.

    Args:
        random: its state changes.
        count: number of sentences.
    """
    classes = random.integers(CLASSES, size=count)
    lengths = random.integers(SHORTEST, LENGTH + 1, size=count)
    ids = random.integers(FIRST_OTHER, WORDS, size=(count, LENGTH))
    ids[:, 0] = START
    for i, length in enumerate(lengths):
        places = np.sort(random.choice(np.arange(1, length), 2, replace=False))
        kinds = np.array(divmod(classes[i], 2))
        ids[i, places] = KIND_WORDS * (1 + kinds) + random.integers(KIND_WORDS, size=2)
    mask = (np.arange(LENGTH) < lengths[:, None]).astype(np.int64)
    return {"input_ids": np.where(mask, ids, PADDING), "attention_mask": mask}, classes


def train(net: nn.Module, inputs: dict[str, np.ndarray], labels: np.ndarray) -> None:
    """Train with AdamW and a one-cycle learning rate."""
    tensors = {name: torch.tensor(values) for name, values in inputs.items()} | {"labels": torch.tensor(labels)}
    steps = len(labels) // BATCH
    optimizer = torch.optim.AdamW(net.parameters(), lr=LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=EPOCHS * steps)
    net.train()
    for _ in range(EPOCHS):
        order = torch.randperm(len(labels))
        for step in range(steps):
            batch = order[step * BATCH : (step + 1) * BATCH]
            loss = net(**{name: values[batch] for name, values in tensors.items()}).loss
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()


if __name__ == "__main__":
    sys.exit(main())
