"""EVA with transformers' Trainer, which makes its optimizer in ``train()``: the call comes before that.

The model is a small one with random weights, so that this needs no download; ``from_pretrained`` gives a real one.
"""

import tempfile

import torch
from transformers import LlamaConfig, LlamaForSequenceClassification, Trainer, TrainingArguments, set_seed

import eva_lightning

set_seed(0)
config = LlamaConfig(
    vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_labels=2,
    pad_token_id=0,
)  # fmt: skip
model = LlamaForSequenceClassification(config)
lengths = torch.randint(8, 17, (256,))
attention_mask = (torch.arange(16) < lengths[:, None]).long()
labels = torch.randint(2, (256,))
input_ids = torch.randint(3, 64, (256, 16)) * attention_mask
input_ids[:, :4] = labels[:, None] + 1  # what is to be found out
data = [
    {"input_ids": i, "attention_mask": m, "labels": label}
    for i, m, label in zip(input_ids, attention_mask, labels, strict=True)
]

arguments = TrainingArguments(
    tempfile.mkdtemp(), num_train_epochs=2, per_device_train_batch_size=16, learning_rate=1e-2, use_cpu=True,
    report_to="none", save_strategy="no", logging_strategy="no", disable_tqdm=True,
)  # fmt: skip
trainer = Trainer(model, arguments, train_dataset=data)
# padding does not count; every projection gets LoRA, `score` trains in full
state = eva_lightning.initialize(
    model, trainer.get_train_dataloader(), rho=2, r=4, mask_fn=eva_lightning.attention_mask
)
result = trainer.train()
print(f"ranks {sorted(state.ranks.values())}, loss {result.training_loss:.3f}")
