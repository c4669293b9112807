"""The modules of a vision transformer."""

from __future__ import annotations

import inspect
from functools import partial

import pytest
import timm.layers
import timm.models.vision_transformer as timm_vit
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from dinov2_kernels import PackedLayout
from dinov2_kernels.nn import Attention, Block, DropPath, LayerScale, Mlp, SwiGLUFFN, swiglu_hidden_features


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


def test_attention_weights_cannot_be_dropped() -> None:
    with pytest.raises(ValueError, match=r"attn_drop: expected 0, .*, got 0\.1"):
        Attention(24, attn_drop=0.1)


def test_norms_of_queries_and_keys_may_widen() -> None:
    """As autocast's do on a GPU."""

    class Widening(nn.LayerNorm):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.float())

    attention = Attention(24, num_heads=3, qk_norm=True, norm_layer=partial(Widening, elementwise_affine=False))
    assert attention.bfloat16()(torch.randn(2, 5, 24, dtype=torch.bfloat16)).dtype == torch.bfloat16


FACEBOOK = {
    Attention: "dim num_heads qkv_bias proj_bias attn_drop proj_drop",
    Mlp: "in_features hidden_features out_features act_layer drop bias",
    SwiGLUFFN: "in_features hidden_features out_features act_layer drop bias",
    LayerScale: "dim init_values inplace",
    DropPath: "drop_prob",
    Block: "dim num_heads mlp_ratio qkv_bias proj_bias ffn_bias drop attn_drop init_values drop_path act_layer "
    "norm_layer attn_class ffn_layer",
}


@pytest.mark.parametrize("module", FACEBOOK, ids=lambda module: module.__name__)
def test_positional_arguments_are_those_of_facebook(module: type[nn.Module]) -> None:
    expected = FACEBOOK[module].split()
    assert list(inspect.signature(module).parameters)[: len(expected)] == expected


NORM = partial(nn.LayerNorm, eps=1e-6)
AS_IN_TIMM = [
    (
        Attention,
        timm.layers.Attention,
        {"dim": 24, "num_heads": 3, "qkv_bias": True, "qk_norm": True, "norm_layer": NORM},
    ),
    (
        Attention,
        timm.layers.Attention,
        {"dim": 24, "num_heads": 3, "proj_bias": False, "attn_drop": 0.0, "proj_drop": 0.1},
    ),
    (Mlp, timm.layers.Mlp, {"in_features": 24, "hidden_features": 40, "act_layer": nn.SiLU, "bias": (False, True)}),
    (Mlp, timm.layers.Mlp, {"in_features": 24, "out_features": 8, "norm_layer": NORM, "drop": (0.1, 0.2)}),
    (LayerScale, timm.layers.LayerScale, {"dim": 24, "init_values": 0.5, "inplace": False}),
    (
        Block,
        timm_vit.Block,
        {
            "dim": 24,
            "num_heads": 3,
            "mlp_ratio": 2.0,
            "qkv_bias": True,
            "qk_norm": True,
            "proj_bias": True,
            "proj_drop": 0.1,
            "attn_drop": 0.0,
            "init_values": 0.3,
            "drop_path": 0.1,
            "act_layer": nn.SiLU,
            "norm_layer": NORM,
            "mlp_layer": timm.layers.Mlp,
        },
    ),
]


@pytest.mark.parametrize(("ours", "theirs", "arguments"), AS_IN_TIMM)
def test_constructed_and_loaded_as_in_timm(
    ours: type[nn.Module], theirs: type[nn.Module], arguments: dict[str, object]
) -> None:
    module, model = ours(**arguments).eval(), theirs(**arguments).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    module.load_state_dict(model.state_dict())
    x = torch.randn(2, 5, 24)
    torch.testing.assert_close(module(x), model(x))


def test_dropout_of_results() -> None:
    x = torch.randn(2, 50, 24)
    for module in (Attention(24, num_heads=3, proj_drop=0.5), Mlp(24, drop=0.5), SwiGLUFFN(24, drop=0.5)):
        assert 0.4 < (module(x) == 0).float().mean() < 0.6
        assert (module.eval()(x) != 0).all()


def test_names_of_timm_in_a_block() -> None:
    block = Block(24, 3, proj_drop=0.5, mlp_layer=SwiGLUFFN)
    assert block.attn.proj_drop.p == block.mlp.drop.p == 0.5
    assert isinstance(block.mlp, SwiGLUFFN)


@pytest.mark.parametrize("scale_by_keep", [True, False])
def test_drop_path_is_that_of_timm(scale_by_keep: bool) -> None:
    x = torch.randn(64, 3, 4)
    results = []
    for module in (DropPath(0.3, scale_by_keep), timm.layers.DropPath(0.3, scale_by_keep)):
        torch.manual_seed(0)
        results.append(module(x))
        assert module.eval()(x) is x
    torch.testing.assert_close(*results)
    assert 0 < (results[0] == 0).all(dim=(1, 2)).sum() < 64


def test_layer_scale_in_place_and_by_channel() -> None:
    x = torch.randn(3, 4)
    factors = torch.randn(4)
    expected = x * factors
    result = LayerScale(4, factors, inplace=True)(x)
    assert result.data_ptr() == x.data_ptr()
    torch.testing.assert_close(result, expected)


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


class Scatters(TorchDispatchMode):
    """Records whether scatters add a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.add_bias: list[bool] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        operators = torch.ops.dinov2_kernels
        if function in (operators.residual_scatter.default, operators.residual_scatter_gather_norm.default):
            self.add_bias.append(args[5] is not None)
        return function(*args, **(kwargs or {}))


class Unknown(nn.Linear):
    """An attention that has nothing but a forward."""

    def __init__(self, dim: int, **_: object) -> None:
        super().__init__(dim, dim)

    def forward(self, x: Tensor, layout: PackedLayout | None = None) -> Tensor:
        return super().forward(x)


def watch(part: nn.Module) -> None:
    part.register_forward_hook(lambda _module, _inputs, _output: None)


WATCHED = {
    "": [True, True],
    "attn": [False, True],
    "attn.proj": [False, True],
    "attn.proj_drop": [False, True],
    "attn.qkv": [True, True],
    "mlp": [True, False],
    "mlp.fc1": [True, True],
    "mlp.fc2": [True, False],
    "mlp.drop2": [True, False],
}


@pytest.mark.parametrize("name", WATCHED)
@pytest.mark.parametrize("arguments", [{}, {"init_values": None, "qkv_bias": True}], ids=str)
def test_scatters_add_the_last_biases_where_nobody_sees_it(arguments: dict[str, object], name: str) -> None:
    """And values and gradients are those of the parts called one by one."""
    block = random_block(**arguments)
    watch(block.get_submodule(name))
    x = torch.randn(2, 5, 16, dtype=torch.float64, requires_grad=True)
    inputs = [x, *block.parameters()]
    with Scatters() as scatters:
        result = block(x)
    y = x + block.ls1(block.attn(block.norm1(x)))
    expected = y + block.ls2(block.mlp(block.norm2(y)))
    torch.testing.assert_close(result, expected)
    torch.testing.assert_close(*(torch.autograd.grad(z.square().sum(), inputs) for z in (result, expected)))
    assert scatters.add_bias == WATCHED[name]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"ffn_layer": SwiGLUFFN}, [True, True]),
        ({"proj_bias": False}, [False, True]),
        ({"ffn_bias": False}, [True, False]),
        ({"drop": 0.5}, [False, False]),
        ({"attn_class": Unknown}, [False, True]),
        ({"ffn_layer": timm.layers.Mlp}, [True, False]),
        ({"ffn_layer": type("Subclass", (Mlp,), {"forward": lambda self, x: Mlp.forward(self, x)})}, [True, False]),
    ],
    ids=str,
)
def test_which_last_biases_scatters_add(arguments: dict[str, object], expected: list[bool]) -> None:
    with Scatters() as scatters:
        random_block(**arguments)(torch.randn(2, 5, 16, dtype=torch.float64))
    assert scatters.add_bias == expected


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
    with pytest.raises(ValueError, match="x: expected 6 tokens, as the layout describes, got 5"):
        random_block()(torch.zeros(5, 16, dtype=torch.float64), PackedLayout([(3, 2)]))


def kept_for_backward(block: Block, x: Tensor) -> tuple[int, list[Tensor]]:
    """Bytes that a block keeps beside its parameters, and its gradients."""
    parameters = {parameter.data_ptr() for parameter in block.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.data_ptr() not in parameters:
            storage = tensor.untyped_storage()
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    leaf = x.clone().requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = block(leaf * 1)
    return sum(kept.values()), list(torch.autograd.grad(y.square().sum(), [leaf, *block.parameters()]))


@pytest.mark.parametrize("rate", [0.0, 0.4])
def test_recompute_keeps_two_activations_less(rate: float) -> None:
    block = random_block(drop_path=rate)
    x = torch.randn(8, 50, 16, dtype=torch.float64)
    results = []
    for block.recompute in (False, True):
        torch.manual_seed(1)
        results.append(kept_for_backward(block, x))
    (plain, gradients), (less, gradients_of_less) = results
    assert plain - less == 2 * x.nbytes
    torch.testing.assert_close(gradients_of_less, gradients)
