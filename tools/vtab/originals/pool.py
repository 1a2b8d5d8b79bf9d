"""What every original data set is read into: keys, labels, and images that are fetched one by one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from tools.vtab.originals.rules import Rule
from tools.vtab.tfds_order import Key


@dataclass(frozen=True)
class Encoded:
    """An image file that lies inside another file: its bytes, and the suffix that tells their format."""

    data: bytes
    suffix: str


#: An image file to take over as it is, one inside another file, or pixels ``(H, W)`` or ``(H, W, 3)`` uint8.
Image = Path | Encoded | npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Pool:
    """All examples of one TFDS split, in any order.

    Attributes:
        keys: The key that TFDS gives to each example.
        labels: VTAB's label of each example.
        image: Gives the image of an example by its index.
    """

    keys: Sequence[Key]
    labels: Sequence[int]
    image: Callable[[int], Image]


@dataclass(frozen=True)
class Original:
    """How a task is made from its original data.

    Attributes:
        task: VTAB-1K task.
        rule: Rule that names the subsets.
        needs: What must be in the folder, relative to it; the first is looked for.
        load: Reads the folder into one pool per TFDS split.
        sizes: TFDS split -> examples in the published data set. The subsets are right only if all of them are there.
        hint: How to get the data, as the end of a sentence.
        test: TFDS split that is the test set where the rule leaves it whole.
    """

    task: str
    rule: Rule
    needs: tuple[str, ...]
    load: Callable[[Path], dict[str, Pool]]
    sizes: Mapping[str, int]
    hint: str
    test: str = "test"

    def found_in(self, folder: Path) -> bool:
        """Whether `folder` seems to hold the data."""
        return (folder / self.needs[0]).exists()
