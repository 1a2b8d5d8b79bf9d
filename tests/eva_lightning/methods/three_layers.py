"""The network that initialisations from gradients are computed for by hand."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tests.modules import CLASSES, HIDDEN, IN


class ThreeLayers(nn.Module):
    """Three layers with weights wide, tall and square, on (batch, tokens, IN)."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(IN, HIDDEN)
        self.second = nn.Linear(HIDDEN, HIDDEN)
        self.third = nn.Linear(HIDDEN, IN)
        self.head = nn.Linear(IN, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.first(x))
        x = torch.tanh(self.third(x + torch.tanh(self.second(x))))
        return self.head(x.mean(1))
