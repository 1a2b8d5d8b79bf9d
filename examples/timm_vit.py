"""Fine-tune a Vision Transformer of timm with EVA. Needs ``pip install '.[vision]'``.

Images here are random and small, and weights too, so that it runs anywhere in seconds: set PRETRAINED and give your own
loader for the real thing.
"""

import lightning as L
import timm
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from eva_lightning import EVAInitCallback
from eva_lightning.adapters import merge_and_unload

PRETRAINED = False  # True: timm downloads ImageNet weights
SIZE, CLASSES = 32, 4  # pixels; your number of classes


class Classifier(L.LightningModule):
    def __init__(self):
        super().__init__()
        model = "vit_tiny_patch16_224"
        self.net = timm.create_model(model, pretrained=PRETRAINED, num_classes=CLASSES, img_size=SIZE)

    def training_step(self, batch, batch_idx):
        images, labels = batch
        loss = nn.functional.cross_entropy(self.net(images), labels)
        self.log("loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self):
        return torch.optim.AdamW((p for p in self.parameters() if p.requires_grad), lr=1e-3, weight_decay=0.05)


L.seed_everything(0)
labels = torch.randint(CLASSES, (64,))
images = torch.randn(CLASSES, 3, SIZE, SIZE)[labels] + torch.randn(64, 3, SIZE, SIZE) / 2
loader = DataLoader(TensorDataset(images, labels), batch_size=16, shuffle=True)

module = Classifier()
eva = EVAInitCallback(rho=2, r=8)  # every linear layer but the head; the head trains in full
trainer = L.Trainer(max_epochs=2, accelerator="auto", devices=1, logger=False, callbacks=[eva])
trainer.fit(module, loader)

merge_and_unload(module)  # a plain timm model again
torch.save(module.net.state_dict(), "finetuned.pth")  # timm.create_model(..., checkpoint_path="finetuned.pth")
print("rank of the first attention:", eva.state.ranks["net.blocks.0.attn.qkv"])
