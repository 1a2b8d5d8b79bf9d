"""The paper's Tables 20, 21 and 25 as data: ``paper_tables.csv``, and their columns in the order they are printed.

How the paper averages (checked by a test): *Average* of Table 20 and *All* of Table 25 are the plain mean over the 19
tasks, not the mean of the three group means, which would be 1.1 to 2.6 points higher; the average of Table 21 is the
mean of the 19 standard deviations; the group means of Table 25 are plain means over a group's tasks. All printed
averages agree with the printed entries within rounding.
"""

from __future__ import annotations

import csv
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from eva_lightning.vision.data.tasks import TASKS
from experiments.runner.statistics import Sample

#: Task -> heading, as printed.
HEADINGS: dict[str, str] = {
    "cifar": "Cifar100",
    "caltech101": "Caltech101",
    "dtd": "DTD",
    "oxford_flowers102": "Flower102",
    "oxford_iiit_pet": "Pets",
    "svhn": "SVHN",
    "sun397": "Sun397",
    "patch_camelyon": "Camelyon",
    "eurosat": "EuroSAT",
    "resisc45": "Resisc45",
    "diabetic_retinopathy": "Retinopathy",
    "clevr_count": "Clevr-Count",
    "clevr_dist": "Clevr-Dist",
    "dmlab": "DMLab",
    "kitti": "KITTI-Dist",
    "dsprites_loc": "dSpr-Loc",
    "dsprites_ori": "dSpr-Ori",
    "smallnorb_azi": "sNORB-Azim",
    "smallnorb_ele": "sNORB-Ele",
}

#: Group -> its tasks, in the order of the columns; "average" has all 19.
GROUPS: dict[str, tuple[str, ...]] = {
    **{group: tuple(task for task in HEADINGS if TASKS[task].group == group)
       for group in ("natural", "specialized", "structured")},
    "average": tuple(HEADINGS),
}  # fmt: skip

GROUP_HEADINGS: dict[str, str] = {
    "natural": "Natural",
    "specialized": "Specialized",
    "structured": "Structured",
    "average": "Average",
}

#: Seeds behind every entry of Tables 20 and 21.
SEEDS = 5
#: What entries are rounded to, in percent points.
RESOLUTION = 0.1

_FILE = Path(__file__).with_name("paper_tables.csv")


@dataclass(frozen=True)
class PaperLine:
    """A method's line of the paper's tables.

    Attributes:
        method: Name, as in ``METHOD_TRAITS``. Which ρ a line of EVA has is not printed.
        samples: Task -> accuracy in percent (Table 20) with its standard deviation over five seeds (Table 21); empty
            for methods that only Table 25 has.
        average: Mean over the 19 tasks as printed in Table 20, or None.
        average_std: Mean standard deviation as printed in Table 21, or None.
        groups: Group -> mean accuracy as printed in Table 25; empty for methods it lacks.
    """

    method: str
    samples: Mapping[str, Sample]
    average: float | None
    average_std: float | None
    groups: Mapping[str, float]


@lru_cache(maxsize=1)
def paper_lines() -> tuple[PaperLine, ...]:
    """All lines: first those of Table 20, then those that only Table 25 has, in the printed order."""
    tables = _entries()
    methods = list(dict.fromkeys([*tables["20"], *tables["25"]]))
    return tuple(
        _line(method, *(tables[number].get(method, {}) for number in ("20", "21", "25"))) for method in methods
    )


def paper_line(method: str) -> PaperLine | None:
    """The line of `method`, or None."""
    return next((line for line in paper_lines() if line.method == method), None)


def table25_methods() -> list[str]:
    """Methods of Table 25, in the printed order."""
    return list(_entries()["25"])


@lru_cache(maxsize=1)
def _entries() -> dict[str, dict[str, dict[str, float]]]:
    """Table -> method -> column -> value."""
    lines = [line for line in _FILE.read_text(encoding="utf-8").splitlines() if not line.startswith("#")]
    tables: dict[str, dict[str, dict[str, float]]] = {}
    for entry in csv.DictReader(lines):
        row = tables.setdefault(entry["table"], {}).setdefault(entry["method"], {})
        row[entry["column"]] = float(entry["value"])
    return tables


def _line(
    method: str, means: Mapping[str, float], deviations: Mapping[str, float], groups: Mapping[str, float]
) -> PaperLine:
    samples = {task: Sample(means[task], deviations[task], SEEDS, RESOLUTION) for task in HEADINGS if task in means}
    return PaperLine(method, samples, means.get("average"), deviations.get("average"), dict(groups))
