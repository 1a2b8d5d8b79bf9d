from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import timm
import torch
from peft import PeftModel
from torch import nn

from eva_lightning.adapters import find_adapters, inject
from eva_lightning.adapters.registry import remove, sync_configs
from eva_lightning.vision.backbone.fused_adapter import save_fused_adapter
from eva_lightning.vision.backbone.split_fused import split_fused

TINY = {"depth": 2, "embed_dim": 48, "num_heads": 4}


def stock() -> nn.Module:
    L.seed_everything(0, verbose=False)
    model = timm.create_model("vit_giant_patch14_dinov2", num_classes=5, img_size=28, **TINY)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model.eval()


def trained(**options: Any) -> nn.Module:
    """A split model with adapters of uneven ranks that all do something; one part has none."""
    model = stock()
    split_fused(model)
    inject(model, **{"r": 4, "alpha": 2.0, "head": "head", "bias": "all", **options})
    layers = find_adapters(model)
    if options.get("initialisation") is None:
        layers["blocks.0.attn.qkv.q"].resize(7)
        layers["blocks.0.mlp.fc1.up"].resize(2, alpha=2.0)  # another scaling than the gate's
        for name in ("blocks.0.attn.qkv.k", "blocks.1.mlp.fc1.gate", "blocks.1.mlp.fc1.up"):
            remove(model, layers[name])
        sync_configs(model)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.data += 0.05 * torch.randn_like(parameter)
            assert "lora" in name or "bias" in name or "head" in name
    return model


@pytest.mark.parametrize(
    "options",
    [{}, {"use_rslora": True}, {"use_dora": True}, {"initialisation": "pissa"}, {"bias": "lora_only"}],
    ids=str,
)
def test_stock_peft_on_stock_timm_computes_the_same(tmp_path: Path, options: dict[str, Any]) -> None:
    model = trained(**options)
    x = torch.randn(3, 3, 28, 28)
    expected = model(x)
    folder = save_fused_adapter(model, tmp_path / "fused")
    loaded = PeftModel.from_pretrained(stock(), str(folder)).eval()
    torch.testing.assert_close(loaded(x), expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(stock()(x), expected, atol=1e-2)
    assert torch.equal(model(x), expected)  # not changed by saving
    names = [name for name, module in loaded.named_modules() if hasattr(module, "lora_A")]
    assert any(name.endswith("blocks.0.attn.qkv") for name in names)
    assert not any(name.endswith("qkv.q") for name in names)


def test_rank_is_the_sum_of_the_parts(tmp_path: Path) -> None:
    folder = save_fused_adapter(trained(), tmp_path / "fused")
    loaded = PeftModel.from_pretrained(stock(), str(folder))
    ranks = {name.removeprefix("base_model.model."): module.r["default"] for name, module in loaded.named_modules()
             if hasattr(module, "lora_A")}  # fmt: skip
    assert ranks["blocks.0.attn.qkv"] == 7 + 4
    assert ranks["blocks.1.attn.qkv"] == 3 * 4
    assert ranks["blocks.0.mlp.fc1"] == 4 + 2
    assert ranks["blocks.0.attn.proj"] == 4
    assert "blocks.1.mlp.fc1" not in ranks


def test_adalora_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    model = stock()
    split_fused(model)
    inject(model, r=6, head="head", adalora={"target_r": 4, "total_step": 10})
    with pytest.raises(ValueError, match="AdaLoRA's adapters cannot be fused exactly"):
        save_fused_adapter(model, tmp_path / "fused")
    assert not (tmp_path / "fused").exists()
