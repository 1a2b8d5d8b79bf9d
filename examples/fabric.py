"""EVA with Lightning Fabric: the call comes before ``fabric.setup``, which wraps the model and takes its parameters."""

import torch
from lightning.fabric import Fabric, seed_everything
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import eva_lightning

fabric = Fabric(accelerator="cpu", devices=1)  # any precision, and DDP or FSDP2 over any number of devices
fabric.launch()
seed_everything(0)
y = torch.randint(4, (512,))
x = torch.randn(4, 32)[y] + torch.randn(512, 8) @ torch.randn(8, 32) / 4
loader = fabric.setup_dataloaders(DataLoader(TensorDataset(x, y), batch_size=32, shuffle=True))

with fabric.init_module():  # on the device, in its precision
    model = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 4))
with fabric.autocast():  # of bf16-mixed and the like; every process streams its own batches
    state = eva_lightning.initialize(model, loader, rho=2, r=4)

optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2)
model, optimizer = fabric.setup(model, optimizer)
for _ in range(3):
    for inputs, labels in loader:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(inputs), labels)
        fabric.backward(loss)
        optimizer.step()
fabric.print(f"ranks {state.ranks}, loss {loss.item():.3f}")
