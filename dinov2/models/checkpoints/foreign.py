"""Names for files of weights that hold another model: the names of their tensors tell which."""

from __future__ import annotations

import re
from collections.abc import Iterable

FOREIGN: tuple[tuple[str, str], ...] = (
    (r"\.lora_[AB]\.", "a LoRA adapter without its model (merge it: peft's merge_and_unload)"),
    (
        r"\._packed_params\b|\.(zero_point|SCB|qweight|absmax|weight_scale)$",
        "a quantised model (give the weights that it was made from)",
    ),
    (r"^storage_tokens$|^rope_embed\.|\.attn\.qkv\.bias_mask$", "facebook's DINOv3, which has rotary positions"),
    (r"^(model\.)?layer\.\d+\.attention\.[qkvo]_proj\.", "transformers' DINOv3, which has rotary positions"),
    (r"^downsample_layers\.|^stages\.\d+\.", "a convolutional network such as ConvNeXt or DINOv3's ConvNeXt"),
    (r"^(model\.)?layer1\.0\.conv1\.", "a ResNet"),
    (r"relative_position_bias_table$|\.attn\.q_bias$", "a BEiT, EVA or Swin transformer, which has other positions"),
    (r"^(vision_model|visual|text_model|visual_model|attn_pool|norm_pre)\.", "a CLIP, SigLIP or dino.txt model"),
    (r"\bclass_embedding$|^embeddings\.patch_embedding\.", "a CLIP or SigLIP model"),
    (r"^(image_encoder|prompt_encoder|mask_decoder)\.|\.rel_pos_h$", "a Segment Anything model"),
    (r"^decoder_(embed|blocks)\b|^decoder\.decoder_", "a masked autoencoder with its decoder"),
    (r"\bdistillation_token$|^dist_token$", "a DeiT with a distillation token"),
    (r"(^|\.)(layernorm_before|layernorm_after)\.", "transformers' ViT (or DeiT, ViT-MAE, I-JEPA), not its Dinov2"),
    (r"\bword_embeddings\.|\bembed_tokens\.|^wte\.|\.mlp\.c_fc\.", "a language model"),
    (r"^decode_head\.", "a segmentation or depth head without its backbone"),
    (r"^fc_norm\.", "a ViT that averages its patches (timm's global_pool='avg') and has no norm of its class token"),
)
"""Part of a tensor's name, as a regular expression -> the model that has such a tensor. The first match counts."""


def foreign_model(names: Iterable[str]) -> str | None:
    """Say which known model has such tensors, or None if it may be a DINOv2.

    >>> foreign_model(["cls_token", "storage_tokens", "rope_embed.periods"])
    "facebook's DINOv3, which has rotary positions"
    """
    names = set(names)
    if "blocks.0.gamma_1" in names and "pos_embed" not in names:
        return "timm's DINOv3, EVA or BEiT, which has rotary or relative positions"
    for pattern, model in FOREIGN:
        if any(re.search(pattern, name) for name in names):
            return model
    if {"blocks.0.norm1.weight", "patch_embed.proj.weight"} <= names and "cls_token" not in names:
        return "a ViT without a class token"
    return "a linear classifier without its backbone" if names == {"weight", "bias"} else None


def hidden_under(names: Iterable[str]) -> str:
    """A hint for an error if a ViT's tensors stand under a prefix that no known program writes."""
    names = set(names)
    for token, other in (("cls_token", "pos_embed"), ("embeddings.cls_token", "embeddings.position_embeddings")):
        for prefix in (name.removesuffix(token) for name in sorted(names) if name.endswith(f".{token}")):
            if prefix + other in names:
                return f"; a ViT is under the prefix {prefix!r}: save its tensors without the prefix"
    return ""
