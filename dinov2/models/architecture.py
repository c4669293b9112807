"""The architecture of a model, told from its weights."""

from __future__ import annotations

from math import isqrt

from dinov2.models.config import ViTConfig
from dinov2.models.state_dict_formats import Source, Tensors
from dinov2_kernels.nn import swiglu_hidden_features

HEAD_WIDTH = 64
"""Width of an attention head in every published model."""


def config_of(tensors: Tensors, source: Source, *, num_heads: int | None = None) -> ViTConfig:
    """Configuration of a model from the shapes of its weights.

    Position embeddings are interpolated as the library that wrote the weights does: shapes do not tell.

    Args:
        tensors: weights with facebook's names.
        source: whose names they had.
        num_heads: heads of each attention layer; by default as many as make them 64 wide.

    Raises:
        KeyError: the weights lack a part of the model.
        ValueError: they do not tell the number of heads.
    """
    embed_dim, in_chans, patch_size, _ = tensors["patch_embed.proj.weight"].shape
    registers = tensors["register_tokens"].shape[1] if "register_tokens" in tensors else 0
    if num_heads is None and embed_dim % HEAD_WIDTH:
        raise ValueError(f"a width of {embed_dim} does not tell the number of heads: config.json must")
    gated = "blocks.0.mlp.w3.weight" in tensors
    last_linear = "blocks.0.mlp.w3" if gated else "blocks.0.mlp.fc2"
    offset, antialias = _interpolation(source, registers)
    return ViTConfig(
        img_size=isqrt(tensors["pos_embed"].shape[1] - 1) * patch_size,
        patch_size=patch_size,
        in_chans=in_chans,
        embed_dim=embed_dim,
        depth=1 + max(int(name.split(".")[1]) for name in tensors if name.startswith("blocks.")),
        num_heads=num_heads or embed_dim // HEAD_WIDTH,
        mlp_ratio=_mlp_ratio(embed_dim, tensors[f"{last_linear}.weight"].shape[1], gated),
        ffn="swiglu" if gated else "mlp",
        qkv_bias="blocks.0.attn.qkv.bias" in tensors,
        proj_bias="blocks.0.attn.proj.bias" in tensors,
        ffn_bias=f"{last_linear}.bias" in tensors,
        init_values=1e-5 if "blocks.0.ls1.gamma" in tensors else None,
        num_register_tokens=registers,
        interpolate_offset=offset,
        interpolate_antialias=antialias,
    )


def _mlp_ratio(embed_dim: int, hidden: int, gated: bool) -> float:
    """A ratio that gives the feed-forward layer this width."""
    if not gated:
        return hidden / embed_dim
    if swiglu_hidden_features(4 * embed_dim) == hidden:
        return 4.0
    return (1.5 * hidden - 0.5) / embed_dim  # 1.5 undoes the two thirds; 0.5 keeps clear of the next multiple of 8


def _interpolation(source: Source, registers: int) -> tuple[float, bool]:
    """Offset and antialiasing with which a library interpolates position embeddings."""
    if registers or source == "timm":
        return 0.0, True
    return (0.1, False) if source == "facebook" else (0.0, False)
