"""EVA with a LoraConfig of your own, or with LoRA layers that the module has already."""

import copy

import lightning as L
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from eva_lightning import EVAInitCallback, StreamingOptions


class Classifier(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU())
        self.head = nn.Linear(64, 4)

    def training_step(self, batch, batch_idx):
        x, y = batch
        return nn.functional.cross_entropy(self.head(self.body(x)), y)

    def configure_optimizers(self):
        return torch.optim.AdamW((p for p in self.parameters() if p.requires_grad), lr=1e-2)


def fit(module, callback):
    trainer = L.Trainer(max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False, callbacks=[callback])
    trainer.fit(module, DataLoader(TensorDataset(x, y), batch_size=32))
    print(callback.state.ranks)


L.seed_everything(0)
y = torch.randint(4, (512,))
x = torch.randn(4, 32)[y] + torch.randn(512, 8) @ torch.randn(8, 32) / 4
module = Classifier()

# 1. the callback makes the layers, with the options of a LoraConfig; `streaming` says how minibatches are decomposed
config = LoraConfig(r=4, lora_alpha=4, target_modules=["body.0", "body.2"], use_dora=True)
fit(copy.deepcopy(module), EVAInitCallback(rho=2, lora=config, streaming=StreamingOptions(max_batches=8, tau=0.95)))

# 2. the module has LoRA layers: they are used as they are, with their rank and alpha
inject_adapter_in_model(LoraConfig(r=4, lora_alpha=4, target_modules=["0", "2"]), module.body)
fit(module, EVAInitCallback(rho=2))
