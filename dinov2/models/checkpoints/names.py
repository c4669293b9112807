"""Names of weights in the files of facebook, transformers and timm, and the architecture that weights imply."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from math import isqrt
from typing import Any, Literal

import torch
from torch import Tensor

from dinov2.models.checkpoints.foreign import foreign_model, hidden_under
from dinov2.models.config import ViTConfig
from dinov2_kernels.nn import swiglu_hidden_features

Tensors = dict[str, Tensor]
Source = Literal["facebook", "transformers", "timm"]

WRAPPERS = ("teacher", "model", "state_dict")
"""Keys of the weights in files of training programs."""
PREFIXES = ("teacher.backbone.", "backbone.", "dinov2_with_registers.", "dinov2.", "module.", "_orig_mod.")
"""Prefixes of the vision transformer's weights, perhaps several. All other weights, such as heads, are left out."""
PRETRAINING_HEADS = ("dino_head.", "ibot_head.")
HEADS = ("head.", *PRETRAINING_HEADS, "linear_head.", "classifier.")
CENTERS = ("dino_loss.center", "ibot_patch_loss.center")
"""Names of the centres: moving averages of the teacher's logits for class tokens and for patches."""

Pairs = Sequence[tuple[str, str]]
"""facebook's name -> the other library's name. A name that begins with a dot is an inner part of a full name; any other
name is the beginning of a full name."""

TRANSFORMERS: Pairs = (
    ("patch_embed.proj.", "embeddings.patch_embeddings.projection."),
    ("pos_embed", "embeddings.position_embeddings"),
    ("cls_token", "embeddings.cls_token"),
    ("mask_token", "embeddings.mask_token"),
    ("register_tokens", "embeddings.register_tokens"),
    ("blocks.", "encoder.layer."),
    (".attn.proj.", ".attention.output.dense."),
    (".ls1.gamma", ".layer_scale1.lambda1"),
    (".ls2.gamma", ".layer_scale2.lambda1"),
    (".mlp.w12.", ".mlp.weights_in."),
    (".mlp.w3.", ".mlp.weights_out."),
    ("norm.", "layernorm."),
)
IN_MEMORY: Pairs = (
    (".attention.attention.query.", ".attention.q_proj."),
    (".attention.attention.key.", ".attention.k_proj."),
    (".attention.attention.value.", ".attention.v_proj."),
    (".attention.output.dense.", ".attention.o_proj."),
    (".mlp.weights_out.", ".mlp.down_proj."),
)
"""transformers' name in its files -> its name in a model's ``state_dict()``, from version 5 on."""
GATE, UP = ".mlp.gate_proj.", ".mlp.up_proj."
"""The two halves of ``.mlp.weights_in.`` in a model's ``state_dict()``, in this order."""
QKV = tuple(f".attention.attention.{part}." for part in ("query", "key", "value"))
"""transformers' three parts of facebook's ``.attn.qkv.``, in this order."""
TIMM: Pairs = (("register_tokens", "reg_token"),)
TIMM_GATED: Pairs = ((".mlp.w12.", ".mlp.fc1."), (".mlp.w3.", ".mlp.fc2."))
"""timm's names fc1 and fc2 are the same for gated and other layers."""
EXPECTED = "expected a DINOv2 model of facebook, transformers or timm"
HEAD_WIDTH = 64
"""Width of an attention head in all published models of DINOv2."""
OTHER_HEADS = {1152: 16, 1280: 16, 1408: 16, 1664: 16}
"""Widths of published models (ViT-SO400M, ViT-H, ViT-g, ViT-G) whose heads are not 64 wide, and their heads."""


def to_facebook_names(content: Any) -> tuple[Tensors, Source]:
    """Rename the weights of a vision transformer to facebook's names; also returns the source of the old names.

    Args:
        content: content of a file of weights: tensors by name, perhaps inside a training checkpoint.

    Raises:
        ValueError: the names do not belong to a known model.
    """
    tensors = _backbone(_unwrap(content))
    if (model := foreign_model(tensors)) is not None:
        raise ValueError(f"{EXPECTED}, got {model} (tensors {_some(tensors)}, ...)")
    is_transformers = {"embeddings.cls_token", "embeddings.position_embeddings"} <= tensors.keys()
    if not is_transformers and not {"patch_embed.proj.weight", "cls_token", "pos_embed"} <= tensors.keys():
        raise ValueError(f"{EXPECTED}, got tensors {_some(tensors) or 'none'}{_keys(content)}{hidden_under(tensors)}")
    _check_numbers(tensors)
    source: Source
    if is_transformers:
        tensors, source = _from_transformers(tensors), "transformers"
    elif "mask_token" in tensors:
        tensors, source = _rename(tensors, _without_chunk), "facebook"
    else:
        tensors, source = _from_timm(tensors), "timm"
    _check_shapes(tensors)
    return tensors, source


def _some(names: Iterable[str]) -> str:
    return ", ".join(sorted(names)[:3])


def _keys(content: Any) -> str:
    """Say what a file without tensors has in their place."""
    keys = ", ".join(str(key) for key in list(content)[:5])
    return f"; its keys are {keys}" if keys and not _unwrap(content) else ""


def _check_numbers(tensors: Tensors) -> None:
    """Weights are plain numbers. Quantised ones need a scale, which each library stores in its own way."""
    for name, tensor in tensors.items():
        if not tensor.is_floating_point() or tensor.is_quantized or tensor.layout != torch.strided:
            kind = tensor.dtype if tensor.layout == torch.strided else f"{tensor.layout} of {tensor.dtype}"
            raise ValueError(f"{name}: expected dense floating-point numbers, not quantised ones, got {kind}")


def _check_shapes(tensors: Tensors) -> None:
    """Patches are square, and position embeddings are those of the class token and of a square grid of patches."""
    shape = list(tensors["patch_embed.proj.weight"].shape)
    if len(shape) != 4 or shape[2] != shape[3]:
        raise ValueError(f"patch_embed.proj.weight: expected shape [D, channels, P, P] for square patches, got {shape}")
    shape = list(tensors["pos_embed"].shape)
    if len(shape) != 3 or shape[0] != 1 or shape[1] < 2 or isqrt(shape[1] - 1) ** 2 != shape[1] - 1:
        raise ValueError(f"pos_embed: expected shape [1, 1 + M * M, D] for a square grid of M x M patches, got {shape}")


def heads_and_centers(content: Any) -> tuple[Tensors, Tensors]:
    """The teacher's heads (``dino_head.mlp.0.weight``, ...) and its centres, from a training checkpoint.

    Args:
        content: content of a file of weights. Many files have no heads; then both results are empty.
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
    return {name: value for name, value in content.items() if isinstance(name, str) and isinstance(value, Tensor)}


def _backbone(tensors: Tensors) -> Tensors:
    while prefix := next((prefix for prefix in PREFIXES if any(name.startswith(prefix) for name in tensors)), None):
        tensors = {name.removeprefix(prefix): x for name, x in tensors.items() if name.startswith(prefix)}
    return {name: tensor for name, tensor in tensors.items() if not name.startswith(HEADS)}


def _rename(tensors: Tensors, new_name: Callable[[str], str]) -> Tensors:
    return {new_name(name): tensor for name, tensor in tensors.items()}


def _without_chunk(name: str) -> str:
    """Remove the chunk before the block's number, which models built with ``block_chunks`` have in their names."""
    return re.sub(r"^blocks\.\d+\.(\d+)\.", r"blocks.\1.", name)


def _from_transformers(tensors: Tensors) -> Tensors:
    tensors = _rename(tensors, lambda name: _replaced(name, _reversed(IN_MEMORY)))
    for name in [name for name in tensors if GATE in name]:
        halves = [tensors.pop(name), tensors.pop(name.replace(GATE, UP))]
        tensors[name.replace(GATE, ".mlp.weights_in.")] = torch.cat(halves)
    tensors = _rename(tensors, lambda name: _replaced(name, _reversed(TRANSFORMERS)))
    renamed = {name: tensor for name, tensor in tensors.items() if not any(part in name for part in QKV)}
    for name in tensors:
        if QKV[0] in name:
            parts = [tensors[name.replace(QKV[0], part)] for part in QKV]
            renamed[name.replace(QKV[0], ".attn.qkv.")] = torch.cat(parts)
    return _with_mask_token(renamed)


def to_transformers_names(tensors: Tensors, vit: ViTConfig) -> Tensors:
    """Rename weights from facebook's names to those of transformers' Dinov2.

    Queries, keys and values become separate tensors. transformers needs LayerScale, so it is 1 if the model has none.
    """
    renamed: Tensors = {}
    for name, tensor in tensors.items():
        name = _replaced(name, TRANSFORMERS)
        thirds = zip(QKV, tensor.chunk(3), strict=True) if ".attn.qkv." in name else [(".attn.qkv.", tensor)]
        renamed |= {name.replace(".attn.qkv.", part): third for part, third in thirds}
    if vit.init_values is None:
        for name in (f"blocks.{block}.ls{branch}.gamma" for block in range(vit.depth) for branch in (1, 2)):
            renamed[_replaced(name, TRANSFORMERS)] = torch.ones(vit.embed_dim)
    return renamed


def _replaced(name: str, pairs: Pairs) -> str:
    """Replace the first name of each pair by the second."""
    for before, after in pairs:
        if before.startswith("."):
            name = name.replace(before, after)
        elif name.startswith(before):
            name = after + name.removeprefix(before)
    return name


def _reversed(pairs: Pairs) -> Pairs:
    return [(there, here) for here, there in pairs]


def _from_timm(tensors: Tensors) -> Tensors:
    tensors = _rename(tensors, lambda name: _replaced(name, _reversed(TIMM)))
    positions = tensors["pos_embed"].shape[1]
    if isqrt(positions) ** 2 == positions:
        # timm adds the class token's position embedding to the class token itself.
        tensors["pos_embed"] = torch.nn.functional.pad(tensors["pos_embed"], (0, 0, 1, 0))
    elif "register_tokens" in tensors:
        expected = "one for each patch of a square grid, and none for registers (timm's no_embed_class=True)"
        raise ValueError(f"pos_embed: expected {expected}, got {positions}")
    if _is_gated(tensors):
        tensors = _rename(tensors, lambda name: _replaced(name, _reversed(TIMM_GATED)))
    return _with_mask_token(tensors)


def _is_gated(tensors: Tensors) -> bool:
    fc1, fc2 = tensors.get("blocks.0.mlp.fc1.weight"), tensors.get("blocks.0.mlp.fc2.weight")
    return fc1 is not None and fc2 is not None and fc1.shape[0] == 2 * fc2.shape[1]


def _with_mask_token(tensors: Tensors) -> Tensors:
    """Add a mask token of zeros, as in a new model, to weights for inference, which have none."""
    return {"mask_token": torch.zeros_like(tensors["cls_token"][0]), **tensors}


def config_of(tensors: Tensors, source: Source, *, num_heads: int | None = None) -> ViTConfig:
    """Configuration of a model from the shapes of its weights.

    Shapes do not tell how position embeddings are interpolated, so this depends on the source of the weights.

    Args:
        tensors: weights with facebook's names.
        source: the library whose names the weights had.
        num_heads: heads of each attention layer; by default, heads are 64 wide.

    Raises:
        KeyError: the weights lack a part of the model.
        ValueError: no number of heads is given, and the width is not a multiple of 64, or that of a published model
            whose heads have another width.
    """
    embed_dim, in_chans, patch_size, _ = tensors["patch_embed.proj.weight"].shape
    registers = tensors["register_tokens"].shape[1] if "register_tokens" in tensors else 0
    if num_heads is None and (embed_dim % HEAD_WIDTH or embed_dim in OTHER_HEADS):
        raise ValueError(f"a width of {embed_dim} does not tell the number of heads; config.json must tell it")
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
    """An mlp_ratio that gives the feed-forward layer this width."""
    if not gated:
        return hidden / embed_dim
    if swiglu_hidden_features(4 * embed_dim) == hidden:
        return 4.0
    return (1.5 * hidden - 0.5) / embed_dim  # 1.5 undoes the two thirds; 0.5 avoids the next multiple of 8


def _interpolation(source: Source, registers: int) -> tuple[float, bool]:
    """The offset and antialiasing of position embeddings in a library."""
    if registers or source == "timm":
        return 0.0, True
    return (0.1, False) if source == "facebook" else (0.0, False)
