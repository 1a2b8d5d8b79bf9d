"""CLEVR (tasks ``clevr_count`` and ``clevr_dist``), from images and scene files; TFDS ``clevr`` 3.*, key: file name.

The test set of the benchmark is CLEVR's validation split: its test split has no scenes.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from eva_lightning.names import check_name
from eva_lightning.reading import read_bytes, reading
from tools.vtab.originals.pool import Original, Pool

_NAMES = {"train": "train", "validation": "val"}
#: Four times the larger of the two files.
_MOST_BYTES = 2**30
_EDGES = np.array([0.0, 8.0, 8.5, 9.0, 9.5, 10.0, 100.0], dtype=np.float32)


def count(objects: Sequence[dict[str, Any]]) -> int:
    """Number of objects, of which there are 3 to 10, less 3."""
    return len(objects) - 3


def distance(objects: Sequence[dict[str, Any]]) -> int:
    """Interval of the smallest distance from the camera (third pixel coordinate), open below and closed above."""
    nearest = np.float32(min(thing["pixel_coords"][2] for thing in objects))
    return int(np.flatnonzero(nearest > _EDGES).max())


def load(label: Callable[[Sequence[dict[str, Any]]], int], folder: Path) -> dict[str, Pool]:
    """The images of ``CLEVR_v1.0/images/{train,val}`` with `label` of ``CLEVR_v1.0/scenes/CLEVR_*_scenes.json``."""
    root = folder / "CLEVR_v1.0"
    pools = {}
    for split, name in _NAMES.items():
        file = root / "scenes" / f"CLEVR_{name}_scenes.json"
        with reading(file):
            scenes = json.loads(read_bytes(file, _MOST_BYTES))["scenes"]
            names = [check_name("image_filename", scene["image_filename"]) for scene in scenes]
            labels = [label(scene["objects"]) for scene in scenes]
        files = [root / "images" / name / image for image in names]
        pools[split] = Pool([file.name for file in files], labels, files.__getitem__)
    return pools


ORIGINALS = tuple(
    Original(
        task=task,
        rule="A90",
        needs=("CLEVR_v1.0",),
        load=partial(load, label),
        sizes={"train": 70000, "validation": 15000},
        test="validation",
        hint="unpack CLEVR_v1.0.zip there",
    )
    for task, label in (("clevr_count", count), ("clevr_dist", distance))
)
