"""Adapters that start with a B that is not zero: PiSSA, MiLoRA, OLoRA, CorDA, LoRA-GA and others.

So that the function stays, most of them take ``scaling * B A`` out of the base weight, and the layer's change is
``B A`` less what it started as: an export to plain LoRA has to take that off.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from eva_lightning.adapters.adapter_layer import AdapterLayer
from eva_lightning.adapters.attention_roles import attention_role
from eva_lightning.errors import InputError
from eva_lightning.initialization import uniform_orthonormal
from eva_lightning.layer_inputs import LayerInputs


@dataclass(frozen=True)
class Start:
    """How an adapter starts, as far as its layers have to know.

    Attributes:
        product: What ``scaling * B A`` is at the start: "zero"; "taken" out of the base weight, so that the function
            stays; or "added", which moves the function (unless it is to be kept: then it is taken, too).
        peft: PEFT's ``init_lora_weights`` while layers are made; where that is True, all but "lora" is written later.
        from_data: Waits for statistics of training minibatches (:mod:`eva_lightning.methods.data_driven`).
        directions: Singular directions of a matrix of the weight's shape that it takes per rank; 0: ranks are free.
        make: ``make(layer)``: A and B from the base weight, for starts that PEFT does not have.
        even: Ranks are even numbers.
    """

    product: Literal["zero", "taken", "added"]
    peft: Any = True
    from_data: bool = False
    directions: int = 1
    make: Callable[[AdapterLayer], tuple[Tensor, Tensor]] | None = None
    even: bool = False

    @property
    def uses(self) -> str:
        """What it does with the base weight, as words before "the base weight"; empty for nothing."""
        if self.product == "taken":
            return "takes a part out of"
        if self.from_data:
            return "starts from the gradient of"
        return "makes A and B in the precision of" if self.even else ""


INITIALISATIONS: dict[str, Start] = {
    "lora": Start("zero", directions=0),
    "pissa": Start("taken", peft="pissa"),
    "milora": Start("taken", make=lambda layer: milora(layer)),
    "olora": Start("taken", peft="olora"),
    "ailora": Start("taken", make=lambda layer: ailora(layer)),
    "gaussian": Start("zero", peft="gaussian", directions=0),
    "orthogonal": Start("zero", peft="orthogonal", directions=0, even=True),
    # from PEFT's normal A, which is drawn as every other random A is
    "orthonormal": Start("zero", peft="gaussian", directions=0, make=lambda layer: orthonormal(layer)),
    "corda": Start("taken", from_data=True),
    "corda-kpm": Start("taken", from_data=True),
    "lora-ga": Start("taken", from_data=True, directions=2),
    "lora-ga-peft": Start("taken", from_data=True, directions=2),
    "lora-da": Start("added", from_data=True),
    "lora-one": Start("added", from_data=True),
    "gora": Start("added", from_data=True),
    "eva-gradient": Start("zero", from_data=True, directions=0),
}
"""Every way in which an adapter can start; "lora" is A random and B = 0."""

INITIAL_A, INITIAL_B = "initial_lora_A", "initial_lora_B"
"""Buffers of such layers, in checkpoints too: the A and B that left the base weight."""


def takes_from_base(initialisation: str, keep_function: bool = False) -> bool:
    """Whether ``scaling * B A`` leaves the base weight when an adapter starts."""
    product = INITIALISATIONS[initialisation].product
    return product == "taken" or (product == "added" and keep_function)


def capped(
    module: nn.Module, targets: Iterable[str], initialisation: str, r: int, alpha: float, use_rslora: bool
) -> dict[str, Any]:
    """PEFT's patterns of rank and alpha for layers with too few singular directions or inputs; the scaling stays.

    Raises:
        InputError: There is not even one direction (names the layer), or `r` is odd and the initialisation needs an
            even one.
    """
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    start = INITIALISATIONS[initialisation]
    if start.even and r % 2:
        raise InputError(f"{initialisation} needs an even rank, got {r}")
    for name in targets:
        layer: Any = module.get_submodule(name)
        limit = min(layer.weight.shape) // start.directions if start.directions else LayerInputs(layer).width
        rank = min(r, max(2, limit // 2 * 2) if start.even else limit)
        if rank < 1:
            raise InputError(
                f"{initialisation} needs layers of at least 2 inputs and outputs, but {name!r} has a weight of shape "
                f"{tuple(layer.weight.shape)}; leave it out"
            )
        if rank < r:
            pattern = "^" + re.escape(f"module.{name}")
            ranks[pattern] = rank
            alphas[pattern] = alpha * (rank / r) ** (0.5 if use_rslora else 1.0)
    return {"rank_pattern": ranks, "alpha_pattern": alphas}


def remember_start(layer: AdapterLayer) -> None:
    """Keep the A and B that the layer has now as those it started with."""
    with torch.no_grad():
        layer.module.register_buffer(INITIAL_A, layer.a.detach().clone())
        layer.module.register_buffer(INITIAL_B, layer.b.detach().clone())


def resize(layer: AdapterLayer, rank: int, alpha: float | None = None) -> None:
    """:meth:`AdapterLayer.resize` of a layer that may keep what it started as: that gets the new shapes too."""
    layer.resize(rank, alpha)
    if hasattr(layer.module, INITIAL_A):
        remember_start(layer)


def start_at(layer: AdapterLayer, a: Tensor, b: Tensor, take: bool = True) -> None:
    """Write A and B into a fresh adapter and take ``scaling * B A`` out of the base weight.

    A and B are rounded to the adapter's precision first, so that what leaves the weight is what the adapter gives
    back. Parameters are written in place: optimizers that hold them hold the new values.

    Args:
        layer: With B = 0 and its whole base weight.
        a: Shape ``(rank, in_features)``.
        b: Shape ``(out_features, rank)``.
        take: Out of the base weight; otherwise the weight stays and the layer's function moves by B A.
    """
    weight: Any = layer.base.weight
    with torch.no_grad():
        layer.a.copy_(a)
        layer.b.copy_(b)
        if not take:
            return
        delta = layer.module.scaling[layer.adapter] * layer.b.float() @ layer.a.float()
        delta = delta.T if layer.module.fan_in_fan_out else delta
        weight.copy_(weight.float() - delta)
        remember_start(layer)


def milora(layer: AdapterLayer) -> tuple[Tensor, Tensor]:
    """A and B from the least singular directions of the base weight, ``sqrt(s / scaling)`` in each.

    MiLoRA (Wang et al., 2024, section 3): the reverse of PiSSA, which keeps the large directions where pre-training
    left them and trains the small ones. PEFT has no such initialisation.

    Returns:
        Shapes ``(rank, in_features)`` and ``(out_features, rank)``, fp32.
    """
    return _singular_part(layer, slice(-layer.rank, None))


def ailora(layer: AdapterLayer) -> tuple[Tensor, Tensor]:
    """A and B of AILoRA (arXiv 2510.08034): PiSSA's for an attention's queries, MiLoRA's for its values.

    Queries adapt to a task and start from what the weight does most; values carry what pre-training has learned, which
    stays in the base weight.

    Returns:
        Shapes ``(rank, in_features)`` and ``(out_features, rank)``, fp32.

    Raises:
        InputError: The layer's name is neither that of queries nor that of values.
    """
    role = attention_role(layer.name)
    if role not in ("query", "value"):
        raise InputError(
            f"ailora adapts an attention's queries and values, and {layer.name!r} is not named like one (q, q_proj, "
            "query, v, v_proj, value, ...); leave it out"
        )
    return _singular_part(layer, slice(0, layer.rank)) if role == "query" else milora(layer)


def orthonormal(layer: AdapterLayer) -> tuple[Tensor, Tensor]:
    """A random A with orthonormal rows, uniform over all of them, and B = 0: EVA's scale without its directions.

    PEFT's "orthogonal" is another thing: A is ``N Q / 10`` with N normal and Q half the rows of an orthogonal
    ``rank x rank`` matrix, so that A has rank ``rank / 2`` and rows of other lengths, and B is not zero.

    Args:
        layer: Whose A has independent normal entries.

    Returns:
        Shapes ``(rank, in_features)``, fp64 on the CPU, and ``(out_features, rank)``.
    """
    return uniform_orthonormal(layer.a.detach().cpu().double().T).T, torch.zeros_like(layer.b)


def _singular_part(layer: AdapterLayer, chosen: slice) -> tuple[Tensor, Tensor]:
    """A and B whose ``scaling * B A`` are these singular directions of the base weight, half of each in either."""
    weight: Any = layer.base.weight
    u, s, vh = torch.linalg.svd(as_linear(layer, weight.detach().float()), full_matrices=False)
    root = (s[chosen] / layer.module.scaling[layer.adapter]).sqrt()
    return root[:, None] * vh[chosen], u[:, chosen] * root


def corda(layer: AdapterLayer, covariance: Tensor, least: bool = False) -> tuple[Tensor, Tensor]:
    """A and B as PEFT's CorDA makes them (Yang et al., 2024).

    They are directions of the weight seen through its inputs, ``svd(W C) C^-1``: the top ones in the
    instruction-previewed mode, where the inputs are the task's; the least ones in the knowledge-preserving mode, where
    the inputs are those of data that the model is to remain good at: what it does most on them stays in the base
    weight.

    Args:
        layer: A fresh adapter.
        covariance: Second moments of the layer's inputs, shape ``(in_features, in_features)``, finite and not all zero.
        least: The knowledge-preserving mode.

    Returns:
        Shapes ``(rank, in_features)`` and ``(out_features, rank)``, fp32.
    """
    from peft.tuners.lora.corda import CordaEigens, collect_eigens_for_layer

    base: Any = layer.base
    base.covariance_matrix = covariance
    try:
        found = collect_eigens_for_layer(base, layer.config)
    finally:
        del base.covariance_matrix
    chosen, device = slice(-layer.rank, None) if least else slice(layer.rank), base.weight.device
    base.eigens = CordaEigens(
        S_WC=found.S_WC[chosen].clone(), U_WC=found.U_WC[:, chosen].to(device), V_WC=found.V_WC[:, chosen].to(device)
    )
    return _made_by_peft(layer, lambda: layer.module.corda_init(layer.adapter, "corda"), "eigens")


def lora_ga_peft(layer: AdapterLayer, gradient: Tensor) -> tuple[Tensor, Tensor]:
    """A and B as PEFT's LoRA-GA with its default settings makes them.

    A takes the first ``rank`` right singular vectors of the gradient and B the next ``rank`` left ones. Unlike the
    authors (:func:`eva_lightning.methods.gradient_starts.lora_ga`) PEFT (0.21) multiplies B by their singular values
    and scales B alone: its A is larger or smaller by ``sqrt(gamma) / out_features ** 0.25`` and its B, for gradients
    below 1, smaller. PEFT finds the directions by a randomized SVD: the global generator decides the last digits.

    Args:
        layer: A fresh adapter.
        gradient: Of the training loss with respect to the base weight, in its shape.

    Returns:
        Shapes ``(rank, in_features)`` and ``(out_features, rank)``, in the precision of the base weight.
    """
    from peft.tuners.lora.config import LoraGAConfig

    base: Any = layer.base
    base._peft_loraga_grad = gradient
    return _made_by_peft(layer, lambda: layer.module.lora_ga_init(layer.adapter, LoraGAConfig()), "_peft_loraga_grad")


def _made_by_peft(layer: AdapterLayer, initialise: Callable[[], None], statistic: str) -> tuple[Tensor, Tensor]:
    """What an initialisation of PEFT's sets A and B to; the layer is left as it was."""
    base: Any = layer.base
    parameters = (layer.a, layer.b, base.weight)
    before = [p.data for p in parameters]  # PEFT puts new tensors in the place of these
    try:
        initialise()
        return layer.a.data, layer.b.data
    finally:
        for parameter, data in zip(parameters, before, strict=True):
            parameter.data = data
        vars(base).pop(statistic, None)


def as_linear(layer: AdapterLayer, matrix: Tensor) -> Tensor:
    """A matrix in the shape of the base weight as ``(out_features, in_features)``; transformers' Conv1D transposes."""
    return matrix.T if layer.module.fan_in_fan_out else matrix


@contextmanager
def put_back_on_failure(layers: Iterable[AdapterLayer], take: bool = True) -> Iterator[None]:
    """Undo what :func:`start_at` did to these layers if the body raises, Ctrl-C included; `take` is as there."""
    chosen = list(layers)
    bases: list[Any] = [layer.base.weight for layer in chosen] if take else []
    parameters = [*bases, *(layer.a for layer in chosen), *(layer.b for layer in chosen)]
    before = [p.detach().clone() for p in parameters]
    try:
        yield
    except BaseException:
        with torch.no_grad():
            for parameter, value in zip(parameters, before, strict=True):
                parameter.copy_(value)
        for layer in chosen:
            if hasattr(layer.module, INITIAL_A):
                remember_start(layer)
        raise
