"""How training minibatches are streamed through the model: one object, checked when it is made (no torch here)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from eva_lightning.errors import InputError, check_choice, check_number

if TYPE_CHECKING:
    from typing_extensions import Self

MAX_BATCHES = {"fast": 64, "paper": 1000}
"""The algorithms, and the most minibatches that each streams where nothing is said."""
ALGORITHMS = tuple(MAX_BATCHES)
ENGINES = ("auto", "exact", "incremental", "sketch")
STOPPING_RULES = ("auto", "captured", "cosine", "never")

TokensPerSample = int | Literal["auto"] | None
"""Tokens to use per sample; ``"auto"`` for :func:`eva_lightning.token_subsampling.automatic`, ``None`` for all."""


@dataclass(frozen=True)
class StreamingOptions:
    """How minibatches are streamed and decomposed.

    Attributes:
        algorithm: ``"fast"``: as the options below say, which are made for speed; or ``"paper"``: Algorithms 1 and 2 of
            the paper as its authors and PEFT run them. Every token goes into the incremental SVD of Ross et al., the
            training data are started over until the components that get a rank have converged by cosine, and a layer
            whose have is left alone (:class:`eva_lightning.svd.SelectedCosineRule`). It says itself which engine,
            stopping rule and tokens to use.
        tau: Convergence threshold in (0, 1].
        delta: Share of the layers that must have converged, in (0, 1]; of the components that get a rank with the
            paper's algorithm (paper, section C.3).
        max_batches: Most minibatches to stream; ``None``: 64, or 1,000 with the paper's algorithm (the paper needs 90
            for Llama-2-7B, Figure 11), which warns of what had not converged by then.
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

    algorithm: str = "fast"
    tau: float = 0.99
    delta: float = 1.0
    max_batches: int | None = None
    tokens_per_sample: TokensPerSample = "auto"
    engine: str = "auto"
    stopping: str = "auto"
    seed: int = 0
    memory_budget: int = 2**31
    offload: bool = False

    def __post_init__(self) -> None:
        check_choice("algorithm", self.algorithm, ALGORITHMS)
        check_number("tau", self.tau, above=0, at_most=1)
        check_number("delta", self.delta, above=0, at_most=1)
        if self.max_batches is not None:
            check_number("max_batches", self.max_batches, at_least=1, whole=True)
        if self.tokens_per_sample not in (None, "auto"):
            check_number("tokens_per_sample", self.tokens_per_sample, at_least=1, whole=True)
        check_choice("engine", self.engine, ENGINES)
        check_choice("stopping", self.stopping, STOPPING_RULES)
        check_number("memory_budget", self.memory_budget, at_least=1, whole=True)
        if self.algorithm == "paper":
            self._refuse_contradictions()

    def _refuse_contradictions(self) -> None:
        for name, allowed, what in (
            ("engine", ("auto", "incremental"), "decomposes by the incremental SVD"),
            ("stopping", ("auto",), "stops by a rule of its own"),
            ("tokens_per_sample", (None, "auto"), "uses every token"),
        ):
            value = getattr(self, name)
            if value not in allowed:
                raise InputError(
                    f"algorithm='paper' {what}: leave {name}={value!r} out, or choose algorithm='fast'", setting=name
                )

    @property
    def limit(self) -> int:
        """Most minibatches to stream: those asked for, or the algorithm's."""
        return MAX_BATCHES[self.algorithm] if self.max_batches is None else self.max_batches

    def resolved(self) -> Self:
        """The same with the algorithm's own choices in the place of what was left to it."""
        own = {"engine": "incremental", "tokens_per_sample": None} if self.algorithm == "paper" else {}
        return replace(self, max_batches=self.limit, **own)  # type: ignore[arg-type]
