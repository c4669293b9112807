"""transformers: DINOv2 with and without registers, and the ViTs that share one code: ViT, DeiT, MAE, MSN, I-JEPA.

transformers itself is never imported here: its classes are known by where their forward is defined.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from dinov2_kernels.attention import varlen_attention
from dinov2_kernels.integrations.blocks import DROPPED_IN_TRAINING, AcceleratedBlock, add_branch, drop_rate
from dinov2_kernels.integrations.swap import Accelerated, forward_name
from dinov2_kernels.packing import PackedLayout

DINOV2 = {"dinov2": "Dinov2", "dinov2_with_registers": "Dinov2WithRegisters"}
VIT = {"vit": "ViT", "deit": "DeiT", "vit_mae": "ViTMAE", "vit_msn": "ViTMSN", "ijepa": "IJepa"}


def _forwards(models: dict[str, str], kind: str) -> set[tuple[str, str]]:
    """Where the forward of every "Layer", for instance, is defined."""
    return {
        (f"transformers.models.{name}.modeling_{name}", f"{prefix}{kind}.forward") for name, prefix in models.items()
    }


ATTENTIONS = _forwards(DINOV2 | VIT, "Attention")
DINOV2_LAYERS = _forwards(DINOV2, "Layer")
VIT_LAYERS = _forwards(VIT, "Layer")


class TransformersAttention(Accelerated):
    """Self-attention with three linear layers, whatever attention implementation the model is configured for."""

    runs_on = "varlen_attention"
    parts = ("q_proj", "k_proj", "v_proj", "o_proj", "head_dim", "scaling", "attention_dropout", "config")
    q_proj: nn.Module
    k_proj: nn.Module
    v_proj: nn.Module
    o_proj: nn.Module
    head_dim: int
    scaling: float
    attention_dropout: float
    config: Any

    @classmethod
    def recognises(cls, module: nn.Module) -> bool:
        return forward_name(module) in ATTENTIONS

    def restriction(self) -> str:
        return DROPPED_IN_TRAINING if self.attention_dropout else ""

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """hidden_states: [B, N, C]; masks, wanted attention weights and their dropout are left to transformers."""
        drops = self.training and self.attention_dropout
        if attention_mask is not None or drops or wants_weights(self.config, kwargs):
            result: tuple[Tensor, Tensor | None] = super().forward(hidden_states, attention_mask, **kwargs)
            return result
        layout = PackedLayout([(hidden_states.shape[0], hidden_states.shape[1])])
        tokens = hidden_states.flatten(0, 1)  # [B N, C]
        q, k, v = (
            projection(tokens).unflatten(1, (-1, self.head_dim))  # [B N, H, D]
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        y = varlen_attention(q, k, v, layout, scale=self.scaling).flatten(1)
        return self.o_proj(y).unflatten(0, hidden_states.shape[:2]), None


class Dinov2Layer(AcceleratedBlock):
    """The block of DINOv2: one DropPath for both branches."""

    parts = ("norm1", "attention.q_proj", "layer_scale1", "drop_path", "norm2", "mlp", "layer_scale2")
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

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor:
        """hidden_states: [B, N, C]."""
        if (
            attention_mask is not None
            or wants_weights(self.attention.config, kwargs)
            or not self.can_fuse(hidden_states)
        ):
            result: Tensor = super().forward(hidden_states, attention_mask, **kwargs)
            return result

        def attend(x: Tensor) -> Tensor:
            attended: Tensor = self.attention(x, **kwargs)[0]
            return attended

        rate = drop_rate(self.drop_path)
        hidden_states = add_branch(hidden_states, attend, self.norm1, self.layer_scale1, rate)
        return add_branch(hidden_states, self.mlp, self.norm2, self.layer_scale2, rate)


class ViTLayer(AcceleratedBlock):
    """The block of ViT and its relatives: no LayerScale, no stochastic depth."""

    parts = ("layernorm_before", "attention.q_proj", "dropout", "layernorm_after", "mlp")
    layernorm_before: nn.Module
    attention: nn.Module
    dropout: nn.Module
    layernorm_after: nn.Module
    mlp: nn.Module

    @classmethod
    def recognises(cls, module: nn.Module) -> bool:
        return forward_name(module) in VIT_LAYERS

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor:
        """hidden_states: [B, N, C]."""

        def attend(x: Tensor) -> Tensor:
            attended: Tensor = self.dropout(self.attention(x, attention_mask, **kwargs)[0])
            return attended

        def feed_forward(x: Tensor) -> Tensor:
            y: Tensor = self.dropout(self.mlp(x))
            return y

        hidden_states = add_branch(hidden_states, attend, self.layernorm_before)
        return add_branch(hidden_states, feed_forward, self.layernorm_after)


def wants_weights(config: Any, kwargs: dict[str, Any]) -> bool:
    """Whether the caller asked for attention weights, which the kernels never store."""
    return bool(kwargs.get("output_attentions", getattr(config, "output_attentions", False)))
