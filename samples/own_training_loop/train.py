"""Trains the digits net at 2 bits with 4-bit activations, in its own training loop.

Reads `state.pt` and `test.npz` from the folder `--digits` (samples/digits/train.py writes them) and writes
`digits.w2a4.onnx` to the folder `--out`. Takes about twenty seconds on a CPU.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import nn

import qcompress as qc
from qcompress.metrics.metric import load_metric
from qcompress_exporters import export, validate

sys.path.insert(0, str(Path(__file__).parents[1] / "digits"))
from net import DigitsNet

EPOCHS = 12
BATCH = 64
LEARNING_RATE = 2e-3


def main() -> None:
    """Prepares, trains, finalizes, exports and validates the net."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--digits", type=Path, default=Path(), help="folder with state.pt and test.npz")
    parser.add_argument("--out", type=Path, default=Path(), help="folder to write to")
    args = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)  # more threads do not help with a net this small

    net = DigitsNet()
    net.load_state_dict(torch.load(args.digits / "state.pt", weights_only=True))
    x, y, test = images(args.digits / "test.npz")

    # Weights get 2 bits, layer inputs 4. The code of the net stays the same.
    plan = qc.Plan.from_flags(bits=2, activation_bits=4)
    tuned = qc.prepare(net, plan, example_inputs=(x[:256],), regularizers=[qc.regularizers.BinRegularizer])

    # The rest is an ordinary loop that calls `tuned` instead of `net` and adds the regularizers' penalty to the loss.
    optimizer = torch.optim.AdamW(tuned.parameters(), lr=LEARNING_RATE)
    steps = len(x) // BATCH
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=EPOCHS * steps)
    tuned.train()
    for epoch in range(EPOCHS):
        if epoch == EPOCHS // 2:
            tuned.snap_offsets()  # to values that integer kernels support
        if epoch == EPOCHS - 1:
            tuned.settle()  # biases at whole steps too, as the file holds them
        for i, part in enumerate(torch.randperm(len(x))[: steps * BATCH].split(BATCH)):
            tuned.step((epoch + i / steps) / EPOCHS)  # schedules of methods that have one, such as dkm
            task_loss = nn.functional.cross_entropy(tuned(x[part]), y[part])
            loss = task_loss + tuned.penalty()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        print(f"epoch {epoch + 1:2}: loss {float(task_loss.detach()):.3f}")

    small = tuned.finalize()
    path = args.out / "digits.w2a4.onnx"
    report = export(small, path, force=True)
    parity = validate(small, path, test, metric=load_metric("top1"))
    assert parity.metric is not None
    print(f"{path}: {report.size.file:,} bytes, {report.size.ratio:.1f}x smaller than the float file")
    accuracy = f"top-1 {parity.metric.compressed:.2%}, float {parity.metric.original:.2%}"
    print(f"parity {'ok' if parity.ok else 'FAILED'}; {accuracy}")


def images(path: Path) -> tuple[torch.Tensor, torch.Tensor, qc.Dataset]:
    """Returns training images, their labels, and test data with other images."""
    test = qc.load_data(str(path))
    tested = {image.tobytes() for image in test.inputs["x"]}
    pixels, labels = load_digits(return_X_y=True)
    x = (pixels / 16).astype(np.float32).reshape(-1, 1, 8, 8)
    kept = np.array([image.tobytes() not in tested for image in x])
    return torch.from_numpy(x[kept]), torch.from_numpy(labels[kept]), test


if __name__ == "__main__":
    main()
