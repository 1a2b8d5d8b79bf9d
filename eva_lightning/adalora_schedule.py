"""AdaLoRA's schedule as numbers; nothing heavy is imported here (:mod:`eva_lightning.adapters.adalora` follows it)."""

from __future__ import annotations

from dataclasses import dataclass

from eva_lightning.errors import check_number

#: Ranks per layer above the final ones at the start (EVA paper, section C.3; ``peft_trainer.py`` of the authors' code).
START_ABOVE_FINAL = 4


def start_rank(rank: int) -> int:
    """The rank AdaLoRA begins with so that `rank` per layer are left: four more."""
    return rank + START_ABOVE_FINAL


@dataclass(frozen=True)
class AdaLoRASchedule:
    """When AdaLoRA takes ranks away, and its orthogonality penalty; the defaults are AdaLoRA's own.

    Attributes:
        warm_up: Share of all steps before ranks shrink (PEFT's ``tinit``); AdaLoRA's GLUE runs use about 0.1.
        final: Share of all steps at the end in which ranks stay (``tfinal``); about 0.5 there.
        every: Steps between allocations (``deltaT``).
        penalty: Weight of the orthogonality penalty (``orth_reg_weight``); 0.5 in PEFT.
        penalises: Add the penalty to the gradients. PEFT adds it to the loss that a model computes itself; a program
            that computes its loss from logits, as the authors' code does, trains without it.
        first_step: What the first step is counted as in PEFT's calls.

    Raises:
        InputError: A value is out of range.
    """

    warm_up: float = 0.1
    final: float = 0.5
    every: int = 1
    penalty: float = 0.5
    penalises: bool = True
    first_step: int = 1

    @property
    def text(self) -> str:
        """The schedule for a reader, in PEFT's words."""
        acts = "" if self.penalises else ", which no loss contains"
        return (
            f"tinit {self.warm_up:g} T, tfinal {self.final:g} T, deltaT {self.every}, orthogonality weight "
            f"{self.penalty:g}{acts}"
        )

    def __post_init__(self) -> None:
        for name in ("warm_up", "final"):
            check_number(name, getattr(self, name), at_least=0, below=1)
        check_number("every", self.every, at_least=1, whole=True)
        check_number("penalty", self.penalty, above=0)


ADALORA_SCHEDULE = AdaLoRASchedule()
"""AdaLoRA's own."""
