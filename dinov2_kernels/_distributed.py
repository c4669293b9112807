"""Process groups as the operators take them: ``group=None`` means this process alone."""

from __future__ import annotations

import torch.distributed as dist


def world_size(group: dist.ProcessGroup | None) -> int:
    """The processes of the group; 1 for None.

    Raises:
        ValueError: this process is not a member of the group.
    """
    if group is None:
        return 1
    size = dist.get_world_size(group)
    if size < 1:
        raise ValueError("group: expected a process group that this process is a member of")
    return size
