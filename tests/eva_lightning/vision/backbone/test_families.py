"""Models of the families that users ask for, small: built, adapted, split and trained for a step."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from eva_lightning.adapters import find_adapters, inject
from eva_lightning.adapters.targets import find_targets
from eva_lightning.vision.backbone.split_fused import split_fused
from eva_lightning.vision.backbone.weights import Weights
from eva_lightning.vision.module import ImageClassifier

TINY = {"depth": 2, "embed_dim": 48, "num_heads": 4}
SWIN = {"embed_dim": 24, "depths": (1, 1, 1, 1), "num_heads": (2, 2, 2, 2), "window_size": 2}

#: timm name, what makes it small, image size, fused projections per model
TRANSFORMERS = [
    ("vit_giant_patch14_dinov2", TINY, 28, 4),
    ("vit_giant_patch14_reg4_dinov2", TINY, 28, 4),
    ("vit_small_patch16_dinov3", TINY, 32, 2),
    ("vit_small_patch16_dinov3_qkvb", TINY, 32, 2),
    ("vit_huge_plus_patch16_dinov3", TINY, 32, 2),
    ("vit_base_patch16_224.mae", TINY, 32, 2),
    ("vit_base_patch16_clip_224", TINY, 32, 2),
    ("vit_base_patch16_siglip_224", TINY, 32, 3),
    ("deit3_small_patch16_224", TINY, 32, 2),
    ("beit_base_patch16_224", TINY, 32, 2),
    ("eva02_tiny_patch14_224", TINY, 28, 4),
    ("aimv2_large_patch14_224", TINY, 28, 2),
    ("swin_tiny_patch4_window7_224", SWIN, 64, 4),
]


def classifier(name: str, options: dict[str, Any], size: int) -> ImageClassifier:
    module = ImageClassifier(name, 5, size, lr=1.0, model_options=options)
    nn.init.normal_(module.get_submodule(module.head_name).weight)  # type: ignore[arg-type]
    return module.eval()


@pytest.mark.parametrize(("name", "options", "size", "fused"), TRANSFORMERS, ids=[t[0] for t in TRANSFORMERS])
def test_transformers_train_and_split(name: str, options: dict[str, Any], size: int, fused: int) -> None:
    module = classifier(name, options, size)
    x, labels = torch.randn(4, 3, size, size), torch.arange(4)
    before = module(x)
    assert before.shape == (4, 5)
    targets = len(find_targets(module, head=module.head_name)[0])
    split = split_fused(module.model)
    assert len(split) == fused
    torch.testing.assert_close(module(x), before, rtol=1e-5, atol=1e-5)
    module.layer_decay = 0.75
    rates = {name: group["lr"] for group in module._parameter_groups() for name in map(id, group["params"])}
    assert len(rates) == len(list(module.parameters()))
    assert rates[id(module.get_submodule(module.head_name).weight)] == 1.0
    assert min(rates.values()) < 0.5
    inject(module, r=2, head=module.head_name)
    layers = find_adapters(module)
    assert len(layers) == targets + sum(len(list(module.model.get_submodule(path).children())) - 1 for path in split)
    nn.functional.cross_entropy(module.train()(x), labels).backward()
    # each was called: one whose weight is read past it would get no gradient
    silent = [name for name, layer in layers.items() if layer.b.grad is None or not bool(layer.b.grad.any())]
    assert silent == []


@pytest.mark.parametrize("name", ["beit_base_patch16_224", "vit_small_patch16_dinov3_qkvb"])
def test_calling_the_fused_layer_computes_what_timm_computes(name: str) -> None:
    """timm's BEiT and EVA-02 add the biases of q and v inside F.linear, past the layer's own forward."""
    import timm

    module = classifier(name, TINY, 32)
    stock = timm.create_model(name, num_classes=5, img_size=32, **TINY).eval()
    assert not any(getattr(m, "qkv_bias_separate", True) for n, m in stock.named_modules() if n.endswith("attn"))
    for parameter in module.model.parameters():
        nn.init.normal_(parameter, std=0.2)
    stock.load_state_dict(module.model.state_dict())
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(module(x), stock(x), rtol=1e-4, atol=1e-4)


def test_convolutional_networks_train_where_they_have_linear_layers() -> None:
    module = classifier("test_convnext", {}, 32)
    inject(module, r=2, head=module.head_name)
    nn.functional.cross_entropy(module.train()(torch.randn(4, 3, 32, 32)), torch.arange(4)).backward()
    assert all(layer.b.grad is not None for layer in find_adapters(module).values())
    with pytest.raises(ValueError, match=r"has no layer to adapt: 1 nn\.Linear in all"):
        inject(ImageClassifier("test_resnet", 5, 32))


def test_several_heads_are_refused_in_one_sentence() -> None:
    with pytest.raises(ValueError, match=r"has no linear head \(its classifier is tuple\): choose another model"):
        ImageClassifier("deit_tiny_distilled_patch16_224", 5, 32, model_options=TINY)


def test_unsuitable_options_are_one_sentence() -> None:
    with pytest.raises(ValueError, match=r"vit_tiny_patch16_224 cannot be built for images of 32 pixels: .*depht"):
        ImageClassifier("vit_tiny_patch16_224", 5, 32, Weights(False), model_options={"depht": 2})
