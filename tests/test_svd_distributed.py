"""Two processes that see different tokens end up with the decomposition of the union, identical on both."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from svd_helpers import captured_variance, decaying, feed

from eva_lightning.svd import make_engine

CASES = {"uneven": (100, 500), "first rank empty": (0, 300), "few tokens": (3, 2), "nothing at all": (0, 0)}


def _tokens(rank: int, case: str) -> torch.Tensor:
    return decaying(CASES[case][rank], 200, mean=5.0 * rank, seed=rank)


def _worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    results = {}
    for name in ("exact", "incremental"):
        for case in CASES:
            engine = feed(make_engine(name, 200, 16), _tokens(rank, case).split(64)).all_reduce()
            results[name, case] = vars(engine.result()) if engine.n_samples else None
    torch.save(results, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.distributed
def test_all_reduce_gives_every_rank_the_union(tmp_path: Path) -> None:
    mp.spawn(_worker, args=(str(tmp_path),), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    for (name, case), found in first.items():
        if case == "nothing at all":
            assert found is None
            assert second[name, case] is None
            continue
        for key, value in found.items():
            other = second[name, case][key]
            assert torch.equal(value, other) if isinstance(value, torch.Tensor) else value == other
        x = torch.cat([_tokens(rank, case) for rank in range(2)])
        assert found["n_samples"] == len(x)
        single = feed(make_engine(name, 200, 16), [x]).result()
        assert found["total_variance"] == pytest.approx(single.total_variance, rel=1e-4)
        assert torch.allclose(found["mean"], single.mean, atol=1e-4)
        kept = min(16, len(x) - 1)
        assert captured_variance(x, found["components"][:kept]) >= (1 - 1e-5 if name == "exact" else 0.995)
