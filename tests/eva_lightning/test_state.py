"""EVA state: save, load, refuse what is broken, redistribute."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from eva_lightning.state import EVAState
from eva_lightning.svd import ExactSVD
from tests.svd_helpers import decaying

WIDTHS = {"blocks.0.q": 32, "blocks.0.k": 32, "blocks.0.fc1": 48, "head.in": 6, "dead": 16}


@pytest.fixture
def state() -> EVAState:
    results = {}
    for i, (layer, width) in enumerate(WIDTHS.items()):
        engine = ExactSVD(width, min(8, width))
        engine.update(torch.zeros(50, width) if layer == "dead" else decaying(200, width, power=0.3 + i / 4, seed=i))
        results[layer] = engine.result()
    results["blocks.0.k"] = results["blocks.0.q"]
    return EVAState(
        ranks={"blocks.0.q": 5, "blocks.0.k": 4, "blocks.0.fc1": 6, "head.in": 1, "dead": 0},
        components={layer: result.components for layer, result in results.items()},
        singular_values={layer: result.singular_values for layer, result in results.items()},
        explained_variance_ratio={layer: result.explained_variance_ratio for layer, result in results.items()},
        total_variance={layer: result.total_variance for layer, result in results.items()},
        n_samples={layer: result.n_samples for layer, result in results.items()},
        converged=dict.fromkeys(WIDTHS, True),
        n_batches=16,
        seconds=1.25,
        shared_with={"blocks.0.k": "blocks.0.q"},
        convergence={"blocks.0.q": [(2, 0.97), (4, 0.995)]},
        meta={"r": 4, "rho": 2.0, "metric": "ratio", "engine": "exact"},
    )


def assert_equal(one: EVAState, two: EVAState) -> None:
    for name, value in vars(one).items():
        other = getattr(two, name)
        if name in ("components", "singular_values", "explained_variance_ratio"):
            assert value.keys() == other.keys()
            assert all(torch.equal(value[layer], other[layer]) for layer in value)
        else:
            assert value == other, name


@pytest.mark.parametrize("name", ["eva", "eva.safetensors", "eva.json", "sub/vit.r16"])
def test_saves_and_loads_everything_under_either_name(state: EVAState, tmp_path: Path, name: str) -> None:
    written = state.save(tmp_path / name)
    assert written.suffix == ".safetensors"
    assert_equal(EVAState.load(tmp_path / name), state)
    assert_equal(EVAState.load(written), state)
    assert_equal(EVAState.load(written.with_suffix(".json")), state)
    assert sorted(p.suffix for p in written.parent.iterdir()) == [".json", ".safetensors"]


def test_shared_decompositions_are_stored_once_and_come_back_as_one_object(state: EVAState, tmp_path: Path) -> None:
    loaded = EVAState.load(state.save(tmp_path / "eva"))
    assert "components/blocks.0.k" not in load_file(tmp_path / "eva.safetensors")
    assert loaded.components["blocks.0.k"] is loaded.components["blocks.0.q"]


def test_overwrites_whole_files_and_leaves_no_temporary_ones(state: EVAState, tmp_path: Path) -> None:
    state.save(tmp_path / "eva")
    state.n_batches = 99
    state.save(tmp_path / "eva")
    assert EVAState.load(tmp_path / "eva").n_batches == 99
    state.meta["bad"] = object()  # type: ignore[assignment]
    with pytest.raises(TypeError, match="object cannot be saved"):
        state.save(tmp_path / "eva")
    assert EVAState.load(tmp_path / "eva").n_batches == 99
    assert len(list(tmp_path.iterdir())) == 2


def test_numbers_that_are_tensors_are_saved_as_numbers(state: EVAState, tmp_path: Path) -> None:
    state.meta["tau"] = torch.tensor(0.5)  # type: ignore[assignment]
    assert EVAState.load(state.save(tmp_path / "eva")).meta["tau"] == 0.5


@pytest.mark.parametrize("suffix", [".safetensors", ".json"])
def test_a_missing_half_is_named(state: EVAState, tmp_path: Path, suffix: str) -> None:
    state.save(tmp_path / "eva")
    (tmp_path / f"eva{suffix}").unlink()
    with pytest.raises(FileNotFoundError, match=rf"eva\{suffix} is missing"):
        EVAState.load(tmp_path / "eva")


@pytest.mark.parametrize("suffix", [".safetensors", ".json"])
def test_a_truncated_half_is_named(state: EVAState, tmp_path: Path, suffix: str) -> None:
    state.save(tmp_path / "eva")
    path = tmp_path / f"eva{suffix}"
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(ValueError, match=rf"eva\{suffix} is truncated"):
        EVAState.load(tmp_path / "eva")


def test_tensors_of_another_state_are_refused(state: EVAState, tmp_path: Path) -> None:
    state.save(tmp_path / "one")
    state.components["dead"] = torch.ones(8, 16)
    state.save(tmp_path / "two")
    (tmp_path / "one.safetensors").write_bytes((tmp_path / "two.safetensors").read_bytes())
    with pytest.raises(ValueError, match=r"does not belong to one\.json"):
        EVAState.load(tmp_path / "one")


@pytest.mark.parametrize(
    ("change", "message"),
    [({"version": 7}, "version 7"), ({"format": "x"}, "not describe an EVA state"), ({"ranks": None}, "lacks ranks")],
)
def test_other_versions_and_documents_are_refused(
    state: EVAState, tmp_path: Path, change: dict[str, object], message: str
) -> None:
    state.save(tmp_path / "eva")
    document = json.loads((tmp_path / "eva.json").read_text()) | change
    (tmp_path / "eva.json").write_text(json.dumps({k: v for k, v in document.items() if v is not None}))
    with pytest.raises(ValueError, match=message):
        EVAState.load(tmp_path / "eva")


def test_a_safetensors_file_that_matches_its_checksum_but_is_none(state: EVAState, tmp_path: Path) -> None:
    state.save(tmp_path / "eva")
    (tmp_path / "eva.safetensors").write_bytes(b"not tensors")
    document = json.loads((tmp_path / "eva.json").read_text())
    import hashlib

    document["tensor_checksum"] = "sha256:" + hashlib.sha256(b"not tensors").hexdigest()
    (tmp_path / "eva.json").write_text(json.dumps(document))
    with pytest.raises(ValueError, match="not a readable safetensors file"):
        EVAState.load(tmp_path / "eva")


def test_redistribute_for_other_ranks(state: EVAState) -> None:
    uniform = state.redistribute(4, 1.0)
    assert uniform == {"blocks.0.q": 4, "blocks.0.k": 4, "blocks.0.fc1": 4, "head.in": 4, "dead": 0}
    doubled = state.redistribute(4, 2.0)
    assert sum(doubled.values()) == 20
    assert doubled["dead"] == 0
    assert max(doubled.values()) <= 8
    assert doubled["head.in"] <= 6
    assert doubled["blocks.0.q"] == doubled["blocks.0.k"]
    assert max(state.redistribute(4, 2.0, max_rank=5).values()) == 5
    assert sum(state.redistribute({"dead": 1, **dict.fromkeys(list(WIDTHS)[:4], 2)}, 2.0).values()) == 9


def test_redistribute_works_without_components_and_says_what_it_lacks(state: EVAState, tmp_path: Path) -> None:
    light = EVAState.load(state.without_components().save(tmp_path / "light"))
    assert light.components == {}
    assert state.components
    for each in (state, light):
        assert each.redistribute(4, 2.0) == state.redistribute(4, 2.0)
        # A layer that is narrower than r * rho is held completely; a wider one is what limits.
        with pytest.raises(ValueError, match=r"4 \* 2\.25 needs 9 components per layer, but this EVA state holds 8"):
            each.redistribute(4, 2.25)


@pytest.mark.parametrize("rho", [0.5, math.nan, math.inf])
def test_redistribute_refuses_rho_below_one(state: EVAState, rho: float) -> None:
    with pytest.raises(ValueError, match="rho must be"):
        state.redistribute(4, rho)


def test_redistribute_refuses_r_below_one(state: EVAState) -> None:
    with pytest.raises(ValueError, match="r must be a number of at least 1, got 0"):
        state.redistribute(0, 1.0)
    with pytest.raises(ValueError, match="unknown metric"):
        state.redistribute(4, 1.0, "ration")


def test_summary_and_rows(state: EVAState) -> None:
    summary = state.summary()
    assert summary["layers"] == 5
    assert summary["decompositions"] == 4
    assert (summary["rank_min"], summary["rank_median"], summary["rank_max"], summary["removed"]) == (0, 4, 6, 1)
    row = {row["layer"]: row for row in state.describe()}["blocks.0.k"]
    assert row["shared_with"] == "blocks.0.q"
    assert row["width"] == 32
    assert row["explained"] == pytest.approx(float(state.explained_variance_ratio["blocks.0.q"][:4].sum()))
    assert EVAState().summary()["layers"] == 0
