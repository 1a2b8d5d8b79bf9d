"""Against PEFT's own EVA on the same network and minibatches, the paper's Theorem 3.2 on real digits, PEFT's faults.

The network is a small Vision Transformer pre-trained on the scanned digits 0-4; the data are digits 5-9.

Faults of PEFT 0.21's EVA, by their number in this project's notes, and the test that ours does not have them:

 1. promotes to fp64 from the second update on: ``test_streaming_stays_in_fp32``, and for the shared statistics
    ``test_svd_exact.py::test_takes_any_floating_dtype_and_keeps_an_fp32_state``
 2. whitens inputs that q, k and v share three times: ``test_shared_inputs_are_whitened_once``
 3. an all-zero-input layer receives the maximum rank: ``test_callback.py::test_layer_with_constant_input_is_removed``
 4. sign flips count as "not converged": ``test_svd_convergence.py::test_cosine_rule_ignores_signs``
 5. loops for ever when batches have fewer tokens than components:
    ``test_bad_input.py::test_batches_with_fewer_tokens_than_components_accumulate``; has no batch limit:
    ``test_stream_that_never_converges_ends``
 6. crashes on non-contiguous inputs, keyword calls, late layers: ``test_bad_input.py::test_odd_layers``; on layers
    narrower than r * rho: ``test_callback.py::test_r_times_rho_above_the_width_is_capped_and_said``
 7. an exception leaves hooks and eval mode:
    ``test_bad_input.py::test_failure_while_streaming_leaves_the_module_as_it_was``
 8. rejects (image, label) batches and loaders without ``len``: ``test_image_label_batches_of_unknown_number``
 9. layers that stop early are biased to the first minibatches:
    ``test_capture.py::test_stop_is_for_all_layers_at_once``; on a class-sorted stream: ``test_class_sorted_stream``
10. hashes inputs through Python tuples: ``test_sharing_is_found_without_python_numbers``
11. gathers raw activations over processes: ``test_messages_between_processes_do_not_grow_with_the_data``
12. has no Conv2d, Embedding or MultiheadAttention targets. Neither has ours yet; what it promises is that such adapters
    are left alone and go on training: ``test_adapters_on_other_kinds_of_layers_are_left_alone``
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from peft import EvaConfig, LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.eva import get_eva_state_dict, initialize_lora_eva_weights
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, IterableDataset

from eva_lightning import EVAInitCallback, EVAState, StreamingOptions, compute_eva_state
from eva_lightning.adapters import find_adapters, inject, save_pretrained
from eva_lightning.adapters.targets import linear_layers
from eva_lightning.svd import make_engine
from eva_lightning.vision.digits import DigitsClassifier, load_digits_split, small_vit
from tests.modules import HIDDEN, IN, Classifier, TokenNet, dataset, loader, trainer

Batch = tuple[Tensor, Tensor]
NEW_DIGITS = load_digits_split(range(5, 10)).train.tensors


@pytest.fixture(scope="module")
def pretrained() -> nn.Module:
    """A ViT that knows digits 0-4, with a fresh head for five others."""
    torch.manual_seed(0)
    net = small_vit(width=48, depth=3)
    images, labels = load_digits_split(range(5)).train.tensors
    optimizer = torch.optim.AdamW(net.parameters(), 2e-3)
    for _ in range(10):
        for i in torch.randperm(len(images)).split(64):
            optimizer.zero_grad()
            F.cross_entropy(net(images[i]), labels[i]).backward()
            optimizer.step()
    net.eval()
    with torch.no_grad():
        assert (net(images).argmax(1) == labels).float().mean() > 0.95
    net.head.reset_parameters()
    return net


def minibatches(seed: int, size: int = 32) -> list[Batch]:
    order = torch.randperm(len(NEW_DIGITS[0]), generator=torch.Generator().manual_seed(seed))
    return [(NEW_DIGITS[0][i], NEW_DIGITS[1][i]) for i in order.split(size)]


def targets(net: nn.Module) -> dict[str, nn.Module]:
    return {n: m for n, m in linear_layers(net).items() if n != "head"}


def covariances(net: nn.Module, batches: list[Batch]) -> dict[str, Tensor]:
    """Covariance of every target's inputs in fp64, of all tokens at once."""
    seen: dict[str, list[Tensor]] = {n: [] for n in targets(net)}
    hooks = [
        m.register_forward_pre_hook(lambda _, args, n=n: seen[n].append(args[0].flatten(0, -2).double()))
        for n, m in targets(net).items()
    ]
    with torch.no_grad():
        for images, _ in batches:
            net(images)
    for hook in hooks:
        hook.remove()
    return {n: torch.cat(tokens).T.cov(correction=0) for n, tokens in seen.items()}


def captured(v: Tensor, c: Tensor) -> float:
    """tr(V C V^T) over the optimum for as many directions: 1 is the exact SVD."""
    v = v.double()
    return float(torch.trace(v @ c @ v.T) / torch.linalg.eigvalsh(c)[-len(v) :].sum())


def peft_config(net: nn.Module, r: int, rho: float) -> LoraConfig:
    eva = EvaConfig(rho=rho, tau=0.99)
    return LoraConfig(r=r, lora_alpha=1, target_modules=list(targets(net)), init_lora_weights="eva", eva_config=eva)


def peft_eva(net: nn.Module, batches: list[Batch], r: int, rho: float) -> tuple[dict[str, Tensor], int]:
    """PEFT's A for every layer, and how many minibatches it streamed (it starts over at the end of the data)."""
    calls = []

    def forward(model: nn.Module, batch: Batch) -> None:
        calls.append(1)
        model(batch[0])

    found = get_eva_state_dict(
        net,
        batches,
        peft_config(net, r, rho),
        forward_fn=forward,
        prepare_model_inputs_fn=None,
        prepare_layer_inputs_fn=None,
        show_progress_bar=False,
    )
    return found, len(calls) - 1  # the first call only compares inputs


def our_eva(net: nn.Module, batches: list[Batch], r: int, rho: float) -> EVAState:
    """Ours through the callback, on all these minibatches."""
    callback = EVAInitCallback(
        rho=rho, r=r, streaming=StreamingOptions(tau=1.0, max_batches=len(batches)), verbose=False
    )
    module = DigitsClassifier(copy.deepcopy(net))
    trainer(callback, max_epochs=0).fit(module, DataLoader(batches, batch_size=None))
    assert callback.state is not None
    assert callback.state.n_batches == len(batches)
    return callback.state


# --- the same network, the same minibatches ---------------------------------------------------------------------------


@pytest.mark.parametrize(("r", "rho"), [(4, 1.0), (4, 2.0), (8, 2.0)])
def test_captured_variance_and_rank_totals(pretrained: nn.Module, r: int, rho: float) -> None:
    """On the tokens both saw ours captures at least as much in every layer. On minibatches neither saw, sampling noise
    can favour either in a single layer and split; averaged over splits ours is at least as good in the layer that is
    worst and in the median layer."""
    unseen: list[list[tuple[float, float]]] = []
    for seed in range(4):
        train, held_out = minibatches(seed)[:9], minibatches(seed)[9:]
        theirs, n = peft_eva(pretrained, train, r, rho)
        streamed = list(itertools.islice(itertools.cycle(train), n))
        state = our_eva(pretrained, streamed, r, rho)
        assert sum(state.ranks.values()) == sum(len(v) for v in theirs.values()) == r * len(theirs)
        same, other = covariances(pretrained, streamed), covariances(pretrained, held_out)
        split = []
        for name, v in theirs.items():
            # PEFT's rank for both: the share of the optimum depends on the number of directions
            a = state.components[f"model.{name}"][: len(v)]
            assert captured(a, same[name]) >= max(0.9999, captured(v, same[name]) - 1e-6), name
            split.append((captured(a, other[name]), captured(v, other[name])))
        unseen.append(split)
    ours, peft = torch.tensor(unseen).mean(0).unbind(1)
    assert ours.min() >= peft.min() - 1e-6
    assert ours.median() >= peft.median() - 1e-6


def test_class_sorted_stream(pretrained: nn.Module) -> None:
    """Fault 9: PEFT stops layers one by one, and the first are left with the first classes. In ours no layer stops
    before the others: with ``tau=1`` every layer has the optimum of the whole stream. (A rule that looks at the past
    only, ``tau`` < 1, may still end the stream for all of them before the classes change: shuffle.)"""
    order = NEW_DIGITS[1].argsort()
    batches = [(NEW_DIGITS[0][i], NEW_DIGITS[1][i]) for i in order.split(32)]
    whole = covariances(pretrained, batches)
    state = our_eva(pretrained, batches, r=4, rho=1.0)
    assert len(set(state.n_samples.values())) == 1
    for name, c in whole.items():
        assert captured(state.components[f"model.{name}"], c) > 0.9999, name


def test_peft_initialises_from_our_decomposition_alike(pretrained: nn.Module) -> None:
    """Same directions in; same ranks, A, scaling and outputs out: in all but the decomposition ours is PEFT's EVA."""
    batches = DataLoader(minibatches(0), batch_size=None)
    module = DigitsClassifier(copy.deepcopy(pretrained))
    callback = EVAInitCallback(rho=2, r=4, streaming=StreamingOptions(tau=1.0, max_batches=4), verbose=False)
    trainer(callback, max_epochs=0).fit(module, batches)
    state = callback.state
    assert state is not None
    net = get_peft_model(copy.deepcopy(pretrained), peft_config(pretrained, 4, 2.0))
    given = {
        f"base_model.model.{n.removeprefix('model.')}": state.components[n][:rank].clone()
        for n, rank in state.ranks.items()
    }
    initialize_lora_eva_weights(net, eva_state_dict=given)
    ours, theirs = find_adapters(module.model), find_adapters(net)
    assert list(ours) == list(theirs)
    assert len({x.rank for x in ours.values()}) > 1
    with torch.no_grad():
        for name, layer in ours.items():
            assert torch.equal(layer.a, theirs[name].a)
            assert layer.module.scaling == pytest.approx(theirs[name].module.scaling)
            theirs[name].b.copy_(layer.b.normal_())
    images = NEW_DIGITS[0][:64]
    torch.testing.assert_close(module.eval()(images), net.eval()(images))


@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"use_rslora": True, "bias": "all"}], ids=str)
def test_trained_adapters_load_in_stock_peft(pretrained: nn.Module, options: dict[str, Any], tmp_path: Path) -> None:
    module = DigitsClassifier(copy.deepcopy(pretrained), learning_rate=1e-2)
    # a small budget: some layers lose their adapter, which PEFT has to be told
    callback = EVAInitCallback(rho=4, r=1, streaming=StreamingOptions(max_batches=4), lora=options, verbose=False)
    trainer(callback, max_epochs=2).fit(module, DataLoader(list(zip(*NEW_DIGITS, strict=True)), 64))
    assert callback.state is not None
    assert 0 in callback.state.ranks.values()
    assert max(callback.state.ranks.values()) > 1
    module.eval()
    images = NEW_DIGITS[0][:64]
    assert not torch.allclose(module(images), pretrained(images), atol=0.1)
    save_pretrained(module.model, tmp_path)
    loaded = PeftModel.from_pretrained(copy.deepcopy(pretrained), str(tmp_path)).eval()
    assert torch.equal(loaded(images), module(images))


# --- Theorem 3.2 ------------------------------------------------------------------------------------------------------


def squared_gradient_norms(net: nn.Module, a: dict[str, Tensor], batches: list[Batch]) -> dict[str, float]:
    """Mean over minibatches of the squared gradient norm of every layer's B = 0, with these A."""
    layers = find_adapters(net)
    for name, layer in layers.items():
        layer.write(a[name])
    total = dict.fromkeys(layers, 0.0)
    for images, labels in batches:
        net.zero_grad()
        F.cross_entropy(net(images), labels).backward()
        for name, layer in layers.items():
            assert layer.b.grad is not None
            total[name] += float(layer.b.grad.square().sum()) / len(batches)
    return total


def test_theorem_3_2_squared_gradient_norm_of_b(pretrained: nn.Module) -> None:
    """EVA's A gives B the larger expected squared gradient norm than a random orthonormal A of the same rank.

    The theorem assumes inputs and output gradients independent, which they are not in a trained network, so on real
    data it is a claim that may fail. It is put to the test in every layer, on minibatches EVA did not see: the mean
    over minibatches under EVA's A exceeds that under each of 10 random A. Were EVA's A no better than a random one,
    this would happen in one layer with probability 1/11. The directions of least variance fail the same test in every
    layer, so it can tell the difference.
    """
    r, draws = 4, 10
    seen, other = minibatches(0)[:7], minibatches(0)[7:]
    net = copy.deepcopy(pretrained)
    inject(net, r=r)
    layers = {n: x.base for n, x in find_adapters(net).items()}
    a = {}
    for kind in ("eva", "minor"):
        settings = StreamingOptions(tau=1.0)
        a[kind] = compute_eva_state(net, lambda: seen, layers, r, settings, minor=kind == "minor").components
    norms = {kind: squared_gradient_norms(net, a[kind], other) for kind in a}
    random = [
        squared_gradient_norms(net, {n: nn.init.orthogonal_(torch.empty_like(v)) for n, v in a["eva"].items()}, other)
        for _ in range(draws)
    ]
    assert len(layers) == 12
    for name in layers:
        assert norms["eva"][name] > max(draw[name] for draw in random), name
        assert norms["minor"][name] < min(draw[name] for draw in random), name


# --- faults of PEFT's EVA that ours must not have ---------------------------------------------------------------------


@pytest.mark.parametrize("name", ["exact", "incremental"])
def test_streaming_stays_in_fp32(name: str) -> None:
    """Fault 1: every state of more than a vector stays fp32, update after update."""
    engine = make_engine(name, 40, 8)
    for x in torch.randn(5, 60, 40, dtype=torch.float64):
        engine.update(x)
        matrices = [t for t in tensors_in(vars(engine)) if t.dim() == 2]
        assert matrices
        assert {t.dtype for t in matrices} == {torch.float32}
        assert engine.result().components.dtype is torch.float32


def tensors_in(obj: Any) -> Iterator[Tensor]:
    if isinstance(obj, Tensor):
        yield obj
    elif isinstance(obj, dict):
        for value in obj.values():
            yield from tensors_in(value)
    elif isinstance(obj, (list, tuple)):
        for value in obj:
            yield from tensors_in(value)
    elif hasattr(obj, "__dict__"):
        yield from tensors_in(vars(obj))


def test_shared_inputs_are_whitened_once() -> None:
    """Fault 2: q, k and v share one decomposition; each gets v_j / sqrt(ratio_j), and the decomposition stays."""
    module = Classifier(TokenNet())
    callback = EVAInitCallback(rho=1, r=4, init="whiten", verbose=False)
    trainer(callback, max_epochs=0).fit(module, loader(tokens=5))
    state = callback.state
    assert state is not None
    assert set(state.shared_with) == {"net.attention.k", "net.attention.v"}
    for name in ("q", "k", "v"):
        name = f"net.attention.{name}"
        v, ratio = state.components[name][:4], state.explained_variance_ratio[name][:4]
        torch.testing.assert_close(v @ v.T, torch.eye(4), atol=1e-4, rtol=0)
        torch.testing.assert_close(find_adapters(module)[name].a.data, v / ratio.sqrt()[:, None])


class Endless(IterableDataset[Any]):
    """(image, label) pairs of no known number whose principal directions turn for ever."""

    def __iter__(self) -> Iterator[Any]:
        generator = torch.Generator().manual_seed(0)
        for step in itertools.count():
            scale = torch.ones(IN).roll(step // 16) * (1 + 0.3 * step)
            scale[step // 16 % IN] *= 10
            yield torch.randn(IN, generator=generator) * scale, 0


@pytest.mark.parametrize("engine", ["exact", "incremental"])
def test_stream_that_never_converges_ends(engine: str) -> None:
    """Fault 5, second half: at ``max_batches``, whatever the data do."""
    callback = EVAInitCallback(
        rho=2, r=4, streaming=StreamingOptions(tau=1.0, max_batches=6, engine=engine), verbose=False
    )
    trainer(callback, max_steps=1, max_epochs=-1).fit(Classifier(), DataLoader(Endless(), 16))
    assert callback.state is not None
    assert callback.state.n_batches == 6
    assert not any(callback.state.converged.values())


def test_image_label_batches_of_unknown_number(pretrained: nn.Module) -> None:
    """Fault 8: labels are not fed to the network, and nobody asks for ``len``."""

    class Pairs(IterableDataset[Any]):
        def __iter__(self) -> Iterator[Any]:
            return iter(zip(*NEW_DIGITS, strict=True))

    data = DataLoader(Pairs(), 32)
    with pytest.raises(TypeError):
        len(data)
    callback = EVAInitCallback(rho=2, r=4, streaming=StreamingOptions(tau=1.0, max_batches=3), verbose=False)
    trainer(callback, max_steps=1, max_epochs=-1).fit(Classifier(copy.deepcopy(pretrained)), data)
    assert callback.state is not None
    assert callback.state.n_samples["net.blocks.0.attn.qkv"] == 3 * 32 * 17


def test_sharing_is_found_without_python_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fault 10: no activation is turned into Python numbers on the way to finding that q, k and v share."""
    largest = 0
    tolist = Tensor.tolist

    def counting(self: Tensor) -> Any:
        nonlocal largest
        largest = max(largest, self.numel())
        return tolist(self)

    monkeypatch.setattr(Tensor, "tolist", counting)
    net = TokenNet()
    x = torch.randn(64, 10, IN)
    layers = linear_layers(net)
    state = compute_eva_state(net, lambda: iter(x.split(32)), layers, 4, StreamingOptions(tau=1.0))
    assert state.shared_with == {"attention.k": "attention.q", "attention.v": "attention.q"}
    assert largest <= HIDDEN


@pytest.mark.distributed
@pytest.mark.parametrize("name", ["exact", "incremental"])
def test_messages_between_processes_do_not_grow_with_the_data(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fault 11: what is exchanged is statistics, as large for 10,000 tokens as for 100."""
    sent: list[int] = []

    def counted(operation: Any, position: int) -> Any:
        def run(*args: Any, **kwargs: Any) -> Any:
            sent.append(args[position].numel())
            return operation(*args, **kwargs)

        return run

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        for operation, position in (("all_reduce", 0), ("broadcast", 0), ("all_gather", 1)):
            monkeypatch.setattr(dist, operation, counted(getattr(dist, operation), position))
        volumes = []
        for tokens in (100, 10_000):
            sent.clear()
            engine = make_engine(name, 40, 8)
            for x in torch.randn(tokens, 40).split(500):
                engine.update(x)
            engine.all_reduce()
            volumes.append(sum(sent))
    finally:
        dist.destroy_process_group()
    assert volumes[0] == volumes[1] > 0
    assert volumes[0] < 2 * 40 * 40


def test_adapters_on_other_kinds_of_layers_are_left_alone() -> None:
    """Fault 12: LoRA on an embedding and a convolution that PEFT's A does not fit, beside LoRA on linear layers: EVA
    takes the linear ones, the others keep their adapter and train with them."""

    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.kind = nn.Embedding(3, IN)
            self.conv = nn.Conv1d(1, 2, 3, padding=1, padding_mode="circular")
            self.linear, self.other = nn.Linear(2 * IN, HIDDEN), nn.Linear(HIDDEN, HIDDEN)
            self.head = nn.Linear(HIDDEN, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = x + self.kind(x[:, 0].sign().long() + 1)
            x = self.conv(x[:, None]).flatten(1)
            return self.head(self.other(self.linear(x).relu()).relu())

    config = LoraConfig(r=4, target_modules=["kind", "conv", "linear", "other"], modules_to_save=["head"])
    module = Classifier(get_peft_model(Mixed(), config))
    net = module.net.base_model.model
    x = dataset(16).tensors[0]
    before, conv_a = module(x), net.conv.lora_A["default"].weight.clone()
    callback = EVAInitCallback(rho=2, streaming=StreamingOptions(tau=1.0), verbose=False)
    trainer(callback, max_epochs=0).fit(module, loader())
    assert callback.state is not None
    assert set(callback.state.ranks) == {"net.linear", "net.other"}
    assert sum(callback.state.ranks.values()) == 8
    assert torch.equal(module(x), before)
    assert torch.equal(net.conv.lora_A["default"].weight, conv_a)
    trainer(callback, max_epochs=1).fit(module, loader())
    assert net.conv.lora_B["default"].weight.any()
    assert net.kind.lora_embedding_A["default"].any()
