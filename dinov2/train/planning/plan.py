"""A run before it starts: what it needs, and that as tables for people."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from dinov2.objectives import build_networks
from dinov2.train.config import PretrainConfig
from dinov2.train.flops import step_flops
from dinov2.train.graphed_step import check_graphable
from dinov2.train.planning.memory import Peak, peak_memory
from dinov2.train.planning.sizes import Parameters, Rows, bytes_sent
from dinov2.train.precision import definite, with_definite_precision
from dinov2.train.processes import Processes

NAMES = {"backbone": "backbone", "dino_head": "head of class tokens", "ibot_head": "head of patches"}
SHARED_HEAD = "head of class tokens and patches"


@dataclass(frozen=True)
class Plan:
    """What a run needs.

    Attributes:
        config: the run.
        world_size: its processes.
        device_type: where they train.
        parameters: of its networks.
        rows: of one pass of one process.
        sent: bytes that a process sends in a step, by what they are for.
        flops: floating-point operations of a step, over all processes; see :mod:`dinov2.train.flops`.
    """

    config: PretrainConfig
    world_size: int
    device_type: str
    parameters: Parameters
    rows: Rows
    sent: dict[str, float]
    flops: float

    @cached_property
    def peak(self) -> Peak:
        """The most memory that a process holds, in bytes. To find it takes seconds, when it is first asked for."""
        return peak_memory(
            self.config, self.parameters, self.rows, world_size=self.world_size, device_type=self.device_type
        )

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
    parameters = Parameters.of(student, teacher)
    rows = Rows.of(config, processes.share(config.micro_batch_size))
    return Plan(
        config=config,
        world_size=world_size,
        device_type=device_type,
        parameters=parameters,
        rows=rows,
        sent=bytes_sent(config, parameters, rows, world_size=world_size, device_type=device_type),
        flops=step_flops(config, teacher),
    )


def print_plan(plan: Plan, console: Console | None = None) -> None:
    """Print what a run needs."""
    console = console or Console()
    console.print(_overview(plan))
    console.print(_parameters(plan))
    console.print(_memory(plan))
    console.print(_step(plan))
    console.print(
        "[dim]Memory is what tensors take; a CUDA context and allocators come on top, with some per cent. Operations"
        " are those of products and attention, without what is computed again.[/dim]"
    )


def _overview(plan: Plan) -> Table:
    config, vit = plan.config, plan.config.vit
    table = Table(box=None, show_header=False)
    where = f"{plan.world_size} process{'es' if plan.world_size > 1 else ''} on {plan.device_type}"
    for name, value in (
        ("model", f"{vit.depth} blocks of width {vit.embed_dim}, patches of {vit.patch_size} pixels"),
        ("run", f"{config.steps:,} steps of {config.batch_size:,} images, {config.steps * config.batch_size:,} in all"),
        ("processes", f"{where}, {definite(config.precision, plan.device)}, sharding {config.parallel.sharding}"),
    ):
        table.add_row(f"[dim]{name}[/dim]", value)
    return table


def _parameters(plan: Plan) -> Table:
    table = _table("parameters", "millions")
    names = NAMES if "ibot_head" in plan.parameters.modules else NAMES | {"dino_head": SHARED_HEAD}
    for name, count in plan.parameters.modules.items():
        table.add_row(names[name], f"{count / 1e6:,.1f}")
    table.add_section()
    table.add_row("together, and as many in the teacher", f"{plan.parameters.student / 1e6:,.1f}")
    return table


def _memory(plan: Plan) -> Table:
    table = _table("memory of a process", "")
    for name, size in sorted(plan.peak.bytes.items(), key=lambda item: -item[1]):
        if size >= 0.5e6:
            table.add_row(name, _scaled(size, "B"))
    table.add_section()
    table.add_row(f"together, at its peak: {plan.peak.moment}", _scaled(plan.peak.total, "B"))
    return table


def _step(plan: Plan) -> Table:
    config, rows = plan.config, plan.rows
    table = _table("a step", "")
    table.add_row("passes of each process", f"{config.accumulation_steps:,}")
    table.add_row("images of one pass of a process", f"{rows.images:,}")
    table.add_row("tokens of these, in all their crops", f"{rows.crops.total_tokens:,}")
    if (kept := rows.kept(max(config.vit.drop_path_rates))) < rows.crops.total_tokens:
        table.add_row("of which stochastic depth lets through a branch", f"{kept:,}")
    table.add_row("masked patches, on average", f"{rows.masked:,.0f}")
    table.add_row("operations of all processes", _scaled(plan.flops, "FLOP"))
    table.add_row("of one image", _scaled(plan.flops / config.batch_size, "FLOP"))
    if plan.world_size > 1:
        for name, size in plan.sent.items():
            if size:
                table.add_row(f"{name} that a process sends", _scaled(size, "B"))
    table.add_row("operations of the whole run", _scaled(config.steps * plan.flops, "FLOP"))
    return table


def _scaled(value: float, unit: str) -> str:
    """A number of millions or more, with the prefix that leaves it one to three digits before the point."""
    power = min(max(2, int(math.log10(max(value, 1.0))) // 3), 6)
    return f"{value / 1000**power:,.1f} {'kMGTPE'[power - 1]}{unit}"


def _table(title: str, unit: str) -> Table:
    table = Table(box=SIMPLE_HEAD)
    table.add_column(title, min_width=48)
    table.add_column(unit, justify="right")
    return table
