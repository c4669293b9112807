"""Weights of DINOv2 models under the names of facebook, transformers or timm; all become facebook's."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from math import isqrt
from typing import Any, Literal

import torch
from torch import Tensor

Tensors = dict[str, Tensor]
Source = Literal["facebook", "transformers", "timm"]

WRAPPERS = ("teacher", "model", "state_dict")
"""Keys under which training programs store the weights."""
PREFIXES = ("teacher.backbone.", "backbone.", "dinov2_with_registers.", "dinov2.", "module.")
"""Modules that hold the vision transformer; everything outside it, heads above all, is left out."""
PRETRAINING_HEADS = ("dino_head.", "ibot_head.")
HEADS = ("head.", *PRETRAINING_HEADS, "linear_head.", "classifier.")
CENTERS = ("dino_loss.center", "ibot_patch_loss.center")
"""Moving averages of the teacher's logits on class tokens and on patches, which softmax centring subtracts."""

TRANSFORMERS_NAMES = (
    (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"^embeddings\.position_embeddings$", "pos_embed"),
    (r"^embeddings\.", ""),
    (r"^encoder\.layer\.", "blocks."),
    (r"\.attention\.output\.dense\.", ".attn.proj."),
    (r"\.layer_scale([12])\.lambda1$", r".ls\1.gamma"),
    (r"\.mlp\.weights_in\.", ".mlp.w12."),
    (r"\.mlp\.weights_out\.", ".mlp.w3."),
    (r"^layernorm\.", "norm."),
)
"""Patterns in the names that transformers writes, and what facebook writes instead."""


def to_facebook_names(content: Any) -> tuple[Tensors, Source]:
    """The weights of a vision transformer with facebook's names, and whose names they had.

    Args:
        content: what a file of weights holds: tensors by name, perhaps inside a training checkpoint.

    Raises:
        ValueError: the names are of no known model.
    """
    tensors = _backbone(_unwrap(content))
    if "embeddings.cls_token" in tensors:
        return _from_transformers(tensors), "transformers"
    if not {"patch_embed.proj.weight", "cls_token", "pos_embed"} <= tensors.keys():
        names = ", ".join(sorted(tensors)[:3]) or "none"
        raise ValueError(f"expected a DINOv2 model of facebook, transformers or timm, got tensors {names}")
    if "mask_token" not in tensors:
        return _from_timm(tensors), "timm"
    return _rename(tensors, _without_chunk), "facebook"


def heads_and_centers(content: Any) -> tuple[Tensors, Tensors]:
    """The heads (``dino_head.mlp.0.weight``, ...) and the centres of a training checkpoint, those of the teacher.

    Args:
        content: what a file of weights holds. Files without heads are common: both results are then empty.
    """
    teacher = {name.removeprefix("module.").removeprefix("teacher."): x for name, x in _unwrap(content).items()}
    heads = {name: tensor for name, tensor in teacher.items() if name.startswith(PRETRAINING_HEADS)}
    return heads, {name: tensor for name, tensor in teacher.items() if name in CENTERS}


def _unwrap(content: Any) -> Tensors:
    for wrapper in WRAPPERS:
        if isinstance(content, Mapping) and isinstance(content.get(wrapper), Mapping):
            content = content[wrapper]
    if not isinstance(content, Mapping):
        raise ValueError(f"expected tensors by name, got {type(content).__name__}")
    return {name: value for name, value in content.items() if isinstance(value, Tensor)}


def _backbone(tensors: Tensors) -> Tensors:
    for prefix in PREFIXES:
        inside = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
        tensors = inside or tensors
    return {name: tensor for name, tensor in tensors.items() if not name.startswith(HEADS)}


def _rename(tensors: Tensors, new_name: Callable[[str], str]) -> Tensors:
    return {new_name(name): tensor for name, tensor in tensors.items()}


def _without_chunk(name: str) -> str:
    """Block names of models built with ``block_chunks`` carry the chunk before the block's number."""
    return re.sub(r"^blocks\.\d+\.(\d+)\.", r"blocks.\1.", name)


def _from_transformers(tensors: Tensors) -> Tensors:
    tensors = _rename(tensors, _transformers_name)
    renamed = {name: tensor for name, tensor in tensors.items() if ".attention.attention." not in name}
    for name in tensors:
        if ".attention.attention.query." in name:
            parts = [tensors[name.replace(".query.", part)] for part in (".query.", ".key.", ".value.")]
            renamed[name.replace(".attention.attention.query.", ".attn.qkv.")] = torch.cat(parts)
    return _with_mask_token(renamed)


def _transformers_name(name: str) -> str:
    for pattern, replacement in TRANSFORMERS_NAMES:
        name = re.sub(pattern, replacement, name)
    return name


def _from_timm(tensors: Tensors) -> Tensors:
    tensors = _rename(tensors, lambda name: "register_tokens" if name == "reg_token" else name)
    if isqrt(tensors["pos_embed"].shape[1]) ** 2 == tensors["pos_embed"].shape[1]:
        # timm adds the class token's position embedding to the class token itself.
        tensors["pos_embed"] = torch.nn.functional.pad(tensors["pos_embed"], (0, 0, 1, 0))
    if _is_gated(tensors):
        tensors = _rename(tensors, lambda name: name.replace(".mlp.fc1.", ".mlp.w12.").replace(".mlp.fc2.", ".mlp.w3."))
    return _with_mask_token(tensors)


def _is_gated(tensors: Tensors) -> bool:
    fc1, fc2 = tensors.get("blocks.0.mlp.fc1.weight"), tensors.get("blocks.0.mlp.fc2.weight")
    return fc1 is not None and fc2 is not None and fc1.shape[0] == 2 * fc2.shape[1]


def _with_mask_token(tensors: Tensors) -> Tensors:
    """Models for inference come without a mask token: it starts at zero, as in a new model."""
    return {"mask_token": torch.zeros_like(tensors["cls_token"][0]), **tensors}
