from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.decomposition import IncrementalPCA
from torch import Tensor, nn
from torch.utils.data import Dataset

from eva_lightning.callback import EVAInitCallback
from eva_lightning.vision.data.datamodule import Batch
from eva_lightning.vision.decomposition import decompose
from eva_lightning.vision.module import ImageClassifier
from eva_lightning.vision.protocol import OnePassPCA

TOKENS = 5  # 32 pixels, patches of 16, and [CLS]


class Images(Dataset[Batch]):
    """Random images that remember in which order they were asked for."""

    def __init__(self, count: int) -> None:
        scale = torch.linspace(3, 0.5, 32)[:, None]
        self.pixels = torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(1)) * scale
        self.asked: list[list[int]] = []

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, index: int) -> Batch:
        return self.pixels[index], torch.tensor(0)

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        self.asked.append(list(indices))
        return self.pixels[list(indices)], torch.zeros(len(indices), dtype=torch.long)


def classifier() -> ImageClassifier:
    torch.manual_seed(0)
    return ImageClassifier("vit_tiny_patch16_224", 4, 32, split_fused=True,
                           model_options={"depth": 2, "embed_dim": 48, "num_heads": 4})  # fmt: skip


def inputs(module: nn.Module, name: str, pixels: Tensor) -> np.ndarray[Any, Any]:
    seen: list[Tensor] = []
    handle = module.get_submodule(name).register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        module.eval()(pixels)
    handle.remove()
    return seen[0].flatten(0, 1).numpy()


def test_is_the_incremental_pca_of_scikit_learn_over_one_shuffled_pass() -> None:
    """The authors call ``partial_fit`` of a buffer as soon as it holds enough tokens, and drop what is left over."""
    module, images = classifier(), Images(110)
    options = OnePassPCA(images=10, min_tokens=14 * TOKENS, components=8)
    state = decompose(module, images, options, seed=3)
    # two forward passes of 10 images are the first to reach 70 tokens; 110 images give 5 updates, 10 are left over
    updates = images.asked
    assert [len(batch) for batch in updates] == [20] * 5
    assert len({i for batch in updates for i in batch}) == 100
    assert sorted(updates[0]) != updates[0]
    for name in ("model.blocks.0.attn.qkv.q", "model.blocks.1.mlp.fc1", "model.blocks.1.mlp.fc2"):
        reference = IncrementalPCA(n_components=8)
        for batch in updates:
            reference.partial_fit(inputs(module, name, images.pixels[batch]))
        cosines = (state.components[name] * torch.from_numpy(reference.components_)).sum(dim=1).abs()
        assert cosines.min() > 0.999, name
        theirs = torch.from_numpy(reference.explained_variance_ratio_).float()
        torch.testing.assert_close(state.explained_variance_ratio[name], theirs, rtol=1e-3, atol=1e-6)
        assert state.n_samples[name] == reference.n_samples_seen_ == 100 * TOKENS
    assert len(state.components) == 6 * 2
    assert state.shared_with["model.blocks.0.attn.qkv.v"] == "model.blocks.0.attn.qkv.q"
    assert "model.head" not in state.components


def test_components_do_not_depend_on_rank_and_no_test_of_convergence_ends_the_pass() -> None:
    images = Images(400)
    images.pixels[:] = images.pixels[:1]  # converged at once
    images.pixels += 1e-3 * torch.randn(images.pixels.shape)
    state = decompose(classifier(), images, OnePassPCA(images=10, min_tokens=40, components=8))
    assert state.n_batches == 40
    assert {len(values) for values in state.singular_values.values()} == {8}


def test_few_tokens_are_used_all_the_same() -> None:
    state = decompose(classifier(), Images(24), OnePassPCA())
    assert state.n_batches == 1
    assert set(state.n_samples.values()) == {24 * TOKENS}
    assert {len(v) for v in state.components.values()} == {32}


def test_module_is_left_as_it_was() -> None:
    module = classifier().train()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    random = torch.get_rng_state()
    decompose(module, Images(24), OnePassPCA())
    assert torch.equal(torch.get_rng_state(), random)
    assert all(m.training for m in module.modules())
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert not any(m._forward_pre_hooks for m in module.modules())


@pytest.mark.parametrize("rank", [2, 8, 16])
def test_all_components_compete_whatever_the_rank(rank: int) -> None:
    options = OnePassPCA()
    assert round(rank * options.rho(rank, 2.0)) == 32
    assert options.rho(rank, 1.0) == 1.0
    callback = EVAInitCallback(rho=options.rho(rank, 2.0), r=rank)
    assert callback.rho == 32 / rank


def test_more_ranks_than_components_are_refused() -> None:
    with pytest.raises(ValueError, match="into 32 components, so rank must be at most 32, got 33"):
        OnePassPCA().rho(33, 2.0)
