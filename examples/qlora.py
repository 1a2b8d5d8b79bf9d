"""EVA on a language model with 4-bit base weights (QLoRA). Needs ``pip install '.[quant]'``; runs on a CPU too.

The model is a tiny Llama that is written to a folder first, so that nothing is downloaded. For the real thing, give
``from_pretrained`` the name of a model and leave ``device_map`` out of it on a GPU.
"""

import tempfile

import lightning as L
import torch
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

from eva_lightning import EVAInitCallback, attention_mask
from eva_lightning.adapters import save_pretrained

VOCABULARY, LENGTH = 64, 12
sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
folder = tempfile.mkdtemp()
torch.manual_seed(0)
LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, pad_token_id=0, **sizes)).save_pretrained(folder)


class Text(L.LightningModule):
    def __init__(self):
        super().__init__()
        four_bits = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
        )
        self.model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=four_bits, device_map="cpu")
        self.model.train()  # from_pretrained hands it over in eval mode

    def training_step(self, batch, batch_idx):
        return self.model(**batch).loss

    def configure_optimizers(self):
        return torch.optim.AdamW((p for p in self.parameters() if p.requires_grad), lr=1e-3)


def sentence():
    length = int(torch.randint(4, LENGTH + 1, ()))
    ids = torch.zeros(LENGTH, dtype=torch.long)
    ids[:length] = torch.randint(1, VOCABULARY, (length,))
    return {"input_ids": ids, "attention_mask": (ids != 0).long(), "labels": torch.where(ids != 0, ids, -100)}


L.seed_everything(0)
module = Text()
# the output layer stays as it is, without an adapter; padding does not count
eva = EVAInitCallback(rho=2, r=4, mask_fn=attention_mask)
trainer = L.Trainer(max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False, callbacks=[eva])
trainer.fit(module, DataLoader([sentence() for _ in range(32)], batch_size=8))
save_pretrained(module.model, "adapter")  # a few kilobytes, for PeftModel.from_pretrained
print("ranks:", sorted(eva.state.ranks.values()))
