"""Files of weights: writes our own format and those of transformers and timm."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import safetensors.torch

from dinov2.configuration import replacing, write_json
from dinov2.models.checkpoints.finding import WEIGHTS
from dinov2.models.checkpoints.names import CENTERS, Tensors, to_transformers_names
from dinov2.models.checkpoints.weights import CONFIG, HEADS, MODEL_TYPE, Weights
from dinov2.models.config import ViTConfig
from dinov2.models.vision_transformer import VisionTransformer

Format = Literal["facebook", "transformers", "timm"]


def save_heads(weights: Weights, path: str | os.PathLike[str]) -> Path:
    """Write ``heads.safetensors`` into a folder: heads and centres with facebook's names.

    Centres have facebook's shapes, ``dino_loss.center`` [1, K] and ``ibot_patch_loss.center`` [1, 1, K].

    Returns:
        The folder.

    Raises:
        ValueError: the weights have no heads.
    """
    if not weights.heads:
        raise ValueError(f"{weights.origin} has no heads")
    shapes = dict(zip(CENTERS, ((1, -1), (1, 1, -1)), strict=True))
    tensors = {name: tensor for name, tensor in weights.named_tensors().items() if not name.startswith("backbone.")} | {
        name: tensor.reshape(shapes[name]) for name, tensor in weights.centers.items()
    }
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    write_tensors(tensors, folder / HEADS)
    return folder


def save_pretrained(model: VisionTransformer, path: str | os.PathLike[str]) -> Path:
    """Write ``model.safetensors`` (facebook's names, with the mask token) and ``config.json`` into a folder.

    Each file replaces an older one only when it is complete.

    Args:
        model: the model.
        path: the folder; it is created if necessary.

    Returns:
        The folder.
    """
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    write_tensors(model.state_dict(), folder / WEIGHTS)
    write_json({"model_type": MODEL_TYPE, **asdict(model.config)}, folder / CONFIG)
    return folder


def write_tensors(tensors: Tensors, file: Path) -> None:
    """Write a safetensors file. It replaces an older file only when it is complete."""
    on_host = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with replacing(file) as partial:
        safetensors.torch.save_file(on_host, partial, metadata={"format": "pt"})


def write_facebook(weights: Weights, folder: Path) -> None:
    """Write our own format: facebook's names, and the fields of :class:`~dinov2.models.ViTConfig`."""
    backbone: Any = weights.network()["backbone"]
    save_pretrained(backbone, folder)


def write_transformers(weights: Weights, folder: Path) -> None:
    """Write ``Dinov2Model``, or ``Dinov2WithRegistersModel`` with registers, for ``AutoModel.from_pretrained``.

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
    _write(config, to_transformers_names(weights.backbone, vit), folder)


def write_timm(weights: Weights, folder: Path) -> None:
    """Write for ``timm.create_model("local-dir:FOLDER")``, which converts facebook's names itself.

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
        # timm multiplies this by the width and rounds down; its gated layers count both halves.
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


def _require(vit: ViTConfig, library: str, **expected: Any) -> None:
    for name, value in expected.items():
        if getattr(vit, name) != value:
            raise ValueError(f"{library} has no model with {name} {getattr(vit, name)}, only with {value}")


def _write(config: dict[str, Any], tensors: Tensors, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    write_tensors(tensors, folder / WEIGHTS)
    write_json(config, folder / CONFIG)
