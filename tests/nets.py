"""Small nets on 5 features and 3 classes, for the tests of replays and of curvature."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Recurrent(nn.Module):
    """An LSTM, read out at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(5, 3, batch_first=True)
        self.head = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(torch.stack([x, x.flip(0), -x], 1))[0][:, -1])


class LowRank(nn.Module):
    """A frozen net with a trained low-rank addition."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)).requires_grad_(False)
        self.down = nn.Parameter(torch.randn(5, 2))
        self.up = nn.Parameter(torch.randn(2, 6))

    def forward(self, x: Tensor) -> Tensor:
        return self.base[2]((self.base[0](x) + x @ self.down @ self.up).tanh())


def mlp() -> nn.Module:
    """One hidden layer."""
    return nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3))
