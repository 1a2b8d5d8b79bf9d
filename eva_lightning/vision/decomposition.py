"""EVA's decomposition as the authors' vision code computes it: one shuffled pass of incremental PCA, in fp32."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence

import torch
from rich.progress import Progress
from torch import Tensor, nn
from torch.utils.data import Dataset

from eva_lightning.adapters.targets import find_targets
from eva_lightning.layer_inputs import inputs_of
from eva_lightning.state import EVAState
from eva_lightning.streaming import compute_eva_state
from eva_lightning.streaming_options import StreamingOptions
from eva_lightning.vision.data.datamodule import Batch
from eva_lightning.vision.module import ImageClassifier
from eva_lightning.vision.protocol import OnePassPCA


def decompose(
    module: ImageClassifier,
    images: Dataset[Batch],
    options: OnePassPCA,
    *,
    target_modules: Sequence[str] | None = None,
    seed: int = 0,
    device: torch.device | str = "cpu",
    progress: bool = False,
) -> EVAState:
    """Components of the inputs of every layer that gets an adapter, over all of `images` once.

    The layers are, by default, the linear ones of `module` but its head. Their inputs go into incremental PCA (paper,
    Algorithm 2; scikit-learn's ``IncrementalPCA`` in the authors' code) in batches of at least ``options.min_tokens``
    tokens. A layer that sees fewer tokens per image than the median one, such as in attention pooling, gets smaller
    batches.

    Args:
        module: Without adapters, in fp32; back on its own device afterwards.
        images: Data set of images ``(3, H, W)`` and labels that fetches lists (``__getitems__``), as
            :class:`~eva_lightning.vision.data.datamodule.SplitDataset` does.
        options: Sizes.
        target_modules: Layers to adapt; None for every linear one but the head.
        seed: Seed of the order.
        device: Where to compute.
        progress: Show a progress bar.

    Returns:
        A state with ``options.components`` components per layer (at most its width) and no ranks, for
        ``EVAInitCallback(state=...)``.
    """
    names, _ = find_targets(module, target_modules, head=module.head_name)
    layers = {name: module.get_submodule(name) for name in names}
    home = next(module.parameters()).device
    module.to(device)
    try:
        batches = _batches(images, _images_per_update(module, layers, images, options), options, seed)
        stream = StreamingOptions(
            max_batches=len(batches),
            tokens_per_sample=None,
            engine="incremental",
            stopping="never",
        )
        with Progress(disable=not progress, transient=True) as bar:
            task = bar.add_task("EVA: incremental PCA", total=len(batches))
            return compute_eva_state(
                module,
                lambda: _fetch(images, batches, device),
                {name: inputs_of(layer) for name, layer in layers.items()},
                options.components,
                stream,
                progress=lambda n, share: bar.update(task, completed=n),
            )
    finally:
        module.to(home)


def _images_per_update(
    module: nn.Module, layers: dict[str, nn.Module], images: Dataset[Batch], options: OnePassPCA
) -> int:
    """Images whose tokens make one update: whole forward passes until there are enough tokens, as in a buffer."""
    tokens = statistics.median(_tokens_per_image(module, layers, images))
    passes = -(-options.min_tokens // round(options.images * tokens))
    return options.images * passes


def _tokens_per_image(module: nn.Module, layers: dict[str, nn.Module], images: Dataset[Batch]) -> list[int]:
    seen: dict[str, int] = {}
    handles = [
        layer.register_forward_pre_hook(
            lambda layer, args, name=name: seen.__setitem__(
                name, args[0].numel() // getattr(layer, "in_channels", args[0].shape[-1])
            )
        )
        for name, layer in layers.items()
    ]
    training = module.training
    try:
        with torch.no_grad():
            module.eval()(images[0][0][None].to(next(module.parameters()).device))
    finally:
        module.train(training)
        for handle in handles:
            handle.remove()
    return list(seen.values())


def _batches(images: Dataset[Batch], size: int, options: OnePassPCA, seed: int) -> list[list[int]]:
    count = len(images)  # type: ignore[arg-type]
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()
    batches = [order[start : start + size] for start in range(0, count, size)]
    # what is left over would stay in the authors' buffer
    return [batch for batch in batches if len(batch) == size] or batches


def _fetch(images: Dataset[Batch], batches: list[list[int]], device: torch.device | str) -> Iterator[Tensor]:
    for batch in batches:
        pixels, _ = images.__getitems__(batch)  # type: ignore[attr-defined]
        yield pixels.to(device)
