"""Whether a converted network computes what its ONNX graph does: both see the same random images."""

from __future__ import annotations

import numpy as np
import torch
from onnx.reference import ReferenceEvaluator
from torch import Tensor, nn
from torch.nn.functional import interpolate

from eva_lightning.errors import InputError
from eva_lightning.reading import reading
from tools.dinov2_small.graph import Backbone
from tools.dinov2_small.network import create_network
from tools.dinov2_small.release import Architecture

#: The largest error of a token must be below this; single precision leaves a hundredth of it.
TOLERANCE = 1e-4
#: Random images, of so many patches along a side: 224 px, the size that the graph declares.
IMAGES, SIDE = 2, 16


def relative_error(backbone: Backbone, name: str, architecture: Architecture) -> float:
    """The largest error of a token after the last norm, ``|timm's - the graph's| / |the graph's|``.

    The graph is computed by ONNX's own evaluator, which is written in NumPy.

    Args:
        backbone: The graph and what it was converted to.
        name: What the graph is called in errors.
        architecture: Of the network.

    Raises:
        InputError: The graph cannot be computed, or the error is not below `TOLERANCE`.
    """
    size = SIDE * architecture.patch
    images = np.random.default_rng(0).standard_normal((IMAGES, 3, size, size)).astype(np.float32)
    inputs = [value.name for value in backbone.model.graph.input]
    with reading(name, "get it again", "ONNX file"):
        (tokens,) = ReferenceEvaluator(backbone.model).run(None, dict.fromkeys(inputs, images))
        expected = torch.from_numpy(np.asarray(tokens, dtype=np.float64))
    with torch.inference_mode():
        model = _with_weights(backbone.tensors, architecture)
        found: Tensor = model.forward_features(torch.from_numpy(images)).double()  # type: ignore[operator]
    error = float("inf")
    if expected.shape == found.shape:
        error = float(((found - expected).norm(dim=-1) / expected.norm(dim=-1)).max())
    if not error < TOLERANCE:
        raise InputError(
            f"ONNX file {name} computes something else than {architecture.label} with its weights: the relative error "
            f"is {error:.2g} where less than {TOLERANCE:g} is expected"
        )
    return error


def _with_weights(tensors: dict[str, Tensor], architecture: Architecture) -> nn.Module:
    """timm's model for the images of the check. Its position embedding is resampled as the graph does it: bicubic,
    without antialiasing, to a number of patches."""
    position = tensors["pos_embed"]
    grid = position[:, 1:].unflatten(1, (architecture.grid, architecture.grid)).permute(0, 3, 1, 2)
    resampled = interpolate(grid, size=(SIDE, SIDE), mode="bicubic", align_corners=False)
    position = torch.cat([position[:, :1], resampled.flatten(2).transpose(1, 2)], 1)
    model = create_network(architecture, SIDE)
    model.load_state_dict({**tensors, "pos_embed": position})
    return model
