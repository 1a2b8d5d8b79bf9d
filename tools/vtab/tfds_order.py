"""The order in which TensorFlow Datasets (TFDS) stores the examples of a split, without TensorFlow.

TFDS sorts the examples of a split by a hash of their keys (``tensorflow_datasets/core/hashing.py`` and ``shuffle.py``):
MD5 of the name of the split followed by the key, as a 128-bit number. VTAB's subsets are slices of that order, so who
knows the keys knows the subsets.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from itertools import pairwise

from eva_lightning.errors import InputError

Key = str | bytes | int


def key_hash(split: str, key: Key) -> bytes:
    """16 bytes by which TFDS sorts: MD5 of `split` and `key`; a whole number counts as its digits."""
    digest = hashlib.md5(split.encode(), usedforsecurity=False)
    digest.update(key if isinstance(key, bytes) else str(key).replace("\\", "/").encode())
    return digest.digest()


def tfds_order(split: str, keys: Sequence[Key]) -> list[int]:
    """Indices into `keys` in the order of TFDS.

    Args:
        split: Name of the TFDS split: ``"train"``, ``"validation"`` or ``"test"``.
        keys: The key that the data set's TFDS builder gives to each example.

    Raises:
        InputError: Two examples have the same key.
    """
    hashes = [key_hash(split, key) for key in keys]
    order = sorted(range(len(keys)), key=hashes.__getitem__)
    for first, second in pairwise(order):
        if hashes[first] == hashes[second]:
            raise InputError(f"two examples of split {split} have the key {keys[first]!r}")
    return order
