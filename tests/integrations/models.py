"""Tiny models of random weights, of every family that accelerate knows."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import timm
import torch
import transformers as hf
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from tests.integrations import earlier_transformers
from tests.integrations.facebook import DinoVisionTransformer

SIZES = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 56, "patch_size": 14}
WITHOUT_RATIO = SIZES | {"intermediate_size": 192}


def of_timm(name: str, **arguments: object) -> nn.Module:
    return timm.create_model(name, img_size=56, **{"depth": 2, "embed_dim": 48, "num_heads": 4, **arguments})


class GatedAttention(timm.layers.Attention):
    """A subclass with the forward of its base, which is all that counts."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        super().__init__(*args, gated=True, **kwargs)


def dinov2(**arguments: object) -> nn.Module:
    return hf.Dinov2Model(hf.Dinov2Config(**SIZES, **arguments))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "timm dinov2": lambda: of_timm("vit_small_patch14_dinov2"),
    "timm dinov2 with registers, SwiGLU": lambda: of_timm("vit_giant_patch14_reg4_dinov2"),
    "timm SigLIP": lambda: of_timm("vit_so400m_patch14_siglip_224"),
    "timm DeiT": lambda: of_timm("deit_tiny_distilled_patch16_224", patch_size=14),
    "timm DeiT3": lambda: of_timm("deit3_small_patch16_224", patch_size=14),
    "timm with norms of queries and keys": lambda: of_timm("vit_small_patch14_dinov2", qk_norm=True),
    "timm with norms of attention and SwiGLU": lambda: of_timm(
        "vit_giant_patch14_reg4_dinov2", scale_attn_norm=True, scale_mlp_norm=True
    ),
    "timm with gated attention": lambda: of_timm("vit_small_patch14_dinov2", attn_layer=GatedAttention),
    "transformers Dinov2Model": dinov2,
    "transformers Dinov2Model, SwiGLU": lambda: dinov2(use_swiglu_ffn=True),
    "transformers Dinov2WithRegistersModel": lambda: hf.Dinov2WithRegistersModel(hf.Dinov2WithRegistersConfig(**SIZES)),
    "transformers Dinov2ForImageClassification": lambda: hf.Dinov2ForImageClassification(hf.Dinov2Config(**SIZES)),
    "earlier transformers Dinov2Model": earlier_transformers.Dinov2Model,
    "transformers ViTModel": lambda: hf.ViTModel(hf.ViTConfig(**WITHOUT_RATIO)),
    "transformers ViTForImageClassification": lambda: hf.ViTForImageClassification(hf.ViTConfig(**WITHOUT_RATIO)),
    "transformers DeiTModel": lambda: hf.DeiTModel(hf.DeiTConfig(**WITHOUT_RATIO)),
    "transformers IJepaModel": lambda: hf.IJepaModel(hf.IJepaConfig(**WITHOUT_RATIO)),
    "transformers ViTMSNModel": lambda: hf.ViTMSNModel(hf.ViTMSNConfig(**WITHOUT_RATIO)),
    "facebook": DinoVisionTransformer,
    "facebook, SwiGLU": lambda: DinoVisionTransformer(ffn_layer="swiglu"),
    "facebook in chunks": lambda: DinoVisionTransformer(block_chunks=2),
}


def randomised(model: nn.Module) -> nn.Module:
    """The model in eval mode with weights under which every part of it matters, a LayerScale of 1e-5 included."""
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        is_factor = parameter.dim() == 1 and not name.endswith("bias")
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.data.copy_(1 + 0.2 * noise if is_factor else noise / parameter[0].numel() ** 0.5)
    return model.eval()


def images(count: int = 3) -> Tensor:
    return torch.randn(count, 3, 56, 56, generator=torch.Generator().manual_seed(2))


def output(model: nn.Module, *args: object) -> Tensor:
    """All that a model returns about its images as one tensor."""
    if hasattr(model, "forward_features"):
        features = model.forward_features(*args)
        return features[0] if isinstance(features, list) else features
    result = model(*args)
    return result.last_hidden_state if "last_hidden_state" in result else result.logits


def gradients(model: nn.Module, *args: object) -> dict[str, Tensor]:
    """Gradients of every parameter, for a loss that weighs the outputs differently."""
    model.zero_grad()
    y = output(model, *args)
    weights = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)
    (y * weights).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


class operators_used(TorchDispatchMode):
    """Collects the names of this library's operators that run."""

    def __enter__(self) -> set[str]:
        super().__enter__()
        self.names: set[str] = set()
        return self.names

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if func.namespace == "dinov2_kernels":
            self.names.add(func._opname)
        return func(*args, **(kwargs or {}))


def blocks_of(model: nn.Module) -> Iterator[nn.Module]:
    """Its transformer blocks, whatever the library calls them."""
    return (m for m in model.modules() if type(m).__name__.endswith(("Block", "Layer")))
