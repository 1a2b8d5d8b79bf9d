"""``algorithm="paper"``: against Algorithm 1 written anew with scikit-learn's IncrementalPCA, and against PEFT."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from peft import EvaConfig, LoraConfig
from peft.tuners.lora import eva as peft_module
from sklearn.decomposition import IncrementalPCA
from torch import Tensor, nn
from torch.utils.data import DataLoader

from eva_lightning import EVAInitCallback, EVAState, StreamingOptions, compute_eva_state, precompute
from eva_lightning.adapters.targets import linear_layers
from eva_lightning.errors import EVAWarning, InputError
from eva_lightning.selection import Selection
from eva_lightning.streaming import started_over
from eva_lightning.vision.digits import load_digits_split, small_vit
from tests.modules import IN, Classifier, TokenNet, build, correlated, dataset, loader, trainer
from tests.svd_helpers import captured_variance

Batch = tuple[Tensor, Tensor]


def state_by(callback: EVAInitCallback, module: Classifier, data: Any) -> EVAState:
    trainer(callback, max_epochs=0).fit(module, data)
    assert callback.state is not None
    return callback.state


# --- Algorithm 1, written anew ----------------------------------------------------------------------------------------


def inputs_of(net: nn.Module, batches: Sequence[Batch]) -> dict[str, list[np.ndarray]]:
    """Layer -> its inputs, minibatch by minibatch, of all layers but the last."""
    layers = {n: m for n, m in net.named_modules() if isinstance(m, nn.Linear)}
    layers.popitem()
    seen: dict[str, list[np.ndarray]] = {n: [] for n in layers}
    hooks = [
        m.register_forward_pre_hook(lambda _, args, n=n: seen[n].append(args[0].flatten(0, -2).double().numpy()))
        for n, m in layers.items()
    ]
    with torch.no_grad():
        for x, _ in batches:
            net.eval()(x)
    for hook in hooks:
        hook.remove()
    return seen


def algorithm_1(
    inputs: dict[str, list[np.ndarray]], r: int, rho: float, tau: float, delta: float, cap: int, metric: str = "ratio"
) -> tuple[int, dict[str, int], dict[str, np.ndarray], int]:
    """Minibatches, ranks, components and how many of the selected had converged, in fp64 by scikit-learn."""
    k = round(r * rho)
    pca = {n: IncrementalPCA(k) for n in inputs}
    similar = {n: np.zeros(k, dtype=bool) for n in inputs}
    ranks = dict.fromkeys(inputs, k)
    for t in range(cap):
        for n, batches in inputs.items():
            if t and similar[n][: ranks[n]].all():
                continue
            before = getattr(pca[n], "components_", None)
            pca[n].partial_fit(batches[t % len(batches)])
            if before is not None:
                similar[n] = np.abs((before * pca[n].components_).sum(1)) >= tau
        score = {n: p.explained_variance_ratio_ if metric == "ratio" else p.explained_variance_ for n, p in pca.items()}
        order = sorted(((s, n) for n in inputs for s in score[n]), key=lambda pair: -pair[0])[: r * len(inputs)]
        ranks = {n: sum(name == n for _, name in order) for n in inputs}
        passed = sum(int(similar[n][: ranks[n]].sum()) for n in inputs)
        if passed >= delta * r * len(inputs):
            break
    return t + 1, ranks, {n: p.components_ for n, p in pca.items()}, passed


@pytest.mark.parametrize(
    ("r", "rho", "tau", "delta", "n", "metric"),
    [
        (4, 1.0, 0.99, 1.0, 6, "ratio"),
        (4, 2.0, 0.99, 1.0, 6, "ratio"),
        (4, 2.0, 0.999, 1.0, 3, "ratio"),
        (4, 2.0, 0.999, 0.8, 3, "ratio"),
        (4, 2.0, 0.9999, 0.5, 6, "ratio"),
        (3, 2.0, 0.995, 1.0, 4, "raw"),
        (3, 1.5, 0.9, 1.0, 2, "raw"),
    ],
)
def test_it_is_algorithm_1(r: int, rho: float, tau: float, delta: float, n: int, metric: str) -> None:
    """Same number of minibatches, ranks, components and converged ones, whatever r, ρ, τ, δ and metric."""
    data = DataLoader(dataset(32 * n), batch_size=32)
    module = build()
    expected, ranks, components, passed = algorithm_1(
        inputs_of(module.net, list(data)), r, rho, tau, delta, 200, metric
    )
    callback = EVAInitCallback(rho, r, algorithm="paper", tau=tau, delta=delta, metric=metric, verbose=False)
    state = state_by(callback, module, data)
    assert state.n_batches == expected
    assert state.ranks == {f"net.{layer}": rank for layer, rank in ranks.items()}
    assert (state.meta["selected"], state.meta["selected_converged"]) == (r * len(ranks), passed)
    for layer, rows in components.items():
        ours = state.components[f"net.{layer}"].double().numpy()
        cosines = np.abs((ours * rows).sum(1))[: ranks[layer]]
        assert (cosines > 0.9999).all(), layer


def test_these_cases_cycle_pause_and_redistribute() -> None:
    """What the test above would miss were it not so."""
    inputs = inputs_of(build().net, list(DataLoader(dataset(96), batch_size=32)))
    all_of_them, ranks, _, passed = algorithm_1(inputs, 4, 2.0, 0.999, 1.0, 200)
    assert all_of_them > 3 * 2  # the three minibatches were started over
    assert passed == 12
    assert len(set(ranks.values())) > 1
    fewer, _, _, passed = algorithm_1(inputs, 4, 2.0, 0.999, 0.8, 200)
    assert fewer < all_of_them
    assert passed / 12 >= 0.8
    callback = EVAInitCallback(2, 4, algorithm="paper", tau=0.999, verbose=False)
    state = state_by(callback, build(), DataLoader(dataset(96), batch_size=32))
    assert len(set(state.n_samples.values())) > 1  # layers paused one by one


# --- PEFT -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pretrained() -> nn.Module:
    """A small ViT after a few steps on digits 0-4."""
    torch.manual_seed(0)
    net = small_vit(width=48, depth=2)
    images, labels = load_digits_split(range(5)).train.tensors
    optimizer = torch.optim.AdamW(net.parameters(), 2e-3)
    for _ in range(4):
        for i in torch.randperm(len(images)).split(64):
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(images[i]), labels[i]).backward()
            optimizer.step()
    return net.eval()


def digits(seed: int, n: int) -> list[Batch]:
    """The first `n` minibatches of 32 digits that the network has not seen; there are 22."""
    images, labels = load_digits_split(range(5, 10)).train.tensors
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    return [(images[i], labels[i]) for i in order[: 32 * n].split(32)]


def peft_eva(net: nn.Module, batches: list[Batch], r: int, rho: float) -> tuple[dict[str, Tensor], int]:
    """PEFT's A for every layer, and how many minibatches it took."""
    calls = []

    def forward(model: nn.Module, batch: Batch) -> None:
        calls.append(1)
        model(batch[0])

    names = [n for n in linear_layers(net) if n != "head"]
    config = LoraConfig(r=r, target_modules=names, init_lora_weights="eva", eva_config=EvaConfig(rho=rho, tau=0.99))
    found = peft_module.get_eva_state_dict(
        net,
        batches,
        config,
        forward_fn=forward,
        prepare_model_inputs_fn=None,
        prepare_layer_inputs_fn=None,
        show_progress_bar=False,
    )
    return found, len(calls) - 1  # the first call only compares inputs


class UnsignedHook(peft_module.SVDHook):
    """PEFT's hook with a full SVD in the place of a random projection, and signs of components left out."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.svd.lowrank = False

    def __call__(self, model: Any, input: Any, output: Any) -> None:
        before = getattr(self.svd, "components_", None)
        super().__call__(model, input, output)
        if before is not None:
            self.converged = (before * self.svd.components_).sum(1).abs() >= self.sim_thresh


def ours(net: nn.Module, batches: list[Batch], r: int, rho: float) -> EVAState:
    callback = EVAInitCallback(rho, r, algorithm="paper", verbose=False)
    return state_by(callback, Classifier(copy.deepcopy(net)), batches)


@pytest.mark.parametrize(("seed", "r", "rho", "n"), [(0, 4, 1.0, 9), (1, 4, 2.0, 9), (1, 8, 2.0, 22), (2, 8, 2.0, 3)])
def test_it_is_pefts_eva_but_for_signs_and_random_projections(
    pretrained: nn.Module, monkeypatch: pytest.MonkeyPatch, seed: int, r: int, rho: float, n: int
) -> None:
    monkeypatch.setattr(peft_module, "SVDHook", UnsignedHook)
    theirs, minibatches = peft_eva(pretrained, digits(seed, n), r, rho)
    state = ours(pretrained, digits(seed, n), r, rho)
    assert state.n_batches == minibatches
    assert {n.removeprefix("net."): rank for n, rank in state.ranks.items()} == {n: len(v) for n, v in theirs.items()}
    for name, v in theirs.items():
        cosines = (state.components[f"net.{name}"][: len(v)] * v).sum(1).abs()
        assert bool((cosines > 0.999).all()), name


def test_it_converges_where_stock_peft_does(pretrained: nn.Module) -> None:
    """Stock PEFT takes a component whose sign flips for one that has not converged, so it may take longer."""
    for seed in (0, 1):
        batches = digits(seed, 22)
        theirs, minibatches = peft_eva(pretrained, batches, 8, 2.0)
        state = ours(pretrained, batches, 8, 2.0)
        assert minibatches - 3 <= state.n_batches <= minibatches
        assert all(state.converged.values())
        assert sum(state.ranks.values()) == sum(map(len, theirs.values()))
        moved = sum(abs(state.ranks[f"net.{name}"] - len(v)) for name, v in theirs.items())
        assert moved <= 4  # of 64 ranks


# --- the stream -------------------------------------------------------------------------------------------------------


def test_minibatches_start_over_and_every_iterator_is_closed() -> None:
    closed = []

    def batches() -> Any:
        try:
            yield from (1, 2, 3)
        finally:
            closed.append(True)

    stream = started_over(batches)
    assert list(itertools.islice(stream, 7)) == [1, 2, 3, 1, 2, 3, 1]
    stream.close()  # type: ignore[attr-defined]
    assert len(closed) == 3
    assert list(started_over(lambda: iter(()))) == []


def test_a_cap_is_said_once_with_what_had_not_converged() -> None:
    callback = EVAInitCallback(2, 4, algorithm="paper", tau=1.0, max_batches=7, verbose=False)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        state = state_by(callback, build(), DataLoader(dataset(64), batch_size=32))
    said = [str(w.message) for w in caught if issubclass(w.category, EVAWarning)]
    assert len(said) == 1
    found = re.match(
        r"EVA: after 7 minibatches, the most allowed, (\d+) of the 12 components that get a rank had not converged to "
        r"tau=1, in (\d) of 3 layers \(such as net\.\d\); they are used as they are: raise max_batches, or lower tau "
        r"or delta$",
        said[0],
    )
    assert found
    assert int(found[1]) == 12 - int(state.meta["selected_converged"])
    assert int(found[2]) == list(state.converged.values()).count(False)
    assert (state.n_batches, sum(state.ranks.values())) == (7, 12)


def test_progress_is_the_share_of_components() -> None:
    shares: list[float] = []
    net = build().net
    layers = {n: m for n, m in net.named_modules() if isinstance(m, nn.Linear) and n != "7"}
    data = list(DataLoader(dataset(96), batch_size=32))
    state = compute_eva_state(
        net, lambda: data, layers, 8, StreamingOptions(algorithm="paper", tau=0.999),
        progress=lambda n, share: shares.append(share), selection=Selection(dict.fromkeys(layers, 4), rho=2.0),
    )  # fmt: skip
    assert len(shares) == state.n_batches
    assert shares[0] == 0
    assert {round(share * 12, 6) % 1 for share in shares} == {0.0}
    assert any(share * 3 % 1 for share in shares)


def test_alone_it_waits_for_all_components() -> None:
    """Without a selection: all k of every layer, as with r = k and ρ = 1."""
    net = build().net
    layers = {n: m for n, m in net.named_modules() if isinstance(m, nn.Linear) and n != "7"}
    data = list(DataLoader(dataset(96), batch_size=32))
    state = compute_eva_state(net, lambda: data, layers, 5, StreamingOptions(algorithm="paper"))
    expected, _, _, passed = algorithm_1(inputs_of(net, data), 5, 1.0, 0.99, 1.0, 200)
    assert (state.n_batches, state.meta["selected"], passed) == (expected, 15, 15)


@pytest.mark.filterwarnings("ignore:EVA. after 4 minibatches")
def test_masked_tokens_do_not_count_and_all_others_do() -> None:
    x = correlated(64 * 6).view(64, 6, IN)
    mask = torch.arange(6).expand(64, 6) < torch.arange(64)[:, None] % 6 + 1
    labels = torch.arange(64) % 3
    batches = [(x[i], labels[i], mask[i]) for i in torch.arange(64).split(16)]
    state = compute_eva_state(
        net := TokenNet(), lambda: batches, {"q": net.attention.q, "k": net.attention.k}, 4,
        StreamingOptions(algorithm="paper", tau=1.0, max_batches=4), forward_fn=lambda m, b: m(b[0]),
        mask_fn=lambda b: b[2],
    )  # fmt: skip
    assert state.n_samples == dict.fromkeys(("q", "k"), int(mask.sum()))
    assert state.shared_with == {"k": "q"}
    assert state.meta["selected"] == 8  # once per layer
    inputs: list[Tensor] = []
    net.attention.q.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    with torch.no_grad():
        net(x)
    assert captured_variance(inputs[0][mask], state.components["q"]) > 0.99


def test_training_sees_what_it_would_have_seen(tmp_path: Path) -> None:
    """Batch order and random state, although the shuffled loader was started over while streaming."""
    streamed = build()
    callback = EVAInitCallback(2, 4, algorithm="paper", tau=0.9999, verbose=False)
    trainer(callback).fit(streamed, loader())
    assert callback.state is not None
    assert callback.state.n_batches > len(loader())
    given = build()
    callback.state.save(tmp_path / "eva")
    trainer(EVAInitCallback(2, 4, state=tmp_path / "eva", verbose=False)).fit(given, loader())
    assert streamed.losses == given.losses


def test_of_a_loader_without_length_as_much_as_it_needs() -> None:
    data = list(DataLoader(dataset(96), batch_size=32))
    state = state_by(EVAInitCallback(2, 4, algorithm="paper", tau=0.999, verbose=False), build(), data)
    assert state.n_batches == algorithm_1(inputs_of(build().net, data), 4, 2.0, 0.999, 1.0, 200)[0] > 3


def test_a_constant_first_minibatch_does_not_end_it() -> None:
    x, y = dataset(64).tensors
    data = [(torch.zeros(32, IN), y[:32]), (x[:32], y[:32]), (x[32:], y[32:])]
    state = state_by(EVAInitCallback(2, 4, algorithm="paper", verbose=False), build(), data)
    assert state.n_batches > 3
    assert sum(state.ranks.values()) == 12


# --- states ----------------------------------------------------------------------------------------------------------


def for_the_command() -> tuple[Classifier, DataLoader[Any]]:
    return build(), DataLoader(dataset(96), batch_size=32)


def test_a_precomputed_state_serves_the_run_it_was_computed_for(tmp_path: Path) -> None:
    command = f"{__name__}:for_the_command --algorithm paper --tau 0.999 --r 4 --rho 2 --accelerator cpu"
    assert precompute.main([*command.split(), "--output", str(tmp_path / "eva")]) == 0
    state = EVAState.load(tmp_path / "eva")
    assert state.meta["algorithm"] == "paper"
    module, data = for_the_command()
    assert state.n_batches == algorithm_1(inputs_of(module.net, list(data)), 4, 2.0, 0.999, 1.0, 200)[0]
    given = EVAInitCallback(2, 4, algorithm="paper", state=state, verbose=False)
    assert state_by(given, module, data).ranks == state.ranks
    for r, rho, metric in ((2, 2, "ratio"), (4, 1, "ratio"), (4, 2, "raw")):
        other = EVAInitCallback(rho, r, algorithm="paper", metric=metric, state=state, verbose=False)
        said = f"computed for r = 4, rho = 2, metric ratio, this run has r = {r}, rho = {rho}, metric {metric}"
        with pytest.raises(InputError, match=re.escape(said)):
            state_by(other, build(), data)
        # who does not insist on the paper's algorithm may use it
        free = EVAInitCallback(rho, r, metric=metric, state=state, verbose=False)
        assert sum(state_by(free, build(), data).ranks.values()) == 3 * r


def test_a_state_of_the_fast_algorithm_is_not_taken_for_the_papers() -> None:
    module, data = for_the_command()
    fast = state_by(EVAInitCallback(2, 4, verbose=False), module, data)
    with pytest.raises(InputError, match="the given EVA state was computed by algorithm='fast'"):
        state_by(EVAInitCallback(2, 4, algorithm="paper", state=fast, verbose=False), build(), data)


# --- options ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"engine": "exact"}, "decomposes by the incremental SVD: leave engine='exact' out, or choose"),
        ({"engine": "sketch"}, "decomposes by the incremental SVD: leave engine='sketch' out, or choose"),
        ({"stopping": "captured"}, "stops by a rule of its own: leave stopping='captured' out, or choose"),
        ({"stopping": "never"}, "stops by a rule of its own: leave stopping='never' out, or choose"),
        ({"tokens_per_sample": 32}, "uses every token: leave tokens_per_sample=32 out, or choose algorithm='fast'"),
    ],
)
def test_contradictions_are_one_sentence(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        StreamingOptions(algorithm="paper", **options)
    with pytest.raises(InputError, match=re.escape(message)):
        EVAInitCallback(streaming=StreamingOptions(**options), algorithm="paper")


def test_what_it_needs_may_be_said_too() -> None:
    options = StreamingOptions(algorithm="paper", engine="incremental", tokens_per_sample=None, max_batches=5)
    assert options.resolved() == options
    assert StreamingOptions(algorithm="paper").limit == 1000
    assert StreamingOptions().limit == 64
    assert dataclasses.replace(StreamingOptions(), algorithm="paper").limit == 1000


def test_other_mistakes() -> None:
    with pytest.raises(InputError, match="unknown algorithm 'papr': did you mean paper"):
        EVAInitCallback(algorithm="papr")
    with pytest.raises(
        InputError, match="init='minor' needs the whole spectrum, which algorithm='paper' does not keep"
    ):
        EVAInitCallback(algorithm="paper", init="minor")


# --- several processes ------------------------------------------------------------------------------------------------


def _worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    net = build().net
    layers = {n: m for n, m in net.named_modules() if isinstance(m, nn.Linear) and n != "7"}
    # unequal numbers of minibatches: the first process starts over more often
    data = list(DataLoader(dataset(64 if rank == 0 else 160, seed=rank), batch_size=32))
    selection = Selection(dict.fromkeys(layers, 4), rho=2.0)
    state = compute_eva_state(
        net, lambda: data, layers, 8, StreamingOptions(algorithm="paper", tau=0.999), selection=selection
    )
    torch.save(vars(state), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.distributed
@pytest.mark.slow
def test_all_processes_stop_at_once_with_the_same_state(tmp_path: Path) -> None:
    mp.spawn(_worker, args=(str(tmp_path),), nprocs=2)  # type: ignore[attr-defined]
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    assert first["n_batches"] == second["n_batches"] > 2
    assert first["meta"]["selected_converged"] == 12
    assert len(set(first["n_samples"].values())) > 1
    for name, v in first["components"].items():
        assert torch.equal(v, second["components"][name]), name
        # a pass of each process' data holds other tokens: 64 of one, 160 of the other
        assert first["n_samples"][name] % 32 == 0
