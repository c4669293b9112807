"""The vision transformer of DINOv2.

Legend: B images, N tokens of an image, D width of a token, R registers, h x w patches, T tokens of all images.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, cast, overload

import torch
from torch import Tensor, nn

from dinov2.models.config import ViTConfig
from dinov2.models.initialization import init_weights
from dinov2.models.patch_embedding import PatchEmbed
from dinov2.models.position_embedding import interpolate_position_embedding
from dinov2_kernels import PackedLayout
from dinov2_kernels._library import autocast_dtype
from dinov2_kernels.nn import Block, Mlp, SwiGLUFFN, run_blocks
from dinov2_kernels.residual import draw_subsets

Features = dict[str, Tensor]
"""What the model knows about B images.

- ``x_norm_clstoken`` [B, D], ``x_norm_regtokens`` [B, R, D], ``x_norm_patchtokens`` [B, h * w, D]: after the last norm;
- ``x_prenorm`` [B, 1 + R + h * w, D]: all tokens before it.
"""


class VisionTransformer(nn.Module):
    """Vision transformer with the parameters of DINOv2 (arXiv:2304.07193), under the same names.

    Tokens are ordered class token, registers, patches row by row. Images of several sizes go through the blocks
    together, packed without padding; the result equals separate forward passes.

    Args:
        config: the architecture.

    Attributes:
        residual_in_fp32: under autocast, keep the tokens between blocks in float32, as they are made (the default);
            False keeps them in autocast's dtype. They are ``x_prenorm`` in the end; the last norm gives float32 anyhow.
            A choice of how to compute, not of the architecture: no file of weights knows it.
    """

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.config = config
        self.residual_in_fp32 = True
        dim = config.embed_dim
        norm_layer = partial(nn.LayerNorm, eps=1e-6)
        self.patch_embed = PatchEmbed(config.patch_size, config.in_chans, dim)
        self.cls_token = nn.Parameter(torch.empty(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.empty(1, 1 + config.grid_size**2, dim))
        registers = config.num_register_tokens
        self.register_tokens = nn.Parameter(torch.empty(1, registers, dim)) if registers else None
        self.mask_token = nn.Parameter(torch.empty(1, dim))
        self.blocks = nn.ModuleList(
            Block(
                dim,
                config.num_heads,
                mlp_ratio=config.mlp_ratio,
                qkv_bias=config.qkv_bias,
                proj_bias=config.proj_bias,
                ffn_bias=config.ffn_bias,
                drop_path=rate,
                init_values=config.init_values,
                norm_layer=norm_layer,
                ffn_layer=SwiGLUFFN if config.ffn == "swiglu" else Mlp,
            )
            for rate in config.drop_path_rates
        )
        self.norm = norm_layer(dim)
        self.init_weights()

    def init_weights(self) -> None:
        """Draw all parameters anew, for instance after building the model on the meta device."""
        init_weights(self)

    @overload
    def forward_features(self, x: Tensor, masks: Tensor | None = None) -> Features: ...
    @overload
    def forward_features(self, x: Sequence[Tensor], masks: Sequence[Tensor | None] | None = None) -> list[Features]: ...
    def forward_features(self, x: Tensor | Sequence[Tensor], masks: Any = None) -> Features | list[Features]:
        """Features of a batch of images, or of several batches of different sizes in one pass.

        Args:
            x: [B, in_chans, H, W], or a sequence of such; height and width are multiples of the patch size.
            masks: [B, h * w] bool, True where the mask token replaces the patch; for a sequence of batches a sequence
                of masks or Nones.

        Raises:
            ValueError: images or masks are not as described.
        """
        if isinstance(x, Tensor):
            return self._forward_batches([x], [masks])[0]
        return self._forward_batches(x, [None] * len(x) if masks is None else masks)

    def forward(self, x: Tensor) -> Tensor:
        """Normalised class token [B, D] of the images [B, in_chans, H, W]."""
        return self.forward_features(x)["x_norm_clstoken"]

    def get_intermediate_layers(
        self,
        x: Tensor,
        n: int | Sequence[int] = 1,
        reshape: bool = False,
        return_class_token: bool = False,
        norm: bool = True,
    ) -> tuple[Tensor, ...] | tuple[tuple[Tensor, Tensor], ...]:
        """Patch tokens after some of the blocks.

        Args:
            x: [B, in_chans, H, W].
            n: the last n blocks, or the indices of the wanted blocks.
            reshape: return maps [B, D, h, w] in place of token lists [B, h * w, D].
            return_class_token: return pairs of patch tokens and class token [B, D].
            norm: apply the model's last norm to each output.

        Returns:
            One tensor, or pair of tensors, for each block, in the order of the blocks.

        Raises:
            ValueError: the images are not as described, or the model has no such blocks.
        """
        depth = len(self.blocks)
        wanted = range(depth - n, depth) if isinstance(n, int) else sorted(n)
        if not wanted or wanted[0] < 0 or wanted[-1] >= depth:
            raise ValueError(f"n: expected 1 to {depth} blocks or indices from 0 to {depth - 1}, got {n}")
        layout, packed = self._packed_tokens([x], [None])
        outputs = [layout.unpack(tokens)[0] for tokens in self._run_blocks(packed, layout, wanted)]  # [B, N, D] each
        outputs = [self._last_norm(output) if norm else output for output in outputs]
        grid = self.patch_embed.grid(x)
        patches = [output[:, 1 + self.config.num_register_tokens :] for output in outputs]
        if reshape:
            patches = [tokens.transpose(1, 2).unflatten(2, grid).contiguous() for tokens in patches]
        if return_class_token:
            return tuple(zip(patches, [output[:, 0] for output in outputs], strict=True))
        return tuple(patches)

    def _forward_batches(self, batches: Sequence[Tensor], masks: Sequence[Tensor | None]) -> list[Features]:
        if len(masks) != len(batches):
            raise ValueError(f"masks: expected one for each of the {len(batches)} batches of x, got {len(masks)}")
        layout, prenorm, normed = self.forward_packed(batches, masks)
        batches_of = zip(layout.unpack(prenorm), layout.unpack(normed), strict=True)
        return [self._features(*tokens) for tokens in batches_of]

    def forward_packed(
        self, batches: Sequence[Tensor], masks: Sequence[Tensor | None]
    ) -> tuple[PackedLayout, Tensor, Tensor]:
        """What :meth:`forward_features` unpacks: all parameters are used here, and no result is a view.

        Args:
            batches, masks: sequences as of :meth:`forward_features`, of equal length.

        Returns:
            The images' layout; their tokens [T, D] before the last norm, and after it.
        """
        layout, packed = self._packed_tokens(batches, masks)
        (packed,) = self._run_blocks(packed, layout, [len(self.blocks) - 1])
        return layout, packed, self._last_norm(packed)

    def _packed_tokens(self, batches: Sequence[Tensor], masks: Sequence[Tensor | None]) -> tuple[PackedLayout, Tensor]:
        """The images' layout, and their tokens [T, D] that enter the first block."""
        tokens = [self._tokens(x, mask) for x, mask in zip(batches, masks, strict=True)]  # [B, N, D] each
        layout = PackedLayout([batch.shape[:2] for batch in tokens])
        return layout, layout.pack(tokens)

    def _run_blocks(self, packed: Tensor, layout: PackedLayout, wanted: Sequence[int]) -> list[Tensor]:
        """Tokens [T, D] after each of the wanted blocks, whose indices ascend; later blocks do not run.

        The samples that each branch of each block keeps are drawn in one launch.
        """
        blocks = cast(list[Block], list(self.blocks))
        subsets = draw_subsets(packed, layout, [rate for block in blocks for rate in block.drop_rates])
        of_blocks = list(zip(subsets[::2], subsets[1::2], strict=True))
        outputs, start = [], 0
        for stop in (index + 1 for index in wanted):
            packed = run_blocks(blocks[start:stop], packed, layout, of_blocks[start:stop])
            outputs.append(packed)
            start = stop
        return outputs

    def _features(self, prenorm: Tensor, normed: Tensor) -> Features:
        first_patch = 1 + self.config.num_register_tokens
        return {
            "x_norm_clstoken": normed[:, 0],
            "x_norm_regtokens": normed[:, 1:first_patch],
            "x_norm_patchtokens": normed[:, first_patch:],
            "x_prenorm": prenorm,
        }

    def _tokens(self, images: Tensor, mask: Tensor | None) -> Tensor:
        """Tokens [B, N, D] that enter the first block; registers get no position embedding."""
        patches = self.patch_embed(images)  # [B, h * w, D]
        if mask is not None:
            _check_mask(mask, patches)
            patches = torch.where(mask.unsqueeze(-1), self.mask_token.to(patches.dtype), patches)
        positions = interpolate_position_embedding(
            self.pos_embed,
            self.patch_embed.grid(images),
            offset=self.config.interpolate_offset,
            antialias=self.config.interpolate_antialias,
        )  # [1, 1 + h * w, D]
        prefix = self.cls_token + positions[:, :1]  # [1, 1, D]
        if self.register_tokens is not None:
            prefix = torch.cat([prefix, self.register_tokens], dim=1)  # [1, 1 + R, D]
        tokens = torch.cat([prefix.expand(len(images), -1, -1), patches + positions[:, 1:]], dim=1)
        return tokens if self.residual_in_fp32 else tokens.to(autocast_dtype(tokens))

    def _last_norm(self, tokens: Tensor) -> Tensor:
        """On CUDA autocast would widen them by itself, on a CPU it would not."""
        if not self.residual_in_fp32:
            tokens = tokens.to(torch.promote_types(tokens.dtype, torch.float32))
        normed: Tensor = self.norm(tokens)
        return normed


def _check_mask(mask: Tensor, patches: Tensor) -> None:
    if mask.dtype != torch.bool or mask.shape != patches.shape[:2]:
        expected = f"torch.bool {list(patches.shape[:2])}, one value for each patch"
        raise ValueError(f"masks: expected {expected}, got {mask.dtype} {list(mask.shape)}")


def vit_small(patch_size: int = 14, **fields: Any) -> VisionTransformer:
    """ViT-S: 12 blocks of width 384; ``fields`` are those of :class:`ViTConfig`."""
    return VisionTransformer(ViTConfig.of("vit_small", patch_size=patch_size, **fields))


def vit_base(patch_size: int = 14, **fields: Any) -> VisionTransformer:
    """ViT-B: 12 blocks of width 768; ``fields`` are those of :class:`ViTConfig`."""
    return VisionTransformer(ViTConfig.of("vit_base", patch_size=patch_size, **fields))


def vit_large(patch_size: int = 14, **fields: Any) -> VisionTransformer:
    """ViT-L: 24 blocks of width 1024; ``fields`` are those of :class:`ViTConfig`."""
    return VisionTransformer(ViTConfig.of("vit_large", patch_size=patch_size, **fields))


def vit_giant2(patch_size: int = 14, **fields: Any) -> VisionTransformer:
    """ViT-g: 40 blocks of width 1536 with SwiGLU; ``fields`` are those of :class:`ViTConfig`."""
    return VisionTransformer(ViTConfig.of("vit_giant2", patch_size=patch_size, **fields))
