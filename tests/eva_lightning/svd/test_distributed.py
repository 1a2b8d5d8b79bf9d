"""Several processes that see different tokens end up with the decomposition of the union, identical on all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from eva_lightning.svd import DoublingRule, StreamingSVD, make_engine, message_bytes, solve
from tests.svd_helpers import captured_variance, decaying, feed

pytestmark = pytest.mark.distributed

# tokens of each rank
CASES = {
    2: {"uneven": (100, 500), "first rank empty": (0, 300), "few tokens": (3, 2), "nothing at all": (0, 0)},
    4: {"uneven": (100, 50, 400, 0), "even": (150, 150, 150, 150)},
}
CAPTURED = {"exact": 1 - 1e-5, "sketch": 0.9985, "incremental": 0.99}


def _tokens(rank: int, world: int, case: str, dim: int) -> torch.Tensor:
    return decaying(CASES[world][case][rank], dim, mean=5.0 * rank, seed=rank)


def _all_reduced(rank: int, world: int) -> dict[Any, Any]:
    results = {}
    for name in CAPTURED:
        for case in CASES[world]:
            engine = feed(make_engine(name, 200, 16), _tokens(rank, world, case, 200).split(64)).all_reduce()
            results[name, case, 200] = vars(engine.result()) if engine.n_samples else None
    return results


def _solved(rank: int, world: int) -> dict[Any, Any]:
    engines: dict[Any, StreamingSVD] = {}
    for name in CAPTURED:
        for case in CASES[world]:
            for dim in (40, 200):
                batches = _tokens(rank, world, case, dim).split(64)
                engines[name, case, dim] = feed(make_engine(name, dim, 16, "cpu"), batches)
    seen = {key: engine.n_samples for key, engine in engines.items()}
    rough = solve(engines, tolerance=1e-3, across_ranks=True).results
    given = {key: result.components for key, result in rough.items()}
    solution = solve(engines, given, across_ranks=True)
    assert {key: engine.n_samples for key, engine in engines.items()} == seen  # looking changes no stream
    for key, value in solution.captured.items():
        assert 0.98 <= value <= 1 + 1e-6, key
    return {key: vars(solution.results[key]) if key in solution.results else None for key in engines}


def _bytes_sent(rank: int, world: int) -> dict[Any, Any]:
    """Bytes of every all_reduce of one check of two layers."""
    sent: list[int] = []
    original = dist.all_reduce

    def counted(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        sent.append(tensor.nbytes)
        return original(tensor, *args, **kwargs)

    engines = {layer: feed(make_engine("exact", 640, 16), decaying(300, 640, seed=rank).split(100)) for layer in "ab"}
    dist.all_reduce = counted
    try:
        rule = DoublingRule()
        verdicts = rule.check(2, engines, across_ranks=True)
    finally:
        dist.all_reduce = original
    return {"sent": sent, "verdicts": verdicts}


def _worker(rank: int, world: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    found = {"all_reduce": _all_reduced(rank, world), "solve": _solved(rank, world), "bytes": _bytes_sent(rank, world)}
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.parametrize("world", [2, 4])
def test_every_rank_gets_the_union(world: int, tmp_path: Path) -> None:
    mp.spawn(_worker, args=(world, str(tmp_path)), nprocs=world)
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(world)]
    for way in ("all_reduce", "solve"):
        for (name, case, dim), found in ranks[0][way].items():
            if sum(CASES[world][case]) == 0:
                assert all(other[way][name, case, dim] is None for other in ranks)
                continue
            for key, value in found.items():
                for other in ranks[1:]:
                    theirs = other[way][name, case, dim][key]
                    assert torch.equal(value, theirs) if isinstance(value, torch.Tensor) else value == theirs
            x = torch.cat([_tokens(rank, world, case, dim) for rank in range(world)])
            _compare(name, x, found)
    sent = ranks[0]["bytes"]["sent"]
    per_iteration = 2 * message_bytes("exact", 640, 16)
    assert per_iteration == 2 * 4 * 640 * 32
    assert max(sent) == per_iteration
    assert sum(sent) <= 6 * per_iteration < 2 * 4 * 640**2
    assert all(other["bytes"]["verdicts"] == ranks[0]["bytes"]["verdicts"] for other in ranks)


def _compare(name: str, x: torch.Tensor, found: dict[str, Any]) -> None:
    assert found["n_samples"] == len(x)
    single = feed(make_engine(name, x.shape[1], 16), [x]).result()
    assert found["total_variance"] == pytest.approx(single.total_variance, rel=1e-4)
    assert torch.allclose(found["mean"], single.mean, atol=1e-4)
    kept = min(16, len(x) - 1)
    assert captured_variance(x, found["components"][:kept]) >= CAPTURED[name]
    if name == "exact":
        assert torch.allclose(found["singular_values"][:kept], single.singular_values[:kept], rtol=1e-3)
