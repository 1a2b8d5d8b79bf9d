"""The option of both command lines by which runs record gradient norms, and the file they write."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import lightning as L

    from experiments.runner.run_folder import RunFolder

#: In a run's folder; its columns are those of :data:`eva_lightning.gradient_norms.COLUMNS`.
FILE = "gradient_norms.csv"

GRADIENT_NORMS_HELP = (
    f"record the gradient norms of A and B over so many first steps in {FILE} (Figure 4); a finished run is not redone"
)


def gradient_norms(steps: int, folder: RunFolder, exclude: Sequence[str] | None = None) -> list[L.Callback]:
    """The callback for a run's Trainer, or none for 0 steps.

    Args:
        steps: Optimizer steps to record.
        folder: Of the run.
        exclude: Layers that adapters leave out.
    """
    if not steps:
        return []
    # torch, which a mistyped option need not wait for
    from eva_lightning.gradient_norms import GradientNorms

    callback: Any = GradientNorms(steps, folder.path / FILE, exclude)
    return [callback]
