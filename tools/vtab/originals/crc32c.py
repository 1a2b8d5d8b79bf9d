"""CRC-32C (Castagnoli), the checksum of TFRecord files, by NumPy.

A message is cut into pieces that are taken byte by byte side by side. CRCs are linear over GF(2): the CRC of two pieces
in a row is that of the first, moved over as many zero bytes as the second has, XOR that of the second.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

_POLYNOMIAL = 0x82F63B78
_BYTE = np.uint32(8)
_BITS = np.arange(32, dtype=np.uint32)


def _make_table() -> npt.NDArray[np.uint32]:
    table: npt.NDArray[np.uint32] = np.arange(256, dtype=np.uint32)
    for _ in range(8):
        table = (table >> np.uint32(1)) ^ (table & np.uint32(1)) * np.uint32(_POLYNOMIAL)
    return table


_TABLE = _make_table()


def crc32c(data: bytes) -> int:
    """CRC-32C of `data`, as RFC 3720 (iSCSI) defines it."""
    if len(data) < 64:
        return ~_plain(data) & 0xFFFFFFFF
    pieces = 1 << ((len(data) // 64).bit_length() - 1)  # of 64 to 128 bytes
    width = -(-len(data) // pieces)
    # zeros in front do not change a CRC that starts from 0; to start from all ones is to flip the first four bytes
    rows = np.zeros((pieces + 32, width), dtype=np.uint8)
    flat = rows[:pieces].reshape(-1)
    flat[pieces * width - len(data) :] = np.frombuffer(data, dtype=np.uint8)
    first = pieces * width - len(data)
    flat[first : first + 4] ^= 0xFF
    state = np.concatenate([np.zeros(pieces, dtype=np.uint32), np.uint32(1) << _BITS])
    for column in np.ascontiguousarray(rows.T):
        state = _TABLE.take(state.astype(np.uint8) ^ column) ^ (state >> _BYTE)
    # the 32 last rows, all zeros, say where each bit of a CRC goes over `width` zero bytes
    state, moved = state[:pieces], state[pieces:]
    while len(state) > 1:
        state = _move(state[0::2], moved) ^ state[1::2]
        moved = _move(moved, moved)
    return int(~state[0])


def _plain(data: bytes) -> int:
    state = 0xFFFFFFFF
    for byte in data:
        state = int(_TABLE[(state ^ byte) & 0xFF]) ^ (state >> 8)
    return state


def _move(state: npt.NDArray[np.uint32], moved: npt.NDArray[np.uint32]) -> npt.NDArray[np.uint32]:
    bits = (state[:, None] >> _BITS) & np.uint32(1)
    found: npt.NDArray[np.uint32] = np.bitwise_xor.reduce(bits * moved, axis=1)
    return found
