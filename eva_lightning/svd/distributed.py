"""The four collective operations engines need, with the process group left to the caller."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


def default_device(group: dist.ProcessGroup | None) -> torch.device:
    """The device collective operations of this group work on, for ranks that hold no tensor yet."""
    if "nccl" in dist.get_backend(group):
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def gather_counts(count: int, device: torch.device, group: dist.ProcessGroup | None) -> list[int]:
    """`count` of every rank, in rank order."""
    counts = [torch.zeros(1, dtype=torch.int64, device=device) for _ in range(dist.get_world_size(group))]
    dist.all_gather(counts, torch.tensor([count], dtype=torch.int64, device=device), group=group)
    return [int(c) for c in counts]


def broadcast(tensor: Tensor, source: int, group: dist.ProcessGroup | None) -> None:
    """Overwrite `tensor` on every rank with that of the group's rank `source`."""
    dist.broadcast(tensor, src=dist.get_global_rank(group, source) if group is not None else source, group=group)


def sum_(tensor: Tensor, group: dist.ProcessGroup | None) -> None:
    """Sum `tensor` over all ranks, in place."""
    dist.all_reduce(tensor, group=group)


def gather_rows(rows: Tensor, counts: list[int], group: dist.ProcessGroup | None) -> list[Tensor]:
    """Matrices of every rank, which may differ in their number of rows.

    Args:
        rows: Shape ``(counts[own rank], width)``.
        counts: Rows of every rank.
    """
    most = max(counts)
    padded = rows.new_zeros(most, rows.shape[1])
    padded[: rows.shape[0]] = rows
    gathered = [torch.zeros_like(padded) for _ in counts]
    dist.all_gather(gathered, padded, group=group)
    return [matrix[:count] for matrix, count in zip(gathered, counts, strict=True)]
