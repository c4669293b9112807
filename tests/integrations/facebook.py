"""facebook's DINOv2 in miniature: the classes, attributes and behaviour of its layers without xFormers."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Attention(nn.Module):
    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.scale = (dim // num_heads) ** -0.5
        self.qkv = nn.Linear(dim, 3 * dim)
        self.attn_drop = nn.Dropout(0.0)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(0.0)

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, -1))  # [B, N, 3, H, D]
        q, k, v = (y.transpose(1, 2) for y in qkv.unbind(2))  # [B, H, N, D]
        weights = self.attn_drop((q * self.scale @ k.transpose(-2, -1)).softmax(dim=-1))
        return self.proj_drop(self.proj((weights @ v).transpose(1, 2).flatten(2)))


class MemEffAttention(Attention):
    def forward(self, x: Tensor, attn_bias: object = None) -> Tensor:
        assert attn_bias is None, "xFormers is required for using nested tensors"
        return super().forward(x)


class LayerScale(nn.Module):
    def __init__(self, dim: int, init_values: float) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((dim,), init_values))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class DropPath(nn.Module):
    def __init__(self, drop_prob: float) -> None:
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        return x * torch.bernoulli(x.new_full((len(x), 1, 1), 1 - self.drop_prob)) / (1 - self.drop_prob)


class Mlp(nn.Module):
    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1, self.act, self.fc2 = nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


class SwiGLUFFN(nn.Module):
    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.w12, self.w3 = nn.Linear(dim, 2 * hidden), nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        x1, x2 = self.w12(x).chunk(2, dim=-1)
        return self.w3(F.silu(x1) * x2)


class SwiGLUFFNFused(SwiGLUFFN):
    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__(dim, (hidden * 2 // 3 + 7) // 8 * 8)


class Block(nn.Module):
    def __init__(self, dim: int, num_heads: int, drop_path: float, ffn: type[nn.Module]) -> None:
        super().__init__()
        norm = partial(nn.LayerNorm, eps=1e-6)
        self.norm1 = norm(dim)
        self.attn = MemEffAttention(dim, num_heads)
        self.ls1 = LayerScale(dim, 1e-5)
        self.drop_path1 = DropPath(drop_path) if drop_path else nn.Identity()
        self.norm2 = norm(dim)
        self.mlp = ffn(dim, 4 * dim)
        self.ls2 = LayerScale(dim, 1e-5)
        self.drop_path2 = DropPath(drop_path) if drop_path else nn.Identity()
        self.sample_drop_ratio = drop_path

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path1(self.ls1(self.attn(self.norm1(x))))
        return x + self.drop_path1(self.ls2(self.mlp(self.norm2(x))))


class NestedTensorBlock(Block):
    def forward(self, x_or_x_list: Tensor | list[Tensor]) -> Tensor:
        assert isinstance(x_or_x_list, Tensor), "xFormers is required for using nested tensors"
        return super().forward(x_or_x_list)


class BlockChunk(nn.ModuleList):
    def forward(self, x: Tensor | list[Tensor]) -> Tensor | list[Tensor]:
        for block in self:
            x = block(x)
        return x


class DinoVisionTransformer(nn.Module):
    def __init__(
        self,
        embed_dim: int = 48,
        depth: int = 2,
        num_heads: int = 4,
        drop_path_rate: float = 0.0,
        ffn_layer: str = "mlp",
        block_chunks: int = 0,
    ) -> None:
        super().__init__()
        self.patch_embed = nn.Conv2d(3, embed_dim, kernel_size=14, stride=14)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, 17, embed_dim))
        ffn = Mlp if ffn_layer == "mlp" else SwiGLUFFNFused
        blocks = [NestedTensorBlock(embed_dim, num_heads, drop_path_rate, ffn) for _ in range(depth)]
        if block_chunks:  # a block's place in its chunk is its place in the model
            size = depth // block_chunks
            chunks = [[nn.Identity()] * i + blocks[i : i + size] for i in range(0, depth, size)]
            self.blocks = nn.ModuleList(BlockChunk(chunk) for chunk in chunks)
        else:
            self.blocks = nn.ModuleList(blocks)
        self.norm = nn.LayerNorm(embed_dim, eps=1e-6)
        self.head = nn.Identity()

    def prepare_tokens_with_masks(self, x: Tensor) -> Tensor:
        x = self.patch_embed(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], dim=1)
        return x + self.pos_embed[:, : x.shape[1]]

    def forward_features(self, x: Tensor | list[Tensor]) -> list[Tensor]:
        crops = x if isinstance(x, list) else [x]
        tokens = [self.prepare_tokens_with_masks(crop) for crop in crops]
        y: Tensor | list[Tensor] = tokens if isinstance(x, list) else tokens[0]
        for block in self.blocks:
            y = block(y)
        return [self.norm(crop) for crop in (y if isinstance(y, list) else [y])]

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.forward_features(x)[0][:, 0])
