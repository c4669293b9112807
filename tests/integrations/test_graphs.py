"""Accelerated models in graphs: torch.compile in training, torch.export, torch.jit, torch.fx and ONNX."""

from __future__ import annotations

import io
from pathlib import Path

import onnxruntime
import pytest
import torch
from torch import Tensor, nn
from torch._dynamo import lookup_backend

from dinov2_kernels.integrations import accelerate, report, restore
from tests.integrations.models import MODELS, images, randomised

# The first input of "earlier transformers" has no name of its own, which dynamic shapes need.
NAMES = [name for name in MODELS if not name.startswith("earlier")]
SOME = ["timm dinov2 with registers, SwiGLU", "timm SigLIP", "transformers Dinov2Model", "facebook"]


class Images(nn.Module):
    """A model as a function from images to one tensor: libraries name and pack these differently."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.model = accelerate(randomised(MODELS[name]()))

    def forward(self, x: Tensor) -> Tensor:
        result = self.model(x)
        if isinstance(result, Tensor):
            return result
        return result.logits if hasattr(result, "logits") else result.last_hidden_state


def assert_same(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", SOME)
def test_compiled_training_makes_few_graphs(name: str) -> None:
    """One for the first batch, one for all others, and one where a branch keeps a single sample."""
    model = Images(name).train()
    for module in model.modules():
        for rate in {"drop_prob", "sample_drop_ratio"} & set(vars(module)):
            setattr(module, rate, 0.3)
    torch._dynamo.reset()
    graphs = 0

    def counting(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> object:
        nonlocal graphs
        graphs += 1
        return lookup_backend("aot_eager")(graph, inputs)

    compiled = torch.compile(model, fullgraph=True, backend=counting)
    for count in (3, 2, 5, 6, 7, 9, 10, 12):
        x, results = images(count), []
        for run in (model, compiled):
            torch.manual_seed(0)
            results.append(run(x))
        assert_same(*results)
        results[1].sum().backward()
    assert graphs <= 3


@torch.no_grad()
@pytest.mark.parametrize("name", NAMES)
def test_an_exported_program_serves_every_batch(name: str) -> None:
    model = Images(name)
    program = torch.export.export(model, (images(3),), dynamic_shapes=({0: torch.export.Dim("batch")},))
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
@pytest.mark.parametrize("name", NAMES)
def test_a_trace_serves_every_batch_without_the_kernels(name: str) -> None:
    model = Images(name)
    traced = torch.jit.trace(model, images(3), check_trace=False)
    assert "dinov2_kernels" not in {node.kind().split("::")[0] for node in traced.inlined_graph.nodes()}
    for count in (1, 2, 3, 7):
        assert_same(traced(images(count)), model(images(count)))


@torch.no_grad()
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dynamo", [True, False], ids=["dynamo", "torchscript"])
@pytest.mark.parametrize("name", SOME)
def test_an_onnx_file_serves_every_batch(name: str, dynamo: bool, tmp_path: Path) -> None:
    model, path = Images(name), tmp_path / "model.onnx"
    if dynamo:
        shapes = ({0: torch.export.Dim("batch")},)
        torch.onnx.export(model, (images(3),), path, dynamo=True, dynamic_shapes=shapes, verbose=False)
    else:
        axes = {"x": {0: "batch"}}
        torch.onnx.export(model, (images(3),), str(path), dynamo=False, input_names=["x"], dynamic_axes=axes)
    session = onnxruntime.InferenceSession(path)
    (inputs,) = session.get_inputs()
    for count in (1, 3, 7):
        (actual,) = session.run(None, {inputs.name: images(count).numpy()})
        assert_same(torch.from_numpy(actual), model(images(count)))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("name", SOME)
def test_script_says_what_to_do(name: str) -> None:
    model = Images(name).model
    with pytest.raises(NotImplementedError, match=r"torch\.jit\.script: .*torch\.jit\.trace.*restore\(model\)"):
        torch.jit.script(model)
    assert report(model).on_kernels  # nothing changed


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_restored_model_can_be_scripted() -> None:
    model = restore(Images("timm dinov2").model)
    assert_same(torch.jit.script(model)(images()), model(images()))


@torch.no_grad()
def test_fx_gives_what_the_model_gives() -> None:
    model = Images("timm dinov2").model
    assert_same(torch.fx.symbolic_trace(model)(images(5)), model(images(5)))
