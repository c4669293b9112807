"""Initial values of the parameters, as DINOv2 draws them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from dinov2_kernels.nn import LayerScale

if TYPE_CHECKING:
    from dinov2.models.vision_transformer import VisionTransformer


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
    """Truncated normal weights of standard deviation 0.02 and zero biases; leaves other modules alone."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
