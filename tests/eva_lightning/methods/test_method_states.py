"""EVA's methods from a precomputed state: one state serves all ranks, and the right kind is asked for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import lightning as L
import pytest
import torch

from eva_lightning import EVAState
from eva_lightning.adapters import find_adapters
from eva_lightning.callback import EVAInitCallback
from eva_lightning.initialization import initial_a
from eva_lightning.methods import METHODS, MethodKey
from eva_lightning.methods.apply import AdapterOptions, apply_method
from eva_lightning.vision.data.datamodule import VTAB1K
from eva_lightning.vision.module import ImageClassifier
from tests.eva_lightning.methods.image_fits import fit, plain
from tests.eva_lightning.vision.fakes import make_task

INITS = {
    "eva": "eva", "eva-dora": "eva", "eva-whiten": "whiten", "eva-lora-norm": "lora-norm", "eva-rotate": "rotate",
    "eva-permute": "permute", "eva-minor": "minor", "lora-redistribute": "redistribute", "eva-raw": "eva",
    "eva-max": "eva",
}  # fmt: skip
LARGEST = 16
"""Components held: what rank 8 with ρ = 2 needs."""


@pytest.fixture(scope="module")
def make_data(tmp_path_factory: pytest.TempPathFactory) -> Callable[[], VTAB1K]:
    root = tmp_path_factory.mktemp("vtab")
    make_task(root)
    return lambda: VTAB1K(root, "kitti", image_size=32, batch_size=8, progress=False)


@pytest.fixture(scope="module")
def states(make_data: Callable[[], VTAB1K], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Saved states by kind, each of the most components that any test here asks for."""
    found = {}
    for kind, method in (("major", "eva"), ("minor", "eva-minor")):
        _, (callback,) = started(method, AdapterOptions(rank=LARGEST, rho=1.0), make_data())
        assert isinstance(callback, EVAInitCallback)
        assert callback.state is not None
        found[kind] = callback.state.save(tmp_path_factory.mktemp("states") / kind)
    return found


def started(method: str, options: AdapterOptions, data: VTAB1K) -> tuple[ImageClassifier, list[L.Callback]]:
    module = plain(lr=0.0)
    callbacks = apply_method(method, module, options)
    fit(module, callbacks, data, max_steps=1)
    return module, callbacks


@pytest.mark.parametrize("rank", [2, 8])
@pytest.mark.parametrize("method", INITS)
def test_one_state_serves_every_method_and_rank(
    method: str, rank: int, states: dict[str, Path], make_data: Callable[[], VTAB1K], monkeypatch: pytest.MonkeyPatch
) -> None:
    kind = MethodKey.parse(method).state_kind
    assert kind is not None
    assert MethodKey.parse(method).components(rank) <= LARGEST
    monkeypatch.setattr("eva_lightning.initialiser.compute_eva_state", lambda *_, **__: pytest.fail("streams"))
    module, (callback,) = started(method, AdapterOptions(rank=rank, state=states[kind], seed=3), make_data())
    assert isinstance(callback, EVAInitCallback)
    assert callback.state is not None
    held = EVAState.load(states[kind])
    layers = find_adapters(module)
    ranks = {name: layers[name].rank if name in layers else 0 for name in held.components}
    expected = (
        dict.fromkeys(ranks, rank)
        if method == "eva-minor"
        else held.redistribute(rank, 2.0, METHODS[method].fixed.get("metric", "ratio"))
    )
    assert ranks == expected
    generator = torch.Generator().manual_seed(3)
    for name, layer_rank in ranks.items():
        if not layer_rank:
            continue
        spectrum = held.components[name], held.singular_values[name], held.explained_variance_ratio[name]
        a = initial_a(INITS[method], *spectrum, layer_rank, generator)
        torch.testing.assert_close(layers[name].a.detach(), a, rtol=0, atol=0, msg=name)
        assert not layers[name].b.any()


def test_a_given_state_is_what_streaming_finds(states: dict[str, Path], make_data: Callable[[], VTAB1K]) -> None:
    """Components of more than are needed: the first ones are those that would have been streamed."""
    options = AdapterOptions(rank=4, rho=2.0)
    streamed, _ = started("eva", options, make_data())
    given, _ = started("eva", AdapterOptions(rank=4, rho=2.0, state=states["major"]), make_data())
    ours, theirs = find_adapters(given), find_adapters(streamed)
    assert {n: x.rank for n, x in ours.items()} == {n: x.rank for n, x in theirs.items()}
    for name, layer in ours.items():
        overlap = torch.linalg.svdvals(layer.a.double() @ theirs[name].a.double().T)
        assert overlap.min() > 0.999, name


def test_resumes_from_a_checkpoint(states: dict[str, Path], make_data: Callable[[], VTAB1K], tmp_path: Path) -> None:
    options = AdapterOptions(rank=4, state=states["major"])
    first, second = plain(), plain()
    run = fit(first, apply_method("eva-rotate", first, options), make_data(), max_epochs=2)
    run.save_checkpoint(tmp_path / "a.ckpt")
    # nothing is left to train: what the second module has is what the checkpoint held, not the state's start
    callbacks = apply_method("eva-rotate", second, options)
    fit(second, callbacks, make_data(), max_epochs=2, ckpt_path=tmp_path / "a.ckpt")
    assert any(layer.b.any() for layer in find_adapters(second).values())
    for name, value in first.state_dict().items():
        assert torch.equal(second.state_dict()[name], value), name


def test_the_wrong_state_is_refused_in_one_sentence(
    states: dict[str, Path], make_data: Callable[[], VTAB1K], tmp_path: Path
) -> None:
    def start(method: str, rank: int = 2, **options: object) -> None:
        started(method, AdapterOptions(rank=rank, **options), make_data())  # type: ignore[arg-type]

    with pytest.raises(
        ValueError, match="'minor' starts from the components of least variance, the EVA state holds th"
    ):
        start("eva-minor", state=states["major"])
    with pytest.raises(ValueError, match=r"'eva' starts from the components of most variance, .* of least"):
        start("eva", state=states["minor"])
    with pytest.raises(
        ValueError, match=r"r \* rho = 9 \* 2 asks for 18 components of layer .*, the EVA state holds 16"
    ):
        start("eva", rank=9, state=states["major"])
    with pytest.raises(ValueError, match="lora starts from no EVA state, but one is given"):
        start("lora", state=states["major"])
    with pytest.raises(FileNotFoundError, match="An EVA state is two files"):
        start("eva", state=tmp_path / "none")


def test_a_minor_state_needs_no_rho(states: dict[str, Path], make_data: Callable[[], VTAB1K]) -> None:
    """Uniform ranks: rank 16 takes the 16 components held, whatever ρ says."""
    module, _ = started("eva-minor", AdapterOptions(rank=16, rho=2.0, state=states["minor"]), make_data())
    assert {layer.rank for layer in find_adapters(module).values()} == {16}


def test_all_that_stream_are_here() -> None:
    assert set(INITS) == {m for m, method in METHODS.items() if method.state_kind}
