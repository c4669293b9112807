"""``accelerate(model)`` finds the modules that it knows and makes their forward run on the kernels, in place."""

from __future__ import annotations

import logging
import re
import warnings
from typing import TypeVar

from torch import nn

import dinov2_kernels.nn as native
from dinov2_kernels.integrations import facebook_vit, timm_vit, transformers_vit
from dinov2_kernels.integrations.summary import Report, Status, summarise
from dinov2_kernels.integrations.swap import Accelerated, original_class

Model = TypeVar("Model", bound=nn.Module)

RECIPES: tuple[type[Accelerated], ...] = (
    timm_vit.Attention,
    timm_vit.Block,
    timm_vit.SwiGLU,
    transformers_vit.Attention,
    transformers_vit.SelfAttention,
    transformers_vit.Dinov2Layer,
    transformers_vit.ViTLayer,
    transformers_vit.SwiGLU,
    facebook_vit.Attention,
    facebook_vit.Block,
    facebook_vit.SwiGLU,
)

NATIVE: dict[type[nn.Module], str] = {
    native.Attention: "varlen_attention",
    native.Block: "stochastic_depth",
    native.SwiGLUFFN: "swiglu",
}

LISTED = re.compile("Attention|Attn|SwiGLU|Block$|[a-z]Layer$")
"""Names of classes that a report lists even if no recipe recognises them."""

REASONS = {
    "AttentionPool|CrossAttention": "cross-attention: queries and keys are of different tokens",
    "Causal": "a causal mask",
    "[Rr]ope|Eva|DINOv3": "rotary position embeddings",
    "Window|[Ss]win|[Bb]eit|RelPos": "relative position bias",
    "Diff": "the difference of two softmaxes",
    "ParallelScaling": "attention and feed-forward layer share their projections",
    "ResPost": "its norms follow the branches",
    "SwiGLU": "gate and value come from two linear layers, and joining them for the kernel costs more than it saves",
    "": "not a module that accelerate knows",
}
"""Why a module is not swapped, by a pattern in the full name of its class; the first pattern that matches counts."""


def accelerate(model: Model) -> Model:
    """Run the attention, SwiGLU and residual connections of a vision transformer on the kernels.

    Modules of timm's ``VisionTransformer`` family, of transformers' DINOv2 and ViT models and of facebook's DINOv2 get
    another forward, which computes the same. Parameters, their names, hooks and optimisers keep working. Copies and
    pickles are accelerated too, and :func:`restore` undoes everything. In training, blocks with stochastic depth no
    longer multiply samples by a mask: they do not compute dropped samples (:func:`dinov2_kernels.stochastic_depth`).
    A call with a mask, with attention dropout in training, or that returns attention weights runs the library's own
    forward; see docs/integrations.md.

    Args:
        model: the model, which is changed in place. A second call changes nothing.

    Returns:
        The model. :func:`report` says what was swapped, and why the rest was not; the report is also logged.

    Warns:
        UserWarning: nothing in the model runs on the kernels.

    Examples:
        >>> from timm.models.vision_transformer import VisionTransformer
        >>> model = VisionTransformer(img_size=28, patch_size=14, embed_dim=64, depth=2, num_heads=1)
        >>> images = torch.randn(2, 3, 28, 28)
        >>> expected = model(images)
        >>> torch.allclose(accelerate(model)(images), expected, atol=1e-4)
        True
    """
    for module in model.modules():
        recipe = _find_recipe(module)
        if recipe is not None and recipe.obstacle(module) is None:
            recipe.swap(module)
    result = report(model)
    logging.getLogger(__name__).info("%s", result)
    if not any(isinstance(module, (Accelerated, *NATIVE)) for module in model.modules()):
        warnings.warn(f"accelerate: nothing was swapped\n{result}", stacklevel=2)
    return model


def restore(model: Model) -> Model:
    """Undo :func:`accelerate` in place: all modules get back their classes and with them their forwards.

    Returns:
        The model.

    Examples:
        >>> from timm.models.vision_transformer import VisionTransformer
        >>> model = accelerate(VisionTransformer(img_size=28, patch_size=14, embed_dim=64, depth=2, num_heads=1))
        >>> report(model).on_kernels
        4
        >>> report(restore(model)).on_kernels
        0
    """
    for module in model.modules():
        if (cls := original_class(module)) is not None:
            module.__class__ = cls
    return model


def report(model: nn.Module) -> Report:
    """Report which modules run on the kernels, and why others do not; before :func:`accelerate`, which ones would.

    ``print`` shows the report as a table.

    Examples:
        >>> from timm.models.vision_transformer import VisionTransformer
        >>> model = VisionTransformer(img_size=28, patch_size=14, embed_dim=64, depth=2, num_heads=1)
        >>> print(report(model))
        VisionTransformer: 0 modules run on dinov2_kernels
        module     count  status
        Block      2      ready   stochastic_depth, after accelerate(model)
        Attention  2      ready   varlen_attention, after accelerate(model)
    """
    return summarise(model, _status)


def _find_recipe(module: nn.Module) -> type[Accelerated] | None:
    if isinstance(module, (Accelerated, *NATIVE)):
        return None
    return next((recipe for recipe in RECIPES if recipe.recognises(module)), None)


def _status(module: nn.Module) -> tuple[Status, str] | None:
    """The status of a module, with its kernel or the reason; None if the kernels have nothing like it."""
    if isinstance(module, Accelerated):
        reason = module.detour()
        return ("left", reason) if reason else ("accelerated", module.runs_on + module.restriction())
    for cls, kernel in NATIVE.items():
        if isinstance(module, cls):
            return "native", kernel
    if (recipe := _find_recipe(module)) is not None:
        reason = recipe.obstacle(module) or recipe.detour_of(module)
        return ("left", reason) if reason else ("ready", f"{recipe.runs_on}, after accelerate(model)")
    cls = type(module)
    wraps_attention = "Attention" in cls.__name__ and hasattr(module, "attention")
    if wraps_attention or not LISTED.search(cls.__name__):
        return None
    name = f"{cls.__module__}.{cls.__name__}"
    return "left", next(reason for pattern, reason in REASONS.items() if re.search(pattern, name))
