"""Hooks on parts of an accelerated model: they fire as before, see what they saw before, and may change it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from torchvision.models.feature_extraction import create_feature_extractor

from dinov2_kernels.integrations import accelerate, report
from tests.integrations.facebook import DinoVisionTransformer
from tests.integrations.models import MODELS, blocks_of, dinov2, images, of_timm, operators_used, output, randomised

every_model = pytest.mark.parametrize("make", [pytest.param(make, id=name) for name, make in MODELS.items()])
Make = Callable[[], nn.Module]
Seen = list[tuple[str, Any]]


def described(value: Any) -> Any:
    """The shapes and values of everything that a hook gets."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, (tuple, list)):
        return [described(item) for item in value]
    return {key: described(item) for key, item in value.items()} if isinstance(value, dict) else value


def watch(part: nn.Module, seen: Seen) -> list[Any]:
    """Hooks of every kind on a part, which note all that they get."""

    def noting(kind: str) -> Callable[..., None]:
        return lambda _module, *values: seen.append((kind, described(values)))

    return [
        part.register_forward_pre_hook(noting("forward pre"), with_kwargs=True),
        part.register_forward_hook(noting("forward"), with_kwargs=True),
        part.register_full_backward_pre_hook(noting("backward pre")),
        part.register_full_backward_hook(noting("backward")),
    ]


def step(model: nn.Module) -> None:
    y = output(model, images())
    (y * torch.linspace(-1, 1, y.numel()).view_as(y)).sum().backward()


def seen_by_each_part(model: nn.Module) -> dict[str, Seen]:
    """What hooks see on each part of the second block, one part at a time."""
    block = list(blocks_of(model))[1]
    everything = {}
    for name, part in block.named_modules():
        everything[name] = []
        handles = watch(part, everything[name])
        step(model)
        for handle in handles:
            handle.remove()
    return everything


@every_model
def test_every_hook_sees_what_it_saw_before(make: Make) -> None:
    """Shapes and values, of arguments by place and by name, results, and gradients."""
    model = randomised(make())
    expected = seen_by_each_part(model)
    result = seen_by_each_part(accelerate(model))
    assert {name: [kind for kind, _ in seen] for name, seen in result.items()} == {
        name: [kind for kind, _ in seen] for name, seen in expected.items()
    }
    for name, seen in expected.items():
        for (kind, before), (_, after) in zip(seen, result[name], strict=True):
            torch.testing.assert_close(
                after, before, atol=1e-4, rtol=1e-4, msg=lambda m, at=f"{name}, {kind}": f"{at}: {m}"
            )


def halving_input(part: nn.Module) -> None:
    def halve(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return (args[0] * 0.5, *args[1:]), kwargs

    part.register_forward_pre_hook(halve, with_kwargs=True)


def halving_output(part: nn.Module) -> None:
    def halve(_: nn.Module, __: Any, result: Any) -> Any:
        return (result[0] * 0.5, *result[1:]) if isinstance(result, tuple) else result * 0.5

    part.register_forward_hook(halve)


def halving_gradient(part: nn.Module) -> None:
    part.register_full_backward_hook(lambda _, grads, __: tuple(g if g is None else g * 0.5 for g in grads))


def halving_gradient_of_output(part: nn.Module) -> None:
    part.register_full_backward_pre_hook(lambda _, grads: tuple(g if g is None else g * 0.5 for g in grads))


def another_forward(part: nn.Module) -> None:
    forward = part.forward

    def half(*args: Any, **kwargs: Any) -> Any:
        result = forward(*args, **kwargs)
        return (result[0] * 0.5, *result[1:]) if isinstance(result, tuple) else result * 0.5

    part.forward = half  # type: ignore[method-assign]


@pytest.mark.parametrize(
    "change", [halving_input, halving_output, halving_gradient, halving_gradient_of_output, another_forward]
)
@pytest.mark.parametrize(
    "name",
    [
        "timm with norms of queries and keys",
        "timm with norms of attention and SwiGLU",
        "transformers Dinov2Model",
        "transformers ViTModel",
        "earlier transformers Dinov2Model",
        "facebook, SwiGLU",
    ],
)
def test_what_a_hook_returns_takes_effect(name: str, change: Callable[[nn.Module], None]) -> None:
    """In the outputs and in the gradients, whichever part has the hook."""
    names = [name for name, _ in next(blocks_of(MODELS[name]())).named_modules()]
    for part in names:
        results = []
        for prepare in (lambda model: model, accelerate):
            model = prepare(randomised(MODELS[name]()))
            change(list(blocks_of(model))[1].get_submodule(part))
            step(model)
            results.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
        torch.testing.assert_close(*reversed(results), atol=1e-3, rtol=1e-3, msg=lambda m, part=part: f"{part}: {m}")


@pytest.mark.parametrize("name", ["timm with norms of queries and keys", "transformers Dinov2Model", "facebook"])
@pytest.mark.parametrize("kind", ["forward_hook", "forward_pre_hook", "full_backward_hook", "full_backward_pre_hook"])
def test_hooks_of_all_modules_see_each_part(name: str, kind: str) -> None:
    model = randomised(MODELS[name]())
    register = getattr(torch_module, f"register_module_{kind}")
    results = []
    for prepare in (lambda model: model, accelerate):
        names = {module: name for name, module in prepare(model).named_modules()}
        seen: list[str] = []
        with register(lambda module, *_, names=names, seen=seen: seen.append(names[module])):
            step(model)
        results.append(seen)
    assert results[1] == results[0]
    assert len(results[0]) > 20


def test_a_trial_of_a_class_is_seen_by_no_hook() -> None:
    class Block(timm.models.vision_transformer.Block):
        """A class that no trial has seen yet."""

    seen: list[nn.Module] = []
    with torch_module.register_module_forward_hook(lambda module, *_: seen.append(module)):
        accelerate(of_timm("vit_small_patch14_dinov2", block_fn=Block))
    assert not seen


def test_attention_dropout_with_a_hook_sees_the_weights() -> None:
    model = of_timm("vit_small_patch14_dinov2")
    accelerate(model)
    for block in model.blocks:
        block.attn.fused_attn = False
    seen: list[Tensor] = []
    model.blocks[1].attn.attn_drop.register_forward_hook(lambda _, args, __: seen.append(args[0]))
    model(images())
    assert [weights.shape for weights in seen] == [(3, 4, 17, 17)]
    torch.testing.assert_close(seen[0].sum(dim=-1), torch.ones(3, 4, 17))


def test_a_module_in_the_place_of_the_attention_dropout_sees_the_weights() -> None:
    class Recording(nn.Module):
        p = 0.0

        def forward(self, weights: Tensor) -> Tensor:
            self.weights = weights
            return weights

    model = accelerate(of_timm("vit_small_patch14_dinov2"))
    attn = model.blocks[0].attn
    attn.fused_attn, attn.attn_drop = False, Recording()
    model(images())
    assert attn.attn_drop.weights.shape == (3, 4, 17, 17)


def test_norms_see_the_samples_that_are_kept() -> None:
    """As all parts of a branch do."""
    model = accelerate(of_timm("vit_small_patch14_dinov2", drop_path_rate=0.5)).train()
    shapes = []
    for part in (model.blocks[1].norm1, model.blocks[1].attn, model.blocks[1].norm2, model.blocks[1].mlp):
        part.register_forward_hook(lambda _, args, result: shapes.append((args[0].shape, result.shape)))
    model(images(8))
    assert shapes == [((4, 17, 48), (4, 17, 48))] * 4


def test_lists_of_crops_are_shown_as_facebook_packs_them() -> None:
    model = accelerate(randomised(DinoVisionTransformer()))
    crops = [images(3), images(2)[:, :, :28, :28]]
    expected = model.forward_features(crops)
    block, shapes = model.blocks[1], {}
    for name in ("norm1", "attn", "attn.qkv", "norm2", "mlp", "mlp.fc1"):
        part = block.get_submodule(name)
        part.register_forward_hook(lambda _, args, __, name=name: shapes.update({name: args[0].shape}))
    torch.testing.assert_close(model.forward_features(crops), expected)
    assert set(shapes.values()) == {(1, 3 * 17 + 2 * 5, 48)}
    assert len(shapes) == 6


def test_lists_of_crops_with_a_hook_on_a_layer_scale_need_no_xformers() -> None:
    model = accelerate(randomised(DinoVisionTransformer()))
    crops = [images(3), images(2)[:, :, :28, :28]]
    expected = model.forward_features(crops)
    shapes: list[torch.Size] = []
    model.blocks[1].ls1.register_forward_hook(lambda _, args, __: shapes.append(args[0].shape))
    torch.testing.assert_close(model.forward_features(crops), expected, atol=1e-5, rtol=1e-5)
    assert shapes == [(3, 17, 48), (2, 5, 48)]


@pytest.mark.parametrize("name", ["timm dinov2", "transformers ViTModel", "facebook"])
def test_saliency_by_gradients_of_a_norm(name: str) -> None:
    """As GradCAM does it: a norm's result [B, N, C], and its gradient through a hook on that tensor."""
    model = randomised(MODELS[name]())
    maps = []
    for prepare in (lambda model: model, accelerate):
        block = list(blocks_of(prepare(model)))[-1]
        norm = block.norm1 if hasattr(block, "norm1") else block.layernorm_before
        kept: dict[str, Tensor] = {}

        def keep(_: nn.Module, __: Any, result: Tensor, kept: dict[str, Tensor] = kept) -> None:
            kept["activations"] = result
            result.register_hook(lambda gradient: kept.update(gradients=gradient))

        handle = norm.register_forward_hook(keep)
        output(model, images())[:, 0, :10].sum().backward()
        handle.remove()
        patches = {name: value[:, 1:].reshape(3, 4, 4, 48) for name, value in kept.items()}
        weights = patches["gradients"].mean(dim=(1, 2), keepdim=True)
        maps.append((weights * patches["activations"]).sum(dim=-1).relu())
    torch.testing.assert_close(*reversed(maps), atol=1e-4, rtol=1e-4)
    assert maps[0].max() > 0


def test_activation_patching() -> None:
    """The result of one run, put in the place of another's, for each part in turn."""
    first, second = images(2), images(4)[2:]
    results = []
    for prepare in (lambda model: model, accelerate):
        block = next(blocks_of(model := prepare(randomised(dinov2()))))
        patched = []
        for part in (block.norm1, block.attention, block.layer_scale1, block.norm2, block.mlp, block):
            kept: list[Any] = []
            with part.register_forward_hook(lambda _, __, result, kept=kept: kept.append(result)):
                model(first)
            with part.register_forward_hook(lambda *_, kept=kept: kept[0]):
                patched.append(model(second).last_hidden_state)
        results.append(patched)
    torch.testing.assert_close(*reversed(results), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["vit_small_patch14_dinov2", "vit_giant_patch14_reg4_dinov2"])
def test_feature_extraction_of_torchvision(name: str) -> None:
    """It traces the model with torch.fx, which the kernels leave to timm's own forward."""
    model = randomised(of_timm(name))
    nodes = ["blocks.0.norm1", "blocks.1.attn.proj", "blocks.1.add_1"]
    expected = create_feature_extractor(model, nodes)(images())
    result = create_feature_extractor(accelerate(model), nodes)(images())
    assert result.keys() == expected.keys()
    torch.testing.assert_close(result, expected, atol=1e-5, rtol=1e-5)


def test_feature_extraction_of_timm() -> None:
    model = randomised(of_timm("vit_small_patch14_dinov2"))
    expected = model.forward_intermediates(images())
    torch.testing.assert_close(accelerate(model).forward_intermediates(images()), expected, atol=1e-5, rtol=1e-5)


def test_the_kernels_run_again_without_the_hook() -> None:
    """And the report says when they do not."""
    model = accelerate(randomised(of_timm("vit_small_patch14_dinov2")))
    handle = model.blocks[1].ls2.register_forward_hook(lambda *_: None)
    left = [row for row in report(model).rows if row.status == "left"]
    assert [(row.names, row.detail.partition(":")[0]) for row in left] == [(("blocks.1",), "ls2 must be called")]
    handle.remove()
    assert {row.status for row in report(model).rows} == {"accelerated"}
    with operators_used() as used:
        model(images())
    assert used >= {"attention_forward", "residual_gather_norm", "residual_scatter"}


def test_a_hooked_norm_keeps_the_other_kernels() -> None:
    model = accelerate(randomised(of_timm("vit_small_patch14_dinov2", depth=1)))
    model.blocks[0].norm1.register_forward_hook(lambda *_: None)
    with operators_used() as used:
        model(images())
    assert used >= {"attention_forward", "residual_scatter"}
