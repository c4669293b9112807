"""transformers: DINOv2 with and without registers, and the ViTs that share their code: ViT, DeiT, MAE, MSN, I-JEPA.

transformers itself is never imported here. A class is recognised by the place where its forward is defined. There are
two generations of these classes. In the earlier one (4.57, and 5.16 for DINOv2), an attention module contains a
"self-attention" and its output layer, and the SwiGLU layer has one linear layer for gate and value.

Legend: B samples of N tokens of width C; H heads of width D.
"""

from __future__ import annotations

import inspect
from typing import Any, ClassVar

from torch import Tensor, nn

from dinov2_kernels._modules import is_unwatched
from dinov2_kernels.attention import varlen_attention
from dinov2_kernels.integrations.blocks import (
    DROPPED_IN_TRAINING,
    AcceleratedBlock,
    ResidualBranch,
    add_branches,
    drop_rate,
    in_use,
)
from dinov2_kernels.integrations.swap import Accelerated, forward_name, forward_of
from dinov2_kernels.nn.fused_mlp import SWIGLU, fused_mlp
from dinov2_kernels.packing import PackedLayout

DINOV2 = {"dinov2": "Dinov2", "dinov2_with_registers": "Dinov2WithRegisters"}
VIT = {"vit": "ViT", "deit": "DeiT", "vit_mae": "ViTMAE", "vit_msn": "ViTMSN", "ijepa": "IJepa"}


def _forwards(models: dict[str, str], kind: str) -> set[tuple[str, str]]:
    """Module and qualified name of the forward of each model's class of one kind, for instance "Layer"."""
    return {
        (f"transformers.models.{name}.modeling_{name}", f"{prefix}{kind}.forward") for name, prefix in models.items()
    }


ATTENTIONS = _forwards(DINOV2 | VIT, "Attention")
SELF_ATTENTIONS = _forwards(DINOV2 | VIT, "SelfAttention")
DINOV2_LAYERS = _forwards(DINOV2, "Layer")
VIT_LAYERS = _forwards(VIT, "Layer")
SWIGLUS = _forwards(DINOV2, "SwiGLUFFN")


class Transformers(Accelerated):
    """Base of the classes below."""

    @classmethod
    def obstacle(cls, module: nn.Module) -> str | None:
        if "output_attentions" in inspect.signature(forward_of(module)).parameters:
            return "a version that passes attention weights from layer to layer"
        return super().obstacle(module)


class SelfAttention(Transformers):
    """Three linear layers and the attention itself, for every attention implementation that a model may configure."""

    runs_on = "varlen_attention"
    parts: ClassVar[tuple[str, ...]] = (
        "query",
        "key",
        "value",
        "attention_head_size",
        "scaling",
        "dropout_prob",
        "config",
    )
    scaling: float
    config: Any

    @classmethod
    def recognises(cls, module: nn.Module) -> bool:
        return forward_name(module) in SELF_ATTENTIONS

    def restriction(self) -> str:
        return DROPPED_IN_TRAINING if self._dropout() else ""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        """hidden_states: [B, N, C]; transformers' own forward serves masks, and weights that are read or dropped."""
        if _has_mask(args, kwargs) or (self.training and self._dropout()) or self._weights_are_read():
            result: tuple[Tensor, Tensor | None] = super().forward(hidden_states, *args, **kwargs)
            return result
        layout = PackedLayout([(hidden_states.shape[0], hidden_states.shape[1])])
        tokens = hidden_states.flatten(0, 1)  # [B N, C]
        q, k, v = (projection(tokens).unflatten(1, (-1, self._head_dim())) for projection in self._projections())
        y = varlen_attention(q, k, v, layout, scale=self.scaling)  # [B N, H, D]
        return self._output(layout.unpack(y.flatten(1))[0]), None

    def _weights_are_read(self) -> bool:
        """Whether weights are read: only eager attention returns them, and a hook or another forward records them."""
        return self.config._attn_implementation == "eager" and not is_unwatched(self)

    def _projections(self) -> tuple[Any, Any, Any]:
        return self.query, self.key, self.value

    def _head_dim(self) -> Any:
        return self.attention_head_size

    def _dropout(self) -> Any:
        return self.dropout_prob

    def _output(self, y: Tensor) -> Tensor:
        return y


class Attention(SelfAttention):
    """The attention of the later generation, which includes the output's linear layer."""

    parts = ("q_proj", "k_proj", "v_proj", "o_proj", "head_dim", "scaling", "attention_dropout", "config")
    o_proj: nn.Module

    @classmethod
    def recognises(cls, module: nn.Module) -> bool:
        return forward_name(module) in ATTENTIONS and not hasattr(module, "attention")  # the earlier generation has it

    def _projections(self) -> tuple[Any, Any, Any]:
        return self.q_proj, self.k_proj, self.v_proj

    def _head_dim(self) -> Any:
        return self.head_dim

    def _dropout(self) -> Any:
        return self.attention_dropout

    def _output(self, y: Tensor) -> Tensor:
        projected: Tensor = self.o_proj(y)
        return projected


class Dinov2Layer(AcceleratedBlock, Transformers):
    """The block of DINOv2: one DropPath for both branches."""

    parts = ("norm1", "attention", "layer_scale1", "drop_path", "norm2", "mlp", "layer_scale2")
    scales = ("layer_scale1", "layer_scale2")
    drop_paths = ("drop_path",)
    norm1: nn.Module
    attention: nn.Module
    layer_scale1: nn.Module
    drop_path: nn.Module
    norm2: nn.Module
    mlp: nn.Module
    layer_scale2: nn.Module

    @classmethod
    def recognises(cls, module: nn.Module) -> bool:
        return forward_name(module) in DINOV2_LAYERS

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """hidden_states: [B, N, C]."""
        if _has_mask(args, kwargs) or not self.can_fuse(hidden_states):
            result: Tensor = super().forward(hidden_states, *args, **kwargs)
            return result

        def attend(x: Tensor) -> Tensor:
            attended: Any = self.attention(x, **kwargs)  # in the later generation, a tuple with the weights
            y: Tensor = attended[0] if isinstance(attended, tuple) else attended
            return y

        rate = drop_rate(self.drop_path)
        attention = ResidualBranch(attend, self.norm1, self.layer_scale1, rate)
        return add_branches(hidden_states, [attention, ResidualBranch(self.mlp, self.norm2, self.layer_scale2, rate)])


class ViTLayer(AcceleratedBlock, Transformers):
    """The block of ViT and similar models, in the later generation: no LayerScale, no stochastic depth."""

    parts = ("layernorm_before", "attention", "dropout", "layernorm_after", "mlp")
    layernorm_before: nn.Module
    attention: nn.Module
    dropout: nn.Module
    layernorm_after: nn.Module
    mlp: nn.Module

    @classmethod
    def recognises(cls, module: nn.Module) -> bool:
        return forward_name(module) in VIT_LAYERS

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """hidden_states: [B, N, C]."""

        def attend(x: Tensor) -> Tensor:
            y: Tensor = self.dropout(self.attention(x, *args, **kwargs)[0])
            return y

        def feed_forward(x: Tensor) -> Tensor:
            y: Tensor = self.dropout(self.mlp(x))
            return y

        branches = ResidualBranch(attend, self.layernorm_before), ResidualBranch(feed_forward, self.layernorm_after)
        return add_branches(hidden_states, branches)


class SwiGLU(Transformers):
    """The feed-forward layer of ViT-g, in the earlier generation."""

    runs_on = "swiglu"
    parts = ("weights_in", "weights_out")
    weights_in: nn.Module
    weights_out: nn.Module

    @classmethod
    def recognises(cls, module: nn.Module) -> bool:
        return forward_name(module) in SWIGLUS and hasattr(module, "weights_in")

    def forward(self, hidden_state: Tensor) -> Tensor:
        """hidden_state: [..., C]; returns the same shape."""
        return fused_mlp(self.weights_in, SWIGLU, self.weights_out, hidden_state)


def _has_mask(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a call has a mask, of tokens (later generation) or of heads (versions of the earlier one)."""
    return in_use(*args, kwargs.get("attention_mask"), kwargs.get("head_mask"))
