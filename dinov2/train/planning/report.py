"""A plan as tables for people."""

from __future__ import annotations

import math

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from dinov2.train.planning.plan import Plan
from dinov2.train.precision import definite

NAMES = {"backbone": "backbone", "dino_head": "head of class tokens", "ibot_head": "head of patches"}
SHARED_HEAD = "head of class tokens and patches"


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
