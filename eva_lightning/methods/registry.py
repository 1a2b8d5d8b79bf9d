"""Every fine-tuning method in one table, and how users write one: ``lora``, ``eva``, ``eva:1``.

Nothing heavy is imported here, so that a mistyped name is reported before torch is loaded. A new method is one entry
in :data:`METHODS` and one prepare function (:class:`eva_lightning.methods.apply.Prepare`).
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from eva_lightning.errors import InputError, unknown

Half = Literal["vision", "rl"]
"""The two halves of the paper's experiments: VTAB-1K and Meta-World."""

StateKind = Literal["major", "minor"]
"""Which end of the spectrum of a layer's inputs an EVA state holds: components of most, or of least, variance."""

Needs = Literal["nothing", "inputs", "gradients", "inputs and gradients"]
"""What a method asks of training data before training starts: inputs of layers, gradients of their weights."""

DEFAULT_RHO = 2.0
"""EVA's ρ where nothing is said. The paper names no default: it searches ρ = 1 and ρ = 2 and reports the better one
(section G), and finds that redistribution has converged at about 2 (section 3.5)."""


@dataclass(frozen=True)
class Method:
    """What is true of a method whatever the user's settings.

    Attributes:
        name: What users type.
        label: What tables and figures print, as the paper's tables do (Tables 8, 10, 12, 20 and 25).
        trains: What is trained. With adapters, the head and (by default) all biases train too.
        needs: What the method asks of training data before training starts.
        redistributes: Spreads the rank budget unevenly, and so has a ρ.
        searches_rho: Its ρ is searched where the paper searches it (section G), unless one is given. Ablations keep
            theirs: they are about what redistributed ranks or components are worth.
        changes_base: The base weights are other ones when training starts.
        moves_function: Adapters change what the module computes when they start, unless the user asks to keep it: then
            the base weights are other ones.
        state_kind: Which EVA state it can start from, or None.
        prepare: Where its prepare function is, ``"module:function"``.
        fixed: Keyword arguments of that function: what the user does not choose.
        halves: Where it is offered.
        revision: Counts the changes of what it computes: results of before are not taken for those of now.
    """

    name: str
    label: str
    trains: Literal["adapters", "everything", "head"] = "adapters"
    needs: Needs = "nothing"
    redistributes: bool = False
    searches_rho: bool = False
    changes_base: bool = False
    moves_function: bool = False
    state_kind: StateKind | None = None
    prepare: str = "eva_lightning.methods.lora:prepare"
    fixed: Mapping[str, Any] = field(default_factory=dict, hash=False)
    halves: tuple[Half, ...] = ("vision", "rl")
    revision: int = 1

    @property
    def adapts(self) -> bool:
        """Whether it has adapters, and so a rank."""
        return self.trains == "adapters"

    def prepare_function(self) -> Callable[..., Any]:
        """The prepare function itself, a :class:`~eva_lightning.methods.apply.Prepare`; imports torch and Lightning."""
        module, _, function = self.prepare.partition(":")
        found: Callable[..., Any] = getattr(importlib.import_module(module), function)
        return found


def _full(name: str, label: str, **traits: Any) -> Method:
    return Method(name, label, prepare=f"eva_lightning.methods.full:{name}", **traits)


def _weight_based(name: str, label: str, **rest: Any) -> Method:
    return Method(name, label, changes_base=True, **{"fixed": {"initialisation": name}, **rest})


def _data_driven(name: str, label: str, needs: Needs, *, moves: bool = False, **traits: Any) -> Method:
    prepare = "eva_lightning.methods.data_driven:prepare"
    traits = traits or ({"moves_function": True} if moves else {"changes_base": True})
    return Method(name, label, needs=needs, prepare=prepare, fixed={"kind": name}, **traits)


def _eva(name: str, label: str, *, state_kind: StateKind = "major", redistributes: bool = True, **rest: Any) -> Method:
    prepare = "eva_lightning.methods.eva:prepare"
    return Method(
        name, label, needs="inputs", redistributes=redistributes, state_kind=state_kind, prepare=prepare, **rest
    )


def _ablation(name: str, label: str, *, state_kind: StateKind = "major", **fixed: Any) -> Method:
    redistributes = "rho" not in fixed
    return _eva(name, label, state_kind=state_kind, redistributes=redistributes, fixed=fixed)


_TABLE = (
    _full("scratch", "From scratch", trains="everything", changes_base=True, halves=("rl",)),
    _full("linear", "Linear", trains="head", halves=("vision",)),
    _full("fft", "FFT", trains="everything", revision=2),
    Method("lora", "LoRA"),
    Method("dora", "DoRA", fixed={"use_dora": True}),
    Method("rslora", "rsLoRA", fixed={"use_rslora": True}),
    Method("lora+", "LoRA+", prepare="eva_lightning.methods.lora:prepare_plus"),
    Method("adalora", "AdaLoRA", prepare="eva_lightning.methods.adalora:prepare", revision=2),
    _weight_based("pissa", "PiSSA"),
    _weight_based("milora", "MiLoRA"),
    _weight_based("olora", "OLoRA"),
    # no command line takes the Decision Transformer's fused projections apart
    _weight_based(
        "ailora", "AILoRA", prepare="eva_lightning.methods.lora:prepare_ailora", fixed={}, halves=("vision",)
    ),
    Method("gaussian", "LoRA (normal A)", fixed={"initialisation": "gaussian"}),
    Method("orthogonal", "Orthogonal", fixed={"initialisation": "orthogonal"}),
    Method("orthonormal", "LoRA (orthonormal A)", fixed={"initialisation": "orthonormal"}),
    _data_driven("corda", "CorDA", needs="inputs"),
    _data_driven("corda-kpm", "CorDA (KPM)", needs="inputs"),
    _data_driven("lora-ga", "LoRA-GA", needs="gradients", changes_base=True, revision=2),
    _data_driven("lora-ga-peft", "LoRA-GA (PEFT)", needs="gradients"),
    _data_driven("lora-da", "LoRA-DA", needs="inputs and gradients", moves=True),
    _data_driven("lora-one", "LoRA-One", needs="gradients", moves=True),
    _data_driven("gora", "GoRA", needs="gradients", moves=True),
    _eva("eva", "EVA", searches_rho=True),
    _data_driven("eva-gradient", "EVA-grad", needs="gradients", redistributes=True),
    _eva("eva-dora", "EVA+DoRA", searches_rho=True, fixed={"use_dora": True}),
    _ablation("eva-whiten", "EVA-whiten", init="whiten"),
    _ablation("eva-lora-norm", "EVA-LoRA-norm", init="lora-norm"),
    _ablation("eva-rotate", "EVA-rot", init="rotate"),
    _ablation("eva-permute", "EVA-perm", init="permute"),
    # uniform ranks: the least explained variance is no sign of where rank is needed (paper, Table 12)
    _ablation("eva-minor", "EVA-minor", state_kind="minor", init="minor", rho=1.0),
    _ablation("lora-redistribute", "LoRA-redist", init="redistribute"),
    # ranks by eigenvalues as they are, or over the largest one of the layer (paper, Table 18)
    _ablation("eva-raw", "EVA-Raw", metric="raw"),
    _ablation("eva-max", "EVA-Max", metric="max"),
)

METHODS: dict[str, Method] = {method.name: method for method in _TABLE}
"""Every method by name, in the order of reports."""


def method_identity(name: str) -> str:
    """What stands for a method in a run's identity: its name, and its revision where there was one before."""
    revision = METHODS[name].revision if name in METHODS else 1
    return name if revision == 1 else f"{name}, revision {revision}"


def method_names(half: Half) -> tuple[str, ...]:
    """Names of the methods offered in a half of the experiments, in the order of reports."""
    return tuple(method.name for method in METHODS.values() if half in method.halves)


@dataclass(frozen=True)
class MethodKey:
    """A method and, where it has one, its ρ: what users write as ``lora``, ``eva``, ``eva:1`` or ``eva-dora:1.5``.

    Attributes:
        method: A name in `METHODS`.
        rho: Largest rank over mean rank, at least 1 (1 keeps ranks uniform); None for methods without redistribution.

    Raises:
        InputError: Unknown method (names the nearest), ρ below 1, missing, or given to a method that has none.
    """

    method: str
    rho: float | None = None

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise InputError(unknown("method", self.method, METHODS))
        if not self.entry.redistributes:
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
        if not colon:
            entry = METHODS.get(method)
            return cls(method, DEFAULT_RHO if entry is not None and entry.redistributes else None)
        try:
            rho = float(number)
        except ValueError:
            raise InputError(
                f"what follows the colon in {text.strip()!r} must be rho, a number of at least 1"
            ) from None
        return cls(method, rho)

    @property
    def entry(self) -> Method:
        """What is true of the method whatever its ρ."""
        return METHODS[self.method]

    @property
    def key(self) -> str:
        """The shortest text that :meth:`parse` reads as this key: one spelling for one thing."""
        return self.method if self.rho in (None, DEFAULT_RHO) else f"{self.method}:{self.rho:.12g}"

    @property
    def label(self) -> str:
        """How reports print it: as the paper's tables do, with ρ where it is not 2."""
        return self.entry.label if self.rho in (None, DEFAULT_RHO) else f"{self.entry.label} (ρ = {self.rho:g})"

    @property
    def adapts(self) -> bool:
        """Whether it has adapters, and so a rank."""
        return self.entry.adapts

    @property
    def state_kind(self) -> StateKind | None:
        """Which kind of EVA state it starts from, or None; one of kind "major" serves all but eva-minor."""
        return self.entry.state_kind

    def components(self, rank: int) -> int:
        """Components per layer that its EVA state must hold at mean rank `rank`; 0 where it needs none."""
        return 0 if self.state_kind is None else round(rank * (self.rho or 1.0))

    def __str__(self) -> str:
        return self.key
