"""How many ranks each layer gets: explained-variance scores and their global redistribution (paper section 3.5)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from eva_lightning.errors import InputError, check_choice, check_number

METRICS = ("ratio", "eq6", "sum", "max", "raw")


def explained_variance(singular_values: Tensor, total_variance: float, n_samples: int, metric: str = "ratio") -> Tensor:
    """Score of every component of one layer, by which components of all layers are compared.

    With ``lambda_j = sigma_j**2``, M tokens and C the scatter matrix of the centred tokens:

    ========  ==============================================  ==========================================
    metric    score                                           meaning
    ========  ==============================================  ==========================================
    "ratio"   ``lambda_j / tr C``                             share of ALL variance (the default)
    "eq6"     ``lambda_j / ((M - 1) * sum_i sigma_i)``        equation 6 of the paper, to the letter
    "sum"     ``lambda_j / sum_i lambda_i``                   share of the kept variance
    "max"     ``lambda_j / lambda_1``                         EVA-Max (Table 18)
    "raw"     ``lambda_j / (M - 1)``                          EVA-Raw (Table 18): variance itself
    ========  ==============================================  ==========================================

    "ratio", "sum" and "max" do not change when a layer's inputs are multiplied by a constant. "eq6" grows linearly
    and "raw" quadratically with it, so layers with large activations attract ranks; the authors' own code uses "ratio".

    Args:
        singular_values: Kept singular values of the centred tokens, shape ``(k,)``.
        total_variance: ``tr C``, the sum of all squared singular values.
        n_samples: M, tokens counted.
        metric: One of `METRICS`.

    Returns:
        Scores, shape ``(k,)``, fp64 on the CPU; all 0 when nothing varies.

    Raises:
        InputError: Unknown metric.
    """
    check_choice("metric", metric, METRICS)
    sigma = singular_values.detach().cpu().double()
    variance = sigma.square()
    denominators = {
        "ratio": float(total_variance),
        "eq6": (n_samples - 1) * float(sigma.sum()),
        "sum": float(variance.sum()),
        "max": float(variance.max()) if len(variance) else 0.0,
        "raw": float(n_samples - 1),
    }
    denominator = denominators[metric]
    return variance / denominator if denominator > 0 else torch.zeros_like(variance)


def redistribute_ranks(
    scores: Mapping[str, Tensor], budget: int, max_rank: int | Mapping[str, int] | None = None
) -> dict[str, int]:
    """Keep the `budget` largest scores over all layers; a layer's rank is how many of its components were kept.

    Equal scores are taken by component index, then by the order of layers. Components of score 0 carry no variance:
    they are used only when the positive ones do not fill the budget, and only in layers that have a positive score.

    Args:
        scores: Per layer the scores of its components, shape ``(k,)``, strongest first.
        budget: Ranks to hand out, usually layers times r.
        max_rank: Cap on the rank, for all layers or per layer; None: the number of scores.

    Returns:
        Rank per layer, in the order of `scores`. They sum to `budget`, or to what the caps of layers with variance
        allow if that is less. A layer without variance gets 0.

    Raises:
        InputError: Negative budget or cap, or scores that are negative, NaN or infinite.
    """
    check_number("budget", budget, at_least=0)
    candidates: list[tuple[float, int, int]] = []
    for position, (layer, values) in enumerate(scores.items()):
        numbers = [float(value) for value in values]
        if any(not 0 <= number < float("inf") for number in numbers):
            raise InputError(f"scores must be finite and not negative, got {numbers} for layer {layer!r}")
        cap = len(numbers) if max_rank is None else max_rank if isinstance(max_rank, int) else max_rank[layer]
        if cap < 0:
            raise InputError(f"the largest rank must be at least 0, got {cap} for layer {layer!r}")
        if any(numbers):
            candidates += [(-number, index, position) for index, number in enumerate(numbers[:cap])]
    layers = list(scores)
    ranks = dict.fromkeys(layers, 0)
    for _, _, position in sorted(candidates)[:budget]:
        ranks[layers[position]] += 1
    return ranks
