"""The tables of docs/recipes.md, from what ``dinov2 pretrain --dry_run`` knows.

python -m tests.recipes.tables        prints them
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import NamedTuple

from dinov2.recipes import RECIPES, recipe
from dinov2.train import PretrainConfig
from dinov2.train.flops import PEAK_TFLOPS
from dinov2.train.planning import Plan, plan

UTILISATION = 0.4


class Case(NamedTuple):
    """One way to run a recipe: processes, passes of a step, how networks are held, what blocks compute again."""

    name: str
    processes: int
    passes: int
    sharding: str = "replicate"
    recomputed: str = "none"


CASES = (
    Case("vits14_small_data", 1, 1),
    Case("vits14_small_data", 1, 1, recomputed="selective"),
    Case("vits14_small_data", 1, 1, recomputed="full"),
    Case("vits14_small_data", 4, 1),
    Case("vitl16_short", 32, 1),
    Case("vitl16_short", 8, 4),
    Case("vitl16_short", 8, 4, sharding="full"),
    Case("vitl16_short", 8, 4, recomputed="full"),
    Case("vits14", 24, 1),
    Case("vits14", 8, 3),
    Case("vitb14", 48, 1),
    Case("vitb14", 8, 6),
    Case("vitl14", 96, 1),
    Case("vitl14", 8, 12),
    Case("vitl14", 8, 12, sharding="full"),
    Case("vitg14", 256, 1),
    Case("vitg14", 256, 1, sharding="full"),
    Case("vitg14", 8, 32, sharding="full"),
    Case("vitl14 at 518", 96, 4),
    Case("vitl14 at 518", 96, 4, recomputed="full"),
)


def config_of(name: str) -> PretrainConfig:
    """A recipe, or one that ``dinov2 adapt`` makes of it: ``NAME at PIXELS``."""
    name, _, size = name.partition(" at ")
    config = recipe(name)
    if not size:
        return config
    vit, views = replace(config.vit, img_size=int(size)), config.data.augmentation
    local = vit.patch_size * round(views.local_size * int(size) / views.global_size / vit.patch_size)
    augmentation = replace(views, global_size=int(size), local_size=local)
    return replace(config, steps=10_000, vit=vit, data=replace(config.data, augmentation=augmentation))


def plan_of(case: Case) -> Plan:
    """The plan of one way to run a recipe, on GPUs."""
    config = config_of(case.name)
    config = replace(
        config,
        accumulation_steps=case.passes,
        parallel=replace(config.parallel, sharding=case.sharding),
        activation_checkpointing=case.recomputed,
    )
    return plan(config, world_size=case.processes, device_type="cuda")


def arithmetic() -> Iterator[str]:
    """What each recipe computes."""
    yield from header(
        ["recipe", "backbone", "heads", "steps", "images", "of one image", "of the run", "A100 hours"],
        "lrrrrrrr",
    )
    for name in (*RECIPES, "vitl14 at 518"):
        if name == "photos":  # for a CPU
            continue
        config = config_of(name)
        made = plan(config, world_size=1, device_type="cuda")
        backbone = made.parameters.modules["backbone"]
        yield row(
            [
                name,
                f"{backbone / 1e6:,.1f} M",
                f"{(made.parameters.student - backbone) / 1e6:,.1f} M",
                f"{config.steps:,}",
                f"{config.steps * config.batch_size / 1e6:,.2f} M",
                f"{made.flops / config.batch_size / 1e9:,.0f} GFLOP",
                f"{config.steps * made.flops / 1e18:,.3f} EFLOP",
                f"{made.hours(UTILISATION * PEAK_TFLOPS['A100'] * 1e12):,.1f}",
            ]
        )


def needs() -> Iterator[str]:
    """What one process of each way to run a recipe holds and sends."""
    yield from header(
        ["recipe", "processes", "passes", "images of a pass", "sharding", "computed again", "memory", "sent in a step"],
        "lrrrllrr",
    )
    for case in CASES:
        made = plan_of(case)
        yield row(
            [
                case.name,
                f"{case.processes}",
                f"{case.passes}",
                f"{made.rows.images}",
                case.sharding if case.processes > 1 else "none",
                case.recomputed,
                f"{made.peak.total / 1e9:,.1f} GB",
                f"{sum(made.sent.values()) / 1e9:,.1f} GB" if case.processes > 1 else "",
            ]
        )


def header(names: Iterable[str], alignment: str) -> list[str]:
    """The first two lines of a table."""
    return [row(names), row({"l": "---", "r": "---:"}[side] for side in alignment)]


def row(cells: Iterable[str]) -> str:
    """A line of a table."""
    return "| " + " | ".join(cells) + " |"


if __name__ == "__main__":
    print("\n".join(arithmetic()), end="\n\n")
    print("\n".join(needs()))
