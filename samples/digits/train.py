"""Trains DigitsNet on scikit-learn's digits and writes the input files for the commands of qcompress.

Writes to the folder `--out`: `model.pt` (an exported program for any batch size), `state.pt` (the state dict, for
`--arch`), `calibration.npz` (x: training images without labels) and `test.npz` (x, y). Takes about fifteen seconds on a
CPU.
"""

import argparse
import io
import random
import sys
from pathlib import Path

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import nn

from net import DigitsNet

SEED = 0
TRAINING_IMAGES = 1197
CALIBRATION_IMAGES = 256
EPOCHS = 25
BATCH = 64
LEARNING_RATE = 5e-3
WEIGHT_DECAY = 1.0
# Standard deviation of the noise. It also makes the net tolerate small errors, including those of compressed weights.
NOISE = 0.2
LEAST_ACCURACY = 0.97


def main() -> int:
    """Train the net, write the files and print the accuracy; return 1 if it is too low."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(), help="folder to write to (default: the working directory)")
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)

    random.seed(SEED)
    torch.manual_seed(SEED)
    torch.use_deterministic_algorithms(True)
    torch.set_num_threads(1)  # more threads do not help, and sums do not depend on the number of cores

    pixels, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(pixels))
    x = torch.tensor(pixels / 16, dtype=torch.float32).reshape(-1, 1, 8, 8)[order]
    y = torch.tensor(labels)[order]
    x_train, y_train, x_test, y_test = (
        x[:TRAINING_IMAGES],
        y[:TRAINING_IMAGES],
        x[TRAINING_IMAGES:],
        y[TRAINING_IMAGES:],
    )

    net = DigitsNet()
    train(net, x_train, y_train)
    net.eval()
    with torch.no_grad():
        accuracy = (net(x_test).argmax(1) == y_test).float().mean().item()

    (out / "model.pt").write_bytes(exported(net, x_test[:2]))
    torch.save(net.state_dict(), out / "state.pt")
    np.savez(out / "calibration.npz", x=x_train[:CALIBRATION_IMAGES].numpy())
    np.savez(out / "test.npz", x=x_test.numpy(), y=y_test.numpy())

    print(f"test accuracy {accuracy:.2%} on {len(x_test)} images; wrote model.pt, state.pt, calibration.npz, test.npz")
    if accuracy < LEAST_ACCURACY:
        print(f"the accuracy must be at least {LEAST_ACCURACY:.0%}", file=sys.stderr)
        return 1
    return 0


def train(net: nn.Module, x: torch.Tensor, y: torch.Tensor) -> None:
    """Train with AdamW and a one-cycle learning rate."""
    steps = len(x) // BATCH
    optimizer = torch.optim.AdamW(net.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=EPOCHS * steps)
    net.train()
    for _ in range(EPOCHS):
        order = torch.randperm(len(x))
        for step in range(steps):
            batch = order[step * BATCH : (step + 1) * BATCH]
            loss = nn.functional.cross_entropy(net(augmented(x[batch])), y[batch])
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()


def augmented(images: torch.Tensor) -> torch.Tensor:
    """Return the batch, shifted by at most one pixel in each direction, with noise."""
    down, right = torch.randint(0, 3, (2,)).tolist()
    shifted = nn.functional.pad(images, (1, 1, 1, 1))[:, :, down : down + 8, right : right + 8]
    return shifted + NOISE * torch.randn_like(shifted)


def exported(net: nn.Module, example: torch.Tensor) -> bytes:
    """Return the net's program as torch.export writes it, for batches of any size."""
    program = torch.export.export(net, (example,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    file = io.BytesIO()
    torch.export.save(program, file)
    return file.getvalue()


if __name__ == "__main__":
    sys.exit(main())
