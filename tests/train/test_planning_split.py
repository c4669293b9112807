"""The plan of networks that are split among processes, against what FSDP makes of the same passes.

FSDP runs in a process of its own, whose group has as many members as the plan and sends nothing, on fake tensors.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.tensor import DTensor

from dinov2.models import HeadConfig, ViTConfig
from dinov2.objectives import SelfDistillation, build_networks
from dinov2.recipes import recipe
from dinov2.train import ParallelConfig, PretrainConfig
from dinov2.train.planning import plan
from dinov2.train.planning.memory import BACKWARD, STUDENT, Recorder, views_of
from dinov2.train.processes import Processes
from dinov2.train.sharding import exchange_gradients, mesh_of, split_network

ROOT = Path(__file__).parents[2]
PROCESSES = 8


class SplitRecorder(Recorder):
    """Sees the parts that a process holds, and memory that FSDP gives back by changing its size."""

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # until it is taken apart
        return super().__torch_dispatch__(operator, types, args, kwargs)

    @contextmanager
    def watching_sizes(self) -> Iterator[None]:
        resize = torch.UntypedStorage.resize_

        def watched(memory: torch.UntypedStorage, size: int) -> None:
            if id(memory) in self._there:
                self.forget(id(memory))
            resize(memory, size)
            self.note(memory, torch.Size(), "resize_")

        torch.UntypedStorage.resize_ = watched  # type: ignore[method-assign, assignment]
        try:
            yield
        finally:
            torch.UntypedStorage.resize_ = resize  # type: ignore[method-assign]


def run(sharding: str, passes: int) -> PretrainConfig:
    config = recipe("vitl16_short")
    head = HeadConfig(out_dim=32768)
    return replace(
        config,
        vit=ViTConfig.of("vit_base", patch_size=16, drop_path_rate=0.3, depth=6),
        dino_head=head,
        ibot_head=head,
        batch_size=4 * PROCESSES * passes,
        accumulation_steps=passes,
        precision="bf16",
        parallel=ParallelConfig(sharding=sharding, shard_size=4 if sharding == "hybrid" else None),
    )


def peak_of_fsdp(sharding: str, passes: int) -> float:
    """Memory of one process, in the second step."""
    import torch.distributed._tools.fake_collectives  # PyTorch 2.10 cannot gather fake tensors without it
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=PROCESSES)
    config = run(sharding, passes)
    made = plan(config, world_size=PROCESSES, device_type="cpu")
    mesh = mesh_of(config.parallel, Processes(torch.device("cpu"), 0, PROCESSES, dist.group.WORLD))
    with torch.device("meta"):
        networks = build_networks(config.vit, config.dino_head, config.ibot_head)
        for network in networks:
            split_network(network, mesh, torch.bfloat16)
    recorder = SplitRecorder(2, "cpu")
    with FakeTensorMode(allow_non_fake_inputs=True), recorder, recorder.watching_sizes():
        objective = SelfDistillation(*networks, config.objective, dist.group.WORLD).to_empty(device="cpu")
        optimizer = torch.optim.AdamW(objective.student.parameters(), fused=True)
        views = views_of(config, made.rows)
        for _ in range(2):
            optimizer.zero_grad()
            for number in range(passes):
                exchange_gradients(objective.student, number == passes - 1)
                recorder.phase = STUDENT
                with torch.autocast("cpu", torch.bfloat16):
                    loss = objective(views, 0.07)["total"]
                recorder.phase = BACKWARD
                loss.backward()
            recorder.phase = "update"  # where DTensor tries operators on whole tensors, which have no memory in a run
            optimizer.step()
            objective.update_average(0.99)
    peaks = recorder.peaks([], 0.0)
    return max(peaks[phase].total for phase in (STUDENT, BACKWARD))


@pytest.mark.parametrize("passes", [1, 2])
@pytest.mark.parametrize("sharding", ["full", "hybrid"])
def test_split_networks_take_what_fsdp_takes(sharding: str, passes: int) -> None:
    code = f"from tests.train.test_planning_split import peak_of_fsdp; print(peak_of_fsdp({sharding!r}, {passes}))"
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT).stdout
    peak = plan(run(sharding, passes), world_size=PROCESSES, device_type="cpu").peak
    assert peak.total == pytest.approx(float(output), rel=0.1)
