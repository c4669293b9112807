"""The architecture of a vision transformer, and the sizes of its head."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from math import isfinite
from typing import Any, Literal

from dinov2.configuration import Config, Count, CountOr0, Positive, Rate, Rules

ARCHITECTURES: dict[str, dict[str, Any]] = {
    "vit_small": {"embed_dim": 384, "depth": 12, "num_heads": 6},
    "vit_base": {"embed_dim": 768, "depth": 12, "num_heads": 12},
    "vit_large": {"embed_dim": 1024, "depth": 24, "num_heads": 16},
    "vit_giant2": {"embed_dim": 1536, "depth": 40, "num_heads": 24, "ffn": "swiglu"},
}
"""The four architectures of DINOv2 (arXiv:2304.07193, table 17), all with heads of width 64.

The paper's table gives ViT-B 18 blocks; its published weights have 12.
"""

OF_FACEBOOK = frozenset(("ffn_layer", "block_chunks", "act_layer", "norm_layer", "block_fn", "embed_layer"))
"""Arguments of facebook's architectures that ours do not have. They come from code that wants the other package."""


@dataclass(frozen=True)
class ViTConfig(Config, at="vit"):
    """Architecture of a :class:`~dinov2.models.VisionTransformer`.

    The defaults of the position embeddings are those of DINOv2's models with registers, which transformers and timm
    reproduce exactly at every image size. The published models without registers need ``interpolate_offset=0.1`` and
    ``interpolate_antialias=False``; :func:`~dinov2.models.load_pretrained` sets them.
    """

    img_size: Count = 224
    """Position embeddings are made for images of this height and width in pixels; others work too."""
    patch_size: Count = 14
    """A patch has this height and width in pixels."""
    in_chans: Count = 3
    """Images have this many channels."""
    embed_dim: Count = 384
    """Tokens have this width."""
    depth: Count = 12
    """The network has this many transformer blocks."""
    num_heads: Count = 6
    """An attention layer has this many heads."""
    mlp_ratio: Positive = 4.0
    """The feed-forward layers are this many times as wide as a token; SwiGLU takes about two thirds of it."""
    ffn: Literal["mlp", "swiglu"] = "mlp"
    """The feed-forward layers are of this kind."""
    qkv_bias: bool = True
    """The layer that computes queries, keys and values has a bias."""
    proj_bias: bool = True
    """The attention's output layer has a bias."""
    ffn_bias: bool = True
    """The feed-forward layers have biases."""
    init_values: float | None = 1e-5
    """LayerScale starts at this in each residual branch; None leaves LayerScale out."""
    num_register_tokens: CountOr0 = 0
    """This many extra tokens follow the class token (arXiv:2309.16588)."""
    interpolate_offset: float = 0.0
    """This is added to the number of patches in the scale of interpolated position embeddings."""
    interpolate_antialias: bool = True
    """Smooth position embeddings before they are interpolated to fewer patches."""
    drop_path_rate: Rate = 0.0
    """Training skips the residual branches of this share of the samples."""
    drop_path_uniform: bool = True
    """Every block has the same rate; otherwise it grows linearly from 0 in the first block to the rate in the last."""

    def rules(self) -> Rules:
        """Patches tile the image, and heads divide the token."""
        yield "img_size", self.img_size % self.patch_size == 0, f"a multiple of patch_size = {self.patch_size}"
        yield "mlp_ratio", isfinite(self.mlp_ratio), "a finite number"
        yield "num_heads", self.embed_dim % self.num_heads == 0, f"a divisor of embed_dim = {self.embed_dim}"

    @classmethod
    def of(cls, architecture: str, **fields: Any) -> ViTConfig:
        """Configuration of one of DINOv2's architectures, e.g. ``ViTConfig.of("vit_large", patch_size=16)``.

        Raises:
            ValueError: no architecture has this name.
            TypeError: the configuration has no such field.
        """
        if not isinstance(architecture, str) or architecture not in ARCHITECTURES:
            close = difflib.get_close_matches(str(architecture), ARCHITECTURES, n=1, cutoff=0.0)[0]
            raise ValueError(f"architecture: expected one of {list(ARCHITECTURES)}, got {architecture!r}; {close!r}?")
        known = cls.__dataclass_fields__
        if unknown := [name for name in fields if name not in known]:
            theirs = OF_FACEBOOK.intersection(unknown)
            hint = (
                "; facebook's model has it, from another package named dinov2: see docs/two_packages.md"
                if theirs
                else ""
            )
            raise TypeError(f"{unknown[0]}: expected a field of {cls.__name__}, got an unknown one{hint}")
        return cls(**{**ARCHITECTURES[architecture], **fields})

    @property
    def grid_size(self) -> int:
        """Patches along each side of an image of ``img_size``."""
        return self.img_size // self.patch_size

    @property
    def ffn_width(self) -> int:
        """Width between the linear layers of a feed-forward layer."""
        from dinov2_kernels.nn import swiglu_hidden_features

        width = int(self.embed_dim * self.mlp_ratio)
        return swiglu_hidden_features(width) if self.ffn == "swiglu" else width

    @property
    def drop_path_rates(self) -> list[float]:
        """The drop path rate of each block [depth]."""
        if self.drop_path_uniform or self.depth == 1:
            return [self.drop_path_rate] * self.depth
        return [self.drop_path_rate * i / (self.depth - 1) for i in range(self.depth)]


@dataclass(frozen=True)
class HeadConfig(Config, at="dino_head"):
    """A :class:`~dinov2.models.DINOHead` has these sizes."""

    out_dim: Count = 65536
    """The head has this many prototypes."""
    hidden_dim: Count = 2048
    """The layers between the linear layers have this width."""
    bottleneck_dim: Count = 256
    """The normalised features that are compared with the prototypes have this width."""
    num_layers: Count = 3
    """This many linear layers come before the prototypes."""
