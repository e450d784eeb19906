"""Sums and cuts over the processes of one training run (torch.distributed); in one process, the values themselves."""

import torch
import torch.distributed as dist
from torch import Tensor


def place() -> tuple[int, int]:
    """(rank, number of processes)."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def total(tensor: Tensor) -> Tensor:
    """The sum over the processes; may be the same memory."""
    if dist.is_initialized():
        tensor = tensor.contiguous()
        dist.all_reduce(tensor)
    return tensor


def gathered(values: Tensor) -> Tensor:
    """The values (n,) of all processes, in the order of the ranks; n may differ."""
    if not dist.is_initialized():
        return values
    counts = torch.zeros(dist.get_world_size(), dtype=torch.long, device=values.device)
    counts[dist.get_rank()] = len(values)
    most = int(total(counts).max())
    parts = [values.new_empty(most) for _ in counts]
    dist.all_gather(parts, torch.nn.functional.pad(values, (0, most - len(values))))
    return torch.cat([part[:count] for part, count in zip(parts, counts.tolist(), strict=True)])
