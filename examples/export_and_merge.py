"""What a trained adapter becomes: a PEFT folder, a plain checkpoint, merged weights, a served program.

Needs nothing beyond ``pip install .``.
"""

import copy
import tempfile
from pathlib import Path

import lightning as L
import torch
from peft import PeftModel
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from eva_lightning import EVAInitCallback
from eva_lightning.adapters import merge_and_unload, save_pretrained
from eva_lightning.plain_checkpoint import write_plain_checkpoint


class Classifier(L.LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)  # stands for pre-trained weights: the same in every process
        self.net = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 4))

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        x, y = batch
        return nn.functional.cross_entropy(self(x), y)

    def configure_optimizers(self):
        return torch.optim.AdamW((p for p in self.parameters() if p.requires_grad), lr=1e-2)


module, folder = Classifier(), Path(tempfile.mkdtemp())
base = copy.deepcopy(module.net)
y = torch.randint(4, (256,))
x = torch.randn(4, 32)[y] + torch.randn(256, 8) @ torch.randn(8, 32) / 4
eva = EVAInitCallback(rho=2, r=4, verbose=False)
quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
trainer = L.Trainer(max_epochs=1, accelerator="cpu", callbacks=[eva], **quiet)
trainer.fit(module, DataLoader(TensorDataset(x, y), batch_size=32))
trainer.save_checkpoint(folder / "last.ckpt")
module.eval()
expected = module(x)

# 1. a folder that stock PEFT loads
save_pretrained(module.net, folder / "adapter")
torch.testing.assert_close(PeftModel.from_pretrained(base, folder / "adapter")(x), expected)

# 2. a Lightning checkpoint for processes that know nothing of adapters
write_plain_checkpoint(Classifier, folder / "last.ckpt", folder / "plain.ckpt")
plain = torch.load(folder / "plain.ckpt", weights_only=True)["state_dict"]
assert set(plain) == set(Classifier().state_dict())

# 3. plain weights: adapters added to them, in double precision with one rounding
merge_and_unload(module)
torch.testing.assert_close(module(x), expected, rtol=1e-4, atol=1e-5)

# 4. a program that runs without this code (torch.onnx.export takes the merged module as well)
batch = {"input": {0: torch.export.Dim("batch")}}
torch.export.save(torch.export.export(module.net, (x,), dynamic_shapes=batch), folder / "served.pt2")
served = torch.export.load(folder / "served.pt2").module()
torch.testing.assert_close(served(x[:3]), module(x[:3]))
print(sorted(path.name for path in folder.iterdir()))
