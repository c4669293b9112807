"""facebook's DINOv2 (torch.hub, and copies of its layers), recognised by names, arguments and parts.

Legend: B samples of N tokens of width C; T tokens of a list of crops, packed.
"""

from __future__ import annotations

import inspect
from typing import Any, ClassVar

from torch import Tensor, nn

from dinov2_kernels.attention import varlen_attention_qkvpacked
from dinov2_kernels.integrations.blocks import (
    DROPPED_IN_TRAINING,
    AcceleratedBlock,
    ResidualBranch,
    add_branches,
    gamma_of,
    in_use,
)
from dinov2_kernels.integrations.swap import Accelerated, forward_name, forward_of
from dinov2_kernels.nn.fused_mlp import SWIGLU, fused_mlp
from dinov2_kernels.packing import PackedLayout
from dinov2_kernels.residual import Connection, draw_subsets, residual_chain


class Facebook(Accelerated):
    """Base of the three classes below.

    Attributes:
        forwards: for each qualified name of a forward, the argument lists that it may have.
    """

    forwards: ClassVar[dict[str, tuple[tuple[str, ...], ...]]]

    @classmethod
    def recognises(cls, module: nn.Module) -> bool:
        arguments = cls.forwards.get(forward_name(module)[1])
        if not arguments or not all(hasattr(module, part) for part in cls.parts):
            return False
        return tuple(inspect.signature(forward_of(module)).parameters)[1:] in arguments


class Attention(Facebook):
    """``Attention`` and ``MemEffAttention``; the latter also takes packed crops, with a PackedLayout as their bias."""

    runs_on = "varlen_attention"
    parts = ("num_heads", "scale", "qkv", "attn_drop", "proj", "proj_drop")
    forwards: ClassVar = {
        "Attention.forward": (("x",), ("x", "is_causal")),
        "MemEffAttention.forward": (("x", "attn_bias"),),
    }
    num_heads: int
    scale: float
    qkv: nn.Module
    attn_drop: nn.Module | float
    proj: nn.Module
    proj_drop: nn.Module

    @classmethod
    def recognises(cls, module: nn.Module) -> bool:
        # The attention of the first DINO has the same name and parts, but also returns its weights.
        place, name = forward_name(module)
        return super().recognises(module) and ("dinov2" in place or name == "MemEffAttention.forward")

    def restriction(self) -> str:
        return DROPPED_IN_TRAINING if self._drops() else ""

    def _drops(self) -> bool:
        return bool(getattr(self.attn_drop, "p", self.attn_drop))  # attn_drop is a module; in later versions, a number

    def takes(self, attn_bias: object) -> bool:
        """Whether the kernels can serve a call: its bias is None or a PackedLayout, and no weights are dropped."""
        return not (self.training and self._drops()) and (isinstance(attn_bias, PackedLayout) or not in_use(attn_bias))

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """x: [B, N, C], or [1, T, C] with a PackedLayout; facebook's forward serves other biases and weight dropout."""
        bias = next(iter((*args, *kwargs.values())), None)
        if not self.takes(bias):
            result: Tensor = super().forward(x, *args, **kwargs)
            return result
        layout = bias if isinstance(bias, PackedLayout) else PackedLayout([(x.shape[0], x.shape[1])])
        qkv = self.qkv(x).flatten(0, 1).unflatten(1, (3, self.num_heads, -1))  # [T, 3, H, D]
        y = varlen_attention_qkvpacked(qkv, layout, scale=self.scale).flatten(1)  # [T, C]
        y = y.view(*x.shape[:2], y.shape[1])
        result = self.proj_drop(self.proj(y))
        return result


class Block(AcceleratedBlock, Facebook):
    """``Block`` and ``NestedTensorBlock``; a list of crops needs no xFormers."""

    parts = ("norm1", "attn", "ls1", "drop_path1", "norm2", "mlp", "ls2", "drop_path2", "sample_drop_ratio")
    scales = ("ls1", "ls2")
    drop_paths = ("drop_path1", "drop_path2")
    forwards: ClassVar = {"Block.forward": (("x",),), "NestedTensorBlock.forward": (("x_or_x_list",),)}
    norm1: nn.Module
    attn: nn.Module
    ls1: nn.Module
    norm2: nn.Module
    mlp: nn.Module
    ls2: nn.Module
    sample_drop_ratio: float

    def forward(self, x: Tensor | list[Tensor]) -> Any:
        """x: [B, N, C], or a list of such tensors; returns the same shapes."""
        rate = self.sample_drop_ratio if self.training else 0.0
        if isinstance(x, list):
            return self._forward_list(x, rate)
        if not self.can_fuse(x):
            return super().forward(x)
        attention = ResidualBranch(self.attn, self.norm1, self.ls1, rate)
        return add_branches(x, [attention, ResidualBranch(self.mlp, self.norm2, self.ls2, rate)])

    def _forward_list(self, crops: list[Tensor], rate: float) -> Any:
        attention_packs = isinstance(self.attn, Attention) and self.attn.takes(None)
        if not attention_packs or not all(self.can_fuse(crop) for crop in crops):
            return super().forward(crops)
        layout = PackedLayout([crop.shape[:2] for crop in crops])
        x = layout.pack(crops)  # [T, C]
        of_attention, of_mlp = draw_subsets(x, layout, [rate, rate])
        connections = [
            Connection(self._attend, of_attention, norm=self.norm1, gamma=gamma_of(self.ls1)),
            Connection(lambda tokens, _: self.mlp(tokens), of_mlp, norm=self.norm2, gamma=gamma_of(self.ls2)),
        ]
        return layout.unpack(residual_chain(x, layout, connections))

    def _attend(self, tokens: Tensor, layout: PackedLayout) -> Tensor:
        attended: Tensor = self.attn(tokens.unsqueeze(0), attn_bias=layout)  # [1, T, C], as facebook packs
        return attended.squeeze(0)


class SwiGLU(Facebook):
    """``SwiGLUFFN``, and ``SwiGLUFFNFused`` without xFormers."""

    runs_on = "swiglu"
    parts = ("w12", "w3")
    forwards: ClassVar = {"SwiGLUFFN.forward": (("x",),)}
    w12: nn.Module
    w3: nn.Module

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., in_features]; returns [..., out_features]."""
        return fused_mlp(self.w12, SWIGLU, self.w3, x)
