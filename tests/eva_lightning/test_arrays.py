"""NumPy's files of strangers: what they promise is compared with what they hold before anything is allocated."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path

import numpy as np
import pytest

from eva_lightning.arrays import array_from_bytes, arrays_from_npz, header, map_array
from eva_lightning.errors import InputError


def saved(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


@pytest.mark.parametrize("dtype", ["<f4", ">f8", "<i8", "|b1", "<f2", "|u1"])
@pytest.mark.parametrize("order", ["C", "F"])
def test_arrays_are_what_numpy_loads(dtype: str, order: str) -> None:
    array = np.asarray(np.arange(24).reshape(2, 3, 4) % 2, dtype=dtype, order=order)  # type: ignore[call-overload]
    found = array_from_bytes(saved(array))
    assert found.dtype == array.dtype
    np.testing.assert_array_equal(found, np.load(io.BytesIO(saved(array))))


@pytest.mark.parametrize(
    "shape", ["(2305843009213693952,)", "(-1,)", "(4611686018427387904, 2)", "(2,)", "(4, 0)", "()", "((((3,),),),)"]
)
def test_a_header_that_promises_other_sizes_is_refused(shape: str) -> None:
    text = saved(np.zeros(3, dtype="<f4")).replace(b"(3,)", shape.encode())
    length = len(text) - 10 - 12
    with pytest.raises((InputError, ValueError)):
        array_from_bytes(text[:8] + length.to_bytes(2, "little") + text[10:])


@pytest.mark.parametrize(
    "array", [np.array([None]), np.array(["a"]), np.zeros(2, dtype=[("a", "<f4")]), np.zeros(2, "M8[s]")]
)
def test_other_things_than_numbers_are_refused(array: np.ndarray) -> None:
    with pytest.raises((InputError, ValueError)):
        array_from_bytes(saved(array))
    with pytest.raises(InputError, match="neither true nor false"):
        array_from_bytes(saved(np.array([2, 1], dtype=np.uint8)).replace(b"'|u1'", b"'|b1'"))


def test_an_archive_that_unpacks_to_gigabytes_is_refused_before() -> None:
    buffer = io.BytesIO()
    with (
        zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive,
        archive.open("a.npy", "w") as file,
    ):
        file.write(header((300 * 2**20,), np.dtype(np.uint8)))
        for _ in range(300):
            file.write(bytes(2**20))
    with pytest.raises(InputError, match=r"it would unpack to 300\.0 MiB"):
        arrays_from_npz(buffer.getvalue(), ["a"])
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_LZMA) as archive:
        archive.writestr("a.npy", saved(np.zeros(3)))
    with pytest.raises(InputError, match="packed in a way that NumPy does not write"):
        arrays_from_npz(buffer.getvalue(), ["a"])


def test_a_map_is_of_the_shape_and_type_that_are_known(tmp_path: Path) -> None:
    array = np.arange(12, dtype=np.float32).reshape(3, 4)
    np.save(tmp_path / "a.npy", array)
    np.testing.assert_array_equal(map_array(tmp_path / "a.npy", (3, 4), array.dtype), array)
    for shape, dtype in (((4, 3), np.float32), ((3, 4), np.int32), ((3, 5), np.float32), ((2**61,), np.float32)):
        with pytest.raises(InputError, match="does not hold"):
            map_array(tmp_path / "a.npy", shape, np.dtype(dtype))
