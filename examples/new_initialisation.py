"""An initialisation of your own, in a dozen lines: by the second moment of a layer's inputs, with their mean left in.

It becomes a method like the others: ``apply_method("moment", module, options)`` here, and where the module with the
three entries is imported, everything that looks methods up by name. Needs nothing beyond ``pip install .``.
"""

import lightning as L
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from eva_lightning.adapters import find_adapters
from eva_lightning.adapters.base_weight_init import INITIALISATIONS, Start
from eva_lightning.methods import METHODS, Method
from eva_lightning.methods.apply import AdapterOptions, apply_method
from eva_lightning.methods.starts import KINDS, Kind


def moment_start(layer, means, given):
    """A: the top eigenvectors of E[x xᵀ]; B: zero."""
    eigenvectors = torch.linalg.eigh(means["inputs"]).eigenvectors  # (in, in), ascending
    return eigenvectors[:, -layer.rank :].T.flip(0), None


# how adapters start: B A is zero; what is read: the inputs of 4 minibatches; and the name that users type
INITIALISATIONS["moment"] = Start("zero", from_data=True, directions=0)
KINDS["moment"] = Kind(("inputs",), 4, moment_start)
METHODS["moment"] = Method(
    "moment",
    "Second moment",
    needs="inputs",
    prepare="eva_lightning.methods.data_driven:prepare",
    fixed={"kind": "moment"},
)


class Classifier(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 4))

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        x, y = batch
        return nn.functional.cross_entropy(self(x), y)

    def configure_optimizers(self):
        return torch.optim.AdamW((p for p in self.parameters() if p.requires_grad), lr=1e-2)


L.seed_everything(0)
y = torch.randint(4, (256,))
x = torch.randn(4, 32)[y] + torch.randn(256, 8) @ torch.randn(8, 32) / 4
module = Classifier()
callbacks = apply_method("moment", module, AdapterOptions(rank=4))
trainer = L.Trainer(max_epochs=0, accelerator="cpu", logger=False, enable_checkpointing=False, callbacks=callbacks)
trainer.fit(module, DataLoader(TensorDataset(x, y), batch_size=64))

a = find_adapters(module)["net.0"].a.detach()  # rows of length 1, orthogonal to each other
torch.testing.assert_close(a @ a.T, torch.eye(4), rtol=0, atol=1e-5)
seen = x.T @ x / len(x)  # all four minibatches, which is all the data
torch.testing.assert_close((a @ seen @ a.T).trace(), torch.linalg.eigvalsh(seen)[-4:].sum())
print("starts from", METHODS["moment"].needs)
