from __future__ import annotations

import hashlib

import pytest

from tools.vtab.tfds_order import Key, tfds_order

# ids of the first batch of TFDS' CIFAR-10, as printed in public documentation and books
CIFAR10 = [16399, 1680, 47917, 17307, 27051, 48736, 26263, 1456, 19135, 31598, 12970, 4223, 27152, 49635, 4093, 17537]
# SHA-256 of the ids of train[:5000], one a line, as a test of the public package datarax has recorded it from TFDS
CIFAR10_5000 = "826f1dad26a11a20249e95c71c6f1532d857fb35e648694f9758d4c5c1747679"


def test_order_of_cifar10_is_the_published_one() -> None:
    order = tfds_order("train", range(50000))
    assert order[:16] == CIFAR10
    ids = "\n".join(f"train_{index:05d}" for index in order[:5000])
    assert hashlib.sha256(ids.encode()).hexdigest() == CIFAR10_5000


def digest(names: list[str]) -> str:
    return hashlib.sha256("\n".join(sorted(names)).encode()).hexdigest()


EUROSAT = {
    "AnnualCrop": 3000, "Forest": 3000, "HerbaceousVegetation": 3000, "Highway": 2500, "Industrial": 2500,
    "Pasture": 2000, "PermanentCrop": 2500, "Residential": 3000, "River": 2500, "SeaLake": 3000,
}  # fmt: skip
RESISC45 = [
    "airplane", "airport", "baseball_diamond", "basketball_court", "beach", "bridge", "chaparral", "church",
    "circular_farmland", "cloud", "commercial_area", "dense_residential", "desert", "forest", "freeway",
    "golf_course", "ground_track_field", "harbor", "industrial_area", "intersection", "island", "lake", "meadow",
    "medium_residential", "mobile_home_park", "mountain", "overpass", "palace", "parking_lot", "railway",
    "railway_station", "rectangular_farmland", "river", "roundabout", "runway", "sea_ice", "ship", "snowberg",
    "sparse_residential", "stadium", "storage_tank", "tennis_court", "terrace", "thermal_power_station", "wetland",
]  # fmt: skip
# What follows is the SHA-256 of the sorted names, one a line, in vtab_trainval_splits.json, the lists that the authors
# of Visual Prompt Tuning took out of TFDS and published: 800 training and 200 validation images.
PUBLISHED = {
    "cifar": (
        "ac3a4b7f6d6c32f787a0b7e609b785b286e47ff933fd9625016298693639a019",
        "7996f329fc85b9ac7daf4dc004fe27e8a082349d62c4e43bb7d8e8b4982228d3",
    ),
    "patch_camelyon": (
        "21eaea5228a490c048a7ea3b28a79f4f470a26a4f9a66ee112af5b5ece573c37",
        "d6e3e99d74f635b8672b69ffc2294e9d8af570ee93234654c5f79573a74f251e",
    ),
    "eurosat": (
        "2a2d9a1c3370755c0717a420efbeb5501b2db4ed7dabfd9c9db423e092101c68",
        "b13e8f5667551e03061a1638d248de14cf780a43f2c0f9488106cd04332076f3",
    ),
    "resisc45": (
        "b283cadb71f06d56f43bb2f3b7eec68d44b47c38ef036641638c4f8f952718c5",
        "0058327227a2a0b15aa207ac8b64fddad90aedc4fbf790a8aa1c670f5de37a0c",
    ),
    "clevr_count": (
        "2755742128ae24c0bca5299c342a54b0ed9a806bd1d9f39ca602159c74ffe21f",
        "6570e8229f7bc1b9e2e445b9959b6fcafb53e3bf5b3e3c4df9a799e93f56c2fb",
    ),
}


def keys_and_names(task: str) -> dict[str, list[tuple[Key, str]]]:
    """TFDS split -> keys as the readers in ``originals`` give them, and names as the published lists have them."""
    if task == "cifar":
        return {"train": [(index, f"train_{index:05d}") for index in range(50000)], "test": []}
    if task == "patch_camelyon":
        sizes = {"train": ("train", 262144), "validation": ("valid", 32768)}
        return {
            split: [(f"{name}_{index}", f"{name}_{index}") for index in range(count)]
            for split, (name, count) in sizes.items()
        }
    if task == "eurosat":
        files = [(name, f"{name}_{index}.jpg") for name, count in EUROSAT.items() for index in range(1, count + 1)]
    elif task == "resisc45":
        files = [(name, f"{name}_{index:03d}.jpg") for name in RESISC45 for index in range(1, 701)]
    else:
        names = [f"CLEVR_train_{index:06d}.png" for index in range(70000)]
        return {"train": [(name, name) for name in names], "test": []}
    return {"train": [(f"{name}_{file}", file) for name, file in files]}


@pytest.mark.parametrize("task", PUBLISHED)
def test_training_images_are_the_published_ones(task: str) -> None:
    from tools.vtab.originals import ORIGINALS
    from tools.vtab.originals.rules import slices

    known = keys_and_names(task)
    assert {split: len(pairs) for split, pairs in known.items() if pairs}.items() <= ORIGINALS[task].sizes.items()
    subsets = slices(ORIGINALS[task].rule, {split: len(pairs) for split, pairs in known.items()})
    for name, expected in zip(("train800", "val200"), PUBLISHED[task], strict=True):
        pairs = known[subsets[name].split]
        order = tfds_order(subsets[name].split, [key for key, _ in pairs])
        assert digest([pairs[index][1] for index in subsets[name].of(order)]) == expected


def test_names_hash_as_bytes_and_with_either_slash() -> None:
    assert (
        tfds_order("train", ["a/b", "c"]) == tfds_order("train", [b"a/b", b"c"]) == tfds_order("train", ["a\\b", "c"])
    )
    assert tfds_order("train", range(100)) != tfds_order("test", range(100))


def test_double_key_is_named() -> None:
    with pytest.raises(ValueError, match="two examples of split train have the key 'b'"):
        tfds_order("train", ["a", "b", "c", "b"])
