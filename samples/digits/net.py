"""A small residual net for 8 x 8 images of digits."""

import torch
from torch import nn


class DigitsNet(nn.Module):
    """Convolutions with BatchNorm, one residual block and a linear head: 149,312 weights at the default width.

    Args:
        width: number of channels in the first half; the second half has twice as many.
    """

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU())
        self.block = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
        )
        self.top = nn.Sequential(
            nn.Conv2d(width, 2 * width, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(2 * width), nn.ReLU()
        )
        self.head = nn.Linear(2 * width, 10)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """Return [N, 10] logits for [N, 1, 8, 8] images with values in 0..1."""
        x = self.stem(image)
        x = torch.relu(x + self.block(x))
        return self.head(self.top(x).mean((2, 3)))
