"""Recipes: each is a function that returns the complete configuration of a run.

Those of :data:`RECIPES` pretrain from nothing but images; :func:`adaptation` and :func:`distillation` build on a
network that is there already.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable

from dinov2.recipes.adaptation import adaptation
from dinov2.recipes.distillation import distillation
from dinov2.recipes.photos import photos
from dinov2.recipes.reference import vitb14, vitg14, vitl14, vitl16_short, vits14
from dinov2.recipes.small_data import vits14_small_data
from dinov2.train.config import PretrainConfig

RECIPES: dict[str, Callable[[], PretrainConfig]] = {
    function.__name__: function
    for function in (photos, vits14_small_data, vitl16_short, vits14, vitb14, vitl14, vitg14)
}


def recipe(name: str) -> PretrainConfig:
    """The configuration of the recipe called ``name``.

    Raises:
        ValueError: there is none of this name; the message suggests the closest.
    """
    if name in RECIPES:
        return RECIPES[name]()
    close = difflib.get_close_matches(name, RECIPES, n=1, cutoff=0.4)
    suggestion = f"did you mean {close[0]!r}? " if close else ""
    raise ValueError(f"unknown recipe {name!r}: {suggestion}the recipes are {', '.join(RECIPES)}")


__all__ = [
    "RECIPES",
    "adaptation",
    "distillation",
    "photos",
    "recipe",
    "vitb14",
    "vitg14",
    "vitl14",
    "vitl16_short",
    "vits14",
    "vits14_small_data",
]
