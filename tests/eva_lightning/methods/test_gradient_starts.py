"""LoRA-GA, LoRA-One, LoRA-DA and GoRA against their formulas, computed densely in float64 from single samples."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from eva_lightning.adapters import find_adapters, merge_and_unload, save_pretrained
from eva_lightning.adapters.base_weight_init import INITIALISATIONS
from eva_lightning.errors import InputError
from eva_lightning.methods import METHODS, data_driven
from eva_lightning.methods.apply import AdapterOptions, apply_method
from eva_lightning.methods.starts import KINDS
from tests.eva_lightning.methods.three_layers import ThreeLayers
from tests.modules import Classifier, dataset, trainer

MOVING = tuple(name for name, method in METHODS.items() if method.moves_function)
SAMPLES = 32
RANK = 3
ALPHA = 2.0
ROOT = math.sqrt(RANK)


NAMES = ("net.first", "net.second", "net.third")


def build(lr: float = 0.0) -> Classifier:
    torch.manual_seed(0)
    return Classifier(ThreeLayers(), lr=lr)


def data(batch_size: int = 8) -> DataLoader[Any]:
    return DataLoader(dataset(SAMPLES, tokens=4), batch_size)


def started(kind: str, module: Classifier | None = None, loader: Any = None, **options: Any) -> tuple[Any, pl.Trainer]:
    module = build() if module is None else module
    run: dict[str, Any] = {"max_steps": 1}
    run |= {key: options.pop(key) for key in ("precision", "accumulate_grad_batches", "max_steps") if key in options}
    chosen = AdapterOptions(**{"rank": RANK, "alpha": ALPHA, "bias": "none", "max_batches": 4, **options})
    fit = trainer(*apply_method(kind, module, chosen, head="net.head"), **run)
    fit.fit(module, data() if loader is None else loader)
    return module, fit


@pytest.fixture(scope="module")
def dense() -> dict[str, dict[str, np.ndarray[Any, Any]]]:
    """W, G, mean x x^T and mean squared output gradients of each layer, from one sample at a time in float64."""
    module = build().double()
    seen: dict[str, dict[str, Tensor]] = {name: {} for name in NAMES}
    for name in NAMES:
        module.get_submodule(name).register_forward_hook(
            lambda _, args, output, name=name: seen[name].update(x=args[0].detach()[0], y=output)
        )
    weights: list[Any] = [module.get_submodule(name).weight for name in NAMES]
    sums: dict[str, dict[str, Any]] = {name: {"g": 0, "z": 0, "y": 0} for name in NAMES}
    x, labels = dataset(SAMPLES, tokens=4).tensors
    for i in range(SAMPLES):
        loss = nn.functional.cross_entropy(module.net(x[i : i + 1].double()), labels[i : i + 1])
        found = torch.autograd.grad(loss, [*weights, *(seen[name]["y"] for name in NAMES)])
        for k, name in enumerate(NAMES):
            tokens = seen[name]["x"]
            sums[name]["g"] += found[k] / SAMPLES
            sums[name]["z"] += tokens.T @ tokens / (SAMPLES * len(tokens))
            sums[name]["y"] += found[len(NAMES) + k][0].square().mean(0) / SAMPLES
    return {
        name: {"w": w.detach().numpy(), **{key: value.numpy() for key, value in sums[name].items()}}
        for name, w in zip(NAMES, weights, strict=True)
    }


def check(found: Tensor, expected: np.ndarray[Any, Any], tolerance: float = 1e-3) -> None:
    gap = np.abs(found.detach().double().numpy() - expected).max() / np.abs(expected).max()
    assert gap < tolerance, gap


def test_every_entry_has_layers_and_a_method() -> None:
    assert set(KINDS) == {name for name, start in INITIALISATIONS.items() if start.from_data}
    assert set(MOVING) == {name for name, start in INITIALISATIONS.items() if start.product == "added"}
    for name, start in INITIALISATIONS.items():
        if name in METHODS:
            assert METHODS[name].changes_base == (start.product == "taken"), name
            assert METHODS[name].moves_function == (start.product == "added"), name


# --- formulas ---------------------------------------------------------------------------------------------------------


def test_lora_ga_scales_both_factors_and_leaves_the_singular_values_out(dense: Any) -> None:
    module, _ = started("lora-ga")
    for name, layer in find_adapters(module).items():
        u, _, vt = np.linalg.svd(dense[name]["g"])
        scale = len(u) ** 0.25 / 4
        a, b = layer.a.detach().double().numpy(), layer.b.detach().double().numpy()
        signs_a = np.sign((a * vt[:RANK]).sum(1, keepdims=True))
        signs_b = np.sign((b * u[:, RANK : 2 * RANK]).sum(0))
        check(layer.a, signs_a * vt[:RANK] * scale)
        check(layer.b, u[:, RANK : 2 * RANK] * signs_b * scale)
        check(layer.base.weight, dense[name]["w"] - ALPHA / ROOT * b @ a, 1e-5)  # type: ignore[arg-type]
        assert layer.module.scaling[layer.adapter] == pytest.approx(ALPHA / ROOT), "rsLoRA's, as in the authors' runs"


def test_pefts_lora_ga_differs_by_the_singular_values(dense: Any) -> None:
    ours, theirs = started("lora-ga")[0], started("lora-ga-peft")[0]
    for name, layer in find_adapters(ours).items():
        peft = find_adapters(theirs)[name]
        s = np.linalg.svd(dense[name]["g"], compute_uv=False)[RANK : 2 * RANK]
        ratios = (peft.b.norm(dim=0) / layer.b.norm(dim=0)).detach().numpy()
        np.testing.assert_allclose(ratios, s, rtol=2e-2)
        np.testing.assert_allclose(peft.a.norm(dim=1).detach().numpy(), 1, rtol=1e-4)
        assert peft.module.scaling[peft.adapter] == pytest.approx(ALPHA / RANK)


def test_lora_one_is_the_best_step_of_its_rank(dense: Any) -> None:
    module, _ = started("lora-one")
    for name, layer in find_adapters(module).items():
        u, s, vt = np.linalg.svd(-dense[name]["g"])
        check(layer.b @ layer.a, (u[:, :RANK] * s[:RANK]) @ vt[:RANK] / s[0] / 128)
        check(layer.a @ layer.a.T, np.diag(s[:RANK]) / s[0] / 128)
        check(layer.b.T @ layer.b, np.diag(s[:RANK]) / s[0] / 128)
        assert layer.module.scaling[layer.adapter] == pytest.approx(ALPHA / ROOT)


@pytest.mark.parametrize("batch_size", [8, 4, 1])
def test_lora_da_solves_its_problem_whatever_the_minibatches(dense: Any, batch_size: int) -> None:
    module, _ = started("lora-da", loader=data(batch_size), max_batches=SAMPLES // batch_size)
    for name, layer in find_adapters(module).items():
        g, z, y = dense[name]["g"], dense[name]["z"], dense[name]["y"]
        z_inverse, y_inverse = np.linalg.inv(z + 1e-6 * np.eye(len(z))), 1 / (y + 1e-6)
        d = -z_inverse @ g.T @ np.diag(y_inverse)
        sigma = np.linalg.svd(d, compute_uv=False)[0]
        d = d / sigma
        omega = -d @ d.T + 0.03 * y_inverse.sum() / (SAMPLES * sigma**2) * z_inverse
        values, vectors = np.linalg.eigh(omega)
        assert values[RANK] - values[RANK - 1] > 1e-6, "the directions are those of a subspace apart"
        q = vectors[:, :RANK]
        check(layer.a.T @ layer.a, q @ q.T / 1024, 1e-2)
        check(layer.b @ layer.a, (q.T @ d).T @ q.T / 1024, 1e-2)
        assert layer.module.scaling[layer.adapter] == pytest.approx(ALPHA / ROOT)


def gora_ranks(dense: Any, reference: int) -> dict[str, int]:
    importance = {name: np.abs(v["w"] * v["g"]).mean() for name, v in dense.items()}
    features = {name: math.sqrt(sum(v["w"].shape)) for name, v in dense.items()}
    budget = reference * sum(features.values())
    total = sum(importance.values())
    found = {name: int(round(budget * importance[name] / total) // features[name]) for name in dense}
    low, high = max(1, reference // 2), 4 * reference
    return {name: min(max(rank, low), high, *dense[name]["w"].shape) for name, rank in found.items()}


@pytest.mark.parametrize("reference", [1, 3, 8])
def test_gora_gives_rank_by_importance(dense: Any, reference: int) -> None:
    expected = gora_ranks(dense, reference)
    module, _ = started("gora", rank=reference)
    layers = find_adapters(module)
    assert {name: layer.rank for name, layer in layers.items()} == expected
    assert reference == 1 or len(set(expected.values())) > 1
    for layer in layers.values():
        assert layer.module.scaling[layer.adapter] == pytest.approx(ALPHA / math.sqrt(reference))
        assert layer.a.shape[0] == layer.b.shape[1] == layer.rank


def test_gora_starts_with_a_gradient_step_within_the_rows_of_a(dense: Any) -> None:
    module, _ = started("gora")
    for name, layer in find_adapters(module).items():
        g, a = dense[name]["g"], layer.a.detach().double().numpy()
        rank, inputs = a.shape
        scaling = layer.module.scaling[layer.adapter]
        pseudo_inverse = a.T @ np.linalg.inv(a @ a.T + 1e-8 * np.eye(rank))
        gamma = 0.05 / math.sqrt(rank / inputs) * ROOT
        check(layer.b, -(gamma / ALPHA) * g @ pseudo_inverse)
        check(scaling * layer.b @ layer.a, -0.05 * math.sqrt(inputs / rank) * g @ pseudo_inverse @ a)
        assert np.abs(a).max() <= 1 / math.sqrt(inputs) + 1e-6, "Kaiming-uniform, as LoRA's A"
        assert np.abs(a).max() > 0.8 / math.sqrt(inputs)


def test_gora_draws_another_a_for_every_layer_and_seed() -> None:
    def rows(seed: int) -> dict[str, Tensor]:
        return {name: layer.a.detach()[0] for name, layer in find_adapters(started("gora", seed=seed)[0]).items()}

    one, same, other = rows(0), rows(0), rows(1)
    for name in NAMES:
        assert torch.equal(one[name], same[name])
        assert not torch.equal(one[name], other[name])
    assert not torch.equal(one["net.second"], one["net.third"])


def test_transposed_weights_start_alike(dense: Any) -> None:
    conv1d = pytest.importorskip("transformers.pytorch_utils").Conv1D

    def transposed() -> Classifier:
        module = build()
        for name in ("first", "second", "third"):
            plain = module.net.get_submodule(name)
            layer = conv1d(*plain.weight.shape)
            layer.weight.data, layer.bias.data = plain.weight.data.T.contiguous(), plain.bias.data
            setattr(module.net, name, layer)
        return module

    for kind in ("lora-ga", *MOVING):
        plain, other = started(kind)[0], started(kind, transposed())[0]
        for name, layer in find_adapters(plain).items():
            twin = find_adapters(other)[name]
            assert twin.rank == layer.rank
            check(twin.b @ twin.a, (layer.b @ layer.a).detach().double().numpy(), 1e-2)
            check(twin.base.weight.T, layer.base.weight.detach().double().numpy(), 1e-4)


# --- what happens to the function -------------------------------------------------------------------------------------


def outputs(module: Any) -> Tensor:
    module.eval()
    with torch.no_grad():
        return module(dataset(8, tokens=4, seed=3).tensors[0])


@pytest.mark.parametrize("kind", MOVING)
def test_the_function_moves_down_the_loss_and_base_weights_stay(kind: str) -> None:
    before = build()
    module, _ = started(kind)
    assert not torch.allclose(outputs(module), outputs(before), atol=1e-4)
    for name in NAMES:
        assert torch.equal(find_adapters(module)[name].base.weight, before.get_submodule(name).weight)  # type: ignore[arg-type]
        assert not any("initial_lora" in key for key in module.state_dict())
    x, y = dataset(SAMPLES, tokens=4).tensors
    with torch.no_grad():
        loss_before, loss_after = (nn.functional.cross_entropy(m(x), y) for m in (before, module))
    assert loss_after < loss_before


@pytest.mark.parametrize("kind", ["lora-ga", *MOVING])
def test_the_function_stays_on_request(kind: str) -> None:
    before = build()
    module, _ = started(kind, keep_function=True)
    torch.testing.assert_close(outputs(module), outputs(before), rtol=1e-4, atol=1e-5)
    for name, layer in find_adapters(module).items():
        assert layer.b.any()
        assert not torch.equal(layer.base.weight, before.get_submodule(name).weight)  # type: ignore[arg-type]


@pytest.mark.parametrize(("keep", "sentence"), [(False, "the function has moved"), (True, "the function is as before")])
def test_the_summary_says_so(keep: bool, sentence: str, monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[str] = []
    monkeypatch.setattr(data_driven, "say", lines.append)
    started("gora", keep_function=keep)
    (said,) = lines
    assert "GoRA: 3 adapters started from 4 minibatches" in said
    assert "; ranks " in said
    assert sentence in said


# --- a life of it -----------------------------------------------------------------------------------------------------


def prepared(kind: str, keep: bool) -> tuple[Classifier, list[pl.Callback]]:
    module = build(lr=0.01)
    options = AdapterOptions(rank=RANK, alpha=ALPHA, bias="none", keep_function=keep)
    return module, apply_method(kind, module, options, head="net.head")


@pytest.mark.parametrize("keep", [False, True], ids=["moves", "keeps"])
@pytest.mark.parametrize("kind", MOVING)
def test_resumes_bit_exactly_merges_and_exports(kind: str, keep: bool, tmp_path: Path) -> None:
    from peft import PeftModel

    whole, callbacks = prepared(kind, keep)
    trainer(*callbacks, max_epochs=2).fit(whole, data())
    half, callbacks = prepared(kind, keep)
    run = trainer(*callbacks, max_epochs=1)
    run.fit(half, data())
    run.save_checkpoint(tmp_path / "half.ckpt")
    resumed, callbacks = prepared(kind, keep)
    trainer(*callbacks, max_epochs=2).fit(resumed, data(), ckpt_path=tmp_path / "half.ckpt", weights_only=False)
    for name, value in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value), name

    expected = outputs(whole)
    save_pretrained(whole.net, tmp_path / "adapter", example=dataset(4, tokens=4).tensors[0])
    stock = PeftModel.from_pretrained(build().net, str(tmp_path / "adapter")).eval()
    with torch.no_grad():
        found = stock(dataset(8, tokens=4, seed=3).tensors[0])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(outputs(merge_and_unload(whole)), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", MOVING)
def test_bf16_mixed_and_accumulation_start_alike(kind: str) -> None:
    plain = started(kind)[0]
    other = started(kind, precision="bf16-mixed", accumulate_grad_batches=2, max_steps=2)[0]
    for name, layer in find_adapters(plain).items():
        twin = find_adapters(other)[name]
        assert twin.rank == layer.rank
        product, reference = ((x.b @ x.a).flatten() for x in (twin, layer))
        assert torch.cosine_similarity(product, reference, dim=0) > 0.9


def test_lora_da_copes_with_fewer_tokens_than_inputs() -> None:
    module = build()
    x = 1e3 * dataset(2, tokens=4).tensors[0]
    loader = DataLoader(torch.utils.data.TensorDataset(x, torch.tensor([0, 1])), 2)
    started("lora-da", module, loader)
    for layer in find_adapters(module).values():
        assert torch.isfinite(layer.a).all()
        assert torch.isfinite(layer.b).all()
        assert layer.b.any()


def test_lora_da_needs_the_size_of_the_training_set() -> None:
    class Endless(torch.utils.data.IterableDataset[Any]):
        def __iter__(self) -> Any:
            x, y = dataset(SAMPLES, tokens=4).tensors
            return iter(zip(x, y, strict=True))

    with pytest.raises(InputError, match="the size of the training set is needed, but Endless has no length"):
        started("lora-da", loader=DataLoader(Endless(), 8))


def test_quantised_weights_have_no_gradient() -> None:
    module = build()
    layer: Any = module.net.second
    layer.weight = nn.Parameter(layer.weight.detach().to(torch.int8), requires_grad=False)
    with pytest.raises(InputError, match=r"gora starts from the gradient of .* 'net.second' is quantised"):
        apply_method("gora", module, AdapterOptions(rank=RANK), head="net.head")
