"""The vision transformer: known values, packing, masks, outputs, initial values, bad input."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from dinov2.models import VisionTransformer, ViTConfig, vit_base, vit_giant2, vit_large, vit_small

TinyViT = Callable[..., VisionTransformer]


def wave(*shape: int, scale: float = 1.0) -> Tensor:
    """sin(1.7 n + 0.3) over the elements n: values that need no random generator."""
    n = torch.arange(math.prod(shape), dtype=torch.float64)
    return (torch.sin(1.7 * n + 0.3) * scale).float().view(shape)


@pytest.mark.parametrize(
    ("size", "interpolation", "class_token", "patch_sum"),
    [
        ((56, 56), (0.0, True), [0.4393, 0.33993, 0.013395, -1.201278], 426.14999),
        ((70, 42), (0.1, False), [0.422647, 0.270753, 0.077661, -1.167339], 390.81509),
        ((70, 42), (0.0, True), [0.43291, 0.267426, 0.072199, -1.159901], 390.35184),
    ],
)
def test_values_of_the_original(
    tiny_vit: TinyViT,
    size: tuple[int, int],
    interpolation: tuple[float, bool],
    class_token: list[float],
    patch_sum: float,
) -> None:
    offset, antialias = interpolation
    model = tiny_vit(ffn="swiglu", init_values=1.0, interpolate_offset=offset, interpolate_antialias=antialias)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            shift = 1.0 if name.endswith("gamma") or ("norm" in name and name.endswith("weight")) else 0.0
            parameter.copy_(wave(*parameter.shape, scale=0.05) + shift)
        features = model.forward_features(wave(1, 3, *size))
    torch.testing.assert_close(features["x_norm_clstoken"][0, :4], torch.tensor(class_token), rtol=0, atol=2e-6)
    assert features["x_norm_patchtokens"].abs().sum().item() == pytest.approx(patch_sum, rel=1e-6)


@pytest.mark.parametrize(
    ("build", "parameters"),
    [
        (vit_small, 22_056_576),
        (vit_base, 86_580_480),
        (vit_large, 304_368_640),
        (vit_giant2, 1_136_480_768),
    ],
)
def test_number_of_parameters(build: Callable[..., VisionTransformer], parameters: int) -> None:
    with torch.device("meta"):
        model = build(img_size=518)
        with_registers = build(img_size=518, num_register_tokens=4)
    assert sum(p.numel() for p in model.parameters()) == parameters
    registers = 4 * model.config.embed_dim
    assert sum(p.numel() for p in with_registers.parameters()) == parameters + registers


def test_parameter_names(tiny_vit: TinyViT) -> None:
    norms = [f"norm{i}.{p}" for i in (1, 2) for p in ("weight", "bias")]
    linears = [f"{layer}.{p}" for layer in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2") for p in ("weight", "bias")]
    block = [*norms, *linears, "ls1.gamma", "ls2.gamma"]
    tokens = ["cls_token", "pos_embed", "register_tokens", "mask_token"]
    outside = [*tokens, "patch_embed.proj.weight", "patch_embed.proj.bias", "norm.weight", "norm.bias"]
    expected = {*outside, *(f"blocks.{i}.{name}" for i in (0, 1) for name in block)}
    assert set(tiny_vit(num_register_tokens=3).state_dict()) == expected

    without = set(tiny_vit(init_values=None, ffn="swiglu").state_dict())
    assert "register_tokens" not in without
    assert not any("ls1" in name or "ls2" in name for name in without)
    assert {"blocks.1.mlp.w12.weight", "blocks.1.mlp.w3.bias"} <= without


@pytest.mark.parametrize("fields", [{}, {"num_register_tokens": 2, "ffn": "swiglu"}], ids=str)
def test_packed_equals_separate(tiny_vit: TinyViT, fields: dict[str, Any]) -> None:
    model = tiny_vit(**fields).double()
    batches = [torch.randn(4, 3, 56, 56).double(), torch.randn(3, 3, 28, 42).double()]
    masks = [torch.rand(4, 16) < 0.4, None]
    packed = model.forward_features(batches, masks)
    separate = [model.forward_features(x, mask) for x, mask in zip(batches, masks, strict=True)]
    torch.testing.assert_close(packed, separate)

    def gradients(features: list[dict[str, Tensor]]) -> tuple[Tensor, ...]:
        total = sum(value.square().sum() for batch in features for value in batch.values())
        return torch.autograd.grad(total, list(model.parameters()))

    torch.testing.assert_close(gradients(packed), gradients(separate))


def test_outputs(tiny_vit: TinyViT) -> None:
    model = tiny_vit(num_register_tokens=3)
    features = model.forward_features(torch.randn(2, 3, 28, 42))
    tokens = model.norm(features["x_prenorm"])
    assert tokens.shape == (2, 1 + 3 + 6, 32)
    torch.testing.assert_close(features["x_norm_clstoken"], tokens[:, 0])
    torch.testing.assert_close(features["x_norm_regtokens"], tokens[:, 1:4])
    torch.testing.assert_close(features["x_norm_patchtokens"], tokens[:, 4:])


def test_no_registers_are_an_empty_tensor(tiny_vit: TinyViT) -> None:
    features = tiny_vit().forward_features(torch.randn(2, 3, 28, 42))
    assert features["x_norm_regtokens"].shape == (2, 0, 32)


def test_forward_is_the_class_token(tiny_vit: TinyViT) -> None:
    model, x = tiny_vit(), torch.randn(2, 3, 56, 56)
    torch.testing.assert_close(model(x), model.forward_features(x)["x_norm_clstoken"])


def test_a_masked_patch_is_not_seen(tiny_vit: TinyViT) -> None:
    model = tiny_vit()
    x = torch.randn(2, 3, 56, 56)
    mask = torch.zeros(2, 16, dtype=torch.bool)
    mask[0, 5] = True  # row 1, column 1 of the first image
    changed = x.clone()
    changed[0, :, 14:28, 14:28] = 9.0
    torch.testing.assert_close(model.forward_features(changed, mask), model.forward_features(x, mask))
    assert not torch.allclose(model(changed), model(x))


def test_intermediate_layers(tiny_vit: TinyViT) -> None:
    model = tiny_vit(depth=3, num_register_tokens=2)
    x = torch.randn(2, 3, 28, 42)
    last = model.forward_features(x)
    (patches,) = model.get_intermediate_layers(x)
    torch.testing.assert_close(patches, last["x_norm_patchtokens"])
    ((patches, class_token),) = model.get_intermediate_layers(x, n=[2], return_class_token=True, norm=False)
    torch.testing.assert_close(patches, last["x_prenorm"][:, 3:])
    torch.testing.assert_close(class_token, last["x_prenorm"][:, 0])

    shorter = tiny_vit(depth=1, num_register_tokens=2)
    shorter.load_state_dict({k: v for k, v in model.state_dict().items() if k in shorter.state_dict()})
    first, second = model.get_intermediate_layers(x, n=[0, 2])
    torch.testing.assert_close(first, shorter.forward_features(x)["x_norm_patchtokens"])
    torch.testing.assert_close(second, last["x_norm_patchtokens"])
    assert len(model.get_intermediate_layers(x, n=3)) == 3


def test_no_block_runs_behind_the_last_one_that_is_wanted(tiny_vit: TinyViT) -> None:
    model, ran = tiny_vit(depth=3), []
    for index, block in enumerate(model.blocks):
        block.register_forward_hook(lambda *_, index=index: ran.append(index))
    model.get_intermediate_layers(torch.randn(1, 3, 28, 28), n=[1, 0, 1])
    assert ran == [0, 1]


def test_outputs_of_blocks_are_what_hooks_see(tiny_vit: TinyViT) -> None:
    model, x, seen = tiny_vit(depth=3), torch.randn(2, 3, 28, 28), []
    outputs = model.get_intermediate_layers(x, n=3, norm=False)
    for block in model.blocks:
        block.register_forward_hook(lambda _, __, output: seen.append(output.view(2, 5, 32)[:, 1:]))
    assert all(map(torch.equal, outputs, model.get_intermediate_layers(x, n=3, norm=False)))
    assert all(map(torch.equal, outputs, seen))


def test_intermediate_layers_as_maps(tiny_vit: TinyViT) -> None:
    model = tiny_vit()
    x = torch.randn(2, 3, 28, 42)
    (patches,), (maps,) = model.get_intermediate_layers(x), model.get_intermediate_layers(x, reshape=True)
    assert isinstance(maps, Tensor)
    assert maps.shape == (2, 32, 2, 3)
    torch.testing.assert_close(maps[:, :, 1, 2], patches[:, 5])  # type: ignore[call-overload]


def test_initial_values() -> None:
    torch.manual_seed(0)
    model = VisionTransformer(ViTConfig(embed_dim=192, depth=1, num_heads=3, num_register_tokens=4))
    block = model.blocks[0]
    for weight in (block.attn.qkv.weight, block.mlp.fc2.weight, model.pos_embed):
        assert weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert block.attn.qkv.bias.eq(0).all()
    assert model.mask_token.eq(0).all()
    assert block.ls1.gamma.eq(1e-5).all()
    for token in (model.cls_token, model.register_tokens):
        assert 1e-7 < token.std().item() < 3e-6
    bound = 1 / math.sqrt(3 * 14 * 14)  # the default of nn.Conv2d: uniform
    assert 0.95 * bound < model.patch_embed.proj.weight.abs().max() <= bound
    assert model.norm.weight.eq(1).all()


def test_a_model_on_the_meta_device_gets_its_values_later() -> None:
    with torch.device("meta"):
        model = VisionTransformer(ViTConfig(embed_dim=64, depth=1, num_heads=1, num_register_tokens=1))
    model.to_empty(device="cpu")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(torch.nan)
    model.init_weights()
    assert all(parameter.isfinite().all() for parameter in model.parameters())


@pytest.mark.parametrize(("uniform", "rates"), [(True, [0.3, 0.3, 0.3, 0.3]), (False, [0.0, 0.1, 0.2, 0.3])])
def test_drop_path_rates(tiny_vit: TinyViT, uniform: bool, rates: list[float]) -> None:
    model = tiny_vit(depth=4, drop_path_rate=0.3, drop_path_uniform=uniform)
    assert [block.drop_path for block in model.blocks] == pytest.approx(rates)


def test_trains_with_bfloat16_autocast(tiny_vit: TinyViT) -> None:
    model = tiny_vit(drop_path_rate=0.3).train()
    with torch.autocast("cpu", torch.bfloat16):
        features = model.forward_features([torch.randn(4, 3, 56, 56), torch.randn(4, 3, 28, 28)])
    assert features[0]["x_prenorm"].dtype == torch.float32
    sum(batch["x_norm_patchtokens"].sum() for batch in features).backward()
    assert model.pos_embed.grad is not None
    assert model.pos_embed.grad.isfinite().all()


def test_compiles_in_one_graph(tiny_vit: TinyViT) -> None:
    model = tiny_vit(depth=1)
    x = [torch.randn(2, 3, 56, 56), torch.randn(3, 3, 28, 28)]
    compiled = torch.compile(model.forward_features, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x), model.forward_features(x))


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((2, 3, 56, 60), "expected height and width that are multiples of the patch size 14, got 56 x 60"),
        ((2, 1, 56, 56), r"images: expected shape \[B, 3, H, W\], got \[2, 1, 56, 56\]"),
        ((3, 56, 56), r"images: expected shape \[B, 3, H, W\], got \[3, 56, 56\]"),
    ],
)
def test_bad_images(tiny_vit: TinyViT, shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny_vit()(torch.zeros(shape))


def test_bad_masks(tiny_vit: TinyViT) -> None:
    model, x = tiny_vit(), torch.zeros(2, 3, 56, 56)
    with pytest.raises(ValueError, match=r"masks: expected torch.bool \[2, 16\].*, got torch.bool \[2, 9\]"):
        model.forward_features(x, torch.zeros(2, 9, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"masks: expected torch.bool \[2, 16\].*, got torch.int64 \[2, 16\]"):
        model.forward_features(x, torch.zeros(2, 16, dtype=torch.int64))
    with pytest.raises(ValueError, match="masks: expected one for each of the 2 batches of x, got 1"):
        model.forward_features([x, x], [None])


@pytest.mark.parametrize("n", [0, 3, [2], [-1]], ids=str)
def test_bad_layers(tiny_vit: TinyViT, n: Any) -> None:
    with pytest.raises(ValueError, match="n: expected 1 to 2 blocks or indices from 0 to 1, got"):
        tiny_vit().get_intermediate_layers(torch.zeros(1, 3, 56, 56), n=n)
