"""The modules of a vision transformer."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from dinov2_kernels import PackedLayout
from dinov2_kernels.nn import Attention, Block, LayerScale, Mlp, SwiGLUFFN, swiglu_hidden_features


def test_attention_is_that_of_torch_nn() -> None:
    ours, theirs = Attention(24, num_heads=3, qkv_bias=True), torch.nn.MultiheadAttention(24, 3, batch_first=True)
    theirs.load_state_dict(
        {
            "in_proj_weight": ours.qkv.weight,
            "in_proj_bias": ours.qkv.bias,
            "out_proj.weight": ours.proj.weight,
            "out_proj.bias": ours.proj.bias,
        }
    )
    x = torch.randn(2, 5, 24)
    torch.testing.assert_close(ours(x), theirs(x, x, x)[0])


def test_heads_must_divide_the_width() -> None:
    with pytest.raises(ValueError, match="num_heads: expected a divisor of dim = 24, got 5"):
        Attention(24, num_heads=5)


def test_mlp_uses_the_exact_gelu() -> None:
    mlp = Mlp(4, 8)
    x = torch.randn(3, 4) * 3
    torch.testing.assert_close(mlp(x), mlp.fc2(F.gelu(mlp.fc1(x), approximate="none")))


@pytest.mark.parametrize(("width", "hidden"), [(384, 1024), (768, 2048), (1024, 2736), (1536, 4096), (32, 88)])
def test_width_of_swiglu(width: int, hidden: int) -> None:
    assert swiglu_hidden_features(4 * width) == hidden
    with torch.device("meta"):
        layer = SwiGLUFFN(width, 4 * width)
    assert layer.w12.weight.shape == (2 * hidden, width)
    assert layer.w3.weight.shape == (width, hidden)


def test_swiglu_gates_the_second_half_by_the_first() -> None:
    layer = SwiGLUFFN(4, 12)
    x = torch.randn(3, 4)
    gate, value = layer.w12(x).chunk(2, dim=-1)
    torch.testing.assert_close(layer(x), layer.w3(F.silu(gate) * value))


def random_block(**arguments: object) -> Block:
    torch.manual_seed(0)
    block = Block(16, num_heads=2, **{"init_values": 0.5, **arguments}).double()  # type: ignore[arg-type]
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return block


def test_block_is_two_scaled_residuals() -> None:
    block = random_block()
    x = torch.randn(2, 5, 16, dtype=torch.float64)
    assert isinstance(block.ls1, LayerScale)
    y = x + block.ls1(block.attn(block.norm1(x)))
    torch.testing.assert_close(block(x), y + block.ls2(block.mlp(block.norm2(y))))


@pytest.mark.parametrize("arguments", [{}, {"init_values": None}, {"ffn_layer": SwiGLUFFN}], ids=str)
def test_packed_equals_separate(arguments: dict[str, object]) -> None:
    block = random_block(**arguments)
    crops = [torch.randn(count, length, 16, dtype=torch.float64) for count, length in [(3, 7), (4, 2)]]
    layout = PackedLayout([crop.shape[:2] for crop in crops])
    packed, separate = block(layout.pack(crops), layout), [block(crop) for crop in crops]
    torch.testing.assert_close(layout.unpack(packed), separate)

    parameters = list(block.parameters())
    packed_gradients = torch.autograd.grad(packed.square().sum(), parameters)
    separate_gradients = torch.autograd.grad(sum(crop.square().sum() for crop in separate), parameters)
    torch.testing.assert_close(packed_gradients, separate_gradients)


@pytest.mark.parametrize("rate", [0.05, 0.4])
def test_block_drops_samples_in_training_only(rate: float) -> None:
    """A tenth and less drops whole samples too, with the work they would have caused."""
    block = random_block(drop_path=rate)
    x = torch.randn(8, 3, 16, dtype=torch.float64)
    rows_seen: list[int] = []
    block.norm1.register_forward_hook(lambda _module, _inputs, output: rows_seen.append(len(output)))
    block(x)
    assert rows_seen == [3 * int(8 * (1 - rate))]
    plain = random_block()
    torch.testing.assert_close(block.eval()(x), plain(x))


@pytest.mark.parametrize("rate", [0.0, 0.4])
def test_block_compiles_in_one_graph(rate: float) -> None:
    torch._dynamo.reset()  # what other tests compiled is no part of this one
    block = random_block(drop_path=rate)
    layout = PackedLayout([(4, 5), (3, 2)])
    x = torch.randn(layout.total_tokens, 16, dtype=torch.float64)
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    results = []
    for function in (block, compiled):
        torch.manual_seed(1)
        leaf = x.clone().requires_grad_()
        result = function(leaf, layout)
        results.append((result, *torch.autograd.grad(result.square().sum(), [leaf, *block.parameters()])))
    torch.testing.assert_close(*results)


def test_block_reports_a_layout_that_does_not_match() -> None:
    with pytest.raises(ValueError, match="layout describes 6 tokens, but x has 5"):
        random_block()(torch.zeros(5, 16, dtype=torch.float64), PackedLayout([(3, 2)]))
