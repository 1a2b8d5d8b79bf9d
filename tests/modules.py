"""Small LightningModules and data for the tests of the callback."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

IN, HIDDEN, CLASSES = 12, 24, 3


def mlp() -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(IN, HIDDEN),
        nn.BatchNorm1d(HIDDEN),
        nn.ReLU(),
        nn.Linear(HIDDEN, HIDDEN),
        nn.ReLU(),
        nn.Linear(HIDDEN, HIDDEN),
        nn.ReLU(),
        nn.Linear(HIDDEN, CLASSES),
    )


class Classifier(pl.LightningModule):
    """Plain classifier on (inputs, labels); knows nothing of adapters."""

    def __init__(self, net: nn.Module | None = None, lr: float = 0.05) -> None:
        super().__init__()
        self.net = mlp() if net is None else net
        self.lr = lr
        self.losses: list[float] = []

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        loss = nn.functional.cross_entropy(self(x).float(), y)
        self.losses.append(float(loss.detach()))
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val", nn.functional.cross_entropy(self(batch[0]).float(), batch[1]))

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=self.lr)


class Attention(nn.Module):
    """Single-head attention with separate q, k and v: three layers, one input."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(dim, dim) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        return self.out(nn.functional.scaled_dot_product_attention(self.q(x), self.k(x), self.v(x)))


class TokenNet(nn.Module):
    """(batch, tokens, IN) -> logits; with q, k, v, a narrow layer and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(IN, HIDDEN)
        self.attention = Attention(HIDDEN)
        self.narrow = nn.Linear(HIDDEN, 4)
        self.wide = nn.Linear(4, HIDDEN)
        self.head = nn.Linear(HIDDEN, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.embed(x))
        x = x + self.attention(x)
        x = x + self.wide(torch.relu(self.narrow(x)))
        return self.head(x.mean(1))


def correlated(n: int, dim: int = IN, seed: int = 0) -> Tensor:
    """Inputs with a decaying spectrum, away from zero mean."""
    g = torch.Generator().manual_seed(seed)
    scale = torch.logspace(0.5, -1.5, dim)
    rotation = torch.linalg.qr(torch.randn(dim, dim, generator=g)).Q
    return (torch.randn(n, dim, generator=g) * scale) @ rotation + torch.randn(dim, generator=g)


def dataset(n: int = 96, tokens: int | None = None, seed: int = 0) -> TensorDataset:
    x = correlated(n * (tokens or 1), seed=seed)
    x = x if tokens is None else x.view(n, tokens, IN)
    y = (x.reshape(n, -1).sum(1) * 3).long().remainder(CLASSES)
    return TensorDataset(x, y)


def loader(n: int = 96, tokens: int | None = None, batch_size: int = 16, **kwargs: Any) -> DataLoader[Any]:
    kwargs.setdefault("generator", torch.Generator().manual_seed(5))
    return DataLoader(dataset(n, tokens), batch_size=batch_size, shuffle=True, **kwargs)


def trainer(*callbacks: pl.Callback, **kwargs: Any) -> pl.Trainer:
    """A quiet CPU Trainer."""
    defaults = {
        "max_epochs": 1,
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return pl.Trainer(**{**defaults, **kwargs}, callbacks=list(callbacks))


def build(seed: int = 0, **kwargs: Any) -> Classifier:
    """A Classifier with reproducible weights."""
    torch.manual_seed(seed)
    return Classifier(**kwargs)
