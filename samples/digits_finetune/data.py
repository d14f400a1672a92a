"""The training images of samples/digits as a torch Dataset: those that its test.npz does not hold."""

import torch
from sklearn.datasets import load_digits
from torch.utils.data import Dataset, TensorDataset

SEED = 0
TRAINING_IMAGES = 1197


def training() -> Dataset[tuple[torch.Tensor, ...]]:
    """Return pairs of an image [1, 8, 8] and its label."""
    pixels, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(pixels), generator=torch.Generator().manual_seed(SEED))[:TRAINING_IMAGES]
    images = torch.tensor(pixels / 16, dtype=torch.float32).reshape(-1, 1, 8, 8)
    return TensorDataset(images[order], torch.tensor(labels)[order])
