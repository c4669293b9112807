"""timm: the blocks, attention and feed-forward layers of ``timm.models.vision_transformer`` and models made of them.

timm itself is never imported here. A class is recognised by the place where its forward is defined.
"""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor, nn

from dinov2_kernels._modules import is_unwatched
from dinov2_kernels.integrations.blocks import (
    DROPPED_IN_TRAINING,
    AcceleratedBlock,
    ResidualBranch,
    add_branches,
    drop_rate,
    in_use,
)
from dinov2_kernels.integrations.swap import Accelerated, forward_name
from dinov2_kernels.nn.attention import attend
from dinov2_kernels.nn.fused_mlp import SWIGLU, fused_mlp
from dinov2_kernels.packing import PackedLayout
from dinov2_kernels.swiglu import swiglu


class Attention(Accelerated):
    """Self-attention with optional norms of queries and keys, and optional norm and gate of the result."""

    runs_on = "varlen_attention"
    parts = ("qkv", "q_norm", "k_norm", "attn_drop", "proj", "proj_drop")
    num_heads: int
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

    def restriction(self) -> str:
        return DROPPED_IN_TRAINING if self.attn_drop.p else ""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """x: [B, N, C]; timm's own forward serves calls with a mask or with dropout of weights."""
        if in_use(*args, **kwargs) or (self.training and self.attn_drop.p):
            result: Tensor = super().forward(x, *args, **kwargs)
            return result
        layout = PackedLayout([(x.shape[0], x.shape[1])])
        qkv = self.qkv(x).flatten(0, 1).unflatten(1, (3, self.num_heads, -1))  # [B N, 3, H, D]
        y = layout.unpack(attend(qkv, layout, self.q_norm, self.k_norm).flatten(1))[0]  # [B, N, H D]
        norm, gate = getattr(self, "norm", None), getattr(self, "gate", None)
        y = y if norm is None else norm(y)
        y = y if gate is None else y * gate(x).sigmoid()
        result = self.proj_drop(self.proj(y))
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
    def swap(cls, module: nn.Module) -> None:
        super().swap(module)
        for norm in (module.get_submodule("norm1"), module.get_submodule("norm2")):
            if LayerNorm.recognises(norm) and LayerNorm.obstacle(norm) is None:
                LayerNorm.swap(norm)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """x: [B, N, C]; timm's own forward serves calls with a mask."""
        if in_use(*args, **kwargs) or not self.can_fuse(x):
            result: Tensor = super().forward(x, *args, **kwargs)
            return result
        attention = ResidualBranch(self.attn, self.norm1, self.ls1, drop_rate(self.drop_path1))
        feed_forward = ResidualBranch(self.mlp, self.norm2, self.ls2, drop_rate(self.drop_path2))
        return add_branches(x, [attention, feed_forward])


class LayerNorm(Accelerated, nn.LayerNorm):
    """timm's LayerNorm. Without its fast norm it equals PyTorch's, so a block can fuse it."""

    runs_on = ""

    @classmethod
    def recognises(cls, module: nn.Module) -> bool:
        return forward_name(module) == ("timm.layers.norm", "LayerNorm.forward")

    @classmethod
    def obstacle(cls, module: nn.Module) -> str | None:
        return super().obstacle(module) or ("its fast norm is on" if module._fast_norm else None)

    forward = nn.LayerNorm.forward


class SwiGLU(Accelerated):
    """``GluMlp`` as in ``SwiGLUPacked``: one linear layer for gate and value, with the gate first."""

    runs_on = "swiglu"
    parts: ClassVar[tuple[str, ...]] = ("fc1", "act", "drop1", "norm", "fc2", "drop2", "gate_last", "chunk_dim")
    fc1: nn.Module
    drop1: nn.Module
    norm: nn.Module
    fc2: nn.Module
    drop2: nn.Module

    @classmethod
    def recognises(cls, module: nn.Module) -> bool:
        return forward_name(module) == ("timm.layers.mlp", "GluMlp.forward")

    @classmethod
    def obstacle(cls, module: nn.Module) -> str | None:
        if reason := super().obstacle(module):
            return reason
        if not isinstance(module.act, nn.SiLU):
            return f"its gate is {type(module.act).__name__}, not SiLU"
        if module.gate_last or module.chunk_dim != -1:
            return "its gate is not the first half of the last dimension"
        return None

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., in_features]; returns [..., out_features]."""
        drop1, norm = self.drop1, self.norm
        is_fusable = isinstance(norm, nn.Identity) and is_unwatched(drop1) and is_unwatched(norm)
        if is_fusable and not getattr(drop1, "p", 1):
            result: Tensor = self.drop2(fused_mlp(self.fc1, SWIGLU, self.fc2, x))
        else:
            result = self.drop2(self.fc2(norm(drop1(swiglu(self.fc1(x))))))
        return result
