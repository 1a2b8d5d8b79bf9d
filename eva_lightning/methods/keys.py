"""The names of the methods, in one table: what users type, what reports print, what each method needs.

Nothing heavy is imported here, so that a mistyped name is reported before torch is loaded.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from eva_lightning.errors import InputError, unknown

StateKind = Literal["major", "minor"]
"""Which end of the spectrum of a layer's inputs an EVA state holds: components of most, or of least, variance."""

DEFAULT_RHO = 2.0
"""EVA's ρ where nothing is said (paper, section 4.1: ρ = 2 gives the better results)."""


@dataclass(frozen=True)
class MethodTraits:
    """What is true of a method whatever its settings.

    Attributes:
        label: How the paper's tables print it (Tables 8, 10, 12, 20 and 25).
        adapts: Has adapters, and so a rank.
        state_kind: Which EVA state it starts from; None for methods without.
        redistributes: Spreads the rank budget unevenly, and so has a ρ.
    """

    label: str
    adapts: bool = True
    state_kind: StateKind | None = None
    redistributes: bool = False


def _eva(label: str) -> MethodTraits:
    return MethodTraits(label, state_kind="major", redistributes=True)


METHOD_TRAITS: dict[str, MethodTraits] = {
    "linear": MethodTraits("Linear", adapts=False),
    "fft": MethodTraits("FFT", adapts=False),
    "lora": MethodTraits("LoRA"),
    "dora": MethodTraits("DoRA"),
    "rslora": MethodTraits("rsLoRA"),
    "lora+": MethodTraits("LoRA+"),
    "adalora": MethodTraits("AdaLoRA"),
    "pissa": MethodTraits("PiSSA"),
    "milora": MethodTraits("MiLoRA"),
    "olora": MethodTraits("OLoRA"),
    "corda": MethodTraits("CorDA"),
    "lora-ga": MethodTraits("LoRA-GA"),
    "eva": _eva("EVA"),
    "eva-dora": _eva("EVA+DoRA"),
    "eva-whiten": _eva("EVA-whiten"),
    "eva-rotate": _eva("EVA-rot"),
    "eva-permute": _eva("EVA-perm"),
    "eva-minor": MethodTraits("EVA-minor", state_kind="minor"),
    "lora-redistribute": _eva("LoRA-redist"),
}
"""Every method for images by name, in the order of reports."""


def eva_state_kind(method: str) -> StateKind | None:
    """Which kind of EVA state `method` starts from: one of kind "major" serves all but eva-minor; None: it needs none.

    Raises:
        InputError: Unknown method; names the nearest.
    """
    return MethodKey.parse(method).state_kind


@dataclass(frozen=True)
class MethodKey:
    """A method and, where it has one, its ρ: what users write as ``lora``, ``eva``, ``eva:1`` or ``eva-dora:1.5``.

    Attributes:
        method: A name in `METHOD_TRAITS`.
        rho: Largest rank over mean rank, at least 1 (1 keeps ranks uniform); None for methods without redistribution.

    Raises:
        InputError: Unknown method (names the nearest), ρ below 1, missing, or given to a method that has none.
    """

    method: str
    rho: float | None = None

    def __post_init__(self) -> None:
        if self.method not in METHOD_TRAITS:
            raise InputError(unknown("method", self.method, METHOD_TRAITS))
        if not self.traits.redistributes:
            if self.rho is not None:
                raise InputError(
                    f"{self.method} has no rho, as it keeps ranks as they are, got {self.method}:{self.rho:g}"
                )
        elif self.rho is None or not 1 <= self.rho < math.inf:
            raise InputError(f"the rho of {self.method} must be a number of at least 1, got {self.rho}")

    @classmethod
    def parse(cls, text: str) -> MethodKey:
        """A key from what a user typed: a name, or a name, a colon and ρ; ρ is 2 where it is left out.

        Raises:
            InputError: As the class, or what follows the colon is no number.
        """
        method, colon, number = text.strip().partition(":")
        traits = METHOD_TRAITS.get(method)
        if traits is None:
            raise InputError(unknown("method", method, METHOD_TRAITS))
        if not colon:
            return cls(method, DEFAULT_RHO if traits.redistributes else None)
        try:
            rho = float(number)
        except ValueError:
            raise InputError(
                f"what follows the colon in {text.strip()!r} must be rho, a number of at least 1"
            ) from None
        return cls(method, rho)

    @property
    def traits(self) -> MethodTraits:
        """What is true of the method whatever its ρ."""
        return METHOD_TRAITS[self.method]

    @property
    def key(self) -> str:
        """The shortest text that :meth:`parse` reads as this key: one spelling for one thing."""
        return self.method if self.rho in (None, DEFAULT_RHO) else f"{self.method}:{self.rho:.12g}"

    @property
    def label(self) -> str:
        """How reports print it: as the paper's tables do, with ρ where it is not 2."""
        return self.traits.label if self.rho in (None, DEFAULT_RHO) else f"{self.traits.label} (ρ = {self.rho:g})"

    @property
    def adapts(self) -> bool:
        """Whether it has adapters, and so a rank."""
        return self.traits.adapts

    @property
    def state_kind(self) -> StateKind | None:
        """Which kind of EVA state it starts from, or None."""
        return self.traits.state_kind

    @property
    def streams_eva(self) -> bool:
        """Whether it starts from an EVA state, given or streamed."""
        return self.traits.state_kind is not None

    def components(self, rank: int) -> int:
        """Components per layer that its EVA state must hold at mean rank `rank`; 0 where it needs none."""
        return round(rank * (self.rho or 1.0)) if self.streams_eva else 0

    def __str__(self) -> str:
        return self.key
