"""A run before it starts: its networks without memory, and what follows from their sizes."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from dinov2.objectives import build_networks
from dinov2.train.config import PretrainConfig
from dinov2.train.flops import step_flops
from dinov2.train.graphed_step import check_graphable
from dinov2.train.planning.communication import bytes_sent
from dinov2.train.planning.memory import Parameters, Peak, parameters_of, peak_memory
from dinov2.train.planning.sizes import Rows
from dinov2.train.precision import with_definite_precision
from dinov2.train.processes import Processes


@dataclass(frozen=True)
class Plan:
    """What a run needs.

    Attributes:
        config: the run.
        world_size: its processes.
        device_type: where they train.
        parameters: of its networks.
        rows: of one pass of one process.
        peak: the most memory that a process holds, in bytes.
        sent: bytes that a process sends in a step, by what they are for.
        flops: floating-point operations of a step, over all processes; see :mod:`dinov2.train.flops`.
    """

    config: PretrainConfig
    world_size: int
    device_type: str
    parameters: Parameters
    rows: Rows
    peak: Peak
    sent: dict[str, float]
    flops: float

    @property
    def device(self) -> torch.device:
        """A device of the type that processes train on."""
        return torch.device(self.device_type)

    def hours(self, flops_per_second: float) -> float:
        """Hours of one device, of so many operations a second, for the whole run; all its devices share them."""
        return self.config.steps * self.flops / flops_per_second / 3600


def plan(config: PretrainConfig, *, world_size: int, device_type: str) -> Plan:
    """What the run ``config`` needs with ``world_size`` processes on devices of this type.

    Raises:
        ValueError: its batch does not split among the processes, its precision on this device does not go with it, or
            it cannot replay its steps there.
    """
    config = with_definite_precision(config, torch.device(device_type))
    with torch.device("meta"):
        student, teacher = build_networks(config.vit, config.dino_head, config.ibot_head)
    processes = Processes(torch.device(device_type), world_size=world_size)
    if config.cuda_graph:
        check_graphable(processes)
    parameters = parameters_of(student, teacher)
    rows = Rows.of(config, processes.share(config.micro_batch_size))
    return Plan(
        config=config,
        world_size=world_size,
        device_type=device_type,
        parameters=parameters,
        rows=rows,
        peak=peak_memory(config, parameters, rows, world_size=world_size, device_type=device_type),
        sent=bytes_sent(config, parameters, rows, world_size=world_size, device_type=device_type),
        flops=step_flops(config, teacher),
    )
