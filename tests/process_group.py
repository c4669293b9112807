"""Tests of several processes, as a gloo group on this machine."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from tests.forkserver import CONTEXT


def in_processes(world_size: int, directory: Path, function: Callable[..., None], *arguments: object) -> None:
    """Call ``function(rank, world_size, *arguments)`` in every process of a new group, which meets in ``directory``."""
    of_member = (world_size, f"{directory}/store", function, arguments)
    mp.start_processes(_member, of_member, world_size, start_method=CONTEXT.get_start_method())


def _member(
    rank: int, world_size: int, store: str, function: Callable[..., None], arguments: tuple[object, ...]
) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size)
    function(rank, world_size, *arguments)
    dist.barrier()  # after all earlier exchanges: one that gloo's threads hold when Python ends aborts the process
    dist.destroy_process_group()
