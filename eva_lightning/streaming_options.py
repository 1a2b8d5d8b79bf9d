"""How training minibatches are streamed through the model: one object, checked when it is made (no torch here)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from eva_lightning.errors import check_choice, check_number

ENGINES = ("auto", "exact", "incremental", "sketch")
STOPPING_RULES = ("auto", "captured", "cosine", "never")

TokensPerSample = int | Literal["auto"] | None
"""Tokens to use per sample; ``"auto"`` for :func:`eva_lightning.token_subsampling.automatic`, ``None`` for all."""


@dataclass(frozen=True)
class StreamingOptions:
    """How minibatches are streamed and decomposed.

    Attributes:
        tau: Convergence threshold in (0, 1].
        delta: Share of the layers that must have converged, in (0, 1].
        max_batches: Most minibatches to stream.
        tokens_per_sample: Tokens to use per sample, different ones in every minibatch; ``None``: all, which also means
            exact decompositions; ``"auto"``: at least 32 (:func:`eva_lightning.token_subsampling.automatic`).
        engine: ``"exact"`` (covariance), ``"incremental"`` (the paper's Algorithm 2), ``"sketch"`` (randomized range
            finder, for very wide layers) or ``"auto"``: exact, and the sketch for layers that are much wider than the
            others (unless ``tokens_per_sample`` is ``None``) or would not fit ``memory_budget``
            (:func:`eva_lightning.svd.choose_engines`).
        stopping: ``"captured"`` (captured variance over doubling intervals), ``"cosine"`` (the paper's rule),
            ``"never"`` (stream ``max_batches``) or ``"auto"``: the paper's rule for the paper's engine, else captured.
        seed: For the random parts: the choice of tokens, and the initialisations "rotate", "permute", "redistribute".
        memory_budget: Bytes that the states of all decompositions may take together.
        offload: Keep states that exceed the budget in the CPU's memory (slower: their tokens are copied there).

    Raises:
        InputError: A value is out of range or of the wrong type.
    """

    tau: float = 0.99
    delta: float = 1.0
    max_batches: int = 64
    tokens_per_sample: TokensPerSample = "auto"
    engine: str = "auto"
    stopping: str = "auto"
    seed: int = 0
    memory_budget: int = 2**31
    offload: bool = False

    def __post_init__(self) -> None:
        check_number("tau", self.tau, above=0, at_most=1)
        check_number("delta", self.delta, above=0, at_most=1)
        check_number("max_batches", self.max_batches, at_least=1, whole=True)
        if self.tokens_per_sample not in (None, "auto"):
            check_number("tokens_per_sample", self.tokens_per_sample, at_least=1, whole=True)
        check_choice("engine", self.engine, ENGINES)
        check_choice("stopping", self.stopping, STOPPING_RULES)
        check_number("memory_budget", self.memory_budget, at_least=1, whole=True)
