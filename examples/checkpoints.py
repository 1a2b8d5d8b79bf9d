"""Keep what EVA found, resume a training, export the adapter, merge it into the weights."""

import tempfile
from pathlib import Path

import lightning as L
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from eva_lightning import EVAInitCallback
from eva_lightning.adapters import merge_and_unload, save_pretrained


class Classifier(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 4))

    def training_step(self, batch, batch_idx):
        x, y = batch
        return nn.functional.cross_entropy(self.net(x), y)

    def configure_optimizers(self):
        return torch.optim.AdamW((p for p in self.parameters() if p.requires_grad), lr=1e-2)


def trainer_for(epochs, callback):
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    return L.Trainer(max_epochs=epochs, accelerator="cpu", callbacks=[callback], enable_checkpointing=False, **quiet)


L.seed_everything(0)
y = torch.randint(4, (512,))
x = torch.randn(4, 32)[y] + torch.randn(512, 8) @ torch.randn(8, 32) / 4
data = DataLoader(TensorDataset(x, y), batch_size=32)
folder = Path(tempfile.mkdtemp())

module, callback = Classifier(), EVAInitCallback(rho=2, r=4, verbose=False)
trainer = trainer_for(1, callback)
trainer.fit(module, data)
trainer.save_checkpoint(folder / "last.ckpt")
callback.state.save(folder / "eva")  # eva.safetensors and eva.json: no pickle

# a freshly built module gets the redistributed ranks of the checkpoint; nothing is streamed again
resumed = Classifier()
trainer_for(2, EVAInitCallback(rho=2, r=4, verbose=False)).fit(resumed, data, ckpt_path=folder / "last.ckpt")

# one state serves any smaller r * rho
trainer_for(1, EVAInitCallback(state=folder / "eva", r=2, rho=1, verbose=False)).fit(Classifier(), data)

save_pretrained(resumed.net, folder / "adapter")  # for PeftModel.from_pretrained(net, folder / "adapter")
before = resumed.net(x)
merge_and_unload(resumed)  # adapters into the weights, in fp32 with one rounding
torch.testing.assert_close(resumed.net(x), before, rtol=1e-4, atol=1e-4)
print(sorted(path.name for path in folder.iterdir()))
