"""accelerate(model): the same numbers from the kernels, and the same model in every other respect."""

from __future__ import annotations

import copy
import io
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import transformers as hf
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import dinov2_kernels as dk
from dinov2_kernels.integrations import accelerate, report, restore
from tests.integrations.facebook import DinoVisionTransformer
from tests.integrations.models import (
    MODELS,
    WITHOUT_RATIO,
    blocks_of,
    dinov2,
    gradients,
    images,
    of_timm,
    operators_used,
    output,
    randomised,
)
from tests.tolerance import assert_at_most_twice_the_error

every_model = pytest.mark.parametrize("make", [pytest.param(make, id=name) for name, make in MODELS.items()])
one_of_each = pytest.mark.parametrize(
    "make", [pytest.param(MODELS[name], id=name) for name in ("timm SigLIP", "transformers Dinov2Model", "facebook")]
)
Make = Callable[[], nn.Module]


@every_model
def test_same_outputs_and_gradients(make: Make) -> None:
    model = randomised(make())
    with torch.no_grad():
        expected = output(model, images())
    expected_gradients = gradients(model.train(), images())
    accelerate(model)
    with torch.no_grad(), operators_used() as used:
        torch.testing.assert_close(output(model.eval(), images()), expected, atol=1e-5, rtol=1e-5)
    assert used >= {"attention_forward", "residual_gather_norm", "residual_scatter"}
    with operators_used() as used:
        result = gradients(model.train(), images())
    assert used >= {"attention_backward", "residual_gather_norm_backward", "residual_scatter_backward"}
    assert result.keys() == expected_gradients.keys()
    largest = max(gradient.abs().max().item() for gradient in expected_gradients.values())
    for name, gradient in expected_gradients.items():  # that of a key's bias is 0 but for rounding
        error = (result[name] - gradient).abs().max() / gradient.abs().max().clamp_min(0.05 * largest)
        assert error < 1e-5, f"{name}: {error:.2g}"


@pytest.mark.parametrize(
    "name", ["timm dinov2 with registers, SwiGLU", "facebook, SwiGLU", "earlier transformers Dinov2Model"]
)
def test_swiglu_runs_on_its_kernel(name: str) -> None:
    with operators_used() as used:
        gradients(accelerate(randomised(MODELS[name]())), images())
    assert used >= {"swiglu", "swiglu_backward_"}


@every_model
def test_there_and_back(make: Make) -> None:
    """Parameters and keys are the same objects; twice is once; restored classes are the ones from before."""
    model = randomised(make())
    classes, parameters = [type(m) for m in model.modules()], dict(model.named_parameters())
    keys, expected = list(model.state_dict()), output(model, images())
    assert accelerate(model) is model
    swapped = [type(m) for m in model.modules()]
    assert swapped != classes
    assert [type(m) for m in accelerate(model).modules()] == swapped
    assert all(issubclass(after, before) for before, after in zip(classes, swapped, strict=True))
    assert list(model.state_dict()) == keys
    assert all(parameter is parameters[name] for name, parameter in model.named_parameters())
    assert restore(model) is model
    assert [type(m) for m in model.modules()] == classes
    assert torch.equal(output(model, images()), expected)


@one_of_each
def test_copies_and_pickles_are_accelerated(make: Make) -> None:
    model = accelerate(randomised(make()))
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for twin in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        assert [type(m) for m in twin.modules()] == [type(m) for m in model.modules()]
        assert torch.equal(output(twin, images()), output(model, images()))
        assert [type(m) for m in restore(twin).modules()] != [type(m) for m in model.modules()]


@one_of_each
def test_hooks_fire(make: Make) -> None:
    """Hooks of fused parts fire, too: their block then runs its own forward."""
    model = randomised(make())
    expected = output(model, images())
    accelerate(model)
    watched = {f"{i}.{name}".strip("."): m for i, b in enumerate(blocks_of(model)) for name, m in b.named_modules()}
    fired: set[str] = set()
    for name, module in watched.items():
        module.register_forward_hook(lambda *_, name=name: fired.add(name))
    torch.testing.assert_close(output(model, images()), expected, atol=1e-5, rtol=1e-5)
    silent = {name for name in watched.keys() - fired if not isinstance(watched[name], nn.Identity)}
    assert silent <= {"0.attn.attn_drop", "1.attn.attn_drop"}, "there are no weights to drop"


def with_stochastic_depth(library: str) -> nn.Module:
    if library == "timm":
        model = of_timm("vit_small_patch14_dinov2", drop_path_rate=0.4)
        model.blocks[0].drop_path1 = model.blocks[0].drop_path2 = copy.deepcopy(model.blocks[1].drop_path1)
        return model
    return dinov2(drop_path_rate=0.4) if library == "transformers" else DinoVisionTransformer(drop_path_rate=0.4)


@pytest.mark.parametrize("library", ["timm", "transformers", "facebook"])
def test_stochastic_depth_drops_the_work_of_samples_in_training(library: str) -> None:
    model = randomised(with_stochastic_depth(library))
    expected = output(model, images(8))
    accelerate(model)
    torch.testing.assert_close(output(model, images(8)), expected, atol=1e-5, rtol=1e-5)
    samples: list[int] = []
    for block in blocks_of(model):
        for name in ("attn", "attention", "mlp"):
            if hasattr(block, name):
                getattr(block, name).register_forward_hook(lambda _module, args, _output: samples.append(len(args[0])))
    output(model.train(), images(8))
    assert samples == [int(8 * 0.6)] * 4


def test_expectation_of_stochastic_depth() -> None:
    """The mean output of a block in training, over many draws, is what it computes in eval mode."""
    block = next(blocks_of(accelerate(randomised(with_stochastic_depth("timm")).double())))
    x = torch.randn(5, 3, 48, dtype=torch.float64)
    block.mlp = nn.Identity()
    torch.nn.init.zeros_(block.ls2.gamma)  # the second branch sees the noise of the first
    expected = block(x)
    torch.manual_seed(0)
    draws = torch.stack([block.train()(x).detach() for _ in range(2000)])
    torch.testing.assert_close(draws.mean(dim=0), expected, atol=6 * draws.std(dim=0).max().item() / 2000**0.5, rtol=0)


def test_facebook_lists_need_no_xformers() -> None:
    crops = [images(3), images(2)[:, :, :28, :28]]
    for arguments in ({}, {"block_chunks": 2}, {"ffn_layer": "swiglu"}):
        model = randomised(DinoVisionTransformer(**arguments))
        expected = [model.forward_features(crop)[0] for crop in crops]
        with pytest.raises(AssertionError, match="xFormers"):
            model.forward_features(crops)
        torch.testing.assert_close(accelerate(model).forward_features(crops), expected, atol=1e-5, rtol=1e-5)


def test_facebook_lists_drop_samples_of_each_crop() -> None:
    model = accelerate(randomised(DinoVisionTransformer(depth=1, drop_path_rate=0.5))).train()
    tokens: list[int] = []
    for linear in (model.blocks[0].attn.qkv, model.blocks[0].mlp.fc1):
        linear.register_forward_hook(lambda _module, args, _output: tokens.append(args[0].shape[-2]))
    model.forward_features([images(4), images(6)[:, :, :28, :28]])
    assert tokens == [2 * 17 + 3 * 5] * 2


def test_timm_masks_run_in_timm() -> None:
    model = randomised(of_timm("vit_small_patch14_dinov2"))
    x, mask = torch.randn(2, 5, 48), torch.ones(5, 5, dtype=torch.bool).tril()
    expected = model.blocks[0](x, attn_mask=mask)
    accelerate(model)
    assert torch.equal(model.blocks[0](x, attn_mask=mask), expected)
    assert torch.equal(model.blocks[0](x, is_causal=True), expected)


def test_transformers_masks_run_in_transformers() -> None:
    model = randomised(MODELS["earlier transformers Dinov2Model"]())
    mask = torch.rand(3, 4, 16, 16)
    expected = output(model, images(), mask)
    with operators_used() as used:
        torch.testing.assert_close(output(accelerate(model), images(), mask), expected, atol=1e-5, rtol=1e-5)
    assert used == {"swiglu"}


@pytest.mark.parametrize("name", ["transformers Dinov2Model", "transformers ViTModel"])
def test_transformers_attention_masks_run_in_transformers(name: str) -> None:
    model = randomised(MODELS[name]())
    mask = torch.ones(3, 17, dtype=torch.bool)
    mask[:, 9:] = False
    expected = model(images(), attention_mask=mask).last_hidden_state
    assert not torch.allclose(expected, output(model, images()), atol=1e-2)
    with operators_used() as used:
        result = accelerate(model)(images(), attention_mask=mask).last_hidden_state
    assert "attention_forward" not in used
    torch.testing.assert_close(result, expected, atol=1e-5, rtol=1e-5)


def test_dropout_of_results_is_kept() -> None:
    """The same elements are dropped, as random numbers are drawn in the same order."""
    for model in (
        of_timm("vit_small_patch14_dinov2", proj_drop_rate=0.5),
        of_timm("vit_giant_patch14_reg4_dinov2", proj_drop_rate=0.5),
        hf.ViTModel(hf.ViTConfig(**WITHOUT_RATIO, hidden_dropout_prob=0.5)),
    ):
        results = []
        for variant in (randomised(model).train(), accelerate(copy.deepcopy(model))):
            torch.manual_seed(0)
            results.append(output(variant, images()))
        torch.testing.assert_close(*results, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("library", ["timm", "transformers"])
def test_attention_dropout_runs_as_before_in_training_only(library: str) -> None:
    dropped = {"timm": {"attn_drop_rate": 0.5}, "transformers": {"attention_probs_dropout_prob": 0.5}}[library]
    model = of_timm("vit_small_patch14_dinov2", **dropped) if library == "timm" else dinov2(**dropped)
    model = accelerate(randomised(model))
    with operators_used() as used:
        output(model, images())
    assert "attention_forward" in used
    with operators_used() as used:
        output(model.train(), images())
    assert "attention_forward" not in used
    row = next(row for row in report(model).rows if "Attention" in row.kind)
    assert row.detail == "varlen_attention, but in training the library's own forward, for its attention dropout"


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_transformers_records_hidden_states_and_attention_weights(implementation: str) -> None:
    """Only the eager implementation has weights to return, and only if they are wanted it must run."""
    model = accelerate(randomised(dinov2(attn_implementation=implementation)))
    with operators_used() as used:
        model(images())
    assert "attention_forward" in used
    wanted = {"output_hidden_states": True, "output_attentions": implementation == "eager"}
    with operators_used() as used:
        result = model(images(), **wanted)
    assert ("attention_forward" in used) == (implementation == "sdpa")
    expected = restore(model)(images(), **wanted)
    torch.testing.assert_close(result.hidden_states, expected.hidden_states, atol=1e-5, rtol=1e-5)
    assert len(result.hidden_states) == 3
    if implementation == "eager":
        torch.testing.assert_close(result.attentions, expected.attentions)
        assert len(result.attentions) == 2


@pytest.mark.parametrize("rate", [0.0, 0.5])
def test_transformers_gradient_checkpointing(rate: float) -> None:
    """Recomputes the forward that ran, with the samples that it drew."""
    model = accelerate(randomised(dinov2(drop_path_rate=rate))).train()
    results = []
    for switch in (model.activation_checkpointing_disable, model.activation_checkpointing_enable):
        switch()
        torch.manual_seed(0)
        calls: list[int] = []
        handle = model.encoder.layer[0].mlp.fc1.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        results.append(gradients(model, images(4)))
        handle.remove()
    assert len(calls) == 2, "the layer was not computed again"
    torch.testing.assert_close(results[1], results[0])


@pytest.mark.parametrize("autocast", [False, True], ids=["bfloat16", "autocast"])
@pytest.mark.parametrize(
    "name", ["timm with norms of queries and keys", "transformers Dinov2Model", "facebook, SwiGLU"]
)
def test_low_precision(name: str, autocast: bool) -> None:
    model = randomised(MODELS[name]())
    exact = output(copy.deepcopy(model).double(), images().double())
    x = images() if autocast else images().bfloat16()
    model = model if autocast else model.bfloat16()

    def run() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return output(model, x)

    plain = run()
    result = accelerate(model) and run()
    assert result.dtype == plain.dtype
    assert_at_most_twice_the_error("output", result, plain, exact, floor=1e-3)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        assert all(gradient.isfinite().all() for gradient in gradients(model.train(), x).values())


@pytest.mark.parametrize("rate", [0.0, 0.5])
@pytest.mark.parametrize("name", ["vit_small_patch14_dinov2", "vit_giant_patch14_reg4_dinov2"])
def test_compiles_in_one_graph(name: str, rate: float) -> None:
    torch._dynamo.reset()  # what other tests compiled is no part of this one
    model = accelerate(randomised(of_timm(name, drop_path_rate=rate))).train()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    results = []
    for function in (model, compiled):
        torch.manual_seed(0)
        model.zero_grad()
        function(images(4)).square().sum().backward()
        results.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    torch.testing.assert_close(*results, atol=1e-4, rtol=1e-4)


@pytest.fixture
def one_process_group(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("one_process_group")
@pytest.mark.filterwarnings("error:FSDP2-wrapped module .FSDP(Block|Dinov2Layer). returned a view")
@pytest.mark.parametrize("sharded_first", [False, True])
@pytest.mark.parametrize("name", ["timm DeiT", "transformers Dinov2Model"])
def test_with_fsdp2(name: str, sharded_first: bool) -> None:
    """Its class is a subclass of the module's, too, and parameters are there only while a block runs."""
    model = randomised(MODELS[name]())
    expected = model(images())
    steps = [accelerate, lambda model: shard(model)]
    for step in reversed(steps) if sharded_first else steps:
        step(model)
    with operators_used() as used:
        result = model(images())
    assert used >= {"attention_forward", "residual_gather_norm", "residual_scatter"}
    torch.testing.assert_close(result, expected, atol=1e-5, rtol=1e-5)


def shard(model: nn.Module) -> None:
    mesh = init_device_mesh("cpu", (1,))
    for module in [*blocks_of(model), model]:
        fully_shard(module, mesh=mesh)


def test_the_libraries_are_not_imported() -> None:
    code = "import sys, dinov2_kernels; assert not {'timm', 'transformers'} & {*sys.modules}"
    subprocess.run([sys.executable, "-c", code], check=True)
    assert dk.integrations.accelerate is accelerate
