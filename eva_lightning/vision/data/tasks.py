"""The 19 tasks of VTAB-1K as data: folder name, group, number of classes, sizes. Other tasks: ``own_tasks.py``.

Zhai et al., "A Large-scale Study of Representation Learning with the Visual Task Adaptation Benchmark", 2019;
groups and classes as in Table 19 of the EVA paper, test sizes as in the folder layout in common use
(``<task>/{train800,val200,train800val200,test}.txt``).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from eva_lightning.errors import InputError, unknown

Group = Literal["natural", "specialized", "structured", "other"]

TRAIN_SIZES: Mapping[str, int] = {"train800": 800, "val200": 200, "train800val200": 1000}
SPLITS: tuple[str, ...] = (*TRAIN_SIZES, "test")


@dataclass(frozen=True)
class VTABTask:
    """One task.

    Attributes:
        name: Its folder.
        group: Of VTAB-1K; "other" for a folder that is none of its tasks.
        classes: Number of labels.
        test_size: Size of the official test set, or of that of another folder.
        sizes: Those of the other splits.
    """

    name: str
    group: Group
    classes: int
    test_size: int
    sizes: Mapping[str, int] = field(default_factory=lambda: TRAIN_SIZES, hash=False)

    @property
    def is_official(self) -> bool:
        """Whether it is one of the 19."""
        return self.group != "other"


TASKS: dict[str, VTABTask] = {
    task.name: task
    for task in (
        VTABTask("caltech101", "natural", 102, 6085),
        VTABTask("cifar", "natural", 100, 10000),
        VTABTask("dtd", "natural", 47, 1880),
        VTABTask("oxford_flowers102", "natural", 102, 6149),
        VTABTask("oxford_iiit_pet", "natural", 37, 3669),
        VTABTask("svhn", "natural", 10, 26032),
        VTABTask("sun397", "natural", 397, 21750),
        VTABTask("patch_camelyon", "specialized", 2, 32768),
        VTABTask("eurosat", "specialized", 10, 5400),
        VTABTask("resisc45", "specialized", 45, 6300),
        VTABTask("diabetic_retinopathy", "specialized", 5, 42670),
        VTABTask("clevr_count", "structured", 8, 15000),
        VTABTask("clevr_dist", "structured", 6, 15000),
        VTABTask("dmlab", "structured", 6, 22735),
        VTABTask("kitti", "structured", 4, 711),
        VTABTask("dsprites_loc", "structured", 16, 73728),
        VTABTask("dsprites_ori", "structured", 16, 73728),
        VTABTask("smallnorb_azi", "structured", 18, 12150),
        VTABTask("smallnorb_ele", "structured", 9, 12150),
    )
}


def get_task(name: str) -> VTABTask:
    """The task called `name`.

    Raises:
        InputError: No such task; the message names the nearest ones.
    """
    if name not in TASKS:
        raise InputError(unknown("VTAB-1K task", name, TASKS))
    return TASKS[name]


def expected_size(task: VTABTask, split: str) -> int:
    """Number of images that `split` of `task` holds: officially, or in a folder that is none of VTAB-1K's."""
    return task.test_size if split == "test" else task.sizes[split]
