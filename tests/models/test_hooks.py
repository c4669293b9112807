"""Hooks on the parts of a vision transformer."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from dinov2.models import VisionTransformer

TinyViT = Callable[..., VisionTransformer]


@pytest.mark.parametrize("arguments", [{"ffn": "mlp"}, {"ffn": "swiglu", "init_values": 1.0}], ids=str)
def test_hooks_of_every_part_fire(tiny_vit: TinyViT, arguments: dict[str, object]) -> None:
    model, seen = tiny_vit(**arguments), set()
    for module in model.modules():
        module.register_forward_hook(lambda module, *_: seen.add(module))
        module.register_full_backward_hook(lambda module, *_: seen.add((module, "backward")))
    model(torch.randn(2, 3, 28, 28, requires_grad=True)).sum().backward()
    silent = {type(module) for module in model.modules() if {module, (module, "backward")} - seen}
    assert silent <= {nn.ModuleList}


def test_a_convolution_that_does_more_is_called(tiny_vit: TinyViT) -> None:
    """It sees images [B, C, H, W]; its result, a map of tokens, may be changed."""
    model, images = tiny_vit().double(), torch.randn(2, 3, 28, 42, dtype=torch.float64)
    patches = model.patch_embed(images)
    handle = model.patch_embed.proj.register_forward_hook(lambda *_: None)
    torch.testing.assert_close(model.patch_embed(images), patches)
    handle.remove()
    shapes = []

    def double(_: nn.Module, args: tuple[Tensor, ...], result: Tensor) -> Tensor:
        shapes.append((args[0].shape, result.shape[2:]))
        return 2 * result

    model.patch_embed.proj.register_forward_hook(double)
    torch.testing.assert_close(model.patch_embed(images), 2 * patches)
    size = model.patch_embed.patch_size
    assert shapes == [((2, 3, 28, 42), (28 // size, 42 // size))]
