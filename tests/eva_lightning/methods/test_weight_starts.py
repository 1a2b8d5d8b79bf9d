"""Starts that need no data: AILoRA by a dense SVD, PEFT's orthogonal and normal ones by PEFT, orthonormal by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from eva_lightning.adapters import find_adapters, inject
from eva_lightning.methods.apply import AdapterOptions, apply_method
from eva_lightning.vision.module import ImageClassifier
from tests.eva_lightning.methods.token_fits import build, fit, outputs, prepared
from tests.modules import HIDDEN

RANK, SCALING = 4, 3 / 4


def options(**kwargs: Any) -> AdapterOptions:
    return AdapterOptions(**{"rank": RANK, "alpha": 3.0, "bias": "none", **kwargs})


def test_ailora_takes_the_queries_top_and_the_values_least_singular_directions() -> None:
    """arXiv 2510.08034, in float64."""
    module, _ = prepared("ailora", options())
    layers = find_adapters(module)
    assert list(layers) == ["net.attention.q", "net.attention.v"]
    for name, chosen in (("net.attention.q", slice(RANK)), ("net.attention.v", slice(-RANK, None))):
        weight: Any = build().get_submodule(name).weight
        u, s, vh = torch.linalg.svd(weight.detach().double())
        part = u[:, chosen] @ torch.diag(s[chosen]) @ vh[chosen]
        layer = layers[name]
        a, b = layer.a.detach().double(), layer.b.detach().double()
        torch.testing.assert_close(SCALING * b @ a, part, rtol=0, atol=1e-5)
        torch.testing.assert_close(a @ a.T, torch.diag(s[chosen]) / SCALING, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(b.T @ b, torch.diag(s[chosen]) / SCALING, rtol=1e-4, atol=1e-5)
        base: Any = layer.base.weight
        torch.testing.assert_close(base.detach().double(), weight.detach().double() - part, rtol=0, atol=1e-5)
    assert module.net.attention.k.weight.requires_grad is False  # type: ignore[union-attr]


def test_ailora_keeps_to_the_layers_that_are_named() -> None:
    module = build()
    apply_method("ailora", module, options(target_modules=["attention"]), head="net.head")
    assert list(find_adapters(module)) == ["net.attention.q", "net.attention.v"]
    with pytest.raises(ValueError, match="ailora adapts an attention's queries and values, but Heeding has no two"):
        apply_method("ailora", build(), options(target_modules=["q", "narrow"]), head="net.head")
    untouched = build()
    with pytest.raises(ValueError, match=r"'net\.attention\.k' is not named like one"):
        inject(untouched, r=2, target_modules=["q", "k"], initialisation="ailora")
    assert not find_adapters(untouched)
    assert all(torch.equal(p, q) for p, q in zip(untouched.parameters(), build().parameters(), strict=True))


def test_ailora_on_images_needs_split_projections() -> None:
    with pytest.raises(ValueError, match=r"'model\.blocks\.0\.attn\.qkv' and \d+ more compute them .*--split-fused"):
        apply_method("ailora", ImageClassifier("test_vit", 4, 32), options())
    module = ImageClassifier("test_vit", 4, 32, split_fused=True)
    apply_method("ailora", module, options())
    assert {name.rsplit(".", 1)[1] for name in find_adapters(module)} == {"q", "v"}


@pytest.mark.parametrize("method", ["orthogonal", "gaussian"])
def test_starts_without_a_base_weight_are_pefts_drawn_alike(method: Any) -> None:
    from peft import LoraConfig, get_peft_model

    module, _ = prepared(method, options())
    net = build().net
    config = LoraConfig(
        r=RANK, lora_alpha=3, target_modules=["q", "k", "v", "out", "narrow", "wide"], init_lora_weights=method
    )
    torch.manual_seed(1)
    theirs: Any = get_peft_model(net, config).base_model.model
    for name, layer in find_adapters(module).items():
        reference = theirs.get_submodule(name.removeprefix("net."))
        assert torch.equal(layer.a, reference.lora_A["default"].weight), name
        assert torch.equal(layer.b, reference.lora_B["default"].weight), name
        assert torch.equal(layer.base.weight, reference.base_layer.weight), name  # type: ignore[arg-type]


def test_orthonormal_rows_are_the_gram_schmidt_of_pefts_normal_ones() -> None:
    """In float64, row by row; B is zero and the base weight is as it was."""
    normal, _ = prepared("gaussian", options())
    before = torch.get_rng_state()
    module, _ = prepared("orthonormal", options())
    assert torch.equal(before, torch.get_rng_state())
    drawn = find_adapters(normal)
    for name, layer in find_adapters(module).items():
        basis: list[torch.Tensor] = []
        for row in drawn[name].a.detach().double():
            rest = row - sum((row @ other) * other for other in basis)
            basis.append(rest / rest.norm())
        torch.testing.assert_close(layer.a.detach().double(), torch.stack(basis), rtol=0, atol=1e-6)
        assert not layer.b.any(), name
        assert torch.equal(layer.base.weight, build().get_submodule(name).weight)  # type: ignore[arg-type]
        assert layer.module.scaling["default"] == SCALING


def test_orthonormal_rows_follow_the_seed_and_no_other_layer() -> None:
    def rows(seed: int) -> list[torch.Tensor]:
        module = build()
        torch.manual_seed(seed)
        inject(module, r=RANK, initialisation="orthonormal")
        return [layer.a.detach() for layer in find_adapters(module).values()]

    assert all(torch.equal(a, b) for a, b in zip(rows(1), rows(1), strict=True))
    assert not any(torch.allclose(a, b, atol=0.1) for a, b in zip(rows(1), rows(2), strict=True))


def test_orthogonal_factors_are_large_and_their_product_is_nothing() -> None:
    module, _ = prepared("orthogonal", options())
    for layer in find_adapters(module).values():
        a, b = layer.a.detach().double(), layer.b.detach().double()
        assert min(a.abs().max(), b.abs().max()) > 0.02
        assert (b @ a).abs().max() < 1e-7
        assert torch.linalg.matrix_rank(a, rtol=1e-5) == min(RANK // 2, layer.in_features)


def test_orthogonal_ranks_are_even_and_no_wider_than_the_layer() -> None:
    with pytest.raises(ValueError, match="orthogonal needs an even rank, got 3"):
        prepared("orthogonal", options(rank=3))
    module, callbacks = prepared("orthogonal", options(rank=32), lr=0.0)
    fit(module, callbacks, max_steps=1)
    layers = find_adapters(module)
    assert {name: layer.rank for name, layer in layers.items() if layer.rank != HIDDEN} == {"net.wide": 4}
    assert {layer.module.scaling["default"] for layer in layers.values()} == {3 / 32}
    torch.testing.assert_close(outputs(module), outputs(build()), rtol=1e-4, atol=1e-5)


def test_what_needs_no_base_weight_adapts_quantised_ones_too() -> None:
    for method, refused in (("gaussian", False), ("orthonormal", False), ("orthogonal", True), ("ailora", True)):
        module = build()
        layer: Any = module.net.attention.q  # type: ignore[union-attr]
        layer.weight = torch.nn.Parameter(layer.weight.detach().to(torch.int8), requires_grad=False)
        arguments: Any = {"r": 2, "target_modules": ["q"], "initialisation": method}
        if refused:
            with pytest.raises(ValueError, match=rf"{method} .* of 'net.attention.q' is quantised \(torch.int8\)"):
                inject(module, **arguments)
        else:
            assert inject(module, **arguments).targets == ["net.attention.q"]
