"""What changes a model after it was accelerated takes effect: other parts, settings and forwards, from outside."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

from dinov2_kernels.integrations import accelerate
from tests.integrations.models import images, of_timm, operators_used, output, randomised


def change_class(patch: pytest.MonkeyPatch, cls: type[nn.Module]) -> None:
    forward = cls.forward
    patch.setattr(cls, "forward", lambda self, x, *args, **kwargs: 0.5 * forward(self, x, *args, **kwargs))


class Half(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 0.5 * x


def changed_layer_norm(model: nn.Module, patch: pytest.MonkeyPatch) -> None:
    change_class(patch, nn.LayerNorm)


def changed_layer_norm_of_timm(model: nn.Module, patch: pytest.MonkeyPatch) -> None:
    change_class(patch, timm.layers.LayerNorm)


def changed_layer_scale(model: nn.Module, patch: pytest.MonkeyPatch) -> None:
    change_class(patch, timm.layers.LayerScale)


def changed_linear(model: nn.Module, patch: pytest.MonkeyPatch) -> None:
    change_class(patch, nn.Linear)


def changed_activation(model: nn.Module, patch: pytest.MonkeyPatch) -> None:
    change_class(patch, nn.SiLU)


def changed_identity(model: nn.Module, patch: pytest.MonkeyPatch) -> None:
    change_class(patch, nn.Identity)


def changed_block(model: nn.Module, patch: pytest.MonkeyPatch) -> None:
    change_class(patch, timm.models.vision_transformer.Block)


def changed_attention(model: nn.Module, patch: pytest.MonkeyPatch) -> None:
    change_class(patch, timm.layers.Attention)


def changed_swiglu(model: nn.Module, patch: pytest.MonkeyPatch) -> None:
    change_class(patch, timm.layers.GluMlp)


def changed_call(model: nn.Module, patch: pytest.MonkeyPatch) -> None:
    call = nn.Module.__call__
    halved = (nn.Identity, nn.LayerNorm, nn.SiLU, timm.layers.LayerScale)
    patch.setattr(
        nn.Module,
        "__call__",
        lambda self, *args, **kwargs: call(self, *args, **kwargs) * (0.5 if isinstance(self, halved) else 1.0),
    )


def changed_sdpa(model: nn.Module, patch: pytest.MonkeyPatch) -> None:
    sdpa = F.scaled_dot_product_attention
    patch.setattr(F, "scaled_dot_product_attention", lambda *args, **kwargs: 0.5 * sdpa(*args, **kwargs))


def parametrized(model: nn.Module, patch: pytest.MonkeyPatch) -> None:
    block = model.blocks[1]
    for part in (block.attn.qkv, block.mlp.fc1, block.mlp.fc2, block.norm1, block.ls1):
        name = "weight" if hasattr(part, "weight") else "gamma"
        torch.nn.utils.parametrize.register_parametrization(part, name, Half())


def weight_norm(model: nn.Module, patch: pytest.MonkeyPatch) -> None:
    for linear in (model.blocks[1].attn.proj, model.blocks[1].mlp.fc1):
        parametrizations.weight_norm(linear)
        linear.parametrizations.weight.original0.data.mul_(0.5)


def pruned(model: nn.Module, patch: pytest.MonkeyPatch) -> None:
    block = model.blocks[1]
    for part, name in (
        (block.attn.qkv, "weight"),
        (block.mlp.fc2, "weight"),
        (block.norm2, "weight"),
        (block.ls2, "gamma"),
    ):
        prune.l1_unstructured(part, name, 0.5)


def other_eps(model: nn.Module, patch: pytest.MonkeyPatch) -> None:
    model.blocks[1].norm1.eps = 1.0


def fast_norm(model: nn.Module, patch: pytest.MonkeyPatch) -> None:
    model.blocks[1].norm1._fast_norm = True
    patch.setattr(timm.layers.norm, "fast_layer_norm", lambda x, *_: 0.5 * x)


def other_scale(model: nn.Module, patch: pytest.MonkeyPatch) -> None:
    for block in model.blocks:
        block.attn.fused_attn, block.attn.scale = False, 3.0


def scale_that_fused_attention_ignores(model: nn.Module, patch: pytest.MonkeyPatch) -> None:
    model.blocks[1].attn.scale = 3.0


def factor_for_all_channels(model: nn.Module, patch: pytest.MonkeyPatch) -> None:
    model.blocks[1].ls1.gamma = nn.Parameter(torch.tensor([0.3]))


def factors_of_tokens(model: nn.Module, patch: pytest.MonkeyPatch) -> None:
    model.blocks[1].ls2.gamma = nn.Parameter(torch.linspace(0, 1, 21)[:, None])


def factors_in_float64(model: nn.Module, patch: pytest.MonkeyPatch) -> None:
    model.blocks[-1].ls2.gamma = nn.Parameter(model.blocks[-1].ls2.gamma.double())
    model.norm.double()


def norm_of_tokens_and_channels(model: nn.Module, patch: pytest.MonkeyPatch) -> None:
    model.blocks[1].norm1 = nn.LayerNorm((21, 48))


def norm_that_reads_the_place_of_a_token(model: nn.Module, patch: pytest.MonkeyPatch) -> None:
    class OfPlaces(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * torch.linspace(0, 1, x.shape[1])[:, None]

    model.blocks[1].norm2 = OfPlaces()


def norm_of_queries_that_reads_their_head(model: nn.Module, patch: pytest.MonkeyPatch) -> None:
    class OfHeads(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * torch.linspace(0, 1, x.shape[1])[:, None, None]

    model.blocks[1].attn.q_norm = OfHeads()


def norm_of_queries_of_all_tokens(model: nn.Module, patch: pytest.MonkeyPatch) -> None:
    model.blocks[1].attn.q_norm = nn.LayerNorm((21, 12))


def norms_of_queries_and_keys_by_rms(model: nn.Module, patch: pytest.MonkeyPatch) -> None:
    model.blocks[1].attn.q_norm, model.blocks[1].attn.k_norm = nn.RMSNorm(12), timm.layers.RmsNorm(12)


def identity_with_another_forward(model: nn.Module, patch: pytest.MonkeyPatch) -> None:
    class Half(nn.Identity):
        def forward(self, x: Tensor) -> Tensor:
            return 0.5 * x

    model.blocks[0].drop_path1, model.blocks[1].ls1 = Half(), Half()
    model.blocks[1].attn.k_norm, model.blocks[1].mlp.norm = Half(), Half()


def other_gate(model: nn.Module, patch: pytest.MonkeyPatch) -> None:
    model.blocks[0].mlp.act, model.blocks[1].mlp.gate_last = nn.GELU(), True


CHANGES = [
    changed_layer_norm,
    changed_layer_norm_of_timm,
    changed_layer_scale,
    changed_linear,
    changed_activation,
    changed_identity,
    changed_block,
    changed_attention,
    changed_swiglu,
    changed_call,
    changed_sdpa,
    parametrized,
    weight_norm,
    pruned,
    other_eps,
    fast_norm,
    other_scale,
    scale_that_fused_attention_ignores,
    factor_for_all_channels,
    factors_of_tokens,
    factors_in_float64,
    norm_of_tokens_and_channels,
    norm_that_reads_the_place_of_a_token,
    norm_of_queries_that_reads_their_head,
    norm_of_queries_of_all_tokens,
    norms_of_queries_and_keys_by_rms,
    identity_with_another_forward,
    other_gate,
]
SAME_VALUES = (changed_layer_norm, scale_that_fused_attention_ignores, factors_in_float64)
"""Changes of what timm does not use (its norms have a forward of their own), or of the dtype alone."""


@pytest.mark.parametrize("change", CHANGES)
def test_changes_take_effect(
    change: Callable[[nn.Module, pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model that was accelerated before the change, one after it, and one without the kernels agree."""
    models = [randomised(of_timm("vit_giant_patch14_reg4_dinov2")) for _ in range(3)]
    unchanged = output(models[0], images())
    accelerate(models[1])
    for model in models:
        if model is models[0] or not change.__name__.startswith("changed"):  # a class is changed once for all models
            change(model, monkeypatch)
    accelerate(models[2])
    expected, *results = (output(model, images()) for model in models)
    torch.testing.assert_close(results, [expected] * 2, atol=1e-5, rtol=1e-5)
    assert (change in SAME_VALUES) == torch.allclose(expected.to(unchanged), unchanged, atol=1e-3)
    monkeypatch.undo()


def test_a_change_that_is_undone() -> None:
    model = accelerate(randomised(of_timm("vit_giant_patch14_reg4_dinov2")))
    expected = output(model, images())
    for change in CHANGES[:11]:
        with pytest.MonkeyPatch.context() as patch:
            change(model, patch)
            output(model, images())
    with operators_used() as used:
        assert torch.equal(output(model, images()), expected)
    assert used >= {"attention_forward", "residual_gather_norm", "residual_scatter"}
