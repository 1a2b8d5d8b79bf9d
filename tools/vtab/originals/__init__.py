"""VTAB-1K tasks from the original public data: the images of the archive in common use, without its JPEG losses.

The benchmark's subsets are slices of the order in which TFDS stores a data set, and that order follows from each
example's key. Each module reads data sets and gives the keys that its TFDS builder gives (tensorflow/datasets,
``tensorflow_datasets/``), the rules are in :mod:`~tools.vtab.originals.rules`.

How far the result is known to be VTAB's: the order was compared with the published order of CIFAR-10. The 1,000
training images were compared with the list that the authors of Visual Prompt Tuning took out of TFDS
(``vtab_trainval_splits.json`` of their data release), for every task whose keys can be written down without the data:

- the very same 800 and 200 images: ``cifar``, ``patch_camelyon``, ``eurosat``, ``resisc45``, ``clevr_count``,
  ``clevr_dist``
- the listed images have the hashes that the first 800 and 200 must have, which confirms key and rule: ``dtd``,
  ``oxford_flowers102``, ``oxford_iiit_pet``, ``dmlab``, ``kitti``
- no published list; key and rule as in the code of TFDS and VTAB: ``svhn``, ``dsprites_loc``, ``dsprites_ori``,
  ``smallnorb_azi``, ``smallnorb_ele``
- not offered, see :data:`REFUSED`: ``caltech101``, ``sun397``, ``diabetic_retinopathy``
"""

from __future__ import annotations

from tools.vtab.originals import by_torchvision, camelyon, clevr, dmlab, dsprites, kitti, resisc45, smallnorb
from tools.vtab.originals.pool import Original

_MODULES = (by_torchvision, camelyon, resisc45, clevr, dmlab, kitti, dsprites, smallnorb)

#: Task -> how it is made from its original data.
ORIGINALS: dict[str, Original] = {original.task: original for module in _MODULES for original in module.ORIGINALS}

#: Task -> why it cannot be made.
REFUSED: dict[str, str] = {
    "caltech101": "TFDS drew its training images by chance from the order in which a file system lists the folders",
    "sun397": "its splits are three lists inside TFDS, and its images passed through OpenCV's resizing and JPEG",
    "diabetic_retinopathy": "its images are Kaggle's after a preprocessing by OpenCV that ends in lossy JPEG",
}
