"""Injection, heads, resizing, export and merging, against stock PEFT."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from eva_lightning import EVAInitCallback
from eva_lightning.adapters import find_adapters, find_head, find_targets, inject, merge_and_unload, save_pretrained
from tests.modules import CLASSES, HIDDEN, IN, Classifier, TokenNet, correlated, loader, mlp, trainer

X = correlated(16, seed=4)


def small_vit() -> nn.Module:
    return timm.create_model(
        "vit_tiny_patch16_224", img_size=16, patch_size=4, embed_dim=48, depth=2, num_heads=3, num_classes=5
    )


def test_injection_freezes_all_but_adapters_and_head() -> None:
    module = Classifier(small_vit())
    report = inject(module, r=2)
    trainable = {n for n, p in module.named_parameters() if p.requires_grad}
    assert report.head == ["net.head"]
    assert len(report.targets) == 2 * 4
    assert {n for n in trainable if "lora_" not in n} == {"net.head.weight", "net.head.bias"}
    assert sum("lora_A" in n for n in trainable) == 8


@pytest.mark.parametrize("bias", ["none", "all", "lora_only"])
def test_biases_that_train(bias: Any) -> None:
    module = Classifier(small_vit())
    inject(module, r=2, bias=bias)
    biases = {n: p.requires_grad for n, p in module.named_parameters() if n.endswith("bias") and "head" not in n}
    adapted = {n for n in biases if n.endswith("base_layer.bias")}
    assert len(adapted) == 8
    assert len(biases) > len(adapted)
    expected = {"none": set(), "all": set(biases), "lora_only": adapted}[bias]
    assert {n for n, on in biases.items() if on} == expected


def test_frozen_parameters_stay_frozen() -> None:
    module = Classifier(TokenNet())
    module.net.head.requires_grad_(False)
    inject(module, r=2, bias="all")
    assert not module.net.head.weight.requires_grad
    assert not module.net.head.bias.requires_grad


def test_undo_leaves_nothing_behind() -> None:
    module = Classifier(small_vit())
    module.net.blocks[0].eval()
    module.net.cls_token.requires_grad_(False)
    before = {n: p.requires_grad for n, p in module.named_parameters()}
    modes = {n: m.training for n, m in module.named_modules()}
    attributes = set(vars(module))
    state = torch.get_rng_state()
    inject(module, r=2).undo(module)
    assert {n: p.requires_grad for n, p in module.named_parameters()} == before
    assert {n: m.training for n, m in module.named_modules()} == modes
    assert set(vars(module)) == attributes
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize(
    ("make", "head"),
    [
        (small_vit, ["head"]),
        (mlp, ["7"]),
        (TokenNet, ["head"]),
        (lambda: nn.Sequential(small_vit(), nn.Linear(5, 2)), ["0.head"]),
        (lambda: nn.ModuleDict({"classifier": nn.Linear(4, 2), "body": nn.Linear(4, 4)}), ["classifier"]),
    ],
)
def test_head_is_found(make: Any, head: list[str]) -> None:
    assert find_head(make()) == head


def test_heads_of_transformers_models() -> None:
    from transformers import BertConfig, BertForSequenceClassification, GPT2Config, GPT2LMHeadModel

    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    bert = BertForSequenceClassification(BertConfig(vocab_size=20, **sizes))
    assert find_head(bert) == ["classifier"]
    gpt = GPT2LMHeadModel(GPT2Config(vocab_size=20, n_embd=16, n_layer=1, n_head=2))
    assert find_head(gpt) == ["lm_head"]


def test_targets_match_like_peft() -> None:
    net = small_vit()
    assert find_targets(net, ["qkv"])[0] == ["blocks.0.attn.qkv", "blocks.1.attn.qkv"]
    assert find_targets(net, "qkv")[0] == ["blocks.0.attn.qkv", "blocks.1.attn.qkv"]
    assert find_targets(net, r"blocks\.1\..*")[0] == [
        f"blocks.1.{n}" for n in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    ]
    assert "blocks.0.mlp.fc1" not in find_targets(net, exclude=["fc1"])[0]
    # a bare "proj" must not reach the convolution patch_embed.proj
    assert find_targets(net, ["proj"])[0] == ["blocks.0.attn.proj", "blocks.1.attn.proj"]


def test_multihead_attention_output_is_left_alone() -> None:
    """Its weight is read, never called: an adapter on it would train nothing."""
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    assert find_targets(nn.ModuleDict({"block": layer, "head": nn.Linear(16, 2)}))[0] == [
        "block.linear1",
        "block.linear2",
    ]


@pytest.mark.parametrize("padding", [False, True])
def test_fused_encoder_does_not_bypass_adapters_in_eval(padding: bool) -> None:
    torch.manual_seed(0)
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 1)
    module = nn.ModuleDict({"encoder": encoder, "head": nn.Linear(16, 2)}).eval()
    x = torch.randn(3, 5, 16)
    mask = torch.arange(5)[None] >= torch.tensor([5, 3, 4])[:, None] if padding else None
    keep = torch.ones(3, 5, dtype=torch.bool) if mask is None else ~mask
    before = encoder(x, src_key_padding_mask=mask)[keep[:, :5]] if not padding else None
    report = inject(module, r=2)
    assert report.targets == ["encoder.layers.0.linear1", "encoder.layers.0.linear2"]
    with torch.no_grad():
        start = encoder(x, src_key_padding_mask=mask)
        for layer in find_adapters(module).values():
            layer.b.normal_()
        assert not torch.allclose(encoder(x, src_key_padding_mask=mask)[keep], start[keep])
        if before is not None:
            torch.testing.assert_close(start[keep], before, rtol=1e-4, atol=1e-5)


def test_names_are_canonical() -> None:
    plain = Classifier(small_vit())
    inject(plain, r=2, target_modules=["qkv"])
    peft = Classifier(get_peft_model(small_vit(), LoraConfig(r=2, target_modules=["qkv"])))
    assert list(find_adapters(plain)) == list(find_adapters(peft)) == ["net.blocks.0.attn.qkv", "net.blocks.1.attn.qkv"]
    assert find_adapters(peft)["net.blocks.0.attn.qkv"].path == "net.base_model.model.blocks.0.attn.qkv"


@pytest.mark.parametrize(
    "options", [{}, {"use_dora": True}, {"use_rslora": True}, {"lora_dropout": 0.1}, {"lora_bias": True}], ids=str
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_resize_keeps_dtype_scaling_modes_and_flags(options: dict[str, Any], dtype: torch.dtype) -> None:
    net = get_peft_model(mlp(), LoraConfig(r=4, lora_alpha=2, target_modules=["0", "3"], **options))
    net.to(dtype)
    net.eval()
    layer = find_adapters(net)["3"]
    layer.a.requires_grad_(False)
    scaling = layer.module.scaling["default"]
    x = torch.randn(5, HIDDEN, dtype=dtype)
    before = layer.module(x)
    layer.resize(7)
    layer.write(torch.randn(7, HIDDEN))
    assert layer.rank == 7
    assert tuple(layer.a.shape) == (7, HIDDEN)
    assert layer.module.scaling["default"] == pytest.approx(scaling)
    assert {p.dtype for p in layer.module.parameters()} == {dtype}
    assert not layer.a.requires_grad
    assert layer.b.requires_grad
    assert not any(m.training for m in layer.module.modules())
    assert torch.equal(layer.module(x), before)


def trained(net: nn.Module, **lora: Any) -> Classifier:
    torch.manual_seed(0)
    module = Classifier(net)
    trainer(EVAInitCallback(rho=2, r=4, lora=lora), max_epochs=2).fit(module, loader())
    return module.eval()


EXPORTS: dict[str, dict[str, Any]] = {
    "LoRA": {},
    "DoRA": {"use_dora": True},
    "rsLoRA": {"use_rslora": True},
    "biases": {"bias": "all"},
    "biases of adapted layers": {"bias": "lora_only"},
    "fewer targets": {"target_modules": ["3", "5"]},
}


@pytest.mark.parametrize("kind", EXPORTS)
def test_stock_peft_loads_what_we_save_with_identical_outputs(kind: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = mlp()
    base = copy.deepcopy(net)
    module = trained(net, **EXPORTS[kind])
    assert len({layer.rank for layer in find_adapters(module).values()}) > 1
    save_pretrained(module.net, tmp_path)
    loaded = PeftModel.from_pretrained(base, str(tmp_path)).eval()
    assert torch.equal(loaded(X), module(X))


def test_users_own_peft_model_saves_itself(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = mlp()
    base = copy.deepcopy(net)
    config = LoraConfig(r=4, target_modules=["0", "3", "5"], modules_to_save=["7", "1"])
    module = trained(get_peft_model(net, config))
    module.net.save_pretrained(str(tmp_path))
    loaded = PeftModel.from_pretrained(base, str(tmp_path)).eval()
    assert torch.equal(loaded(X), module(X))


def test_removed_layers_are_no_targets_when_reloaded(tmp_path: Path) -> None:
    from eva_lightning.adapters.registry import remove

    module = Classifier(mlp())
    base = copy.deepcopy(module.net)
    inject(module, r=2)
    remove(module, find_adapters(module)["net.3"])
    save_pretrained(module.net, tmp_path)
    assert list(find_adapters(PeftModel.from_pretrained(base, str(tmp_path)))) == ["0", "5"]


def test_names_that_end_alike_are_told_apart(tmp_path: Path) -> None:
    """PEFT matches patterns by suffix: "a" would also mean "inner.a"."""

    class Nested(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(IN, IN)
            self.inner = nn.ModuleDict({"a": nn.Linear(IN, IN)})
            self.head = nn.Linear(IN, CLASSES)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.inner["a"](self.a(x)))

    torch.manual_seed(0)
    module = Classifier(Nested())
    base = copy.deepcopy(module.net)
    inject(module, r=2)
    layers = find_adapters(module)
    layers["net.a"].resize(5)
    with torch.no_grad():
        for layer in layers.values():
            layer.b.normal_()
    save_pretrained(module.net, tmp_path)
    loaded = PeftModel.from_pretrained(base, str(tmp_path))
    assert {n: layer.rank for n, layer in find_adapters(loaded).items()} == {"a": 5, "inner.a": 2}
    assert torch.equal(loaded(X), module(X))


@pytest.mark.parametrize("use_dora", [False, True])
def test_merging_keeps_the_function(use_dora: bool) -> None:
    module = trained(mlp(), use_dora=use_dora)
    before = module(X)
    merge_and_unload(module)
    assert not find_adapters(module)
    assert not hasattr(module, "peft_config")
    torch.testing.assert_close(module(X), before, rtol=1e-4, atol=1e-5)


def test_single_trained_parameters_are_loaded_by_stock_peft(tmp_path: Path) -> None:
    module = Classifier(small_vit())
    base = copy.deepcopy(module.net)
    inject(module, r=2)
    nn.init.normal_(module.net.cls_token.requires_grad_(True))
    save_pretrained(module.net, tmp_path)
    loaded = PeftModel.from_pretrained(base, str(tmp_path)).get_base_model()
    assert torch.equal(loaded.cls_token, module.net.cls_token)


def test_layer_under_two_names_is_adapted_under_both(tmp_path: Path) -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(IN, IN)
            self.block = nn.ModuleDict({"again": self.first})
            self.head = nn.Linear(IN, CLASSES)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(torch.relu(self.block["again"](torch.relu(self.first(x)))))

    class Module(Classifier):
        def __init__(self) -> None:
            torch.manual_seed(0)
            super().__init__(Twice())

    module = Module()
    run = trainer(EVAInitCallback(r=4), max_epochs=2)
    run.fit(module, loader())
    assert module.net.first is module.net.block["again"]
    run.save_checkpoint(tmp_path / "two.ckpt")
    module.eval()
    before = module(X)
    assert torch.equal(Module.load_from_checkpoint(tmp_path / "two.ckpt").eval()(X), before)
    merge_and_unload(module)
    torch.testing.assert_close(module(X), before, rtol=1e-4, atol=1e-5)


def test_tied_head_trains() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.body, self.head = nn.Embedding(7, 8), nn.Linear(8, 8), nn.Linear(8, 7, bias=False)
            self.head.weight = self.embed.weight

    module = Tied()
    inject(module, r=2)
    assert module.head.weight.requires_grad
    assert not module.body.base_layer.weight.requires_grad


def test_removing_ours_keeps_other_adapters_of_the_layer() -> None:
    from eva_lightning.adapters.registry import remove

    net = get_peft_model(mlp(), LoraConfig(r=2, target_modules=["0", "3"], init_lora_weights=False), adapter_name="old")
    net.add_adapter("new", LoraConfig(r=2, target_modules=["0", "3"]))
    net.set_adapter("new")
    base = net.get_base_model()[0].base_layer
    remove(net, find_adapters(net)["0"])
    assert "old" in net.get_base_model()[0].lora_A
    assert torch.equal(net.get_base_model()[0](X), base(X)), "no adapter is active there"
    net.set_adapter("old")
    assert not torch.equal(net.get_base_model()[0](X), base(X)), "the other adapter still works"


def test_attributes_of_the_users_module_are_left_alone() -> None:
    class Own(Classifier):
        def __init__(self) -> None:
            super().__init__()
            self.config = {"model_type": "mine"}

        @property
        def peft_config(self) -> Any:
            raise RuntimeError("mine")

    module = Own()
    callback = EVAInitCallback(rho=2, r=4)
    trainer(callback).fit(module, loader())
    assert callback.state is not None
    assert module.config == {"model_type": "mine"}


def test_last_layer_wins_over_a_customary_name_deep_inside() -> None:
    net = nn.ModuleDict({"attn": nn.ModuleDict({"out": nn.Linear(4, 4)}), "to_classes": nn.Linear(4, 2)})
    assert find_head(net) == ["to_classes"]
    early = nn.ModuleDict({"classifier": nn.Linear(4, 2), "encoder": nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))})
    assert find_head(early) == ["classifier"]
