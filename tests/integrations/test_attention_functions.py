"""The attention function of a transformers model: those of the library give way to the kernels, others are called."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from dinov2_kernels.integrations import accelerate, report
from tests.integrations.models import WITHOUT_RATIO, dinov2, images, operators_used, output, randomised

MODELS = {"DINOv2": dinov2, "ViT": lambda: hf.ViTModel(hf.ViTConfig(**WITHOUT_RATIO))}
every_model = pytest.mark.parametrize("make", [pytest.param(make, id=name) for name, make in MODELS.items()])
Make = Callable[[], nn.Module]
REASON = "its attention function 'mine' is not transformers' eager, sdpa or flash attention"


def mean_of_values(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Any:
    return value.mean(dim=2, keepdim=True).expand_as(query).transpose(1, 2), None


@pytest.fixture
def registered() -> Iterator[Callable[[str, Any], None]]:
    """AttentionInterface.register, undone after the test."""
    functions = dict(AttentionInterface._global_mapping)
    masks = dict(AttentionMaskInterface._global_mapping)
    yield AttentionInterface.register
    for mapping, before in (
        (AttentionInterface._global_mapping, functions),
        (AttentionMaskInterface._global_mapping, masks),
    ):
        mapping.clear()
        mapping.update(before)


def details(model: nn.Module) -> dict[str, tuple[str, str]]:
    return {row.kind.removeprefix("Dinov2").removeprefix("ViT"): (row.status, row.detail) for row in report(model).rows}


@every_model
@pytest.mark.parametrize("accelerated_first", [True, False])
def test_a_function_of_the_user_is_called(make: Make, accelerated_first: bool, registered: Any) -> None:
    registered("mine", mean_of_values)
    model = randomised(make())
    plain = output(model, images())
    model.set_attn_implementation("mine")
    expected = output(model, images())
    assert not torch.allclose(expected, plain, atol=1e-2)
    model.set_attn_implementation("sdpa")
    steps = [accelerate, lambda model: model.set_attn_implementation("mine")]
    for step in steps if accelerated_first else reversed(steps):
        step(model)
    torch.testing.assert_close(output(model, images()), expected, atol=1e-5, rtol=1e-5)
    assert details(model)["Attention"] == ("left", REASON)
    assert details(model)["Layer"] == ("accelerated", "stochastic_depth")
    model.set_attn_implementation("sdpa")
    assert details(model)["Attention"] == ("accelerated", "varlen_attention")
    with operators_used() as used:
        torch.testing.assert_close(output(model, images()), plain, atol=1e-5, rtol=1e-5)
    assert "attention_forward" in used


def test_the_report_says_so_before_accelerate(registered: Any) -> None:
    registered("mine", mean_of_values)
    model = dinov2()
    model.set_attn_implementation("mine")
    assert details(model)["Attention"] == ("left", REASON)


def wrapped(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        result, weights = function(*args, **kwargs)
        return 0.5 * result, weights

    return call


@every_model
@pytest.mark.parametrize("name", ["sdpa", "eager", "flash_attention_2"])
def test_a_builtin_name_with_another_function(make: Make, name: str, registered: Any) -> None:
    """Whether the function has another name, the same one, or is an object."""

    class Callee:
        __call__ = staticmethod(mean_of_values)

    model = accelerate(randomised(make()))
    plain = output(model, images())
    module = inspect.getmodule(type(model).__mro__[0])
    own = ALL_ATTENTION_FUNCTIONS.get(name, module.eager_attention_forward)
    sdpa = ALL_ATTENTION_FUNCTIONS["sdpa"]
    for function in (mean_of_values, wrapped(sdpa), functools.partial(mean_of_values), Callee()):
        registered(name, function)
        model.config._attn_implementation = name
        assert not torch.allclose(output(model, images()), plain, atol=1e-2)
        assert details(model)["Attention"][0] == "left"
    registered(name, own)
    with operators_used() as used:
        torch.testing.assert_close(output(model, images()), plain)
    assert "attention_forward" in used


def test_flex_attention_runs_in_transformers() -> None:
    """It gets a mask in all calls."""
    model = accelerate(randomised(dinov2(attn_implementation="flex_attention")))
    assert details(model)["Attention"] == ("left", REASON.replace("mine", "flex_attention"))


def test_another_eager_function_in_the_file_of_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    model = accelerate(randomised(dinov2(attn_implementation="eager")))
    plain = output(model, images())
    monkeypatch.setattr(hf.models.dinov2.modeling_dinov2, "eager_attention_forward", mean_of_values)
    assert not torch.allclose(output(model, images()), plain, atol=1e-2)


def test_an_override_for_one_file(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers' own way to replace a function for some models: another interface in their file."""
    interface = AttentionInterface()
    interface["sdpa"] = mean_of_values
    model = accelerate(randomised(dinov2()))
    plain = output(model, images())
    monkeypatch.setattr(hf.models.dinov2.modeling_dinov2, "ALL_ATTENTION_FUNCTIONS", interface)
    assert not torch.allclose(output(model, images()), plain, atol=1e-2)


def test_a_function_for_one_layer(registered: Any) -> None:
    registered("mine", mean_of_values)
    model = randomised(dinov2())
    attention = model.encoder.layer[1].attention
    attention.config = hf.Dinov2Config(**model.config.to_dict())
    attention.config._attn_implementation = "mine"
    expected = output(model, images())
    with operators_used() as used:
        torch.testing.assert_close(output(accelerate(model), images()), expected, atol=1e-5, rtol=1e-5)
    assert "attention_forward" in used
    rows = {row.names: row.status for row in report(model).rows}
    assert rows["encoder.layer.0.attention",] == "accelerated"
    assert rows["encoder.layer.1.attention",] == "left"


def test_a_mask_of_the_user(registered: Any) -> None:
    def first_half(*args: Any, **kwargs: Any) -> Tensor:
        mask = torch.zeros(3, 1, 17, 17, dtype=torch.bool)
        mask[..., :9] = True
        return mask

    model = randomised(dinov2())
    plain = output(model, images())
    AttentionMaskInterface.register("sdpa", first_half)
    expected = output(model, images())
    assert not torch.allclose(expected, plain, atol=1e-2)
    torch.testing.assert_close(output(accelerate(model), images()), expected, atol=1e-5, rtol=1e-5)
    AttentionMaskInterface.register("sdpa", sdpa_mask)
    torch.testing.assert_close(output(model, images()), plain, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "arguments", [{"is_causal": True}, {"position_bias": torch.linspace(0, 9, 289).view(1, 1, 17, 17)}]
)
@every_model
def test_arguments_of_the_attention_function(make: Make, arguments: dict[str, Any]) -> None:
    model = randomised(make())
    plain, expected = output(model, images()), model(images(), **arguments).last_hidden_state
    assert not torch.allclose(expected, plain, atol=1e-2)
    accelerate(model)
    torch.testing.assert_close(model(images(), **arguments).last_hidden_state, expected, atol=1e-5, rtol=1e-5)


@every_model
def test_eager_attention_that_is_called_by_itself_returns_its_weights(make: Make) -> None:
    model = randomised(make())
    model.set_attn_implementation("eager")
    attention = next(module for module in model.modules() if type(module).__name__.endswith("Attention"))
    tokens = torch.randn(2, 5, 48)
    result, weights = attention(tokens)
    accelerate(model)
    assert torch.equal(attention(tokens)[1], weights)
    assert torch.equal(attention(tokens)[0], result)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_a_layer_that_is_made_causal(implementation: str) -> None:
    """It is for sdpa; the eager function does not ask."""
    model = randomised(dinov2(attn_implementation=implementation))
    plain = output(model, images())
    model.encoder.layer[1].attention.is_causal = True
    expected = output(model, images())
    assert torch.allclose(expected, plain, atol=1e-2) == (implementation == "eager")
    torch.testing.assert_close(output(accelerate(model), images()), expected, atol=1e-5, rtol=1e-5)


def test_a_scale_and_a_dropout_that_change_later() -> None:
    model = randomised(dinov2())
    twin = accelerate(randomised(dinov2()))
    for attention in (model.encoder.layer[1].attention, twin.encoder.layer[1].attention):
        attention.scaling = 3.0
        attention.attention_dropout = 0.5
    torch.testing.assert_close(output(twin, images()), output(model, images()), atol=1e-5, rtol=1e-5)
    results = []
    for candidate in (model, twin):
        torch.manual_seed(0)
        results.append(output(candidate.train(), images()))
    torch.testing.assert_close(*results, atol=1e-5, rtol=1e-5)


def test_a_compiled_model_calls_the_function(registered: Any) -> None:
    torch._dynamo.reset()
    registered("mine", mean_of_values)
    model = accelerate(randomised(dinov2()))
    for name in ("mine", "sdpa"):
        model.set_attn_implementation(name)
        torch.testing.assert_close(
            torch.compile(model, backend="eager")(images()).last_hidden_state,
            output(model, images()),
            atol=1e-5,
            rtol=1e-5,
        )
