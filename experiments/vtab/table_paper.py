"""The paper's Tables 20, 21 and 25 as data: ``paper_tables.csv``, and their columns in the order they are printed.

How the paper averages (checked by a test): *Average* of Table 20 and *All* of Table 25 are the plain mean over the 19
tasks, not the mean of the three group means, which would be 1.1 to 2.6 points higher; the average of Table 21 is the
mean of the 19 standard deviations; the group means of Table 25 are plain means over a group's tasks. All printed
averages agree with the printed entries within rounding.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import pandas as pd

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

GROUP_HEADINGS: dict[str, str] = {
    "natural": "Natural",
    "specialized": "Specialized",
    "structured": "Structured",
    "average": "Average",
}

#: Group -> its tasks, in the order of the columns; "average" has all 19.
GROUPS: dict[str, tuple[str, ...]] = {
    group: tuple(task for task in HEADINGS if group in (TASKS[task].group, "average")) for group in GROUP_HEADINGS
}

#: Seeds behind every entry of Tables 20 and 21.
SEEDS = 5
#: What entries are rounded to, in percent points.
RESOLUTION = 0.1


@dataclass(frozen=True)
class PaperLine:
    """A method's line of the paper's tables.

    Attributes:
        method: Name, as in the method registry. Which ρ a line of EVA has is not printed.
        samples: Task -> accuracy in percent (Table 20) with its standard deviation over five seeds (Table 21); empty
            for methods that only Table 25 has.
        averages: Table (20, 21, 25) -> group or "average" -> the mean as printed there.
    """

    method: str
    samples: Mapping[str, Sample]
    averages: Mapping[int, Mapping[str, float]] = field(default_factory=dict)


@lru_cache(maxsize=1)
def paper_lines() -> dict[str, PaperLine]:
    """Method -> line: first those of Table 20, then those that only Table 25 has, in the printed order."""
    return {method: _line(method) for method in dict.fromkeys([*_entries(20).index, *_entries(25).index])}


def table25_methods() -> list[str]:
    """Methods of Table 25, in the printed order."""
    return list(_entries(25).index)


@lru_cache
def _entries(table: int) -> pd.DataFrame:
    """One of the tables: methods x columns, both in the printed order."""
    entries = pd.read_csv(Path(__file__).with_name("paper_tables.csv"), comment="#").query("table == @table")
    order = {axis: entries[axis].unique() for axis in ("method", "column")}
    values = entries.pivot(index="method", columns="column", values="value")
    return values.reindex(index=order["method"], columns=order["column"])


def _line(method: str) -> PaperLine:
    tables = [table for table in (20, 21, 25) if method in _entries(table).index]
    printed = {table: _entries(table).loc[method].to_dict() for table in tables}
    means, deviations = printed.get(20, {}), printed.get(21, {})
    samples = {task: Sample(means[task], deviations[task], SEEDS, RESOLUTION) for task in HEADINGS if task in means}
    averages = {table: {k: v for k, v in row.items() if k in GROUPS} for table, row in printed.items()}
    return PaperLine(method, samples, averages)
