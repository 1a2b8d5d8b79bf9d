"""The original data sets in miniature, each in the format it is published in.

Every function writes a fake below a folder and returns, for each TFDS split, its examples as (key, label, content),
where content is what the built task must hold: the bytes of a file, or pixels.
"""

from __future__ import annotations

import gzip
import io
import json
import pickle
import struct
import zipfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

Content = bytes | npt.NDArray[np.uint8]
Examples = dict[str, list[tuple[str | int, int, Content]]]


def pixels(seed: int, height: int, width: int, channels: int = 3) -> npt.NDArray[np.uint8]:
    """Noise that tells one image from the other."""
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)


def write_image(file: Path, seed: int) -> bytes:
    """A small image file; returns its bytes."""
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels(seed, 6, 8)).save(file)
    return file.read_bytes()


def cifar(root: Path) -> Examples:
    folder = root / "cifar-100-python"
    folder.mkdir(parents=True)
    found: Examples = {}
    for split, count in (("train", 40), ("test", 12)):
        images = np.stack([pixels(index + count, 32, 32) for index in range(count)])
        labels = [index % 100 for index in range(count)]
        content = {"data": images.transpose(0, 3, 1, 2).reshape(count, -1), "fine_labels": labels}
        (folder / split).write_bytes(pickle.dumps(content))
        found[split] = [(index, labels[index], images[index]) for index in range(count)]
    (folder / "meta").write_bytes(pickle.dumps({"fine_label_names": [str(label) for label in range(100)]}))
    return found


def svhn(root: Path) -> Examples:
    from scipy.io import savemat

    root.mkdir(parents=True)
    found: Examples = {}
    for split, count in (("train", 40), ("test", 12)):
        images = np.stack([pixels(index + count, 32, 32) for index in range(count)])
        digits = np.array([index % 10 + 1 for index in range(count)], dtype=np.uint8)  # 10 stands for the digit 0
        savemat(root / f"{split}_32x32.mat", {"X": images.transpose(1, 2, 3, 0), "y": digits[:, None]})
        found[split] = [(index, int(digits[index]) % 10, images[index]) for index in range(count)]
    return found


def dtd(root: Path) -> Examples:
    folder = root / "dtd" / "dtd"
    (folder / "labels").mkdir(parents=True)
    found: Examples = {}
    for seed, (split, name) in enumerate({"train": "train", "validation": "val", "test": "test"}.items()):
        found[split] = []
        for index in range(12):
            label, kind = (0, "banded") if index % 2 else (1, "zigzagged")
            key = f"{kind}/{kind}_{100 * seed + index:04d}.jpg"
            found[split].append((key, label, write_image(folder / "images" / key, 100 * seed + index)))
        lines = [str(key) for key, _, _ in found[split]]
        (folder / "labels" / f"{name}1.txt").write_text("\n".join(lines) + "\n")
        (folder / "labels" / f"{name}2.txt").write_text("banded/other.jpg\n")
    return found


def flowers(root: Path) -> Examples:
    from scipy.io import savemat

    folder = root / "flowers-102"
    names = {"train": "trnid", "validation": "valid", "test": "tstid"}
    ids = {"train": [5, 1, 9, 12, 30], "validation": [2, 3, 4, 31], "test": list(range(13, 30))}
    labels = np.array([index % 102 + 1 for index in range(31)])
    images = {index: write_image(folder / "jpg" / f"image_{index:05d}.jpg", index) for index in range(1, 32)}
    savemat(folder / "imagelabels.mat", {"labels": labels[None]})
    savemat(folder / "setid.mat", {names[split]: np.array(numbers)[None] for split, numbers in ids.items()})
    return {
        split: [(f"image_{index:05d}.jpg", int(labels[index - 1]) - 1, images[index]) for index in numbers]
        for split, numbers in ids.items()
    }


def pets(root: Path) -> Examples:
    folder = root / "oxford-iiit-pet"
    (folder / "annotations").mkdir(parents=True)
    found: Examples = {}
    for seed, (split, name) in enumerate({"train": "trainval", "test": "test"}.items()):
        rows = [("Abyssinian" if index % 2 else "beagle", 100 * seed + index) for index in range(20)]
        found[split] = [
            (
                f"{breed}_{number}.jpg",
                0 if breed == "Abyssinian" else 4,
                write_image(folder / "images" / f"{breed}_{number}.jpg", number),
            )
            for breed, number in rows
        ]
        lines = [f"{breed}_{number} {1 if breed == 'Abyssinian' else 5} 1 1" for breed, number in rows]
        (folder / "annotations" / f"{name}.txt").write_text("\n".join(lines) + "\n")
    return found


def class_folders(folder: Path, files: Iterable[tuple[str, str]]) -> Examples:
    found = []
    for seed, (kind, name) in enumerate(files):
        found.append((f"{kind}_{name}", kind, write_image(folder / kind / name, seed)))
    kinds = sorted({kind for _, kind, _ in found})
    return {"train": [(key, kinds.index(kind), content) for key, kind, content in found]}


def eurosat(root: Path) -> Examples:
    kinds = ("River", "AnnualCrop", "Forest")
    return class_folders(
        root / "eurosat" / "2750", [(kind, f"{kind}_{index}.jpg") for kind in kinds for index in range(1, 11)]
    )


def resisc45(root: Path) -> Examples:
    kinds = ("wetland", "airplane")
    return class_folders(
        root / "NWPU-RESISC45", [(kind, f"{kind}_{index:03d}.jpg") for kind in kinds for index in range(1, 16)]
    )


def camelyon(root: Path) -> Examples:
    import h5py

    (root / "pcam").mkdir(parents=True)
    found: Examples = {}
    for seed, (split, name) in enumerate({"train": "train", "validation": "valid", "test": "test"}.items()):
        images = np.stack([pixels(100 * seed + index, 96, 96) for index in range(8)])
        labels = np.array([index % 2 for index in range(8)], dtype=np.uint8)
        for part, content in (("x", images), ("y", labels.reshape(-1, 1, 1, 1))):
            with h5py.File(root / "pcam" / f"camelyonpatch_level_2_split_{name}_{part}.h5", "w") as stream:
                stream[part] = content
        found[split] = [(f"{name}_{index}", int(labels[index]), images[index]) for index in range(8)]
    return found


def clevr(root: Path, distances: bool) -> Examples:
    """3 to 10 objects; the nearest at 7.9, 8 (still in the first interval), 8.2, 8.7, 9.3, 9.8 and 11 in turn."""
    nearest = (7.9, 8.0, 8.2, 8.7, 9.3, 9.8, 11.0)
    interval = (0, 0, 1, 2, 3, 4, 5)
    folder = root / "CLEVR_v1.0"
    (folder / "scenes").mkdir(parents=True)
    found: Examples = {}
    for seed, (split, name) in enumerate({"train": "train", "validation": "val"}.items()):
        scenes, found[split] = [], []
        for index in range(30):
            file = f"CLEVR_{name}_{index:06d}.png"
            content = write_image(folder / "images" / name / file, 100 * seed + index)
            number = 3 + index % 8
            depths = [nearest[index % 7], *[12.0] * (number - 1)]
            objects = [{"pixel_coords": [1, 2, depth]} for depth in reversed(depths)]
            scenes.append({"image_filename": file, "objects": objects})
            found[split].append((file, interval[index % 7] if distances else number - 3, content))
        (folder / "scenes" / f"CLEVR_{name}_scenes.json").write_text(json.dumps({"scenes": scenes}))
    return found


def varint(number: int) -> bytes:
    data = b""
    while number > 127:
        data += bytes([number & 127 | 128])
        number >>= 7
    return data + bytes([number])


def field(number: int, content: bytes) -> bytes:
    return varint(number << 3 | 2) + varint(len(content)) + content


def example(image: bytes, filename: str, label: int) -> bytes:
    """A serialised tf.train.Example."""
    features = {
        "image": field(1, field(1, image)),
        "filename": field(1, field(1, filename.encode())),
        "label": field(3, field(1, varint(label))),
        "weight": field(2, field(1, struct.pack("<f", 1.5))),
    }
    entries = [field(1, field(1, name.encode()) + field(2, value)) for name, value in features.items()]
    return field(1, b"".join(entries))


def masked_crc(data: bytes) -> bytes:
    """The checksum of a TFRecord, bit by bit as its definition has it."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    crc ^= 0xFFFFFFFF
    return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)


def dmlab(root: Path) -> Examples:
    (root / "dmlab").mkdir(parents=True)
    found: Examples = {}
    for seed, split in enumerate(("train", "validation", "test")):
        found[split] = []
        for shard in range(2):
            records = b""
            for index in range(6):
                stream = io.BytesIO()
                Image.fromarray(pixels(100 * seed + 10 * shard + index, 30, 40)).save(stream, format="JPEG")
                name = f"video_{seed}_{shard}_{index}.jpg"
                data = example(stream.getvalue(), name, index)
                length = struct.pack("<Q", len(data))
                records += length + masked_crc(length) + data + masked_crc(data)
                found[split].append((name, index, stream.getvalue()))
            (root / "dmlab" / f"dmlab-{split}.tfrecord-0000{shard}-of-00002").write_bytes(records)
    return found


KITTI_ROWS = (
    ("Car 0.00 0 -1.5 1 2 3 4 1.5 1.6 3.7 1.0 1.5 {z} 1.5\n", ("7.99", "8.00", "8.01", "20.00", "20.01")),
    ("Pedestrian 0.00 0 -1.5 1 2 3 4 1.5 1.6 3.7 1.0 1.5 {z} 1.5\n", ("2.0",)),
)


def kitti(root: Path, zipped: bool = True) -> Examples:
    """Twenty videos of four images; TFDS takes two each for validation and test."""
    raw = root / "Kitti" / "raw"
    (raw / "training" / "label_2").mkdir(parents=True)
    videos = [f"2011_09_26_drive_{number:04d}_sync" for number in range(20)]
    lines = [f"2011_09_26 {video} {frame:010d}" for frame in range(4) for video in videos]
    order = np.random.default_rng(0).permutation(len(lines))
    mapping = {
        "train_mapping.txt": "\n".join(lines) + "\n",
        "train_rand.txt": ",".join(str(index + 1) for index in order) + "\n",
    }
    if zipped:
        with zipfile.ZipFile(raw / "devkit_object.zip", "w") as archive:
            for name, content in mapping.items():
                archive.writestr(f"mapping/{name}", content)
    else:
        (raw / "mapping").mkdir()
        for name, content in mapping.items():
            (raw / "mapping" / name).write_text(content)
    # the draw of TFDS, by the global generator that its seed was set on
    np.random.seed(123)  # noqa: NPY002
    test = set(np.random.choice(sorted(videos), 2, replace=False))  # noqa: NPY002
    validation = set(np.random.choice(sorted(set(videos) - test), 2, replace=False))  # noqa: NPY002
    found: Examples = {"train": [], "validation": [], "test": []}
    car, depths = KITTI_ROWS[0]
    for number, line in enumerate(order):
        kind = number % 6
        rows = KITTI_ROWS[1][0].format(z="2.0") + "DontCare -1 -1 -10 1 2 3 4 -1 -1 -1 -1000 -1000 -1000 -10\n"
        rows += car.format(z="50.0") + car.format(z=depths[kind]) if kind < 5 else ""
        (raw / "training" / "label_2" / f"{number:06d}.txt").write_text(rows)
        content = write_image(raw / "training" / "image_2" / f"{number:06d}.png", number)
        video = videos[line % 20]
        split = "test" if video in test else "validation" if video in validation else "train"
        found[split].append((f"{number:06d}.png", (0, 0, 1, 1, 2, 3)[kind], content))
    return found


def dsprites(root: Path, orientation: bool) -> Examples:
    from tools.vtab.originals.dsprites import FILE

    root.mkdir(parents=True, exist_ok=True)
    count = 60
    images = np.stack([pixels(index, 64, 64, 1)[..., 0] % 2 for index in range(count)])
    classes = np.stack([np.array([0, 0, 0, index % 40, index % 32, 0]) for index in range(count)])
    np.savez_compressed(root / FILE, imgs=images, latents_classes=classes, latents_values=classes.astype(float))
    # 40 orientations in 16 classes of 2.5: 0 1 2 | 3 4 | 5 6 7 | ...
    by_orientation = [0, 0, 0, 1, 1, 2, 2, 2, 3, 3, 4, 4, 4, 5, 5, 6, 6, 6, 7, 7]
    by_orientation += [label + 8 for label in by_orientation]
    labels = [by_orientation[index % 40] if orientation else index % 32 // 2 for index in range(count)]
    return {"train": [(index, labels[index], images[index] * np.uint8(255)) for index in range(count)]}


def smallnorb(root: Path, elevation: bool) -> Examples:
    folder = root / "smallnorb"
    folder.mkdir(parents=True)
    names = {"train": "5x46789x9x18x6x2x96x96-training", "test": "5x01235x9x18x6x2x96x96-testing"}
    found: Examples = {}
    for seed, (split, name) in enumerate(names.items()):
        pairs = np.stack([pixels(100 * seed + index, 96, 96, 2).transpose(2, 0, 1) for index in range(20)])
        info = np.stack([np.array([4, index % 9, 2 * (index % 18), 0]) for index in range(20)]).astype("<i4")
        for part, magic, content in (("dat", 0x1E3D4C55, pairs), ("info", 0x1E3D4C54, info)):
            # fewer than three dimensions still take three places
            sizes = [*content.shape, 1, 1][: max(3, content.ndim)]
            data = struct.pack(f"<{2 + len(sizes)}i", magic, content.ndim, *sizes) + content.tobytes()
            file = folder / f"smallnorb-{name}-{part}.mat"
            if split == "train":
                file.write_bytes(data)
            else:
                file.with_suffix(".mat.gz").write_bytes(gzip.compress(data))
        found[split] = [(index, index % 9 if elevation else index % 18, pairs[index, 0]) for index in range(20)]
    return found
