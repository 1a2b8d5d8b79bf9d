from __future__ import annotations

import re
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from eva_lightning.errors import InputError
from eva_lightning.methods import MethodKey
from eva_lightning.state import EVAState
from experiments.runner.run_folder import RunFolder, perform
from experiments.runner.settings import Role, identity
from experiments.vtab import run, states, sweep_settings
from experiments.vtab.settings import Settings
from experiments.vtab.states import SharedState
from tests.experiments.vtab.sweep_fakes import make_tasks


@pytest.fixture
def base(tmp_path: Path) -> Settings:
    make_tasks(tmp_path / "data", ["kitti"])
    return Settings(
        root=str(tmp_path / "data"), task="kitti", model="test_vit", weights="none", image_size=32, epochs=1, lr=1e-2,
        batch_size=8, accelerator="cpu", output=str(tmp_path / "out"), progress=False, plots=False, save_adapter=False,
        split="train800",
    )  # fmt: skip


def by(base: Settings, method: str = "eva", rank: int = 4, seed: int = 0, split: str = "train800") -> Settings:
    """A run by a method."""
    key = MethodKey.parse(method)
    return replace(base, method=key.method, rho=key.rho or 2.0, rank=rank, seed=seed, split=split)


def state_of(settings: Settings, k: int = 32) -> SharedState:
    """The state of `k` components that a run shares."""
    shared = SharedState.of(settings, k)
    assert shared is not None
    return shared


def test_who_shares_a_state(base: Settings) -> None:
    def path(*args: Any, changed: dict[str, Any] | None = None, k: int = 32, **kwargs: Any) -> str:
        return state_of(by(replace(base, **(changed or {})), *args, **kwargs), k).path

    one = path()
    assert path("eva:1", rank=16, seed=2) == one  # any ρ, rank and seed
    assert path("eva-dora") == path("eva-whiten") == path("lora-redistribute") == one
    assert path(changed={"epochs": 30, "alpha": 2.0, "lr": 1.0, "metric": "sum", "limit_test": 3}) == one
    assert path(changed={"root": "elsewhere", "cache": "none", "workers": 5}) == one
    different = [
        path(split="train800val200"),  # all 1,000 images
        path("eva-minor"),
        path(k=16),
        *(
            path(changed=changed)
            for changed in (
                {"image_size": 64}, {"batch_size": 4}, {"tau": 0.9}, {"normalization": "none"}, {"limit_train": 4},
                {"precision": "bf16-mixed"}, {"split_fused": True}, {"protocol": "authors-code"}, {"weights": "w.pth"},
            )
        ),
    ]  # fmt: skip
    assert len({one, *different}) == 1 + len(different)
    assert SharedState.of(by(base, "lora"), 0) is None
    authors = replace(base, protocol="authors-code")
    assert state_of(by(authors)).path == state_of(by(authors, split="train800val200")).path  # train800 for both


def test_settings_say_what_a_state_depends_on() -> None:
    assert set(identity(Settings(root="x", task="kitti"), Role.INITIALISATION)) == {
        "task", "split", "model", "weights", "pos_embed", "split_fused", "protocol", "tau", "delta", "max_batches",
        "batch_size", "accumulate", "precision", "image_size", "normalization", "limit_train",
    }  # fmt: skip


def test_computed_once_under_concurrency(base: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    computed: list[Path] = []

    def slow(settings: Settings, path: Path) -> None:
        computed.append(path)
        time.sleep(0.3)
        EVAState().save(path)

    monkeypatch.setattr(states, "_compute", slow)
    shared = [state_of(by(base, rank=rank, seed=seed)) for rank in (2, 4, 8, 16) for seed in (0, 1)]
    with ThreadPoolExecutor(8) as pool:
        paths = list(pool.map(lambda state: state.obtain(), shared))
    assert len(computed) == 1
    assert set(paths) == set(computed)


def test_the_smallest_sufficient_state_serves(base: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(states, "_compute", lambda settings, path: EVAState().save(path))

    def obtain(k: int) -> str:
        return state_of(by(base), k).obtain().name.rpartition("-k")[2]

    assert [obtain(k) for k in (32, 64, 16, 48, 32)] == ["32", "64", "32", "64", "32"]


@pytest.mark.parametrize("suffix", ["safetensors", "json"])
def test_damaged_state_is_set_aside_and_computed_again(base: Settings, suffix: str) -> None:
    shared = state_of(by(base), 8)
    path = shared.obtain()
    damaged = path.with_name(f"{path.name}.{suffix}")
    whole = EVAState.load(path)
    content = damaged.read_bytes()[:-100]
    damaged.write_bytes(content)
    states._SOUND.clear()  # another process
    assert shared.obtain() == path
    again = EVAState.load(path)
    assert all((whole.components[name] == v).all() for name, v in again.components.items())
    assert len((path.parent / "computed.log").read_text().splitlines()) == 2
    assert damaged.with_name(f"{damaged.name}.damaged").read_bytes() == content


def metrics_of(settings: Settings, folder: Path) -> dict[str, Any]:
    return perform(RunFolder(folder, settings), lambda: run.build(settings), terminal=False)


def with_shared_state(settings: Settings, folder: Path) -> dict[str, Any]:
    return metrics_of(replace(settings, eva_state=str(state_of(settings).obtain())), folder)


RESULTS = ("accuracy", "loss", "ranks", "trainable_parameters")


@pytest.mark.parametrize(
    ("method", "rank"),
    [
        ("eva", 16),  # as many components as the state has
        ("eva", 4),  # fewer components
        ("eva:1", 8),  # another ρ
        ("eva-dora", 4),
        ("eva-permute", 4),
        ("eva-minor", 4),
    ],
)
def test_shared_state_gives_the_results_of_streaming_bit_for_bit(
    base: Settings, tmp_path: Path, method: str, rank: int
) -> None:
    """Where the minibatches are the same: here the training data are one, in the order of the state."""
    settings = by(base, method, rank)
    with_state = with_shared_state(settings, tmp_path / "shared")
    alone = metrics_of(settings, tmp_path / "alone")
    assert {k: with_state[k] for k in RESULTS} == {k: alone[k] for k in RESULTS}
    assert with_state["eva_state"].endswith("-k32")


def test_shared_state_gives_the_results_of_streaming_in_another_order(base: Settings, tmp_path: Path) -> None:
    """Another seed shuffles the images of the one minibatch: sums over them are equal but for their rounding."""
    settings = by(base, "eva:1", 8, 3)
    with_state = with_shared_state(settings, tmp_path / "shared")
    alone = metrics_of(settings, tmp_path / "alone")
    assert with_state["ranks"] == alone["ranks"]
    assert with_state["loss"] == pytest.approx(alone["loss"], rel=1e-5)


def test_protocol_of_the_authors_code(base: Settings, tmp_path: Path) -> None:
    settings = by(replace(base, protocol="authors-code"), rank=4, seed=1, split="train800val200")
    with_state = with_shared_state(settings, tmp_path / "shared")
    alone = metrics_of(settings, tmp_path / "alone")
    assert {k: with_state[k] for k in ("ranks", "trainable_parameters")} == {
        k: alone[k] for k in ("ranks", "trainable_parameters")
    }
    assert with_state["loss"] == pytest.approx(alone["loss"], abs=1e-4)
    assert "-train800-" in with_state["eva_state"]


# --- the paper's algorithm: what gets a rank decides when the stream stops --------------------------------------------


def test_by_the_papers_algorithm_each_rank_rho_and_metric_has_a_state(base: Settings) -> None:
    paper = replace(base, algorithm="paper")

    def path(*args: Any, metric: str = "ratio", **kwargs: Any) -> str:
        return state_of(by(replace(paper, metric=metric), *args, **kwargs)).path

    one = path(rank=4)
    assert one.endswith("-k8")  # its own r * rho, whatever the sweep's largest
    assert path("eva-dora", rank=4, seed=3) == path("eva-whiten", rank=4) == one
    different = [path(rank=2), path("eva:1", rank=4), path("eva:1", rank=8), path(rank=4, metric="raw")]
    assert len({one, state_of(by(base, rank=4), 8).path, *different}) == 6


def test_a_state_by_the_papers_algorithm_gives_the_results_of_streaming(base: Settings, tmp_path: Path) -> None:
    settings = by(replace(base, algorithm="paper", tau=0.95, max_batches=40), rank=4)
    with_state = with_shared_state(settings, tmp_path / "shared")
    alone = metrics_of(settings, tmp_path / "alone")
    assert {k: with_state[k] for k in RESULTS} == {k: alone[k] for k in RESULTS}
    path = str(state_of(settings).find())
    assert with_state["eva_state"] == Path(path).name
    state = EVAState.load(path)
    assert (state.meta["algorithm"], state.meta["selection"]) == ("paper", "r = 4, rho = 2, metric ratio")
    # another rank may not start from it
    other = replace(settings, rank=2, eva_state=path)
    with pytest.raises(InputError, match="the given EVA state was computed for r = 4, rho = 2"):
        metrics_of(other, tmp_path / "other")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"method": "eva-minor"}, "eva-minor needs the whole spectrum, which algorithm=paper does not keep"),
        ({"init": "minor"}, "init=minor needs the whole spectrum, which algorithm=paper does not keep"),
        ({"protocol": "authors-code"}, "algorithm=paper until convergence: choose one of the two"),
        ({"algorithm": "papre"}, "unknown algorithm 'papre': did you mean paper"),
    ],
    ids=["method", "init", "protocol", "typo"],
)
def test_what_contradicts_the_papers_algorithm(base: Settings, changed: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        replace(base, **{"algorithm": "paper", **changed})


def test_a_sweep_by_the_papers_algorithm(base: Settings) -> None:
    options = {"root": base.root, "tasks": ("kitti",), "model": "test_vit", "algorithm": "paper", "ranks": (2, 4)}
    sweep = sweep_settings.Settings(**options, methods=("lora", "eva", "eva:1", "eva-dora"))  # type: ignore[arg-type]
    assert sorted(sweep.states()) == [2, 4, 4, 8]  # per rank and rho
    assert sweep.base.algorithm == "paper"
    for more, message in (
        ({"methods": ("eva", "eva-minor")}, "eva-minor needs the whole spectrum, which algorithm=paper does not keep"),
        ({"state_components": 32}, "state_components has no meaning with algorithm=paper"),
    ):
        with pytest.raises(InputError, match=re.escape(message)):
            sweep_settings.Settings(**options, **more)  # type: ignore[arg-type]
