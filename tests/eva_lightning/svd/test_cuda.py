"""All engines on a CUDA device give what they give on the CPU."""

from __future__ import annotations

import pytest
import torch

from eva_lightning.svd import make_engine
from tests.svd_helpers import captured_variance, decaying, feed

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.mark.parametrize("name", ["exact", "incremental", "sketch"])
@pytest.mark.parametrize("dim", [96, 640])
def test_cuda_equals_cpu(name: str, dim: int) -> None:
    x = decaying(1500, dim)
    on_cpu = feed(make_engine(name, dim, 16), x.split(300)).result()
    engine = make_engine(name, dim, 16)
    with torch.autocast("cuda", dtype=torch.bfloat16):
        feed(engine, x.cuda().split(300))
    result = engine.result()
    assert result.components.device.type == "cuda"
    assert torch.allclose(result.singular_values.cpu(), on_cpu.singular_values, rtol=1e-3)
    captured = captured_variance(x, result.to("cpu").components)
    assert captured >= captured_variance(x, on_cpu.components) - 1e-4
    assert engine.captured(on_cpu.components) == pytest.approx(1.0, abs=1e-4)
