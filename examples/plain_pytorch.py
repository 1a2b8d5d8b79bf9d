"""EVA in a plain PyTorch training loop: one call before the optimizer is made, and saving and loading afterwards."""

import tempfile
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import eva_lightning
from eva_lightning.adapters import merge_and_unload


def build():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 4))


torch.manual_seed(0)
y = torch.randint(4, (512,))
x = torch.randn(4, 32)[y] + torch.randn(512, 8) @ torch.randn(8, 32) / 4
loader = DataLoader(TensorDataset(x, y), batch_size=32, shuffle=True)

model = build()
state = eva_lightning.initialize(model, loader, rho=2, r=4)  # LoRA layers in, ranks redistributed, A set
optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2)
for _ in range(3):
    for inputs, labels in loader:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(inputs), labels)
        loss.backward()
        optimizer.step()
print(f"ranks {state.ranks}, loss {loss.item():.3f}")

# to resume or to serve: the state gives a new model the same layers, so that the weights of a checkpoint fit
file = state.save(Path(tempfile.mkdtemp()) / "eva")
weights = model.state_dict()
loaded = build()
eva_lightning.initialize(loaded, state=file, rho=2, r=4, verbose=False)
loaded.load_state_dict(weights)

merge_and_unload(loaded)  # adapters into the weights: the network as it was built
assert [type(layer) for layer in loaded] == [type(layer) for layer in build()]
torch.testing.assert_close(loaded(x), model(x), rtol=1e-4, atol=1e-4)
