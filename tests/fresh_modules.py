"""Modules that know nothing of eva_lightning, for processes that import Lightning alone (see fresh_reader.py)."""

from __future__ import annotations

from argparse import Namespace
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

IN, CLASSES = 12, 3


class Base(pl.LightningModule):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("loss", nn.functional.cross_entropy(self(batch[0]), batch[1]))

    test_step = validation_step

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self(batch[0])

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=0.05)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


def mlp(width: int) -> nn.Sequential:
    torch.manual_seed(0)  # pre-trained weights, as it were
    layers = [nn.Linear(IN, width), nn.ReLU(), nn.Linear(width, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(8, CLASSES))


class Plain(Base):
    def __init__(self, width: int = 24, rate: float = 0.1) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = mlp(width)


class AnyKeywords(Base):
    def __init__(self, width: int = 24, **others: Any) -> None:
        super().__init__()
        assert not any(name.startswith("_") for name in others), others
        self.save_hyperparameters()
        self.net = mlp(width)


class OneConfig(Base):
    def __init__(self, config: Any) -> None:
        super().__init__()
        self.save_hyperparameters("config")
        self.net = mlp(config.width if isinstance(config, Namespace) else config["width"])


class Bare(Base):
    """No hyper-parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.net = mlp(24)


class Late(Base):
    """Makes its layers in configure_model, and has some of its own."""

    def __init__(self, width: int = 24) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.first = self.last = None

    def configure_model(self) -> None:
        if self.first is None:
            torch.manual_seed(0)
            self.first, self.last = nn.Linear(IN, self.hparams["width"]), nn.Linear(self.hparams["width"], CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        assert self.first is not None
        return self.last(torch.relu(self.first(x)))


class Outer(Base):
    """A LightningModule in a LightningModule of the same class."""

    def __init__(self, depth: int = 1) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = mlp(24)
        self.inner = Outer(depth - 1) if depth else None

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x) if self.inner is None else self.net(x) + self.inner(x)


class Hooked(Plain):
    """Keeps something of its own in the checkpoint."""

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["mine"] = 7

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.mine = checkpoint["mine"]


def data() -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(64, IN, generator=generator)
    return DataLoader(TensorDataset(x, x[:, :CLASSES].argmax(1)), 16)


def quiet_trainer(*callbacks: Any, **options: Any) -> pl.Trainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    options = {"max_epochs": 1, "accelerator": "cpu", "enable_checkpointing": False, **quiet, **options}
    return pl.Trainer(callbacks=list(callbacks), **options)
