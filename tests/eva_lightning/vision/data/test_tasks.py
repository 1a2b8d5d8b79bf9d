from __future__ import annotations

from collections import Counter

import pytest

from eva_lightning.vision.data.tasks import TASKS, expected_size, get_task

# Table 19 of the EVA paper: number of classes per data set
PAPER_CLASSES = {
    "caltech101": 102, "cifar": 100, "dtd": 47, "oxford_flowers102": 102, "oxford_iiit_pet": 37, "sun397": 397,
    "svhn": 10, "eurosat": 10, "resisc45": 45, "patch_camelyon": 2, "diabetic_retinopathy": 5, "clevr_count": 8,
    "clevr_dist": 6, "dsprites_loc": 16, "dsprites_ori": 16, "smallnorb_azi": 18, "smallnorb_ele": 9, "dmlab": 6,
    "kitti": 4,
}  # fmt: skip


def test_table_is_the_papers() -> None:
    assert {name: task.classes for name, task in TASKS.items()} == PAPER_CLASSES
    assert Counter(task.group for task in TASKS.values()) == {"natural": 7, "specialized": 4, "structured": 8}


def test_expected_sizes() -> None:
    task = get_task("caltech101")
    assert [expected_size(task, s) for s in ("train800", "val200", "train800val200", "test")] == [800, 200, 1000, 6085]


def test_unknown_task_suggests_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"unknown VTAB-1K task 'caltech': did you mean caltech101"):
        get_task("caltech")
    with pytest.raises(ValueError, match=r"choose from caltech101, cifar"):
        get_task("zzzz")
