"""Weights of a network of pretraining, on the host and by facebook's names: a backbone and, where known, its heads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import nn

from dinov2.models.config import ViTConfig
from dinov2.models.dino_head import DINOHead, HeadConfig
from dinov2.models.position_embedding import interpolate_position_embedding
from dinov2.models.state_dict_formats import Tensors
from dinov2.models.vision_transformer import VisionTransformer


@dataclass(frozen=True)
class Weights:
    """A backbone and what was trained with it.

    Attributes:
        origin: where the weights are from, in words.
        vit: architecture of the backbone.
        backbone: its tensors.
        heads: tensors of each head, ``dino_head`` and ``ibot_head``; empty if they are not known.
        centers: ``dino_loss.center`` and ``ibot_patch_loss.center``, K numbers each in any shape; or none of them.
    """

    origin: str
    vit: ViTConfig
    backbone: Tensors
    heads: dict[str, Tensors] = field(default_factory=dict)
    centers: Tensors = field(default_factory=dict)

    def head_config(self, head: str) -> HeadConfig:
        """What the head of this name is made of, from the shapes of its tensors."""
        return head_config_of(self.heads[head])

    def network(self) -> nn.ModuleDict:
        """Backbone and heads as modules, on the host, in float32."""
        with torch.device("meta"):
            modules: dict[str, nn.Module] = {"backbone": VisionTransformer(self.vit)}
            for name in self.heads:
                modules[name] = head_of(self.head_config(name), self.vit.embed_dim)
        network = nn.ModuleDict(modules).to_empty(device="cpu")
        network.load_state_dict(self.named_tensors())
        return network

    def named_tensors(self) -> Tensors:
        """All tensors of backbone and heads: ``backbone.cls_token``, ``dino_head.mlp.0.weight``, ..."""
        parts = {"backbone": self.backbone, **self.heads}
        return {f"{part}.{name}": tensor for part, tensors in parts.items() for name, tensor in tensors.items()}

    def backbone_for(self, vit: ViTConfig) -> Tensors:
        """The backbone's tensors with position embeddings for the image size of ``vit``.

        They are resampled as the model they are from does it when it sees images of that size.

        Raises:
            ValueError: ``vit`` is of another architecture; the message names each field and both values.
        """
        check_architecture(self.vit, vit, self.origin)
        grid = (vit.grid_size, vit.grid_size)
        resampled = interpolate_position_embedding(
            self.backbone["pos_embed"],
            grid,
            offset=self.vit.interpolate_offset,
            antialias=self.vit.interpolate_antialias,
        )
        return {**self.backbone, "pos_embed": resampled}


def head_of(config: HeadConfig, embed_dim: int) -> DINOHead:
    """A new head on tokens of width ``embed_dim``."""
    return DINOHead(embed_dim, config.out_dim, config.hidden_dim, config.bottleneck_dim, config.num_layers)


def head_config_of(tensors: Mapping[str, torch.Tensor]) -> HeadConfig:
    """What a head is made of, from the shapes of its tensors.

    Raises:
        KeyError: a tensor is missing.
    """
    out_dim, bottleneck_dim = tensors["last_layer.weight_v"].shape
    layers = [name for name in tensors if name.startswith("mlp.") and name.endswith("weight")]
    hidden_dim = HeadConfig.hidden_dim if layers == ["mlp.weight"] else len(tensors["mlp.0.weight"])
    return HeadConfig(out_dim, hidden_dim, bottleneck_dim, len(layers))


def split_heads(tensors: Tensors) -> dict[str, Tensors]:
    """``dino_head.mlp.0.weight`` and so on, as one dictionary for each head."""
    heads: dict[str, Tensors] = {}
    for name, tensor in tensors.items():
        head, _, rest = name.partition(".")
        heads.setdefault(head, {})[rest] = tensor
    return heads


STRUCTURE = (
    "patch_size",
    "in_chans",
    "embed_dim",
    "depth",
    "num_heads",
    "mlp_ratio",
    "ffn",
    "qkv_bias",
    "proj_bias",
    "ffn_bias",
    "init_values",
    "num_register_tokens",
)
"""Fields on which the names and shapes of weights depend, or what they compute."""


def check_architecture(theirs: ViTConfig, ours: ViTConfig, origin: str) -> None:
    """Raise ValueError, with what to set, if weights of the architecture ``theirs`` do not fit a model of ``ours``."""
    differing = [name for name in STRUCTURE if not _agree(name, theirs, ours)]
    if differing:
        listed = ", ".join(f"{name} is {getattr(theirs, name)} there, not {getattr(ours, name)}" for name in differing)
        options = " ".join(f"--vit.{name} {getattr(theirs, name)}" for name in differing)
        raise ValueError(f"weights of {origin} do not fit the model: {listed}; for a model that they fit set {options}")


def _agree(name: str, theirs: ViTConfig, ours: ViTConfig) -> bool:
    if name == "init_values":  # its value is only where training starts
        return (theirs.init_values is None) == (ours.init_values is None)
    if name == "mlp_ratio" and (theirs.ffn, theirs.embed_dim) == (ours.ffn, ours.embed_dim):
        return theirs.ffn_width == ours.ffn_width
    return bool(getattr(theirs, name) == getattr(ours, name))
