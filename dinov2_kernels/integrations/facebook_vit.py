"""facebook's DINOv2 (torch.hub, and copies of its layers), recognised by names, arguments and parts, and by a trial.

Legend: B samples of N tokens of width C; T tokens of a list of crops, packed.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from types import FunctionType, MethodType
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinov2_kernels._modules import own_forward
from dinov2_kernels.attention import varlen_attention_qkvpacked
from dinov2_kernels.integrations.attentions import AcceleratedAttention, replaced_sdpa, watched_dropout
from dinov2_kernels.integrations.blocks import (
    AcceleratedBlock,
    ResidualBranch,
    add_branches,
    block_parts,
    drop_rate,
    gamma_of,
    in_use,
    norm_on_packed,
)
from dinov2_kernels.integrations.swap import Accelerated, forward_name
from dinov2_kernels.integrations.trial import WIDTH, Part, Sides, identity, matrix
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
        forward = own_forward(type(module))
        return forward is not None and tuple(inspect.signature(forward).parameters)[1:] in arguments


class Attention(AcceleratedAttention, Facebook):
    """``Attention`` and ``MemEffAttention``; the latter also takes packed crops, with a PackedLayout as their bias."""

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

    @classmethod
    def stand_ins(cls, module: nn.Module) -> Iterator[Sides]:
        numbers = {"num_heads": 2, "scale": 0.5, "dim": WIDTH, "head_dim": 4}
        numbers = {name: value for name, value in numbers.items() if hasattr(module, name)}
        attn_drop = identity(p=0.0) if isinstance(getattr(module, "attn_drop", None), nn.Module) else 0.0
        parts = {"qkv": matrix(WIDTH, 3 * WIDTH), "proj": matrix(WIDTH, WIDTH), "proj_drop": Part(torch.sin)}
        attributes = numbers | parts | {"attn_drop": attn_drop}
        yield attributes, attributes

    @classmethod
    def library_on_trial(cls, module: Any) -> Callable[..., Any]:
        """The library's forward with an attention for every device in the place of xFormers'."""
        forward = type(module).forward
        if "memory_efficient_attention" not in forward.__globals__:
            return super().library_on_trial(module)
        names = forward.__globals__ | {"memory_efficient_attention": _memory_efficient_attention}
        rebuilt = FunctionType(forward.__code__, names, forward.__name__, forward.__defaults__, forward.__closure__)
        return MethodType(rebuilt, module)

    def drop_rate(self) -> float:
        rate: float = getattr(self.attn_drop, "p", self.attn_drop)  # type: ignore[arg-type]  # in later versions, a number
        return rate

    def detour(self) -> str | None:
        return super().detour() or watched_dropout(self.attn_drop) or replaced_sdpa()

    def takes(self, x: object, *args: Any, **kwargs: Any) -> bool:
        """Whether x is tokens, its bias is None or a PackedLayout, and no weights are dropped or scaled otherwise."""
        if not isinstance(x, Tensor) or x.dim() != 3 or self.drops():
            return False
        if self.scale != (x.shape[2] // self.num_heads) ** -0.5:
            return False  # some versions read the scale, some have it in their attention function
        bias = next(iter((*args, *kwargs.values())), None)
        return isinstance(bias, PackedLayout) or not in_use(*args, **kwargs)

    def on_kernels(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """x: [B, N, C], or [1, T, C] with a PackedLayout."""
        bias = next(iter((*args, *kwargs.values())), None)
        layout = bias if isinstance(bias, PackedLayout) else PackedLayout([(x.shape[0], x.shape[1])])
        qkv = self.qkv(x).flatten(0, 1).unflatten(1, (3, self.num_heads, -1))  # [T, 3, H, D]
        y = varlen_attention_qkvpacked(qkv, layout).flatten(1)  # [T, C]
        y = y.view(*x.shape[:2], y.shape[1])
        result: Tensor = self.proj_drop(self.proj(y))
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
    drop_path1: nn.Module
    norm2: nn.Module
    mlp: nn.Module
    ls2: nn.Module
    sample_drop_ratio: float

    @classmethod
    def stand_ins(cls, module: nn.Module) -> Iterator[Sides]:
        theirs, _ = block_parts(("norm1", "norm2"), "attn", "mlp", cls.scales)
        attributes = theirs | {"drop_path1": identity(), "drop_path2": identity(), "sample_drop_ratio": 0.0}
        yield attributes, attributes

    def takes(self, x: object) -> bool:
        """Whether x is tokens [B, N, C], or a list of them if the attention takes a PackedLayout."""
        if self.training and self.sample_drop_ratio >= 1:
            return False
        if not isinstance(x, list):
            return self.fits(x)
        attn = self.attn
        if not isinstance(attn, Attention) or attn.detour() is not None:
            return False
        return all(self.fits(crop) and attn.takes(crop) for crop in x)

    def forward(self, x: Tensor | list[Tensor]) -> Any:
        """x: [B, N, C], or a list of such tensors; returns the same shapes."""
        served = self.detour() is None and self.takes(x)
        if isinstance(x, list) and not served and not self._has_xformers():
            return [self.forward(crop) for crop in x]  # without xFormers, facebook's forward takes no list
        return self.on_kernels(x) if served else super(Accelerated, self).forward(x)

    def on_kernels(self, x: Tensor | list[Tensor]) -> Any:
        """x: [B, N, C], or a list of such tensors; returns the same shapes."""
        if isinstance(x, list):
            return self._packed(x)
        rate = self._rate()
        attention = ResidualBranch(self.attn, self.norm1, self.ls1, rate)
        return add_branches(x, [attention, ResidualBranch(self.mlp, self.norm2, self.ls2, rate)])

    def _has_xformers(self) -> bool:
        return bool(getattr(type(self).library_forward, "__globals__", {}).get("XFORMERS_AVAILABLE"))

    def _rate(self) -> float:
        """The share of samples to drop now: up to a ratio of 0.1, facebook's forward leaves it to ``drop_path1``."""
        ratio = self.sample_drop_ratio if self.training else 0.0
        return ratio if ratio > 0.1 or not ratio else drop_rate(self.drop_path1)

    def _packed(self, crops: list[Tensor]) -> list[Tensor]:
        rate = self._rate()
        layout = PackedLayout([crop.shape[:2] for crop in crops])
        x = layout.pack(crops)  # [T, C]
        norms = [norm_on_packed(norm, x, None) for norm in (self.norm1, self.norm2)]
        of_attention, of_mlp = draw_subsets(x, layout, [rate, rate])
        connections = [
            Connection(self._attend, of_attention, norm=norms[0], gamma=gamma_of(self.ls1)),
            Connection(self._feed_forward, of_mlp, norm=norms[1], gamma=gamma_of(self.ls2)),
        ]
        return layout.unpack(residual_chain(x, layout, connections))

    # Parts see [1, T, C], as facebook packs crops.

    def _attend(self, tokens: Tensor, layout: PackedLayout) -> Tensor:
        attended: Tensor = self.attn(tokens.unsqueeze(0), attn_bias=layout)
        return attended.squeeze(0)

    def _feed_forward(self, tokens: Tensor, _: PackedLayout) -> Tensor:
        y: Tensor = self.mlp(tokens.unsqueeze(0))
        return y.squeeze(0)


class SwiGLU(Facebook):
    """``SwiGLUFFN``, and ``SwiGLUFFNFused`` without xFormers."""

    runs_on = "swiglu"
    parts = ("w12", "w3")
    forwards: ClassVar = {"SwiGLUFFN.forward": (("x",),)}
    w12: nn.Module
    w3: nn.Module

    @classmethod
    def stand_ins(cls, module: nn.Module) -> Iterator[Sides]:
        attributes = {"w12": matrix(WIDTH, 4 * WIDTH), "w3": matrix(2 * WIDTH, WIDTH)}
        yield attributes, attributes

    def takes(self, x: object) -> bool:
        """Whether x is a tensor; torch.fx passes something else."""
        return isinstance(x, Tensor)

    def on_kernels(self, x: Tensor) -> Tensor:
        """x: [..., in_features]; returns [..., out_features]."""
        return fused_mlp(self.w12, SWIGLU, self.w3, x)


def _memory_efficient_attention(q: Tensor, k: Tensor, v: Tensor, attn_bias: None = None) -> Tensor:
    """The result of xFormers' function without a bias: attention of [B, N, H, D]."""
    q, k, v = (y.transpose(1, 2) for y in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=attn_bias).transpose(1, 2)
