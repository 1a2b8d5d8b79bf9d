from __future__ import annotations

import weakref
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import timm
import torch
from peft import PeftModel
from timm.layers import GluMlp
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from eva_lightning.adapters import find_adapters, inject, merge_and_unload, save_pretrained
from eva_lightning.adapters.targets import find_targets
from eva_lightning.callback import EVAInitCallback
from eva_lightning.vision.backbone.split_fused import SplitLinear, fuse, split_fused, split_layers
from eva_lightning.vision.module import ImageClassifier

GIANT = "vit_giant_patch14_dinov2"
TINY = {"depth": 2, "embed_dim": 48, "num_heads": 4}


def giant(**options: Any) -> nn.Module:
    """DINOv2-g/14 in all but size, with everything at random."""
    model = timm.create_model(GIANT, num_classes=5, img_size=28, **{**TINY, **options})
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model.eval()


def images(n: int = 3) -> Tensor:
    return torch.randn(n, 3, 28, 28)


def batches(n: int = 16) -> DataLoader[Any]:
    return DataLoader(TensorDataset(images(n), torch.arange(n) % 5), batch_size=8)


def fit(module: L.LightningModule, callbacks: list[L.Callback], epochs: int = 1, **options: Any) -> L.Trainer:
    trainer = L.Trainer(
        accelerator="cpu", max_epochs=epochs, callbacks=callbacks, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, **options,
    )  # fmt: skip
    trainer.fit(module, batches())
    return trainer


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", [{}, {"qkv_bias": False}, {"qk_norm": True}], ids=str)
def test_function_stays(dtype: torch.dtype, options: dict[str, Any]) -> None:
    model = giant(**options).to(dtype)
    x = images().to(dtype)
    with torch.no_grad():
        before = model(x)
        names = split_fused(model)
        after = model(x)
    assert names == [f"blocks.{i}.{name}" for i in range(2) for name in ("attn.qkv", "mlp.fc1")]
    # the same products; a matrix library may add up those of a narrower matrix in another order
    torch.testing.assert_close(after, before, rtol=0, atol=1e-5 if dtype is torch.float32 else 2**-7)


def test_gradients_stay() -> None:
    fused, x = giant(), images()
    split = giant()
    split.load_state_dict(fused.state_dict())
    split_fused(split)
    fused(x).square().sum().backward()
    split(x).square().sum().backward()
    layer = split.get_submodule("blocks.0.attn.qkv")
    ours = torch.cat([part.weight.grad for part in layer.children()])  # type: ignore[union-attr, arg-type, misc]
    torch.testing.assert_close(ours, fused.get_submodule("blocks.0.attn.qkv").weight.grad, rtol=1e-4, atol=1e-5)


def test_giant_has_the_authors_280_targets() -> None:
    with torch.device("meta"):
        model = timm.create_model(GIANT, img_size=224, num_classes=102)
    total = sum(p.numel() for p in model.parameters())
    assert len(find_targets(model, head="head")[0]) == 160
    split_fused(model)
    targets, _ = find_targets(model, head="head")
    assert len(targets) == 280
    parts = ["attn.qkv.q", "attn.qkv.k", "attn.qkv.v", "attn.proj", "mlp.fc1.gate", "mlp.fc1.up", "mlp.fc2"]
    assert targets[:7] == [f"blocks.0.{part}" for part in parts]
    assert sum(p.numel() for p in model.parameters()) == total


def test_gate_and_value_keep_their_meaning_in_both_orders() -> None:
    for gate_last in (True, False):
        block = nn.Sequential(GluMlp(6, 8, gate_last=gate_last))
        fc1: Any = block[0].fc1
        halves = dict(zip(("up", "gate") if gate_last else ("gate", "up"), fc1.weight.detach().chunk(2), strict=True))
        x = torch.randn(2, 6)
        before = block(x)
        split_fused(block)
        torch.testing.assert_close(block(x), before)
        for name, half in halves.items():
            assert torch.equal(block.get_submodule(f"0.fc1.{name}").weight, half)  # type: ignore[arg-type]


def test_fused_weights_are_let_go_and_flags_kept() -> None:
    model = giant().to(torch.bfloat16)
    model.blocks[0].attn.qkv.bias.requires_grad_(False)  # type: ignore[union-attr, index]
    fused: Any = model.get_submodule("blocks.0.attn.qkv")
    gone = weakref.ref(fused.weight)
    del fused
    split_fused(model)
    assert gone() is None
    parts = list(model.get_submodule("blocks.0.attn.qkv").children())
    assert [p.weight.requires_grad for p in parts] == [True] * 3
    assert [p.bias.requires_grad for p in parts] == [False] * 3  # type: ignore[union-attr]
    assert {p.weight.dtype for p in parts} == {torch.bfloat16}
    assert not any(p.training for p in parts)
    storages = {p.weight.untyped_storage().data_ptr() for p in parts}  # type: ignore[union-attr, operator]
    assert len(storages) == 3


def test_fusing_gives_timms_state_dict_back_bit_for_bit() -> None:
    model = giant()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    split_fused(model)
    assert before.keys() != model.state_dict().keys()
    assert fuse(model) == [f"blocks.{i}.{name}" for i in range(2) for name in ("attn.qkv", "mlp.fc1")]
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert fuse(model) == []


def test_trained_adapters_merge_into_stock_timm() -> None:
    module = ImageClassifier(GIANT, 5, 28, lr=1e-2, split_fused=True, model_options=TINY)
    fit(module, [EVAInitCallback(r=4, alpha=8.0, head=module.head_name, verbose=False)], epochs=2)
    module.eval()
    x = images()
    expected = module(x)
    with pytest.raises(ValueError, match=r"has adapters on its parts: add them to the weights first"):
        fuse(module.model)
    merge_and_unload(module.model)
    fuse(module.model)
    stock = timm.create_model(GIANT, num_classes=5, img_size=28, **TINY)
    stock.load_state_dict(module.model.state_dict())
    torch.testing.assert_close(stock.eval()(x), expected, rtol=1e-4, atol=1e-6)


def test_shared_inputs_are_decomposed_once() -> None:
    module = ImageClassifier(GIANT, 5, 28, lr=0.0, split_fused=True, model_options=TINY)
    callback = EVAInitCallback(r=4, rho=1.0, head=module.head_name, verbose=False)
    fit(module, [callback])
    assert callback.state is not None
    assert len(callback.state.ranks) == 7 * 2
    assert callback.state.summary()["decompositions"] == 4 * 2
    shared = callback.state.shared_with
    assert shared["model.blocks.0.attn.qkv.k"] == shared["model.blocks.0.attn.qkv.v"] == "model.blocks.0.attn.qkv.q"
    assert shared["model.blocks.1.mlp.fc1.up"] == "model.blocks.1.mlp.fc1.gate"
    # one A for all three, as they have one rank here and nothing is learned, and a B for each
    q, v = (find_adapters(module)[f"model.blocks.0.attn.qkv.{part}"] for part in "qv")
    assert torch.equal(q.a, v.a)
    assert q.b.shape == v.b.shape == (48, 4)


def test_split_checkpoint_resumes_and_loads(tmp_path: Path) -> None:
    def build() -> tuple[ImageClassifier, EVAInitCallback]:
        L.seed_everything(0, verbose=False)
        module = ImageClassifier(GIANT, 5, 28, lr=1e-2, split_fused=True, model_options=TINY)
        return module, EVAInitCallback(r=4, head=module.head_name, verbose=False, adapter_only_checkpoints=True)

    whole, callback = build()
    fit(whole, [callback], epochs=2)
    first, callback = build()

    class Stop(L.Callback):
        def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            trainer.save_checkpoint(tmp_path / "last.ckpt")
            raise RuntimeError("power cut")

    with pytest.raises(RuntimeError, match="power cut"):
        fit(first, [callback, Stop()], epochs=2)
    second, callback = build()
    trainer = L.Trainer(
        accelerator="cpu", max_epochs=2, callbacks=[callback], logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(second, batches(), ckpt_path=tmp_path / "last.ckpt")
    x = images()
    assert torch.equal(second.eval()(x), whole.eval()(x))
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    L.seed_everything(0, verbose=False)
    loaded = ImageClassifier.load_from_checkpoint(tmp_path / "end.ckpt")
    assert len(split_layers(loaded)) == 4
    assert torch.equal(loaded.eval()(x), whole.eval()(x))


@pytest.mark.parametrize("use_dora", [False, True])
def test_adapter_of_the_split_layout_reloads_in_stock_peft(tmp_path: Path, use_dora: bool) -> None:
    model = giant()
    split_fused(model)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    inject(model, r=3, head="head", use_dora=use_dora)
    for layer in find_adapters(model).values():
        nn.init.normal_(layer.b, std=0.1)
    save_pretrained(model, tmp_path / "adapter")
    fresh = giant()
    split_fused(fresh)
    fresh.load_state_dict(state)
    x = images()
    loaded = PeftModel.from_pretrained(fresh, str(tmp_path / "adapter")).eval()
    torch.testing.assert_close(loaded(x), model(x), rtol=0, atol=0)


def test_attention_pooling_has_keys_and_values_of_its_own() -> None:
    model = timm.create_model("vit_base_patch16_siglip_224", num_classes=5, img_size=32, **TINY).eval()
    x = torch.randn(2, 3, 32, 32)
    before = model(x)
    assert "attn_pool.kv" in split_fused(model)
    assert isinstance(model.attn_pool.kv, SplitLinear)
    assert [name for name, _ in model.attn_pool.kv.named_children()] == ["k", "v"]
    torch.testing.assert_close(model(x), before)


def test_models_without_fused_projections_are_told() -> None:
    with pytest.raises(ValueError, match="ConvNeXt has no fused projection to split"):
        ImageClassifier("test_convnext", 5, 32, split_fused=True)
