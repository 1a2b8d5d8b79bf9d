from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from eva_lightning.adapters import find_adapters, inject, merge_and_unload
from eva_lightning.vision.merged_evaluation import merged_in_fp32
from eva_lightning.vision.module import ImageClassifier


def trained(dtype: torch.dtype = torch.float32, **options: Any) -> ImageClassifier:
    torch.manual_seed(0)
    module = ImageClassifier("test_vit", 5, 32, split_fused=True)
    inject(module, r=4, alpha=2.0, head=module.head_name, **options)
    for name, parameter in module.named_parameters():
        if parameter.requires_grad and "lora_E" not in name:
            nn.init.normal_(parameter, std=0.1)
    return module.to(dtype).eval()


KINDS: list[dict[str, Any]] = [{}, {"use_dora": True}, {"initialisation": "pissa"}]


@pytest.mark.parametrize("options", KINDS, ids=str)
def test_inside_there_are_fp32_weights_without_adapters(options: dict[str, Any]) -> None:
    module, x = trained(**options), torch.randn(3, 3, 32, 32)
    expected = module(x)
    with merged_in_fp32(module):
        assert not find_adapters(module)
        assert not any("lora" in name for name, _ in module.named_parameters())
        torch.testing.assert_close(module(x), expected, rtol=1e-4, atol=1e-5)
    assert len(find_adapters(module)) == 6 * 6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", [*KINDS, {"adalora": {"target_r": 2, "total_step": 10}}], ids=str)
@pytest.mark.parametrize("fails", [False, True])
def test_afterwards_everything_is_bit_for_bit_as_before(
    dtype: torch.dtype, options: dict[str, Any], fails: bool
) -> None:
    module, x = trained(dtype, **options), torch.randn(3, 3, 32, 32).to(dtype)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    expected = module(x)
    try:
        with merged_in_fp32(module):
            assert {p.dtype for p in module.parameters()} == {torch.float32}
            if fails:
                raise KeyboardInterrupt
    except KeyboardInterrupt:
        assert fails
    after = module.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], value) and after[name].dtype == value.dtype for name, value in before.items())
    assert torch.equal(module(x), expected)


def test_bf16_weights_are_merged_without_rounding_to_bf16() -> None:
    module, x = trained(torch.bfloat16), torch.randn(3, 3, 32, 32)
    reference = trained(torch.bfloat16).float()
    merge_and_unload(reference)
    rounded = merge_and_unload(trained(torch.bfloat16)).float()
    with torch.no_grad(), merged_in_fp32(module):
        torch.testing.assert_close(module(x), reference(x), rtol=1e-5, atol=1e-6)
        assert not torch.allclose(rounded(x), reference(x), rtol=1e-5, atol=1e-6)
