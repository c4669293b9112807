"""A class is known by what its forward computes: look-alikes by name keep their own forward, and are reported."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from timm.models import vision_transformer as timm_vit
from torch import Tensor, nn
from transformers.models.dinov2 import modeling_dinov2

from dinov2_kernels.integrations import accelerate, report
from tests.integrations import facebook
from tests.integrations.models import dinov2, images, of_timm, operators_used, output, randomised


class GatedLayerScale(timm.layers.LayerScale):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * x.sigmoid()


def layer_scale_named_alike() -> type[nn.Module]:
    class LayerScale(nn.Module):
        """A project's own: with a shift."""

        def __init__(self, dim: int) -> None:
            super().__init__()
            self.gamma, self.beta = nn.Parameter(torch.ones(dim)), nn.Parameter(torch.ones(dim))

        def forward(self, x: Tensor) -> Tensor:
            return x * self.gamma + self.beta

    return LayerScale


class LayerScale(nn.Module):
    """Another name for what a LayerScale does, and its shift is 0 until somebody sets it."""

    shift = 0.0

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(dim))
        self.shift = 0.0

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma + self.shift


class SquaredLayerScale(timm.layers.LayerScale):
    """With the forward of its base, but another gamma."""

    def __getattr__(self, name: str) -> Any:
        value = super().__getattr__(name)
        return value.square() if name == "gamma" else value


class LoudDropPath(timm.layers.DropPath):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class ScheduledDropPath(timm.layers.DropPath):
    """Drops nothing, but scales in eval mode."""

    def forward(self, x: Tensor) -> Tensor:
        return x if self.training else x * 0.5


class CentredLayerNorm(timm.layers.LayerNorm):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) - 1


def replaced(name: str, make: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    def model() -> nn.Module:
        made = of_timm("vit_small_patch14_dinov2")
        for block in made.blocks:
            block.register_module(name, make())
        return made

    return model


def of_classes(**classes: type[nn.Module]) -> Callable[[], nn.Module]:
    return lambda: of_timm("vit_giant_patch14_reg4_dinov2", **classes)


class CausalAttention(timm.layers.Attention):
    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        return super().forward(x, attn_mask, is_causal=True)


class PostNormBlock(timm_vit.Block):
    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        x = x + self.ls1(self.norm1(self.attn(x)))
        return x + self.ls2(self.norm2(self.mlp(x)))


class Gelu(nn.SiLU):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.gelu(x)


def gate_named_alike(model: nn.Module) -> nn.Module:
    for block in model.blocks:
        block.mlp.act = Gelu()
    return model


def of_facebook(**parts: type[nn.Module]) -> Callable[[], nn.Module]:
    """facebook's model with classes of the same names and arguments, as copies in other projects have them."""

    def model() -> nn.Module:
        made = facebook.DinoVisionTransformer(ffn_layer="swiglu")
        for block in made.blocks:
            for name, cls in parts.items():
                part = block if name == "block" else getattr(block, name)
                part.__class__ = cls
        return made

    return model


def facebook_classes() -> dict[str, type[nn.Module]]:
    class Block(facebook.Block):
        """Post-norm."""

        def forward(self, x: Tensor) -> Tensor:
            x = x + self.ls1(self.norm1(self.attn(x)))
            return x + self.ls2(self.norm2(self.mlp(x)))

    class MemEffAttention(facebook.Attention):
        """Without a softmax."""

        def forward(self, x: Tensor, attn_bias: object = None) -> Tensor:
            q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
            return self.proj_drop(self.proj((self.attn_drop(q * self.scale @ k.mT) @ v).transpose(1, 2).flatten(2)))

    class SwiGLUFFN(facebook.SwiGLUFFN):
        """With the halves in the other order."""

        def forward(self, x: Tensor) -> Tensor:
            x1, x2 = self.w12(x).chunk(2, dim=-1)
            return self.w3(nn.functional.silu(x2) * x1)

    class LayerScale(facebook.LayerScale):
        def forward(self, x: Tensor) -> Tensor:
            return x * self.gamma.abs()

    classes = {"block": Block, "attn": MemEffAttention, "mlp": SwiGLUFFN, "ls1": LayerScale}
    for name, cls in classes.items():
        if name != "ls1":  # a copy defines its classes at the top of a file
            cls.__qualname__ = cls.__name__
            cls.forward.__code__ = cls.forward.__code__.replace(co_name="forward", **named(cls))
            cls.forward.__qualname__ = f"{cls.__name__}.forward"
    return classes


def named(cls: type[nn.Module]) -> dict[str, str]:
    return {"co_qualname": f"{cls.__name__}.forward"} if hasattr(cls.forward.__code__, "co_qualname") else {}


class SwappedLayer(modeling_dinov2.Dinov2Layer):
    def forward(self, hidden_states: Tensor, attention_mask: Any = None, **kwargs: Any) -> Tensor:
        hidden_states = hidden_states + self.layer_scale2(self.mlp(self.norm2(hidden_states)))
        return hidden_states + self.layer_scale1(self.attention(self.norm1(hidden_states))[0])


class NegativeLayerScale(modeling_dinov2.Dinov2LayerScale):
    def forward(self, hidden_state: Tensor) -> Tensor:
        return -super().forward(hidden_state)


class AttentionOfValues(modeling_dinov2.Dinov2Attention):
    def forward(self, hidden_states: Tensor, attention_mask: Any = None, **kwargs: Any) -> tuple[Tensor, None]:
        return self.o_proj(self.v_proj(hidden_states)), None


def of_transformers(**parts: type[nn.Module]) -> Callable[[], nn.Module]:
    def model() -> nn.Module:
        made = dinov2()
        for layer in made.encoder.layer:
            for name, cls in parts.items():
                (layer if name == "layer" else getattr(layer, name)).__class__ = cls
        return made

    return model


LOOK_ALIKES: dict[str, Callable[[], nn.Module]] = {
    "LayerScale with a gate": replaced("ls1", lambda: GatedLayerScale(48)),
    "LayerScale with a shift": replaced("ls2", lambda: layer_scale_named_alike()(48)),
    "LayerScale with a shift that is 0": replaced("ls2", lambda: LayerScale(48)),
    "LayerScale with another gamma": replaced("ls1", lambda: SquaredLayerScale(48)),
    "DropPath that doubles": replaced("drop_path1", lambda: LoudDropPath(0.0)),
    "DropPath that scales in eval mode": replaced("drop_path2", lambda: ScheduledDropPath(0.3)),
    "attention of timm": of_classes(attn_layer=CausalAttention),
    "block of timm": of_classes(block_fn=PostNormBlock),
    "activation of SwiGLU": lambda: gate_named_alike(of_timm("vit_giant_patch14_reg4_dinov2")),
    "block of facebook": of_facebook(block=facebook_classes()["block"]),
    "attention of facebook": of_facebook(attn=facebook_classes()["attn"]),
    "SwiGLU of facebook": of_facebook(mlp=facebook_classes()["mlp"]),
    "LayerScale of facebook": of_facebook(ls1=facebook_classes()["ls1"]),
    "layer of transformers": of_transformers(layer=SwappedLayer),
    "LayerScale of transformers": of_transformers(layer_scale1=NegativeLayerScale),
    "attention of transformers": of_transformers(attention=AttentionOfValues),
}


@pytest.mark.parametrize("make", [pytest.param(make, id=name) for name, make in LOOK_ALIKES.items()])
def test_look_alikes_keep_their_own_forward(make: Callable[[], nn.Module]) -> None:
    model = randomised(make())
    expected = output(model, images())
    torch.testing.assert_close(output(accelerate(model), images()), expected, atol=1e-5, rtol=1e-5)
    assert [len(row.names) for row in report(model).rows if row.status == "left"] == [2]  # one in each block


def test_norms_with_another_forward_are_called() -> None:
    model = randomised(replaced("norm1", lambda: CentredLayerNorm(48))())
    expected = output(model, images())
    torch.testing.assert_close(output(accelerate(model), images()), expected, atol=1e-5, rtol=1e-5)


def test_properties_that_the_forward_of_the_base_reads() -> None:
    class OfHalves(timm.layers.Attention):
        """Half of the heads, of twice the width."""

        num_heads = property(lambda self: self._heads // 2, lambda self, value: setattr(self, "_heads", value))
        head_dim = property(lambda self: 2 * self._width, lambda self, value: setattr(self, "_width", value))

    model = randomised(of_classes(attn_layer=OfHalves)())
    expected = output(model, images())
    torch.testing.assert_close(output(accelerate(model), images()), expected, atol=1e-5, rtol=1e-5)


def test_a_shift_that_is_set_later() -> None:
    model = accelerate(randomised(replaced("ls2", lambda: LayerScale(48))()))
    before = output(model, images())
    model.blocks[1].ls2.shift = torch.linspace(0, 1, 48)
    assert not torch.allclose(output(model, images()), before, atol=1e-2)


@pytest.mark.parametrize("name", ["block", "attn", "mlp"])
def test_the_report_names_look_alikes(name: str) -> None:
    model = of_facebook(**{name: facebook_classes()[name]})()
    rows = {row.kind: (row.status, row.detail) for row in report(accelerate(model)).rows}
    assert rows[facebook_classes()[name].__name__] == ("left", "its forward computes something else")


def test_subclasses_with_the_same_forward_are_swapped() -> None:
    """Their other methods do not count."""

    class MyLayerScale(timm.layers.LayerScale):
        def extra_repr(self) -> str:
            return "mine"

    class Scaling(nn.Module):
        """Has no name in common with a LayerScale."""

        def __init__(self) -> None:
            super().__init__()
            self.gamma = nn.Parameter(torch.ones(48))

        def forward(self, tokens: Tensor) -> Tensor:
            return self.gamma * tokens

    for make in (lambda: MyLayerScale(48), Scaling):
        model = randomised(replaced("ls1", make)())
        expected = output(model, images())
        accelerate(model)
        with operators_used() as used:
            torch.testing.assert_close(output(model, images()), expected, atol=1e-5, rtol=1e-5)
        assert "residual_scatter" in used


def test_a_decorated_forward_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    """Even if it has the name of the original and computes the same: it may record what it sees."""
    import functools

    seen: list[Tensor] = []
    original = timm_vit.Block.forward

    @functools.wraps(original)
    def forward(self: nn.Module, x: Tensor, **kwargs: Any) -> Tensor:
        seen.append(x)
        return original(self, x, **kwargs)

    monkeypatch.setattr(timm_vit.Block, "forward", forward)
    model = accelerate(of_timm("vit_small_patch14_dinov2"))
    model(images())
    assert len(seen) == 2


def test_trials_change_no_random_numbers_and_need_no_device() -> None:
    class Block(timm_vit.Block):
        """A class that no trial has seen yet."""

    class DropPath(timm.layers.DropPath):
        pass

    with torch.device("meta"):
        model = of_timm("vit_small_patch14_dinov2", block_fn=Block, drop_path_rate=0.1)
        model.blocks[1].drop_path1 = DropPath(0.1)
        state = torch.get_rng_state()
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
            accelerate(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert {row.kind: row.status for row in report(model).rows} == {"Block": "accelerated", "Attention": "accelerated"}
