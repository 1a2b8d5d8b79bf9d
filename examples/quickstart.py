"""EVA in any LightningModule: the example of the README. Needs nothing beyond ``pip install .``."""

import lightning as L
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from eva_lightning import EVAInitCallback


class Classifier(L.LightningModule):  # any LightningModule; it knows nothing of adapters
    def __init__(self):
        super().__init__()
        layers = [nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU()]
        self.net = nn.Sequential(*layers, nn.Linear(256, 10))

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        x, y = batch
        return nn.functional.cross_entropy(self(x), y)

    def configure_optimizers(self):
        return torch.optim.AdamW((p for p in self.parameters() if p.requires_grad), lr=1e-2)


L.seed_everything(0)
y = torch.randint(10, (2048,))  # ten classes, each around a centre of its own, with noise in 16 directions
x = torch.randn(10, 64)[y] + torch.randn(2048, 16) @ torch.randn(16, 64) / 4
trainer = L.Trainer(max_epochs=2, accelerator="cpu", logger=False, callbacks=[EVAInitCallback(rho=2, r=8)])
trainer.fit(Classifier(), DataLoader(TensorDataset(x, y), batch_size=64, shuffle=True))
