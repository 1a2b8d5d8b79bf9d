"""Layers other than nn.Linear: Conv1D, convolutions, MultiheadAttention, embeddings, quantised layers."""

from __future__ import annotations

import copy
import math
import subprocess
import sys
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from transformers.pytorch_utils import Conv1D

from eva_lightning import EVAInitCallback, StreamingOptions, compute_eva_state, load_from_checkpoint
from eva_lightning.adapters import (
    find_adapters,
    find_skipped,
    find_targets,
    inject,
    merge_and_unload,
    save_pretrained,
)
from eva_lightning.layer_inputs import PatchInputs
from tests.modules import correlated, trainer

K = 4


class Net(pl.LightningModule):
    """A classifier around any network; keeps the weights it had and the outputs on one batch before the first step."""

    def __init__(self, net: nn.Module, x: Tensor) -> None:
        super().__init__()
        self.net, self.x = net, x

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def on_train_start(self) -> None:
        self.start = self.probe()

    def probe(self) -> Tensor:
        mode = self.training
        self.eval()
        with torch.no_grad():
            out = self(self.x)
        self.train(mode)
        return out

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.3)


def fit(net: nn.Module, x: Tensor, kind: type[Net] = Net, **options: Any) -> tuple[Net, EVAInitCallback]:
    """Train on ``x`` with EVA; the function before the first step must be that before fit, bit for bit."""
    labels = torch.arange(len(x)) % 3
    module = kind(net, x[:4])
    before = module.probe()
    callback = EVAInitCallback(
        rho=2, r=2, streaming=StreamingOptions(tau=1.0, tokens_per_sample=None), verbose=False, **options
    )
    trainer(callback, max_epochs=2).fit(module, DataLoader(TensorDataset(x, labels), batch_size=16))
    assert torch.equal(module.start, before)
    return module.eval(), callback


def assert_decomposes(state: Any, layer: str, tokens: Tensor, k: int = K) -> None:
    """The state against LAPACK's SVD of the centred tokens in fp64."""
    tokens = tokens.reshape(-1, tokens.shape[-1]).double()
    _, s, v = torch.linalg.svd(tokens - tokens.mean(0), full_matrices=False)
    assert state.n_samples[layer] == len(tokens)
    torch.testing.assert_close(state.singular_values[layer][:k], s[:k].float(), rtol=1e-4, atol=1e-4)
    overlap = (state.components[layer][:k].double() @ v[:k].T).square().sum() / min(k, len(s))
    assert overlap > 1 - 1e-4


def inputs(net: nn.Module, x: Tensor, names: list[str]) -> dict[str, Tensor]:
    """What the named layers of a plain network are called on."""
    seen: dict[str, Tensor] = {}
    for name in names:
        net.get_submodule(name).register_forward_pre_hook(lambda _, args, n=name: seen.__setitem__(n, args[0].detach()))
    with torch.no_grad():
        net.eval()(x)
    return seen


# --- transformers' Conv1D ---------------------------------------------------------------------------------------------


class Transposed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.head = Conv1D(20, 12), Conv1D(12, 20), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.down(torch.relu(self.up(x))).mean(1))


@pytest.mark.parametrize("use_dora", [False, True])
def test_conv1d_is_a_linear_layer(use_dora: bool, tmp_path: Path) -> None:
    net, x = Transposed(), correlated(48 * 5).view(48, 5, 12)
    base = copy.deepcopy(net)
    module, callback = fit(net, x, lora={"use_dora": use_dora})
    assert callback.state is not None
    for name, tokens in inputs(copy.deepcopy(base), x, ["up", "down"]).items():
        assert_decomposes(callback.state, f"net.{name}", tokens)
    out = module(x)
    save_pretrained(module.net, tmp_path)
    assert torch.equal(PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path)).eval()(x), out)
    merge_and_unload(module)
    assert isinstance(module.net.up, Conv1D)
    torch.testing.assert_close(module(x), out, rtol=1e-4, atol=1e-5)


def test_finding_targets_does_not_import_transformers() -> None:
    code = (
        "import sys, torch.nn as nn\nfrom eva_lightning.adapters import find_targets\n"
        "assert find_targets(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))) == (['0'], ['1'])\n"
        "assert not {'transformers', 'peft', 'bitsandbytes'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


# --- convolutions -----------------------------------------------------------------------------------------------------


def conv_net(kind: type, **options: Any) -> nn.Sequential:
    d = {nn.Conv1d: 1, nn.Conv2d: 2, nn.Conv3d: 3}[kind]
    pool = (nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d)[d - 1]
    return nn.Sequential(
        OrderedDict(
            conv=nn.Sequential(kind(3, 6, 3, **options), nn.ReLU(), kind(6, 8, 1), nn.ReLU(), pool(2), nn.Flatten()),
            fc=nn.Linear(8 * 2**d, 7),
            head=nn.Linear(7, 3),
        )
    )


def images(kind: type) -> Tensor:
    d = {nn.Conv1d: 1, nn.Conv2d: 2, nn.Conv3d: 3}[kind]
    return F.avg_pool1d(torch.randn(32, 3, 7**d * 2), 3, 1, 1)[..., : 7**d].reshape(32, 3, *[7] * d) + 0.5


CONVOLUTIONS: dict[str, tuple[type, dict[str, Any]]] = {
    "1d": (nn.Conv1d, {"stride": 2, "padding": 1}),
    "2d": (nn.Conv2d, {}),
    "2d stride": (nn.Conv2d, {"stride": 2, "padding": (1, 2)}),
    "2d same": (nn.Conv2d, {"padding": "same", "bias": False}),
    "3d": (nn.Conv3d, {"padding": 1}),
}


@pytest.mark.parametrize("use_dora", [False, True], ids=["LoRA", "DoRA"])
@pytest.mark.parametrize("kind", CONVOLUTIONS)
def test_convolution(kind: str, use_dora: bool, tmp_path: Path) -> None:
    conv, geometry = CONVOLUTIONS[kind]
    net, x = conv_net(conv, **geometry), images(conv)
    base = copy.deepcopy(net)
    module, callback = fit(net, x, target_modules=["conv.0", "conv.2", "fc"], lora={"use_dora": use_dora})
    assert callback.state is not None
    assert set(callback.state.components) == {"net.conv.0", "net.conv.2", "net.fc"}
    assert callback.state.components["net.conv.0"].shape[1] == base.conv[0].weight[0].numel()
    # a filter's response to a patch is the inner product: the patches reproduce the layer's own output
    tokens = patches(base.conv[0], x)
    weight = base.conv[0].weight.flatten(1)
    expected = F.conv1d if conv is nn.Conv1d else F.conv2d if conv is nn.Conv2d else F.conv3d
    out = expected(x, base.conv[0].weight, None, base.conv[0].stride, base.conv[0].padding).movedim(1, -1)
    torch.testing.assert_close((tokens @ weight.T).flatten(), out.flatten(), rtol=1e-4, atol=1e-4)
    assert_decomposes(callback.state, "net.conv.0", tokens)
    layers = find_adapters(module)
    assert sum(layer.rank for layer in layers.values()) == 6
    before = module(x)
    save_pretrained(module.net, tmp_path)
    loaded = PeftModel.from_pretrained(base, str(tmp_path)).eval()
    assert torch.equal(loaded(x), before)
    if conv is nn.Conv3d and use_dora:
        return  # PEFT itself merges DoRA on convolutions, and its merge of 1 x 1 x 1 kernels fails
    merge_and_unload(module)
    assert not find_adapters(module)
    torch.testing.assert_close(module(x), before, rtol=1e-3, atol=1e-4)


def patches(conv: Any, x: Tensor) -> Tensor:
    """im2col by plain loops over output positions: (positions * samples, in_channels * prod(kernel))."""
    kernel, stride = conv.kernel_size, conv.stride
    padding = [(1, 1)] * len(kernel) if conv.padding == "same" else [(p, p) for p in conv.padding]
    x = F.pad(x, [side for pair in reversed(padding) for side in pair])
    counts = [(n - k) // s + 1 for n, k, s in zip(x.shape[2:], kernel, stride, strict=True)]
    rows = []
    for position in torch.cartesian_prod(*[torch.arange(c) for c in counts]).reshape(-1, len(kernel)).tolist():
        window = x
        for axis, (p, k, s) in enumerate(zip(position, kernel, stride, strict=True)):
            window = window.narrow(2 + axis, p * s, k)
        rows.append(window.flatten(1))
    return torch.stack(rows, 1).reshape(len(x), *counts, -1)


def test_a_is_written_as_filters() -> None:
    """A's response to the centred inputs has the variances of the top components: A is not scrambled."""
    net, x = conv_net(nn.Conv2d, padding=1), images(nn.Conv2d)
    module = Net(net, x)
    inject(module, r=3, target_modules=["conv.0"])
    layer = find_adapters(module)["net.conv.0"]
    state = compute_eva_state(module, lambda: iter([x]), {layer.name: layer.inputs()}, 3)
    layer.write(state.components[layer.name])
    response = layer.module.lora_A["default"](x).movedim(1, -1).flatten(0, 2)
    spread = (response - response.mean(0)).square().sum(0).sqrt()
    torch.testing.assert_close(spread, state.singular_values[layer.name], rtol=1e-4, atol=1e-4)


def test_patches_are_chosen_and_masked_before_they_are_copied() -> None:
    conv, x = nn.Conv2d(3, 4, 3, stride=2), images(nn.Conv2d)
    all_patches = patches(conv, x).flatten(1, 2)
    layers: Any = {"c": conv}
    few = compute_eva_state(conv, lambda: iter([x]), layers, K, StreamingOptions(tokens_per_sample=5))
    index = torch.randperm(9, generator=torch.Generator().manual_seed(0)).narrow(0, 0, 5).sort().values
    assert_decomposes(few, "c", all_patches[:, index])
    mask = torch.rand(32, 3, 3) > 0.5
    masked = compute_eva_state(conv, lambda: iter([x]), layers, K, mask_fn=lambda _: mask)
    assert_decomposes(masked, "c", all_patches[mask.flatten(1)])
    inputs = PatchInputs(conv, conv)
    inputs.piece = 500  # in many pieces the sums are the same
    pieces = compute_eva_state(conv, lambda: iter([x]), {"c": inputs}, K, mask_fn=lambda _: mask)
    torch.testing.assert_close(pieces.singular_values["c"], masked.singular_values["c"], rtol=1e-5, atol=1e-5)


def test_convolutions_must_be_named() -> None:
    net = nn.ModuleDict(
        {"patch": nn.ModuleDict({"proj": nn.Conv2d(3, 4, 2)}), "proj": nn.Linear(4, 4), "head": nn.Linear(4, 2)}
    )
    assert find_targets(net)[0] == ["proj"]
    assert find_targets(net, ["proj"])[0] == ["proj"]
    assert find_targets(net, r".*proj")[0] == ["proj"]
    assert find_targets(net, ["proj", "patch.proj"])[0] == ["patch.proj", "proj"]
    assert find_targets(net, r"patch\..*")[0] == ["patch.proj"]


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (nn.Conv2d(4, 4, 3, groups=2), r"groups=2: PEFT's A mixes the groups"),
        (nn.Conv2d(4, 4, 3, dilation=2), r"dilation=\(2, 2\): PEFT makes its A without dilation"),
        (nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"), r"padding_mode='reflect': PEFT's A pads with zeros"),
        (nn.Embedding(5, 4), r"an nn.Embedding's inputs are indices, there is no activation to decompose"),
        (nn.MultiheadAttention(4, 2, kdim=3), r"kdim or vdim of its own"),
    ],
    ids=["groups", "dilation", "padding mode", "embedding", "kdim"],
)
def test_refusals_say_why(layer: nn.Module, reason: str) -> None:
    net = nn.ModuleDict({"layer": layer, "body": nn.Linear(4, 4), "head": nn.Linear(4, 2)})
    with pytest.raises(ValueError, match=f"'layer' cannot be adapted: .*{reason}"):
        inject(net, r=2, target_modules=["layer", "body"])
    assert not find_adapters(net)


def test_convolution_checkpoints(tmp_path: Path) -> None:
    class Fixed(Net):
        def __init__(self) -> None:
            super().__init__(conv_net(nn.Conv2d), torch.zeros(1, 3, 7, 7))

    x = images(nn.Conv2d)
    loader = DataLoader(TensorDataset(x, torch.arange(32) % 3), batch_size=16)
    callback = EVAInitCallback(rho=2, r=2, target_modules=["conv.0", "conv.2", "fc"], verbose=False)
    module, run = Fixed(), trainer(callback, max_epochs=1)
    run.fit(module, loader)
    run.save_checkpoint(tmp_path / "last.ckpt")
    loaded = load_from_checkpoint(Fixed, tmp_path / "last.ckpt")
    assert torch.equal(loaded.eval()(x), module.eval()(x))


def test_names_that_peft_cannot_tell_apart(tmp_path: Path) -> None:
    """PEFT matches "a" for "inner.a" too; a pattern of whole names in the config keeps them apart."""
    net = nn.ModuleDict({"a": nn.Linear(4, 4), "inner": nn.ModuleDict({"a": nn.Bilinear(4, 4, 4)})})
    inject(net, r=2, target_modules=["a"], head=None)
    save_pretrained(net, tmp_path)
    plain = nn.ModuleDict({"a": nn.Linear(4, 4), "inner": nn.ModuleDict({"a": nn.Bilinear(4, 4, 4)})})
    assert list(find_adapters(PeftModel.from_pretrained(plain, str(tmp_path)))) == ["a"]
    twice = nn.ModuleDict({"head": nn.Linear(4, 2), "body": nn.Linear(4, 4), "old_head": nn.Linear(4, 2)})
    inject(twice, r=2, target_modules=["body"], head="head")
    nn.init.ones_(twice["head"].weight)
    save_pretrained(twice, tmp_path)
    plain = nn.ModuleDict({"head": nn.Linear(4, 2), "body": nn.Linear(4, 4), "old_head": nn.Linear(4, 2)})
    loaded = PeftModel.from_pretrained(plain, str(tmp_path)).get_base_model()
    assert bool((loaded["head"].weight == 1).all())
    assert loaded["old_head"] is plain["old_head"]


# --- nn.MultiheadAttention --------------------------------------------------------------------------------------------


class SelfAttention(nn.Module):
    def __init__(self, batch_first: bool = True, other: bool = False) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(12, 3, batch_first=batch_first)
        self.mlp, self.head = nn.Linear(12, 12), nn.Linear(12, 3)
        self.batch_first, self.other = batch_first, other

    def forward(self, x: Tensor) -> Tensor:
        padding = x.abs().sum(-1) > 1e3  # tokens this large are padding
        x = x if self.batch_first else x.transpose(0, 1)
        y = self.attn(x, x + 1 if self.other else x, x, key_padding_mask=padding, need_weights=False)[0]
        y = y if self.batch_first else y.transpose(0, 1)
        return self.head(self.mlp(y)[:, 0])


@pytest.mark.parametrize("batch_first", [True, False])
def test_multihead_attention(batch_first: bool, tmp_path: Path) -> None:
    net, x = SelfAttention(batch_first), correlated(48 * 5).view(48, 5, 12)
    base = copy.deepcopy(net)
    keep = torch.ones(48, 5, dtype=torch.bool)
    keep[::3, 3:] = False
    x[~keep] = 1e4
    module, callback = fit(net, x, target_modules=["attn", "mlp"])
    state = callback.state
    assert state is not None
    assert list(state.ranks) == ["net.attn", "net.attn.out_proj", "net.mlp"]
    assert state.ranks["net.attn"] == state.ranks["net.attn.out_proj"] == 2  # PEFT has one rank for both
    assert_decomposes(state, "net.attn", x[keep])
    assert_decomposes(state, "net.attn.out_proj", heads_by_hand(base.attn, x, keep)[keep])
    out = module(x)
    save_pretrained(module.net, tmp_path)
    loaded = PeftModel.from_pretrained(base, str(tmp_path)).eval()
    # PEFT adds and subtracts the adapter at every step, so the base weights it trained on are rounded otherwise
    torch.testing.assert_close(loaded(x), out, rtol=1e-3, atol=1e-4)
    merge_and_unload(module)
    assert type(module.net.attn) is nn.MultiheadAttention
    assert type(module.net.attn.out_proj) is not type(loaded.base_model.model.attn)
    assert isinstance(module.net.attn.in_proj_weight, nn.Parameter)
    torch.testing.assert_close(module(x), out, rtol=1e-3, atol=1e-4)


def heads_by_hand(attention: Any, x: Tensor, keep: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(d)) v, heads side by side: what the output projection multiplies."""
    q, k, v = (x @ attention.in_proj_weight.T + attention.in_proj_bias).detach().unflatten(-1, (3, 3, 4)).unbind(2)
    scores = torch.einsum("nqhd,nkhd->nhqk", q, k) / math.sqrt(4)
    weights = scores.masked_fill(~keep[:, None, None], -torch.inf).softmax(-1)
    return torch.einsum("nhqk,nkhd->nqhd", weights, v).flatten(2)


def test_cross_attention_is_refused_and_leaves_no_trace() -> None:
    net, x = SelfAttention(other=True), correlated(32 * 5).view(32, 5, 12)
    names = [n for n, _ in net.named_parameters()]
    flags = [p.requires_grad for p in net.parameters()]
    weight = net.attn.in_proj_weight
    with pytest.raises(ValueError, match=r"layer 'net.attn' is used for cross-attention"):
        fit(net, x, target_modules=["attn"])
    assert [n for n, _ in net.named_parameters()] == names
    assert net.attn.in_proj_weight is weight
    assert [p.requires_grad for p in net.parameters()] == flags
    assert type(net.attn) is nn.MultiheadAttention
    assert not any(m._forward_pre_hooks for m in net.modules())


def test_attention_in_torchs_encoder_layer_and_checkpoint(tmp_path: Path) -> None:
    class Encoder(Net):
        def __init__(self) -> None:
            block = nn.TransformerEncoderLayer(12, 3, 16, dropout=0.0, batch_first=True)
            net = nn.Sequential(nn.TransformerEncoder(block, 2), nn.Flatten(), nn.Linear(60, 3))
            super().__init__(net, correlated(20).view(4, 5, 12))

    x = correlated(32 * 5).view(32, 5, 12)
    loader = DataLoader(TensorDataset(x, torch.arange(32) % 3), batch_size=16)
    callback = EVAInitCallback(rho=2, r=2, target_modules=["self_attn", "linear1"], verbose=False)
    module, run = Encoder(), trainer(callback, max_epochs=2)
    run.fit(module, loader)
    assert callback.state is not None
    assert len(callback.state.components) == 2 * 3
    assert float(find_adapters(module)["net.0.layers.0.self_attn"].b.detach().abs().sum()) > 0
    run.save_checkpoint(tmp_path / "last.ckpt")
    loaded = load_from_checkpoint(Encoder, tmp_path / "last.ckpt")
    assert torch.equal(loaded.eval()(x), module.eval()(x))


def test_output_projection_alone_is_refused() -> None:
    with pytest.raises(ValueError, match=r"'attn.out_proj' cannot be adapted: .* name the attention itself"):
        inject(SelfAttention(), r=2, target_modules=["out_proj"])


def test_peft_applies_the_output_projections_adapter_twice() -> None:
    """A fault of PEFT 0.21 that we keep, so that stock PEFT computes what we trained; should it go, note it."""
    net = nn.Sequential(nn.MultiheadAttention(8, 2, batch_first=True))
    x, attention = torch.randn(2, 5, 8), copy.deepcopy(net[0])
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["0"]), net)
    layer: Any = net[0].base_layer.out_proj
    nn.init.normal_(layer.lora_B["default"].weight)
    delta = layer.get_delta_weight("default").detach()
    attention.out_proj.weight.data += 2 * delta
    torch.testing.assert_close(net[0](x, x, x)[0], attention(x, x, x)[0])


# --- nn.Embedding next to linear layers -------------------------------------------------------------------------------


class Embedded(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.a, self.b = nn.Embedding(10, 12), nn.Linear(12, 16), nn.Linear(16, 12)
        self.head = nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.b(torch.relu(self.a(self.embed(x)))).mean(1))


def test_users_lora_on_an_embedding_stays_as_it_is(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    net, x = Embedded(), torch.randint(10, (32, 6))
    base = copy.deepcopy(net)
    model = get_peft_model(net, LoraConfig(r=2, target_modules=["embed", "a", "b"], modules_to_save=["head"]))
    module = Net(model, x)
    lora = model.base_model.model.embed
    before = [lora.lora_embedding_A["default"].detach().clone(), lora.lora_embedding_B["default"].detach().clone()]
    callback = EVAInitCallback(rho=2)
    trainer(callback).fit(module, DataLoader(TensorDataset(x, x[:, 0] % 3), batch_size=16, shuffle=False))
    assert callback.state is not None
    assert list(callback.state.ranks) == ["net.a", "net.b"]
    assert "left as is: 1 LoRA layers, e.g. net.embed: an nn.Embedding's inputs are indices" in caplog.text
    assert find_skipped(module).keys() == {"net.embed"}
    assert lora.r["default"] == 2
    assert not torch.equal(lora.lora_embedding_A["default"], before[0])  # trained on, not EVA's
    module.eval()
    for directory, save in ((tmp_path / "peft", model.save_pretrained), (tmp_path / "ours", None)):
        _ = save(str(directory)) if save else save_pretrained(module.net, directory)
        loaded = PeftModel.from_pretrained(copy.deepcopy(base), str(directory)).eval()
        assert torch.equal(loaded(x), module(x))
    out = module(x)
    merge_and_unload(module.net)
    torch.testing.assert_close(module(x), out, rtol=1e-4, atol=1e-5)


# --- bitsandbytes -----------------------------------------------------------------------------------------------------


def quantised(bits: int) -> nn.Sequential:
    bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    layers: list[nn.Module] = []
    for width_in, width_out in ((64, 128), (128, 64)):
        plain = nn.Linear(width_in, width_out)
        layer: Any
        if bits == 4:
            layer = bnb.nn.Linear4bit(width_in, width_out, compute_dtype=torch.float32, quant_type="nf4")
            layer.weight = bnb.nn.Params4bit(plain.weight.data, requires_grad=False, quant_type="nf4")
        else:
            layer = bnb.nn.Linear8bitLt(width_in, width_out, has_fp16_weights=False)
            layer.weight = bnb.nn.Int8Params(plain.weight.data, requires_grad=False, has_fp16_weights=False)
        layer.bias = nn.Parameter(plain.bias.data)
        layers += [layer, nn.ReLU()]
    net = nn.Sequential(*layers, nn.Linear(64, 3))
    try:
        net.to("cpu")(torch.randn(2, 64))
    except (RuntimeError, NotImplementedError, AttributeError) as error:
        pytest.skip(f"bitsandbytes has no {bits}-bit kernels for this CPU: {error}")
    return net


@contextmanager
def unpacked(net: nn.Module) -> Iterator[None]:
    """Without the packing that makes bitsandbytes' 4-bit layers untrainable after an evaluation on some CPUs."""
    flags = {m: m.support_avx512bf16_for_cpu for m in net.modules() if hasattr(m, "support_avx512bf16_for_cpu")}
    for m in flags:
        m.support_avx512bf16_for_cpu = False  # type: ignore[assignment]
    yield
    for m, flag in flags.items():
        m.support_avx512bf16_for_cpu = flag  # type: ignore[assignment]


class Quantised(Net):
    def probe(self) -> Tensor:
        with unpacked(self):
            return super().probe()


# PEFT's DoRA on 8-bit layers loses their scales on a CPU (bitsandbytes 0.50), with and without EVA
@pytest.mark.parametrize(("bits", "use_dora"), [(4, False), (4, True), (8, False)])
def test_quantised_base_layers(bits: int, use_dora: bool, tmp_path: Path) -> None:
    net, x = quantised(bits), correlated(64, dim=64)
    base = copy.deepcopy(net)
    with unpacked(net):
        seen = inputs(net, x, ["0", "2"])
    for name in seen:
        net.get_submodule(name)._forward_pre_hooks.clear()
    net.train()
    module, callback = fit(net, x, Quantised, lora={"use_dora": use_dora})
    state = callback.state
    assert state is not None
    layers = find_adapters(module)
    assert {type(layer.module).__name__ for layer in layers.values()} == {f"Linear{bits}bit{'Lt' if bits == 8 else ''}"}
    assert {type(layer.module).__module__ for layer in layers.values()} == {"peft.tuners.lora.bnb"}
    assert all(layer.a.dtype == torch.float32 for layer in layers.values())
    assert all(bool(layer.b.any()) for layer in layers.values())
    for name, tokens in seen.items():
        assert_decomposes(state, f"net.{name}", tokens)
    with unpacked(module):
        out = module(x)
        if bits == 4:
            base.is_loaded_in_4bit = True  # type: ignore[assignment]  # as transformers marks its models
            save_pretrained(module.net, tmp_path)
            with unpacked(base):
                assert torch.equal(PeftModel.from_pretrained(base, str(tmp_path)).eval()(x), out)
        merge_and_unload(module)
        assert not find_adapters(module)
        # the merged weight is quantised again
        assert F.cosine_similarity(module(x).flatten(), out.flatten(), dim=0) > 0.95
