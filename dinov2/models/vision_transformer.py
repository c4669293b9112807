"""The vision transformer of DINOv2: patches, position embeddings for images of any size, blocks, initial values.

Legend: B images, N tokens of an image, D width of a token, R registers, h x w patches, T tokens of all images.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from functools import partial
from math import isqrt
from typing import Any, cast, overload

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinov2.models.config import ViTConfig
from dinov2_kernels import PackedLayout
from dinov2_kernels._library import autocast_dtype, is_tracing, refuse_symbols
from dinov2_kernels._modules import is_plain, refuse_script
from dinov2_kernels.nn import Block, LayerScale, Mlp, SwiGLUFFN, run_blocks
from dinov2_kernels.residual import draw_subsets

Features = dict[str, Tensor]
"""The tokens of B images.

- ``x_norm_clstoken`` [B, D], ``x_norm_regtokens`` [B, R, D], ``x_norm_patchtokens`` [B, h * w, D]: after the last norm;
- ``x_prenorm`` [B, 1 + R + h * w, D]: all tokens before the last norm.
"""


class VisionTransformer(nn.Module):
    """Vision transformer with the parameters of DINOv2 (arXiv:2304.07193), under the same names.

    The order of tokens is class token, registers, patches row by row. Images of several sizes run through the blocks
    together, packed without padding; the result equals that of separate forward passes.

    Args:
        config: the architecture.

    Attributes:
        residual_in_fp32: keep the tokens between blocks in float32 under autocast (the default); False keeps them in
            autocast's dtype. This is also the dtype of ``x_prenorm``; the last norm always returns float32. The choice
            is not part of the architecture, so files of weights do not store it.
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

    __prepare_scriptable__ = refuse_script

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
            x: [B, in_chans, H, W], or a sequence of such batches; height and width are multiples of the patch size.
            masks: [B, h * w] bool, True for patches that the mask token replaces; for a sequence of batches, a sequence
                of masks or Nones.

        Raises:
            ValueError: images or masks have another shape or dtype.
        """
        if isinstance(x, Tensor):
            return self._forward_batches([x], [masks])[0]
        refuse_symbols(x)
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
            One tensor or pair of tensors for each wanted block, in the order of the blocks.

        Raises:
            ValueError: the images have another shape, or the model has no such blocks.
        """
        wanted = _wanted_blocks(n, len(self.blocks))
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
        """Packed tokens before :meth:`forward_features` unpacks them. It uses all parameters, and returns no views.

        Args:
            batches, masks: sequences of equal length, as in :meth:`forward_features`.

        Returns:
            The images' layout, their tokens [T, D] before the last norm, and their tokens after it.
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
        """Tokens [T, D] after each of the wanted blocks; their indices ascend, and later blocks do not run.

        One kernel launch draws the samples that each branch of each block keeps.
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
        tokens = torch.cat([prefix.expand(images.shape[0], -1, -1), patches + positions[:, 1:]], dim=1)
        return tokens if self.residual_in_fp32 else tokens.to(autocast_dtype(tokens))

    def _last_norm(self, tokens: Tensor) -> Tensor:
        """The last norm of tokens, in float32. Autocast casts its input on CUDA, but not on a CPU."""
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


def _wanted_blocks(n: Any, depth: int) -> Sequence[int]:
    """Ascending indices of the last n blocks, or of the blocks n; NumPy's integers are integers."""
    try:
        if isinstance(n, int) or (hasattr(n, "__index__") and not hasattr(n, "__len__")):
            wanted: Sequence[int] = range(depth - operator.index(n), depth)
        else:
            wanted = sorted(operator.index(block) for block in n)
    except TypeError:
        wanted = []
    if not wanted or wanted[0] < 0 or wanted[-1] >= depth:
        raise ValueError(f"n: expected 1 to {depth} blocks or indices from 0 to {depth - 1}, got {n!r}")
    return wanted


class PatchEmbed(nn.Module):
    """Cuts images into square patches and projects each linearly.

    Args:
        patch_size: height and width P of a patch in pixels.
        in_chans: channels of the images.
        embed_dim: width D of the tokens.
    """

    def __init__(self, patch_size: int, in_chans: int, embed_dim: int) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.in_chans = in_chans
        self.proj = nn.Conv2d(in_chans, embed_dim, kernel_size=patch_size, stride=patch_size)

    def grid(self, images: Tensor) -> tuple[int, int]:
        """Patches along the height and the width of images [B, in_chans, H, W].

        Raises:
            ValueError: the images have another shape, or a height or width that is not a multiple of the patch size.
        """
        if images.dim() != 4 or images.shape[1] != self.in_chans:
            raise ValueError(f"images: expected shape [B, {self.in_chans}, H, W], got {list(images.shape)}")
        height, width = images.shape[2:]
        if height % self.patch_size or width % self.patch_size:
            expected = f"height and width that are multiples of the patch size {self.patch_size}"
            raise ValueError(f"images: expected {expected}, got {height} x {width}")
        return height // self.patch_size, width // self.patch_size

    def forward(self, images: Tensor) -> Tensor:
        """images: [B, in_chans, H, W]; returns [B, h * w, D], the patches row by row.

        The convolution does not overlap, so it is a matrix product of the patches. This is faster than PyTorch's
        convolution with such a stride, and it writes the tokens in their final order. A convolution that a hook
        observes, or that may do more, is called.
        """
        (h, w), size = self.grid(images), self.patch_size
        if type(self.proj) is not nn.Conv2d or not is_plain(self.proj, nn.Conv2d):
            tokens: Tensor = self.proj(images).flatten(2).mT
            return tokens
        patches = images.unflatten(3, (w, size)).unflatten(2, (h, size))  # [B, in_chans, h, P, w, P]
        patches = patches.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)  # [B, h * w, in_chans * P * P]
        return F.linear(patches, self.proj.weight.flatten(1), self.proj.bias)


def interpolate_position_embedding(
    pos_embed: Tensor, grid: tuple[int, int], *, offset: float = 0.0, antialias: bool = True
) -> Tensor:
    """Resample the position embeddings of a square grid of M x M patches to another grid, bicubically.

    DINOv2's published models use two modes. Models without registers pass ``(patches + 0.1) / M`` as scale factor
    (``offset=0.1, antialias=False``). The offset should protect the output size against rounding, but it also moves the
    sampling points, so the weights need it. Models with registers pass the output size itself (``offset=0,
    antialias=True``). A grid of M x M is returned unchanged in both modes.

    Args:
        pos_embed: [1, 1 + M * M, D] embedding of the class token, then of the patches row by row.
        grid: patches of the image along its height and its width (h, w).
        offset: added to the number of patches in the scale factor; 0 passes the output size instead.
        antialias: smooth before resampling to fewer patches.

    Returns:
        [1, 1 + h * w, D] in the dtype of ``pos_embed``; the arithmetic is float32, or float64 for float64.

    Raises:
        NotImplementedError: ``torch.onnx.export(dynamo=False)`` would have to resample with antialiasing.
    """
    size = isqrt(pos_embed.shape[1] - 1)  # M
    if is_tracing():
        grid = int(grid[0]), int(grid[1])  # a trace serves one size of images, whose embeddings are constants in it
    if grid == (size, size):
        return pos_embed
    if antialias and is_tracing() and torch.onnx.is_in_onnx_export():
        raise NotImplementedError(
            "torch.onnx.export(dynamo=False): expected images whose position embeddings need no antialiased resampling,"
            f" {size} x {size} patches, got {grid[0]} x {grid[1]}; use dynamo=True"
        )
    patches = pos_embed[:, 1:].to(torch.promote_types(pos_embed.dtype, torch.float32))
    patches = patches.unflatten(1, (size, size)).permute(0, 3, 1, 2)  # [1, D, M, M]
    if offset:
        scale = ((grid[0] + offset) / size, (grid[1] + offset) / size)
        patches = F.interpolate(patches, scale_factor=scale, mode="bicubic", antialias=antialias)
    else:
        patches = F.interpolate(patches, size=grid, mode="bicubic", antialias=antialias)
    patches = patches.flatten(2).transpose(1, 2).to(pos_embed.dtype)  # [1, h * w, D]
    return torch.cat([pos_embed[:, :1], patches], dim=1)


def init_weights(model: VisionTransformer) -> None:
    """Draw all parameters of a model.

    Linear layers and position embeddings: normal of standard deviation 0.02, truncated at +-2; class token and
    registers: normal of standard deviation 1e-6; mask token and biases: zero; LayerScale: its initial value; patch
    projection: PyTorch's default for convolutions.
    """
    for module in model.modules():
        init_linear(module)
        if isinstance(module, nn.Conv2d | nn.LayerNorm | LayerScale):
            module.reset_parameters()
    nn.init.trunc_normal_(model.pos_embed, std=0.02)
    nn.init.normal_(model.cls_token, std=1e-6)
    if model.register_tokens is not None:
        nn.init.normal_(model.register_tokens, std=1e-6)
    nn.init.zeros_(model.mask_token)


def init_linear(module: nn.Module) -> None:
    """Draw truncated normal weights of standard deviation 0.02 and set biases to 0; only for linear layers."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
