"""Which slices of TFDS' splits are VTAB-1K's train800, val200 and test: the five rules of the benchmark.

From the data classes of google-research/task_adaptation (``task_adaptation/data/*.py``), the code that VTAB was
published with. All slices are taken in TFDS' order, see :mod:`~tools.vtab.tfds_order`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, NamedTuple

Rule = Literal["A90", "A80", "B", "C", "D", "E"]


class Slice(NamedTuple):
    """Examples `start` to `stop` (all that follow for None) of the TFDS split `split`."""

    split: str
    start: int
    stop: int | None

    def of(self, order: list[int]) -> list[int]:
        """The part of `order` that this slice names."""
        return order[self.start : self.stop]


def slices(
    rule: Rule, sizes: Mapping[str, int], take: tuple[int, int] = (800, 200), test: str = "test"
) -> dict[str, Slice]:
    """VTAB-1K's splits as slices.

    Args:
        rule: ``A90``, ``A80``: validation images come from the last 10 or 20 percent of train; ``B``: from an own
            split; ``C``, ``D``: one split is divided 60/20/20 or 80/10/10; ``E``: test is divided in halves.
        sizes: TFDS split -> number of examples.
        take: Training and validation images (other numbers for tests).
        test: TFDS split that is the test set of rules ``A`` and ``B``.

    Returns:
        ``train800``, ``val200`` and ``test``, in this order.
    """
    training, validating = take
    split, start, last = "train", 0, Slice(test, 0, None)
    if rule in ("A90", "A80"):
        start = int(rule[1:]) * sizes["train"] // 100
    elif rule == "B":
        split = "validation"
    elif rule in ("C", "D"):
        train, validation = (60, 20) if rule == "C" else (80, 10)
        start = train * sizes["train"] // 100
        last = Slice("train", start + validation * sizes["train"] // 100, None)
    else:
        split = "test"
        last = Slice("test", round(sizes["test"] / 2), None)
    return {
        "train800": Slice("train", 0, training),
        "val200": Slice(split, start, start + validating),
        "test": last,
    }
