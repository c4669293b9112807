"""Backbones as folders that transformers and timm load by themselves."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from dinov2.models import ViTConfig, Weights, save_pretrained
from dinov2.models.checkpoint import CONFIG, WEIGHTS, write_tensors

Format = Literal["facebook", "transformers", "timm"]
Tensors = dict[str, Tensor]

TRANSFORMERS_NAMES = (
    (r"^patch_embed\.proj\.", "embeddings.patch_embeddings.projection."),
    (r"^pos_embed$", "embeddings.position_embeddings"),
    (r"^(cls_token|mask_token|register_tokens)$", r"embeddings.\1"),
    (r"^blocks\.", "encoder.layer."),
    (r"\.attn\.proj\.", ".attention.output.dense."),
    (r"\.ls([12])\.gamma$", r".layer_scale\1.lambda1"),
    (r"\.mlp\.w12\.", ".mlp.weights_in."),
    (r"\.mlp\.w3\.", ".mlp.weights_out."),
    (r"^norm\.", "layernorm."),
)
"""Patterns in facebook's names, and what transformers has on the disk instead."""


def write_facebook(weights: Weights, folder: Path) -> None:
    """Our own form: facebook's names, and the fields of :class:`~dinov2.models.ViTConfig`."""
    backbone: Any = weights.network()["backbone"]
    save_pretrained(backbone, folder)


def write_transformers(weights: Weights, folder: Path) -> None:
    """For ``AutoModel.from_pretrained(folder)``: ``Dinov2Model`` or, with registers, ``Dinov2WithRegistersModel``.

    Raises:
        ValueError: transformers has no such model.
    """
    vit = weights.vit
    _require(vit, "transformers", mlp_ratio=int(vit.mlp_ratio), proj_bias=True, ffn_bias=True)
    kind = "dinov2_with_registers" if vit.num_register_tokens else "dinov2"
    config: dict[str, Any] = {
        "model_type": kind,
        "architectures": ["Dinov2WithRegistersModel" if vit.num_register_tokens else "Dinov2Model"],
        "hidden_size": vit.embed_dim,
        "num_hidden_layers": vit.depth,
        "num_attention_heads": vit.num_heads,
        "mlp_ratio": int(vit.mlp_ratio),
        "use_swiglu_ffn": vit.ffn == "swiglu",
        "qkv_bias": vit.qkv_bias,
        "image_size": vit.img_size,
        "patch_size": vit.patch_size,
        "num_channels": vit.in_chans,
        "layer_norm_eps": 1e-6,
        "layerscale_value": 1.0 if vit.init_values is None else vit.init_values,
        "use_mask_token": True,
    }
    if vit.num_register_tokens:
        config["num_register_tokens"] = vit.num_register_tokens
    _write(config, _transformers_tensors(weights), folder)


def write_timm(weights: Weights, folder: Path) -> None:
    """For ``timm.create_model("local-dir:FOLDER")``, which converts facebook's names itself.

    Raises:
        ValueError: timm has no such model.
    """
    vit = weights.vit
    _require(vit, "timm", ffn_bias=vit.proj_bias)
    arguments: dict[str, Any] = {
        "img_size": vit.img_size,
        "patch_size": vit.patch_size,
        "in_chans": vit.in_chans,
        "embed_dim": vit.embed_dim,
        "depth": vit.depth,
        "num_heads": vit.num_heads,
        # timm rounds the product with the width down; its gated layer counts both halves.
        "mlp_ratio": ((2 if vit.ffn == "swiglu" else 1) * vit.ffn_width + 0.5) / vit.embed_dim,
        "qkv_bias": vit.qkv_bias,
        "proj_bias": vit.proj_bias,
        "init_values": vit.init_values,
        "dynamic_img_size": True,
    }
    if vit.num_register_tokens:
        arguments["reg_tokens"] = vit.num_register_tokens
    config = {
        "architecture": f"vit_{'giant' if vit.ffn == 'swiglu' else 'small'}_patch14_"
        f"{'reg4_' if vit.num_register_tokens else ''}dinov2",
        "num_classes": 0,
        "num_features": vit.embed_dim,
        "model_args": arguments,
        "pretrained_cfg": {
            "input_size": [vit.in_chans, vit.img_size, vit.img_size],
            "interpolation": "bicubic",
            "num_classes": 0,
            "first_conv": "patch_embed.proj",
            "classifier": "head",
        },
    }
    _write(config, weights.backbone, folder)


WRITERS: dict[Format, Callable[[Weights, Path], None]] = {
    "facebook": write_facebook,
    "transformers": write_transformers,
    "timm": write_timm,
}


def _transformers_tensors(weights: Weights) -> Tensors:
    """By transformers' names, with queries, keys and values apart, and a LayerScale of 1 where the model has none."""
    vit, tensors = weights.vit, {}
    for name, tensor in weights.backbone.items():
        for pattern, replacement in TRANSFORMERS_NAMES:
            name = re.sub(pattern, replacement, name)
        if ".attn.qkv." in name:
            for part, third in zip(("query", "key", "value"), tensor.chunk(3), strict=True):
                tensors[name.replace(".attn.qkv.", f".attention.attention.{part}.")] = third
        else:
            tensors[name] = tensor
    if vit.init_values is None:
        for block in range(vit.depth):
            for branch in (1, 2):
                tensors[f"encoder.layer.{block}.layer_scale{branch}.lambda1"] = torch.ones(vit.embed_dim)
    return tensors


def _require(vit: ViTConfig, library: str, **expected: Any) -> None:
    for name, value in expected.items():
        if getattr(vit, name) != value:
            raise ValueError(f"{library} has no model with {name} {getattr(vit, name)}, only with {value}")


def _write(config: dict[str, Any], tensors: Tensors, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    write_tensors(tensors, folder / WEIGHTS)
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
