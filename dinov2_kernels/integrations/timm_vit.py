"""timm: the blocks, attention and feed-forward layers of ``timm.models.vision_transformer`` and models made of them.

timm itself is never imported here. A class is recognised by the place where its forward is defined, and by a trial.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from dinov2_kernels._modules import LAYER_NORM_FORWARDS, is_plain
from dinov2_kernels.integrations.attentions import (
    AcceleratedAttention,
    norm_of_heads,
    replaced_sdpa,
    watched_dropout,
)
from dinov2_kernels.integrations.blocks import (
    MUST_BE_CALLED,
    AcceleratedBlock,
    ResidualBranch,
    add_branches,
    block_parts,
    drop_rate,
    in_use,
)
from dinov2_kernels.integrations.swap import Accelerated, forward_name
from dinov2_kernels.integrations.trial import WIDTH, Part, Sides, identity, matrix
from dinov2_kernels.nn.attention import attend
from dinov2_kernels.nn.fused_mlp import SWIGLU, fused_mlp
from dinov2_kernels.packing import PackedLayout
from dinov2_kernels.swiglu import swiglu


class Attention(AcceleratedAttention):
    """Self-attention with optional norms of queries and keys, and optional norm and gate of the result."""

    parts = ("qkv", "q_norm", "k_norm", "attn_drop", "proj", "proj_drop")
    num_heads: int
    scale: float
    fused_attn: bool
    qkv: nn.Module
    q_norm: nn.Module
    k_norm: nn.Module
    attn_drop: nn.Dropout
    proj: nn.Module
    proj_drop: nn.Module

    @classmethod
    def recognises(cls, module: nn.Module) -> bool:
        places = ("timm.layers.attention", "timm.models.vision_transformer")  # now, and in earlier versions
        return forward_name(module) in [(place, "Attention.forward") for place in places]

    @classmethod
    def stand_ins(cls, module: nn.Module) -> Iterator[Sides]:
        for fused in (False, True):
            numbers = {"num_heads": 2, "head_dim": 4, "attn_dim": 8, "scale": 0.3, "fused_attn": fused}
            norms = {"q_norm": Part(torch.sin), "k_norm": Part(torch.tanh), "norm": Part(torch.exp)}
            linears = {"qkv": matrix(WIDTH, 3 * WIDTH), "gate": matrix(WIDTH, WIDTH), "proj": matrix(WIDTH, WIDTH)}
            drops = {"attn_drop": identity(p=0.0), "proj_drop": Part(torch.sin)}
            known = numbers | norms | linears | drops
            attributes = {name: value for name, value in known.items() if hasattr(module, name)}
            yield attributes, attributes

    def drop_rate(self) -> float:
        return getattr(self.attn_drop, "p", 0.0)

    def detour(self) -> str | None:
        reason = super().detour() or watched_dropout(self._modules["attn_drop"])
        return reason or (replaced_sdpa() if self.fused_attn else None)

    def takes(self, x: object, *args: Any, **kwargs: Any) -> bool:
        """Whether x is tokens [B, N, C], there is no mask, and no weights are dropped."""
        return isinstance(x, Tensor) and x.dim() == 3 and not in_use(*args, **kwargs) and not self.drops()

    def on_kernels(self, x: Tensor, *_: Any, **__: Any) -> Tensor:
        """x: [B, N, C]."""
        samples = (x.shape[0], x.shape[1])
        layout, parts = PackedLayout([samples]), self._modules  # attributes of a module are slow
        norm, gate = parts.get("norm"), parts.get("gate")
        gates = None if gate is None else gate(x).sigmoid()
        qkv = self.qkv(x).flatten(0, 1).unflatten(1, (3, self.num_heads, -1))  # [B N, 3, H, D]
        scale = None if self.fused_attn else self.scale  # timm's fused attention takes the default
        of_queries, of_keys = self.q_norm, self.k_norm
        norms = None
        if not (is_plain(of_queries, nn.Identity) and is_plain(of_keys, nn.Identity)):
            norms = norm_of_heads(of_queries, samples), norm_of_heads(of_keys, samples)
        y = layout.unpack(attend(qkv, layout, norms, scale=scale).flatten(1))[0]  # [B, N, H D]
        y = y if norm is None else norm(y)
        y = y if gates is None else y * gates
        result: Tensor = self.proj_drop(self.proj(y))
        return result


class Block(AcceleratedBlock):
    """The pre-norm block."""

    parts = ("norm1", "attn", "ls1", "drop_path1", "norm2", "mlp", "ls2", "drop_path2")
    scales = ("ls1", "ls2")
    drop_paths = ("drop_path1", "drop_path2")
    norm1: nn.Module
    attn: nn.Module
    ls1: nn.Module
    drop_path1: nn.Module
    norm2: nn.Module
    mlp: nn.Module
    ls2: nn.Module
    drop_path2: nn.Module

    @classmethod
    def recognises(cls, module: nn.Module) -> bool:
        return forward_name(module) == ("timm.models.vision_transformer", "Block.forward")

    @classmethod
    def stand_ins(cls, module: nn.Module) -> Iterator[Sides]:
        theirs, ours = block_parts(("norm1", "norm2"), "attn", "mlp", cls.scales)
        for name in cls.drop_paths:
            theirs[name], ours[name] = Part(lambda x: 3 * x), nn.Identity()
        yield theirs, ours

    @classmethod
    def swap(cls, module: nn.Module) -> None:
        for norm in (module.get_submodule("norm1"), module.get_submodule("norm2")):
            if forward_name(norm) == ("timm.layers.norm", "LayerNorm.forward"):
                LAYER_NORM_FORWARDS.add(type(norm).forward)  # that of nn.LayerNorm, but for its fast norm
        super().swap(module)

    def detour(self) -> str | None:
        if reason := super().detour():
            return reason
        parts = self._modules
        is_fast = any(parts[name].__dict__.get("_fast_norm") for name in ("norm1", "norm2"))
        return "the fast norm of its LayerNorm is on" if is_fast else None

    def takes(self, x: object, *args: Any, **kwargs: Any) -> bool:
        """Whether there is no mask, and x is tokens [B, N, C] that the block can take."""
        return not in_use(*args, **kwargs) and self.fits(x)

    def on_kernels(self, x: Tensor, *_: Any, **__: Any) -> Tensor:
        """x: [B, N, C]."""
        attn, arguments = self.attn, self.library_defaults  # a mask and a switch that are not in use

        def attend_with(tokens: Tensor) -> Tensor:
            y: Tensor = attn(tokens, **arguments)
            return y

        attention = ResidualBranch(attend_with, self.norm1, self.ls1, drop_rate(self.drop_path1))
        feed_forward = ResidualBranch(self.mlp, self.norm2, self.ls2, drop_rate(self.drop_path2))
        return add_branches(x, [attention, feed_forward])


class SwiGLU(Accelerated):
    """``GluMlp`` as in ``SwiGLUPacked``: one linear layer for gate and value, with the gate first."""

    runs_on = "swiglu"
    parts: ClassVar[tuple[str, ...]] = ("fc1", "act", "drop1", "norm", "fc2", "drop2", "gate_last", "chunk_dim")
    fc1: nn.Module
    act: nn.Module
    drop1: nn.Module
    norm: nn.Module
    fc2: nn.Module
    drop2: nn.Module
    gate_last: bool
    chunk_dim: int

    @classmethod
    def recognises(cls, module: nn.Module) -> bool:
        return forward_name(module) == ("timm.layers.mlp", "GluMlp.forward")

    @classmethod
    def obstacle(cls, module: nn.Module) -> str | None:
        return super().obstacle(module) or cls._gate_obstacle(module)

    @classmethod
    def _gate_obstacle(cls, module: nn.Module) -> str | None:
        if not isinstance(module.act, nn.SiLU):
            return f"its gate is {type(module.act).__name__}, not SiLU"
        if module.gate_last or module.chunk_dim != -1:
            return "its gate is not the first half of the last dimension"
        return None

    @classmethod
    def stand_ins(cls, module: nn.Module) -> Iterator[Sides]:
        linears = {"fc1": matrix(WIDTH, 4 * WIDTH), "fc2": matrix(2 * WIDTH, WIDTH)}
        drops = {"drop1": Part(torch.sin, p=0.5), "norm": Part(torch.tanh), "drop2": Part(torch.exp)}
        attributes = linears | drops | {"act": nn.SiLU(), "gate_last": False, "chunk_dim": -1}
        yield attributes, attributes

    def detour(self) -> str | None:
        if reason := super().detour() or self._gate_obstacle(self):
            return reason
        return None if is_plain(self.act, nn.SiLU) else f"act {MUST_BE_CALLED}"

    def takes(self, x: object) -> bool:
        """Whether x is a tensor; torch.fx passes something else."""
        return isinstance(x, Tensor)

    def on_kernels(self, x: Tensor) -> Tensor:
        """x: [..., in_features]; returns [..., out_features]."""
        drop1, norm = self.drop1, self.norm
        if is_plain(norm, nn.Identity) and is_plain(drop1, nn.Dropout) and not drop1.p:
            y = fused_mlp(self.fc1, SWIGLU, self.fc2, x)
        else:
            y = self.fc2(norm(drop1(swiglu(self.fc1(x)))))
        result: Tensor = self.drop2(y)
        return result
