"""Recipes: each is a function that returns the complete configuration of a run.

The recipes of :data:`RECIPES` pretrain from scratch. :func:`adaptation` and :func:`distillation` build on a trained
network. The recipes of :data:`CURATIONS` make the set of images to pretrain on.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import TYPE_CHECKING, TypeVar

from dinov2.lazily import names_from

if TYPE_CHECKING:
    from dinov2.curate import CurateConfig
    from dinov2.recipes.building_on import adaptation, distillation
    from dinov2.recipes.curations import CURATIONS, laptop, lvd142m
    from dinov2.recipes.pretraining import (
        RECIPES,
        photos,
        vitb14,
        vitg14,
        vitl14,
        vitl16_short,
        vits14,
        vits14_small_data,
    )
    from dinov2.train.config import PretrainConfig
else:
    __getattr__ = names_from(
        __name__,
        {
            "building_on": ("adaptation", "distillation"),
            "curations": ("CURATIONS", "laptop", "lvd142m"),
            "pretraining": (
                "RECIPES",
                "photos",
                "vitb14",
                "vitg14",
                "vitl14",
                "vitl16_short",
                "vits14",
                "vits14_small_data",
            ),
        },
    )

Function = TypeVar("Function")


def recipe(name: str) -> PretrainConfig:
    """The configuration of the recipe called ``name``.

    Raises:
        ValueError: no recipe has this name; the message suggests the closest name.
    """
    from dinov2.recipes.pretraining import RECIPES

    return _named(name, RECIPES, "recipe")()


def curation(name: str) -> CurateConfig:
    """The configuration of the curation called ``name``; errors are those of :func:`recipe`."""
    from dinov2.recipes.curations import CURATIONS

    return _named(name, CURATIONS, "curation")()


def _named(name: str, functions: Mapping[str, Function], kind: str) -> Function:
    if name in functions:
        return functions[name]
    close = difflib.get_close_matches(name, functions, n=1, cutoff=0.4)
    suggestion = f"did you mean {close[0]!r}? " if close else ""
    raise ValueError(f"unknown {kind} {name!r}: {suggestion}the {kind}s are {', '.join(functions)}")


__all__ = [
    "CURATIONS",
    "RECIPES",
    "adaptation",
    "curation",
    "distillation",
    "laptop",
    "lvd142m",
    "photos",
    "recipe",
    "vitb14",
    "vitg14",
    "vitl14",
    "vitl16_short",
    "vits14",
    "vits14_small_data",
]
