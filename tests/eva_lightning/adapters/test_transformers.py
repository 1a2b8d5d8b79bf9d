"""A causal language model and a sequence classifier of transformers, built from configs, in LightningModules."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import (
    BatchEncoding,
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from eva_lightning import EVAInitCallback, StreamingOptions, attention_mask, load_from_checkpoint
from eva_lightning.adapters import find_adapters, find_targets, inject, merge_and_unload, save_pretrained
from eva_lightning.adapters.targets import linear_layers
from tests.modules import trainer

VOCABULARY, LENGTH, K = 40, 10, 4


def llama(**options: Any) -> nn.Module:
    config = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    return LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, pad_token_id=0, **config, **options))


def gpt2() -> nn.Module:
    sizes = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": LENGTH}
    dropouts = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    return GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, **sizes, **dropouts))


def bert() -> nn.Module:
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    dropouts = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return BertForSequenceClassification(BertConfig(vocab_size=VOCABULARY, **sizes, **dropouts))


MODELS = {"llama": llama, "gpt2": gpt2, "bert": bert}


class Text(pl.LightningModule):
    """As people write it: the batch's keys go to the model, which returns a loss."""

    def __init__(self, kind: str = "llama") -> None:
        super().__init__()
        self.save_hyperparameters()
        torch.manual_seed(0)
        self.model: Any = MODELS[kind]()

    def forward(self, **inputs: Tensor) -> Any:
        return self.model(**inputs)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self(**batch).loss

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-2)


class KeywordText(Text):
    """The other way to write it: forward names the keys; the batch holds one that it does not know."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, labels: Tensor | None = None) -> Any:
        return self.model(input_ids=input_ids, attention_mask=attention_mask, labels=labels)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self(batch["input_ids"], batch["attention_mask"], batch["labels"]).loss


def batches(kind: str, n: int = 4, encoding: bool = False, extra: bool = False) -> list[Any]:
    """Right-padded sequences; for language models the prompt and the padding have label -100."""
    g = torch.Generator().manual_seed(3)
    made = []
    for _ in range(n):
        ids = torch.randint(1, VOCABULARY, (8, LENGTH), generator=g)
        lengths = torch.randint(5, LENGTH + 1, (8, 1), generator=g)
        mask = (torch.arange(LENGTH) < lengths).long()
        labels = ids.masked_fill(mask == 0, -100)
        labels[:, :2] = -100
        batch = {
            "input_ids": ids.masked_fill(mask == 0, 0),
            "attention_mask": mask,
            "labels": ids[:, 0] % 2 if kind == "bert" else labels,
        }
        batch |= {"example_id": torch.arange(8)} if extra else {}
        made.append(BatchEncoding(batch) if encoding else batch)
    return made


def loader(items: list[Any]) -> DataLoader[Any]:
    return DataLoader(items, batch_size=None)  # type: ignore[arg-type]


def counted_inputs(model: nn.Module, items: list[Any]) -> dict[str, Tensor]:
    """The inputs of every layer at the positions that count, by hooks of our own on the plain model."""
    seen: dict[str, list[Tensor]] = {}
    model = copy.deepcopy(model).eval()
    for name, layer in linear_layers(model).items():
        layer.register_forward_pre_hook(lambda _, args, n=name: seen.setdefault(n, []).append(args[0].detach()))
    with torch.no_grad():
        for batch in items:
            model(**batch)
    keep = []
    for batch in items:
        counts = batch["attention_mask"] == 1
        keep.append(counts & (batch["labels"] != -100) if batch["labels"].dim() == 2 else counts)
    return {
        n: torch.cat([x if x.dim() == 2 else x[k] for x, k in zip(xs, keep, strict=True)]) for n, xs in seen.items()
    }


@pytest.mark.parametrize("kind", MODELS)
def test_unmasked_tokens_are_decomposed_exactly(kind: str) -> None:
    module, items = Text(kind), batches(kind)
    expected = counted_inputs(module.model, items)
    callback = EVAInitCallback(rho=2, r=2, streaming=StreamingOptions(tau=1.0), mask_fn=attention_mask, verbose=False)
    trainer(callback).fit(module, loader(items))
    state = callback.state
    assert state is not None
    heads = {"llama": "lm_head", "gpt2": "lm_head", "bert": "classifier"}
    assert set(state.components) == {f"model.{n}" for n in expected if n != heads[kind]}
    for name in state.components:
        tokens = expected[name.removeprefix("model.")].double()
        _, s, v = torch.linalg.svd(tokens - tokens.mean(0), full_matrices=False)
        assert state.n_samples[name] == len(tokens)
        torch.testing.assert_close(state.singular_values[name], s[:K].float(), rtol=1e-3, atol=1e-4)
        overlap = (state.components[name][:2].double() @ v[:2].T).square().sum() / 2
        assert overlap > 1 - 1e-3, name
    if kind == "bert":  # the pooler sees one token per sequence: no mask is for it
        assert state.n_samples["model.bert.pooler.dense"] == sum(len(b["labels"]) for b in items)


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("encoding", [False, True], ids=["dict", "BatchEncoding"])
def test_train_save_and_merge(kind: str, encoding: bool, tmp_path: Path) -> None:
    module, items = Text(kind), batches(kind, encoding=encoding)
    assert isinstance(items[0], Mapping)
    base = copy.deepcopy(module.model)
    frozen = {n: p.detach().clone() for n, p in module.model.named_parameters()}
    callback = EVAInitCallback(rho=2, r=2, mask_fn=attention_mask, verbose=False)
    run = trainer(callback, max_epochs=2)
    run.fit(module, loader(items))
    assert any(bool(layer.b.any()) for layer in find_adapters(module).values())
    for name, parameter in module.model.named_parameters():
        plain = name.replace(".base_layer", "")
        if plain in frozen and not plain.startswith("classifier."):
            assert torch.equal(parameter, frozen[plain]), name
    module.eval()
    out = module(**items[0]).logits
    save_pretrained(module.model, tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(base, str(tmp_path / "adapter")).eval()
    assert torch.equal(loaded(**items[0]).logits, out)
    run.save_checkpoint(tmp_path / "last.ckpt")
    restored = load_from_checkpoint(Text, tmp_path / "last.ckpt").eval()
    assert torch.equal(restored(**items[0]).logits, out)
    merge_and_unload(module)
    torch.testing.assert_close(module(**items[0]).logits, out, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_forward_that_names_its_keys(kind: str) -> None:
    module, items = KeywordText(kind), batches(kind, extra=True, encoding=True)
    callback = EVAInitCallback(rho=2, r=2, mask_fn=attention_mask, verbose=False)
    trainer(callback).fit(module, loader(items))
    assert callback.state is not None
    counts = counted_inputs(Text(kind).model, [{k: v for k, v in b.items() if k != "example_id"} for b in items])
    assert callback.state.n_samples == {f"model.{n}": len(x) for n, x in counts.items() if f"model.{n}" in
                                        callback.state.n_samples}  # fmt: skip


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("kind", MODELS)
def test_gradient_checkpointing_changes_nothing(kind: str, reentrant: bool) -> None:
    losses = []
    for checkpointing in (False, True):
        module, items = Text(kind), batches(kind)
        if checkpointing:
            module.model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            module.model.enable_input_require_grads()  # transformers' own recipe for frozen embeddings
        callback = EVAInitCallback(rho=2, r=2, mask_fn=attention_mask, verbose=False)
        trainer(callback).fit(module, loader(items))
        assert module.model.is_gradient_checkpointing == checkpointing
        module.eval()
        losses.append(float(module(**items[0]).loss))
        assert any(bool(layer.b.any()) for layer in find_adapters(module).values())
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


@pytest.mark.parametrize("tied", [True, False])
def test_vocabulary_projection_is_neither_adapted_nor_trained(tied: bool) -> None:
    """Tied, it is the embedding matrix: training the head would train every input too."""
    model: Any = llama(tie_word_embeddings=tied)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    report = inject(model, r=2)
    assert report.head == []
    assert report.frozen_head == ["lm_head"]
    assert all("lora_" in n for n, p in model.named_parameters() if p.requires_grad)
    assert not model.lm_head.weight.requires_grad


@pytest.mark.parametrize("tied", [True, False])
def test_vocabulary_projection_trains_when_named(tied: bool, tmp_path: Path) -> None:
    model: Any = llama(tie_word_embeddings=tied)
    base = copy.deepcopy(model)
    inject(model, r=2, head="lm_head")
    assert model.lm_head.weight.requires_grad
    with torch.no_grad():
        model.lm_head.weight.add_(0.1)
    save_pretrained(model, tmp_path)
    loaded = PeftModel.from_pretrained(base, str(tmp_path)).eval()
    batch = batches("llama", 1)[0]
    assert torch.equal(loaded(**batch).logits, model.eval()(**batch).logits)


def test_embedding_as_a_target_is_refused() -> None:
    with pytest.raises(ValueError, match=r"'transformer.wte' cannot be adapted: an nn.Embedding's inputs are indices"):
        find_targets(gpt2(), ["wte", "c_attn"])
