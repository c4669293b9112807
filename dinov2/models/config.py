"""What a vision transformer is made of."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from typing import Any, Literal

from dinov2_kernels.nn import swiglu_hidden_features

ARCHITECTURES: dict[str, dict[str, Any]] = {
    "vit_small": {"embed_dim": 384, "depth": 12, "num_heads": 6},
    "vit_base": {"embed_dim": 768, "depth": 12, "num_heads": 12},
    "vit_large": {"embed_dim": 1024, "depth": 24, "num_heads": 16},
    "vit_giant2": {"embed_dim": 1536, "depth": 40, "num_heads": 24, "ffn": "swiglu"},
}
"""The four architectures of DINOv2 (arXiv:2304.07193, table 17), all with heads of width 64.

The paper's table gives ViT-B 18 blocks; its published weights have 12.
"""


@dataclass(frozen=True)
class ViTConfig:
    """Architecture of a :class:`~dinov2.models.VisionTransformer`.

    The defaults of the position embeddings are those of DINOv2's models with registers, which transformers and timm
    reproduce exactly at every image size. The published models without registers need ``interpolate_offset=0.1`` and
    ``interpolate_antialias=False``; :func:`~dinov2.models.load_pretrained` sets them.
    """

    img_size: int = 224
    """Height and width in pixels of the images that the position embeddings are made for; others work too."""
    patch_size: int = 14
    """Height and width of a patch in pixels."""
    in_chans: int = 3
    """Channels of the images."""
    embed_dim: int = 384
    """Width of the tokens."""
    depth: int = 12
    """Number of transformer blocks."""
    num_heads: int = 6
    """Heads of each attention layer."""
    mlp_ratio: float = 4.0
    """Width of the feed-forward layers in units of embed_dim; SwiGLU takes about two thirds of it."""
    ffn: Literal["mlp", "swiglu"] = "mlp"
    """Kind of feed-forward layer."""
    qkv_bias: bool = True
    """Bias of the layer that computes queries, keys and values."""
    proj_bias: bool = True
    """Bias of the attention's output layer."""
    ffn_bias: bool = True
    """Biases of the feed-forward layers."""
    init_values: float | None = 1e-5
    """Initial LayerScale of the residual branches; None for no LayerScale."""
    num_register_tokens: int = 0
    """Extra tokens after the class token (arXiv:2309.16588)."""
    interpolate_offset: float = 0.0
    """Added to the number of patches in the scale of interpolated position embeddings; 0 for the plain scale."""
    interpolate_antialias: bool = True
    """Smooth position embeddings before interpolating them to fewer patches."""
    drop_path_rate: float = 0.0
    """Share of the samples whose residual branches are skipped in training."""
    drop_path_uniform: bool = True
    """The same rate in every block; otherwise it grows linearly from 0 in the first block to the rate in the last."""

    def __post_init__(self) -> None:
        for name in ("img_size", "patch_size", "in_chans", "embed_dim", "depth", "num_heads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")
        if self.img_size % self.patch_size:
            raise ValueError(f"img_size: expected a multiple of patch_size = {self.patch_size}, got {self.img_size}")
        if self.embed_dim % self.num_heads:
            raise ValueError(f"num_heads: expected a divisor of embed_dim = {self.embed_dim}, got {self.num_heads}")
        if self.ffn not in ("mlp", "swiglu"):
            raise ValueError(f'ffn: expected "mlp" or "swiglu", got {self.ffn!r}')
        if not 0.0 <= self.drop_path_rate < 1.0:
            raise ValueError(f"drop_path_rate: expected a number in [0, 1), got {self.drop_path_rate}")

    @classmethod
    def of(cls, architecture: str, **fields: Any) -> ViTConfig:
        """Configuration of one of DINOv2's architectures, e.g. ``ViTConfig.of("vit_large", patch_size=16)``.

        Raises:
            ValueError: no architecture has this name.
        """
        if architecture not in ARCHITECTURES:
            close = difflib.get_close_matches(architecture, ARCHITECTURES, n=1, cutoff=0.0)[0]
            raise ValueError(f"architecture: expected one of {list(ARCHITECTURES)}, got {architecture!r}; {close!r}?")
        return cls(**{**ARCHITECTURES[architecture], **fields})

    @property
    def grid_size(self) -> int:
        """Patches along each side of an image of ``img_size``."""
        return self.img_size // self.patch_size

    @property
    def ffn_width(self) -> int:
        """Width between the linear layers of a feed-forward layer."""
        width = int(self.embed_dim * self.mlp_ratio)
        return swiglu_hidden_features(width) if self.ffn == "swiglu" else width

    @property
    def drop_path_rates(self) -> list[float]:
        """Rate of each block [depth]."""
        if self.drop_path_uniform or self.depth == 1:
            return [self.drop_path_rate] * self.depth
        return [self.drop_path_rate * i / (self.depth - 1) for i in range(self.depth)]
