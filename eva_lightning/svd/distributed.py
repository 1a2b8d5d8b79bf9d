"""The collective operations engines need. Messages travel on the device the group's backend works on, wherever the
engines keep their state.
"""

from __future__ import annotations

from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


def default_device(group: dist.ProcessGroup | None) -> torch.device:
    """The device collective operations of this group work on."""
    if "nccl" in dist.get_backend(group):
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def world_size() -> int:
    """Processes that take part; 1 without ``torch.distributed``."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def all_ranks(flag: bool) -> bool:
    """Whether `flag` is set on every rank; the same answer on all."""
    if world_size() == 1:
        return flag
    votes = torch.tensor(int(flag), device=default_device(None))
    dist.all_reduce(votes)
    return int(votes) == world_size()


def from_first_rank(value: T) -> T:
    """What the first rank has, on every rank: equal sums can still differ in the last bit between unequal machines."""
    if world_size() == 1:
        return value
    box: list[Any] = [value]
    dist.broadcast_object_list(box, src=0)
    return cast(T, box[0])


def gather_counts(count: int, group: dist.ProcessGroup | None) -> list[int]:
    """`count` of every rank, in rank order."""
    own = torch.tensor([count], dtype=torch.int64, device=default_device(group))
    counts = [torch.zeros_like(own) for _ in range(dist.get_world_size(group))]
    dist.all_gather(counts, own, group=group)
    return [int(c) for c in counts]


def broadcast(tensor: Tensor, source: int, group: dist.ProcessGroup | None) -> None:
    """Overwrite `tensor` on every rank with that of the group's rank `source`."""
    work = tensor.to(default_device(group))
    dist.broadcast(work, src=source if group is None else dist.get_global_rank(group, source), group=group)
    tensor.copy_(work)


def sum_(tensor: Tensor, group: dist.ProcessGroup | None) -> None:
    """Sum `tensor` over all ranks, in place."""
    work = tensor.to(default_device(group))
    dist.all_reduce(work, group=group)
    tensor.copy_(work)


def gather_rows(rows: Tensor, counts: list[int], group: dist.ProcessGroup | None) -> list[Tensor]:
    """Matrices of every rank, which may differ in their number of rows.

    Args:
        rows: Shape ``(counts[own rank], width)``.
        counts: Rows of every rank.
    """
    padded = torch.zeros(max(counts), rows.shape[1], dtype=rows.dtype, device=default_device(group))
    padded[: rows.shape[0]] = rows
    gathered = [torch.zeros_like(padded) for _ in counts]
    dist.all_gather(gathered, padded, group=group)
    return [matrix[:count].to(rows.device) for matrix, count in zip(gathered, counts, strict=True)]
