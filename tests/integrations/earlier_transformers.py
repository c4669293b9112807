"""transformers' DINOv2 of versions 4.57 to 5.16 in miniature: classes, attributes and behaviour of its layers."""

from __future__ import annotations

from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__name__ = "transformers.models.dinov2.modeling_dinov2"  # what is defined below then says that it is from there


class Dinov2SelfAttention(nn.Module):
    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.config = SimpleNamespace(_attn_implementation="eager")
        self.num_attention_heads = num_heads
        self.attention_head_size = dim // num_heads
        self.dropout_prob = 0.0
        self.scaling = self.attention_head_size**-0.5
        self.query, self.key, self.value = (nn.Linear(dim, dim) for _ in range(3))

    def forward(self, hidden_states: Tensor, head_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        projections = self.query(hidden_states), self.key(hidden_states), self.value(hidden_states)
        q, k, v = (y.unflatten(-1, (self.num_attention_heads, -1)).transpose(1, 2) for y in projections)  # [B, H, N, D]
        weights = (q @ k.mT * self.scaling).softmax(dim=-1)
        weights = weights if head_mask is None else weights * head_mask
        return (weights @ v).transpose(1, 2).flatten(2), weights


class Dinov2SelfOutput(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dense, self.dropout = nn.Linear(dim, dim), nn.Dropout(0.0)

    def forward(self, hidden_states: Tensor, input_tensor: Tensor) -> Tensor:
        return self.dropout(self.dense(hidden_states))


class Dinov2Attention(nn.Module):
    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.attention, self.output = Dinov2SelfAttention(dim, num_heads), Dinov2SelfOutput(dim)

    def forward(self, hidden_states: Tensor, head_mask: Tensor | None = None) -> Tensor:
        return self.output(self.attention(hidden_states, head_mask)[0], hidden_states)


class Dinov2LayerScale(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.lambda1 = nn.Parameter(torch.ones(dim))

    def forward(self, hidden_state: Tensor) -> Tensor:
        return hidden_state * self.lambda1


class Dinov2SwiGLUFFN(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weights_in, self.weights_out = nn.Linear(dim, 6 * dim), nn.Linear(3 * dim, dim)

    def forward(self, hidden_state: Tensor) -> Tensor:
        x1, x2 = self.weights_in(hidden_state).chunk(2, dim=-1)
        return self.weights_out(F.silu(x1) * x2)


class Dinov2Layer(nn.Module):
    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attention = Dinov2Attention(dim, num_heads)
        self.layer_scale1, self.layer_scale2 = Dinov2LayerScale(dim), Dinov2LayerScale(dim)
        self.drop_path = nn.Identity()
        self.mlp = Dinov2SwiGLUFFN(dim)

    def forward(self, hidden_states: Tensor, head_mask: Tensor | None = None) -> Tensor:
        attended = self.layer_scale1(self.attention(self.norm1(hidden_states), head_mask))
        hidden_states = self.drop_path(attended) + hidden_states
        return self.drop_path(self.layer_scale2(self.mlp(self.norm2(hidden_states)))) + hidden_states


class Dinov2Model(nn.Module):
    def __init__(self, dim: int = 48, depth: int = 2, num_heads: int = 4) -> None:
        super().__init__()
        self.embeddings = nn.Conv2d(3, dim, kernel_size=14, stride=14)
        self.layer = nn.ModuleList(Dinov2Layer(dim, num_heads) for _ in range(depth))

    def forward_features(self, pixel_values: Tensor, head_mask: Tensor | None = None) -> Tensor:
        x = self.embeddings(pixel_values).flatten(2).mT
        for layer in self.layer:
            x = layer(x, head_mask)
        return x
