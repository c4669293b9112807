"""The vision transformer in graphs: torch.compile, torch.export, torch.jit, torch.fx and ONNX, with other batches."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch
from torch import Tensor, nn
from torch._dynamo import lookup_backend

from dinov2.models import DINOHead, VisionTransformer, ViTConfig
from dinov2_kernels.nn import Attention, Block, Mlp, SwiGLUFFN

SIZES: dict[str, Any] = {"img_size": 56, "embed_dim": 48, "depth": 2, "num_heads": 4, "drop_path_rate": 0.4}
MODELS: dict[str, dict[str, Any]] = {
    "plain": {},
    "registers, SwiGLU": {"num_register_tokens": 2, "ffn": "swiglu"},
    "resampled": {"img_size": 98, "interpolate_offset": 0.1, "interpolate_antialias": False},
    "resampled with antialias": {"img_size": 98, "interpolate_offset": 0.0, "interpolate_antialias": True},
}


@pytest.fixture(params=MODELS)
def model(request: pytest.FixtureRequest) -> VisionTransformer:
    torch.manual_seed(0)
    return VisionTransformer(ViTConfig(**SIZES | MODELS[request.param])).eval()


def images(count: int = 3) -> Tensor:
    return torch.randn(count, 3, 56, 56, generator=torch.Generator().manual_seed(count))


def assert_same(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


def test_two_graphs_serve_every_batch_in_training(model: VisionTransformer) -> None:
    torch._dynamo.reset()
    graphs = 0

    def counting(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> object:
        nonlocal graphs
        graphs += 1
        return lookup_backend("aot_eager")(graph, inputs)

    compiled = torch.compile(model.train(), fullgraph=True, backend=counting)
    for count in (3, 2, 4, 5, 7, 10, 13):
        results = []
        for run in (model, compiled):
            torch.manual_seed(0)
            results.append(run(images(count)))
        assert_same(*results)
        results[1].sum().backward()
    assert graphs <= 2


@torch.no_grad()
@pytest.mark.parametrize("strict", [False, True], ids=["traced", "strict"])
def test_an_exported_program_serves_every_batch(model: VisionTransformer, strict: bool) -> None:
    shapes = {"x": {0: torch.export.Dim("batch")}}
    program = torch.export.export(model, (images(),), dynamic_shapes=shapes, strict=strict)
    saved = io.BytesIO()
    torch.export.save(program, saved)
    loaded = torch.export.load(io.BytesIO(saved.getvalue()))
    for count in (1, 2, 3, 7):
        x = images(count)
        for exported in (program, loaded):
            assert_same(exported.module()(x), model(x))
            assert_same(exported.module()(x.to(memory_format=torch.channels_last)), model(x))


@torch.no_grad()
@pytest.mark.filterwarnings("ignore")  # TorchScript is deprecated, and traces warn of every check of a size
def test_a_trace_serves_every_batch_without_the_kernels(model: VisionTransformer) -> None:
    traced = torch.jit.trace(model, images(), check_trace=False)
    assert "dinov2_kernels" not in {node.kind().split("::")[0] for node in traced.inlined_graph.nodes()}
    for count in (1, 2, 3, 7):
        assert_same(traced(images(count)), model(images(count)))


@torch.no_grad()
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dynamo", [True, False], ids=["dynamo", "torchscript"])
def test_an_onnx_file_serves_every_batch(model: VisionTransformer, dynamo: bool, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    if dynamo:
        shapes = {"x": {0: torch.export.Dim("batch")}}
        torch.onnx.export(model, (images(),), path, dynamo=True, dynamic_shapes=shapes, verbose=False)
    else:
        axes = {"x": {0: "batch"}}
        if model.config.img_size != 56 and model.config.interpolate_antialias:
            with pytest.raises(NotImplementedError, match="7 x 7 patches, got 4 x 4; use dynamo=True"):
                torch.onnx.export(model, (images(),), str(path), dynamo=False)
            return
        torch.onnx.export(model, (images(),), str(path), dynamo=False, input_names=["x"], dynamic_axes=axes)
    session = onnxruntime.InferenceSession(path)
    for count in (1, 3, 7):
        (actual,) = session.run(None, {"x": images(count).numpy()})
        assert_same(torch.from_numpy(actual), model(images(count)))


@pytest.mark.filterwarnings("ignore")
def test_a_trace_of_a_model_in_training_mode_says_what_to_do(model: VisionTransformer) -> None:
    with pytest.raises(NotImplementedError, match=r"drop rate 0\.4; call model\.eval\(\) first"):
        torch.jit.trace(model.train(), images())


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(
    "make",
    [
        lambda: VisionTransformer(ViTConfig(**SIZES)),
        lambda: DINOHead(16, 32),
        lambda: Block(16, num_heads=2),
        lambda: Attention(16, num_heads=2),
        lambda: Mlp(16, 32),
        lambda: SwiGLUFFN(16, 32),
    ],
)
def test_script_says_what_to_do(make: Any) -> None:
    part: nn.Module = make()
    with pytest.raises(NotImplementedError, match=rf"torch\.jit\.script: .*got a {type(part).__name__};.*jit\.trace"):
        torch.jit.script(nn.Sequential(part))


def test_fx_says_what_to_do(model: VisionTransformer) -> None:
    with pytest.raises(NotImplementedError, match=r"torch\.fx\.symbolic_trace: .* use torch\.export"):
        torch.fx.symbolic_trace(model)
