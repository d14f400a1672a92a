"""Trains the digits net with and without a penalty on the range of its weights, and compresses both to 2 bits.

The penalty (R² in its margin form) acts on the float model, which is then compressed without training like any other.
On this net a factor of 0.1 has more effect than the paper's 0.01. Takes about twenty seconds on a CPU.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import nn

import qcompress as qc
from qcompress.regularizers import RangeRegularizer

sys.path.insert(0, str(Path(__file__).parents[1] / "digits"))
from net import DigitsNet

EPOCHS = 15
BATCH = 64
LEARNING_RATE = 5e-3
TRAINING_IMAGES = 1197


def main() -> None:
    """Trains and compresses both nets and prints them side by side."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    torch.set_num_threads(1)  # more threads do not help with a net this small
    pixels, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(pixels))
    x = torch.from_numpy((pixels / 16).astype(np.float32).reshape(-1, 1, 8, 8)[order])
    y = torch.from_numpy(labels[order])
    data, tested = (x[:TRAINING_IMAGES], y[:TRAINING_IMAGES]), (x[TRAINING_IMAGES:], y[TRAINING_IMAGES:])

    print(f"{'':8} {'largest weight':>15} {'float':>8} {'2 bits':>8}")
    for name in ("plain", "R²"):
        net = trained(*data, ranged=name == "R²")
        largest = max(float(m.weight.detach().abs().max()) for m in net.modules() if isinstance(m, nn.Conv2d))
        small = qc.compress(net, qc.Plan.from_flags(bits=2), example_inputs=(x[:2],), effort="fast")
        print(f"{name:8} {largest:15.3f} {top1(net, *tested):8.2%} {top1(small.to_module(), *tested):8.2%}")


def trained(x: torch.Tensor, y: torch.Tensor, *, ranged: bool) -> nn.Module:
    """Returns the net after training with or without the penalty."""
    torch.manual_seed(0)
    net = DigitsNet()
    regularizer = RangeRegularizer(net, kind="margin", weight=0.1)
    parameters = [*net.parameters(), *regularizer.parameters()] if ranged else [*net.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE)
    steps = len(x) // BATCH
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=EPOCHS * steps)
    for _ in range(EPOCHS):
        for part in torch.randperm(len(x))[: steps * BATCH].split(BATCH):
            loss = nn.functional.cross_entropy(net(x[part]), y[part])
            if ranged:
                loss = loss + regularizer.penalty()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return net.eval()


def top1(net: nn.Module, x: torch.Tensor, y: torch.Tensor) -> float:
    """Returns the share of correctly classified images."""
    with torch.no_grad():
        return float((net(x).argmax(1) == y).float().mean())


if __name__ == "__main__":
    main()
