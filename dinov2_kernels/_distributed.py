"""Process groups as the operators take them: ``group=None`` means this process alone."""

from __future__ import annotations

import torch.distributed as dist


def place_in(group: dist.ProcessGroup | None) -> tuple[int, int]:
    """How many processes the group has, and which of them this one is.

    Raises:
        ValueError: this process is not a member of the group.
    """
    if group is None:
        return 1, 0
    rank = dist.get_rank(group)
    if rank < 0:
        raise ValueError("group: expected a process group to which this process belongs, got one to which it does not")
    return dist.get_world_size(group), rank
