"""EVA state: save, load, refuse what is broken, redistribute."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import os
import random
import signal
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from eva_lightning.errors import InputError
from eva_lightning.files import is_temporary
from eva_lightning.state import EVAState
from eva_lightning.svd import ExactSVD
from eva_lightning.tensor_files import read_tensors, write_tensors
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


def save_as_version_1(state: EVAState, stem: Path) -> None:
    """What the first version wrote: the document in the JSON file alone, with a checksum of the tensors."""
    names = ("components", "singular_values", "explained_variance_ratio")
    tensors = {
        f"{name}/{layer}": value
        for name in names
        for layer, value in getattr(state, name).items()
        if layer not in state.shared_with
    }
    save_file(tensors, stem.with_suffix(".safetensors"))
    checksum = hashlib.sha256(stem.with_suffix(".safetensors").read_bytes()).hexdigest()
    document = {name: value for name, value in vars(state).items() if name not in names}
    document |= {"format": "eva_lightning.state", "version": 1, "tensor_checksum": f"sha256:{checksum}"}
    stem.with_suffix(".json").write_text(json.dumps(document))


def test_the_tensor_file_is_the_state(state: EVAState, tmp_path: Path) -> None:
    state.save(tmp_path / "eva")
    (tmp_path / "eva.json").unlink()
    assert_equal(EVAState.load(tmp_path / "eva"), state)
    state.save(tmp_path / "eva")
    (tmp_path / "eva.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"eva\.safetensors is missing"):
        EVAState.load(tmp_path / "eva")


def test_a_copy_of_another_state_is_warned_of_and_not_used(state: EVAState, tmp_path: Path) -> None:
    save_as_version_1(state, tmp_path / "eva")
    copies = [(tmp_path / "eva.json").read_text()]
    state.save(tmp_path / "eva")
    copies.append((tmp_path / "eva.json").read_text())
    state.ranks["dead"] = 3
    state.save(tmp_path / "eva")
    for copy in copies:
        (tmp_path / "eva.json").write_text(copy)
        with pytest.warns(UserWarning, match=r"eva\.json is of another state than eva\.safetensors"):
            assert EVAState.load(tmp_path / "eva").ranks["dead"] == 3


@pytest.mark.parametrize("suffix", [".safetensors", ".json"])
def test_no_damage_changes_what_loads(state: EVAState, tmp_path: Path, suffix: str) -> None:
    """Every digit of the JSON file, and bytes all over the tensor file; and cuts."""
    state.save(tmp_path / "eva")
    path = tmp_path / f"eva{suffix}"
    whole = path.read_bytes()
    step = 1 if suffix == ".json" else 13
    places = [i for i in range(0, len(whole), step) if suffix != ".json" or chr(whole[i]).isdigit()]
    versions = [whole[:i] + bytes([whole[i] ^ 1]) + whole[i + 1 :] for i in places]
    versions += [b"", whole[:-40], whole[: len(whole) // 2]]
    assert len(versions) > 100
    refused = 0
    for content in versions:
        path.write_bytes(content)
        try:
            assert_equal(EVAState.load(tmp_path / "eva"), state)  # a changed space in a header
        except InputError:
            refused += 1
    assert refused > 0.97 * len(versions)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("ranks", -7), ("ranks", math.nan), ("ranks", 2.0), ("ranks", True), ("ranks", 9), ("ranks", "4"),
        ("ranks", 10**400),
        ("total_variance", math.inf), ("total_variance", -1.0), ("total_variance", None), ("total_variance", 10**400),
        ("n_samples", 1.5), ("n_samples", [3]), ("converged", 1), ("convergence", [[2]]), ("convergence", 3),
        ("convergence", [[2, math.nan]]), ("widths", 0), ("widths", 33),
        ("shared_with", "dead.not"), ("shared_with", 3),
    ],
)  # fmt: skip
def test_impossible_values_are_refused_when_saving_and_in_version_1(
    state: EVAState, tmp_path: Path, field: str, value: object
) -> None:
    getattr(state, field)["blocks.0.q"] = value
    save_as_version_1(state, tmp_path / "old")
    with pytest.raises(InputError, match=r"old\.json"):
        EVAState.load(tmp_path / "old")
    with pytest.raises(InputError, match="cannot be saved"):
        state.save(tmp_path / "new")
    assert not (tmp_path / "new.safetensors").exists()


@pytest.mark.parametrize("field", ["total_variance", "n_samples", "singular_values", "explained_variance_ratio"])
def test_fields_that_name_other_layers_are_refused(state: EVAState, tmp_path: Path, field: str) -> None:
    del getattr(state, field)["head.in"]
    with pytest.raises(InputError, match=r"head\.in"):
        state.save(tmp_path / "eva")


@pytest.mark.parametrize("value", [None, -3, "x", [1], math.nan, math.inf, True])
@pytest.mark.parametrize("field", ["ranks", "n_batches", "seconds", "meta", "widths", "convergence"])
def test_fields_of_another_type_are_refused(state: EVAState, tmp_path: Path, field: str, value: object) -> None:
    save_as_version_1(state, tmp_path / "old")
    document = json.loads((tmp_path / "old.json").read_text()) | {field: value}
    (tmp_path / "old.json").write_text(json.dumps(document))
    with pytest.raises(InputError, match=rf"old\.json is no sound EVA state: {field}"):
        EVAState.load(tmp_path / "old")


def test_version_1_loads_and_its_halves_are_held_together(state: EVAState, tmp_path: Path) -> None:
    save_as_version_1(state, tmp_path / "one")
    assert_equal(EVAState.load(tmp_path / "one"), state)
    state.components["dead"] = torch.ones(8, 16)
    save_as_version_1(state, tmp_path / "two")
    (tmp_path / "one.safetensors").write_bytes((tmp_path / "two.safetensors").read_bytes())
    with pytest.raises(ValueError, match=r"does not belong to one\.json"):
        EVAState.load(tmp_path / "one")
    (tmp_path / "one.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"one\.json is missing"):
        EVAState.load(tmp_path / "one")


@pytest.mark.parametrize(
    ("change", "message"),
    [({"version": 7}, "version 7"), ({"format": "x"}, "not describe an EVA state"), ({"ranks": None}, "lacks ranks")],
)
def test_other_versions_and_documents_are_refused(
    state: EVAState, tmp_path: Path, change: dict[str, object], message: str
) -> None:
    save_as_version_1(state, tmp_path / "eva")
    document = json.loads((tmp_path / "eva.json").read_text()) | change
    (tmp_path / "eva.json").write_text(json.dumps({k: v for k, v in document.items() if v is not None}))
    with pytest.raises(ValueError, match=message):
        EVAState.load(tmp_path / "eva")


def test_a_state_without_ranks_keeps_its_decompositions(state: EVAState, tmp_path: Path) -> None:
    state.ranks = {}
    assert_equal(EVAState.load(state.save(tmp_path / "eva")), state)


def _save_for_ever(folder: Path) -> None:
    """Save four states over one path, told apart by every field."""
    for number in itertools.cycle(range(4)):
        state = EVAState(
            ranks={"a": number},
            components={"a": torch.full((4, 20_000), number / 4)},
            singular_values={"a": torch.full((4,), float(number))},
            explained_variance_ratio={"a": torch.full((4,), number / 4)},
            total_variance={"a": float(number)},
            n_samples={"a": number},
            n_batches=number,
        )
        state.save(folder / "eva")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*is of another state than:UserWarning", "ignore:.*fork:DeprecationWarning")
def test_25_kills_while_saving_over_a_state_leave_it_whole(tmp_path: Path) -> None:
    delays = random.Random(0)
    for _ in range(25):
        process = os.fork()
        if process == 0:
            try:
                _save_for_ever(tmp_path)
            finally:
                os._exit(1)
        deadline = time.monotonic() + 30
        while not (tmp_path / "eva.safetensors").exists() and time.monotonic() < deadline:
            time.sleep(0.005)
        time.sleep(delays.uniform(0.01, 0.15))
        os.kill(process, signal.SIGKILL)
        assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == -signal.SIGKILL
        state = EVAState.load(tmp_path / "eva")
        number = state.n_batches
        assert state.ranks["a"] == state.n_samples["a"] == state.total_variance["a"] == number
        assert torch.equal(state.components["a"], torch.full((4, 20_000), number / 4))
    assert len([path for path in tmp_path.iterdir() if is_temporary(path)]) <= 2


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


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("components", torch.full((8, 32), 3e38)),
        ("components", torch.full((8, 32), -2.0)),
        ("singular_values", -torch.ones(8)),
        ("explained_variance_ratio", torch.full((8,), 2.0)),
        ("explained_variance_ratio", -torch.ones(8)),
    ],
)
def test_tensors_of_impossible_values_are_refused(
    state: EVAState, tmp_path: Path, field: str, value: torch.Tensor
) -> None:
    getattr(state, field)["blocks.0.q"] = value
    save_as_version_1(state, tmp_path / "old")
    with pytest.raises(InputError, match=rf"{field} of layer 'blocks\.0\.[qk]' must be numbers from"):
        EVAState.load(tmp_path / "old")
    with pytest.raises(InputError, match="must be numbers from"):
        state.save(tmp_path / "new")


def test_a_state_made_by_hand_with_a_fitting_checksum_is_checked(state: EVAState, tmp_path: Path) -> None:
    tensors, text = read_tensors(state.save(tmp_path / "eva"))
    assert text is not None
    (tmp_path / "eva.json").unlink()
    file = tmp_path / "eva.safetensors"
    for change, message in (
        ({"meta": {"x": [math.nan]}}, "meta must be a mapping, all numbers in it finite"),
        ({"version": 2.0}, "has version 2.0"),
        ({"version": "2"}, "has version '2'"),
    ):
        write_tensors(file, tensors, json.dumps(json.loads(text) | change))
        with pytest.raises(InputError, match=message):
            EVAState.load(file)
    for document, message in (
        (text[:-1] + ', "ranks": {}}', "a key is there twice"),
        ("[" * 100_000, "nested too deeply"),
    ):
        write_tensors(file, tensors, document)
        with pytest.raises(InputError, match=message):
            EVAState.load(file)
    write_tensors(file, {**tensors, "other/a\n": torch.ones(1)}, text)
    with pytest.raises(InputError, match=r"'other/a\\n' is no tensor of an EVA state"):
        EVAState.load(file)
