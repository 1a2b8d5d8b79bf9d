"""The paper's Table 18, ranks by other measures of explained variance, beside ours on VTAB-1K.

The paper prints EVA-Raw (eigenvalues as they are) and EVA-Max (over the largest one of a layer) for RoBERTa-Large on
GLUE only; ours are the same initialisations on images, so that differences between lines compare, not their values.
"""

from __future__ import annotations

from collections.abc import Sequence

from eva_lightning.methods.registry import METHODS
from experiments.vtab.table_layout import MEAN_COLUMNS, Notes, Sheet, SheetLine, mean_cells
from experiments.vtab.table_results import Ours

#: Table 18 of the paper: mean and, where printed, standard deviation over five seeds.
COLUMNS = ("CoLA", "MRPC", "RTE", "STS-B", "GLUE average")
PRINTED: dict[str, tuple[str, ...]] = {
    "lora": ("69.1 ± 0.5", "91.1 ± 0.6", "88.1 ± 1.1", "92.3 ± 0.1", "85.2"),
    "eva": ("69.5 ± 1.4", "91.4 ± 0.8", "88.8 ± 1.2", "92.6 ± 0.1", "85.6"),
    "eva-raw": ("69.4 ± 1.1", "91.0 ± 0.9", "88.2 ± 0.3", "92.5 ± 0.2", "85.3"),
    "eva-max": ("69.1 ± 0.5", "91.2 ± 0.5", "88.4 ± 1.2", "92.5 ± 0.2", "85.3"),
}
_CAPTION = (
    "The paper: RoBERTa-Large on four tasks of GLUE, mean and standard deviation over five seeds. Ours: mean accuracy "
    "in percent over the tasks of each group of VTAB-1K. Other models and data: compare differences between lines."
)


def is_asked_for(ours: Sequence[Ours]) -> bool:
    """Whether there are results that no other table has."""
    return any(entry.key.method in ("eva-raw", "eva-max") for entry in ours)


def table18_sheet(ours: Sequence[Ours], notes: Notes) -> Sheet:
    """The paper's lines in their order, each with ours below."""
    lines = []
    for method, printed in PRINTED.items():
        lines.append(SheetLine("paper", METHODS[method].label, dict(zip(COLUMNS, printed, strict=True)), method))
        lines += [
            SheetLine("ours", entry.label, mean_cells(entry.samples), method, notes.marks(entry.notes))
            for entry in ours
            if entry.key.method == method
        ]
    title = "Ranks by raw and by normalised eigenvalues (layout of Table 18)"
    return Sheet("table18", title, _CAPTION, (*COLUMNS, *MEAN_COLUMNS), tuple(lines))
