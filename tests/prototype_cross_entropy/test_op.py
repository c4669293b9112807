"""The cross-entropy of prototypes as users call it: values, gradients, memory, PyTorch's machinery, bad input."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import dinov2_kernels as dk
from dinov2_kernels import prototype_cross_entropy
from dinov2_kernels.prototype_cross_entropy import chunked
from tests.prototype_cross_entropy.cases import (
    CASES,
    Case,
    chunk_arguments,
    gradients_of,
    to_float64,
    with_logits_in_memory,
)
from tests.tolerance import assert_at_most_twice_the_error

TEMPERATURES = {"student_temperature": 0.1, "teacher_temperature": 0.04}


@pytest.fixture(params=[1, 7, 64, 1024], ids="{} columns".format)
def columns(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """The width of a chunk: far below, near and above the number of prototypes of the cases."""
    monkeypatch.setattr(chunked, "columns_of_a_chunk", lambda _, K, device_type: min(request.param, K))
    return request.param


@pytest.mark.usefixtures("columns", "poisoned_outputs")
@pytest.mark.parametrize("gain", [False, True], ids=["weight", "weight and gain"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_equals_the_loss_of_logits_in_memory(case: Case, gain: bool) -> None:
    arguments = case.loss_arguments(torch.float64, gain=gain)
    loss, expected = prototype_cross_entropy(**arguments), with_logits_in_memory(**arguments)
    torch.testing.assert_close(loss, expected, rtol=2e-12, atol=1e-12)
    gradients, expected_gradients = gradients_of(loss, arguments), gradients_of(expected, arguments)
    assert gradients.keys() == expected_gradients.keys()
    for name, gradient in gradients.items():
        scale = expected_gradients[name].abs().max().item() if gradient.numel() else 0.0
        # Large logits are sums of rounded products: features and weight fix them to 1e-16 of themselves, no better.
        rounding = 1e-12 * max(1.0, case.magnitude)
        torch.testing.assert_close(gradient, expected_gradients[name], rtol=rounding, atol=rounding * scale)


def test_fake_tensors_have_no_values_to_look_at() -> None:
    with FakeTensorMode():
        features, weight = torch.empty(6, 8, requires_grad=True), torch.empty(37, 8, requires_grad=True)
        rest = {"row_weight": torch.empty(6), "teacher_index": torch.empty(6, 2, dtype=torch.int64)}
        loss = prototype_cross_entropy(features, weight, torch.empty(4, 37), **rest, **TEMPERATURES)
        loss.sum().backward()
    assert loss.shape == (6,)
    assert weight.grad is not None
    assert weight.grad.shape == (37, 8)


@pytest.mark.parametrize("case", [Case(5, 5, 37, J=0), Case(6, 4, 37, J=2)], ids=str)
def test_the_definition_is_the_same(case: Case) -> None:
    arguments = case.loss_arguments(torch.float64, gain=True)
    with dk.use_backend("reference"):
        loss = prototype_cross_entropy(**arguments)
        gradients = gradients_of(loss, arguments)
    expected = with_logits_in_memory(**arguments)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradients, gradients_of(expected, arguments))


LOW_PRECISION = (
    Case(64, 64, 2048, 64, J=0),
    Case(64, 16, 2048, 64, J=2),
    Case(33, 7, 1999, 63, J=3, magnitude=30.0),
    Case(32, 32, 512, 16, J=0, magnitude=1e4),
)


@pytest.mark.parametrize("gain", [False, True], ids=["weight", "weight and gain"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", LOW_PRECISION, ids=str)
def test_low_precision_is_at_most_twice_as_wrong_as_plain_pytorch(
    case: Case, dtype: torch.dtype, gain: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In chunks of 64: up to 32 products, each rounded, make up the gradient of the features."""
    if gain and dtype == torch.float16 and case.magnitude > 1000:
        pytest.skip("the gradient of weight is beyond the range of float16")
    monkeypatch.setattr(chunked, "columns_of_a_chunk", lambda *_: 64)
    arguments = case.loss_arguments(dtype, gain=gain)
    results = {}
    for label, function, inputs in (
        ("ours", prototype_cross_entropy, arguments),
        ("plain", with_logits_in_memory, arguments),
        ("exact", with_logits_in_memory, to_float64(arguments)),
    ):
        loss = function(**inputs)
        results[label] = {"loss": loss.detach(), **gradients_of(loss, inputs)}
    assert results["ours"]["loss"].dtype == torch.float32
    for name, exact in results["exact"].items():
        ours, plain = results["ours"][name], results["plain"][name]
        assert ours.dtype == plain.dtype
        floor = 8 * torch.finfo(torch.float32).eps * exact.abs().max().item()
        assert_at_most_twice_the_error(name, ours, plain, exact, floor)


def test_autocast_is_that_of_a_linear_layer() -> None:
    """Float32 parameters: the product in bfloat16, everything behind it and every gradient in float32."""
    arguments = Case(64, 64, 2048, 64, J=0).loss_arguments(torch.float32, gain=True)
    wide = to_float64(arguments)
    exact = with_logits_in_memory(**wide)
    with torch.autocast("cpu", torch.bfloat16):
        ours, plain = prototype_cross_entropy(**arguments), with_logits_in_memory(**arguments)
    assert ours.dtype == torch.float32
    assert min((x - exact).abs().max() for x in (ours, plain)) > 1e-4, "not computed in bfloat16"
    assert_at_most_twice_the_error("loss", ours, plain, exact, 0.0)
    gradients = [gradients_of(loss, x) for loss, x in ((ours, arguments), (plain, arguments), (exact, wide))]
    for name, gradient in gradients[0].items():
        assert gradient.dtype == torch.float32
        assert_at_most_twice_the_error(name, gradient, gradients[1][name], gradients[2][name], 0.0)


@pytest.mark.parametrize("J", [0, 2])
def test_gradcheck(J: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunked, "columns_of_a_chunk", lambda *_: 4)
    arguments = Case(4, 4, 9, 3, J=J).loss_arguments(torch.float64, gain=True)
    names = ("features", "weight", "weight_gain")

    def loss(*leaves: Tensor) -> Tensor:
        return prototype_cross_entropy(**arguments | dict(zip(names, leaves, strict=True)))

    assert torch.autograd.gradcheck(loss, [arguments[name] for name in names])


def test_gradients_reach_the_student_alone() -> None:
    arguments = Case(4, 4, 9, J=0).loss_arguments(torch.float32)
    for name in ("teacher_logits", "teacher_bias", "row_weight"):
        arguments[name].requires_grad_()
    prototype_cross_entropy(**arguments).sum().backward()
    assert arguments["features"].grad is not None
    assert arguments["weight"].grad is not None
    assert all(arguments[name].grad is None for name in ("teacher_logits", "teacher_bias", "row_weight"))


@pytest.mark.parametrize("trained", [("features",), ("weight",), ("weight_gain",), ("weight", "weight_gain")], ids=str)
def test_what_is_frozen_costs_no_product(trained: tuple[str, ...]) -> None:
    """Forward 1 product; backward that of the logits and one for what is trained. A last layer is often frozen."""
    arguments = Case(4, 4, 9, J=0).loss_arguments(torch.float64, gain=True)
    expected = gradients_of(with_logits_in_memory(**arguments), arguments)
    for name in ("features", "weight", "weight_gain"):
        arguments[name] = arguments[name].detach().requires_grad_(name in trained)
    with Sizes() as sizes:
        gradients = gradients_of(prototype_cross_entropy(**arguments), arguments)
    assert sizes.calls["mm"] == 3
    torch.testing.assert_close(gradients, {name: expected[name] for name in trained})


def test_without_gradient_there_is_one_product_and_nothing_is_kept() -> None:
    arguments = Case(4, 4, 9, J=0).loss_arguments(torch.float64)
    with torch.no_grad(), Sizes() as sizes:
        loss = prototype_cross_entropy(**arguments)
    assert not loss.requires_grad
    assert sizes.calls["mm"] == 1


class Sizes(TorchDispatchMode):
    """Sees every result of every operator: the largest storage in bytes, and how often each operator was called."""

    def __init__(self) -> None:
        super().__init__()
        self.largest, self.calls = 0, {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._opname
        self.calls[name] = self.calls.get(name, 0) + 1
        operator = dk._library.OPERATORS.get(name) if func.namespace == "dinov2_kernels" else None
        if operator is not None and operator.composite is not None:
            with self:
                return operator.composite(*args)
        result = func(*args, **(kwargs or {}))
        arguments = {x.untyped_storage().data_ptr() for x in args if isinstance(x, Tensor)}
        for x in result if isinstance(result, tuple) else (result,):
            if isinstance(x, Tensor) and x.untyped_storage().data_ptr() not in arguments:
                self.largest = max(self.largest, x.untyped_storage().nbytes())
        return result


@pytest.mark.parametrize("J", [0, 1])
def test_no_memory_grows_with_rows_times_prototypes(J: int) -> None:
    """A chunk of 16 MB at most, where logits or targets would take 100 MB, and the gradient of the weight."""
    N, M, K, D = 200, 200, 131072, 3
    case = Case(N, M, K, D, J=J)
    arguments = case.loss_arguments(torch.float32, gain=True)
    with Sizes() as sizes:
        prototype_cross_entropy(**arguments).sum().backward()
    assert 4 * N * K > 100e6
    assert sizes.calls["mm"] > 8, "the whole was one chunk"
    assert sizes.largest <= max(chunked.CHUNK_BYTES["cpu"], 4 * K * D)


def test_chunks_are_bounded() -> None:
    for rows in (0, 1, 100, 1024, 20000, 10**6):
        for device_type, limit in (("cpu", 16 << 20), ("cuda", 256 << 20), ("mps", 16 << 20)):
            bytes_per_column = 8 * rows + 1024
            columns = chunked.columns_of_a_chunk(bytes_per_column, 65536, device_type)
            assert 1 <= columns <= 65536
            assert columns & (columns - 1) == 0
            assert columns * bytes_per_column <= max(limit, bytes_per_column * 256)
    assert chunked.columns_of_a_chunk(8, 1000, "cpu") == 1000


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_rows_without_length(dtype: torch.dtype) -> None:
    """Where v is zero, so is the prototype, and gradients are those of F.normalize, whose divisor stays at 1e-12."""
    arguments = Case(6, 6, 11, J=0).loss_arguments(dtype, gain=True)
    with torch.no_grad():
        arguments["weight"][3] = 0
        arguments["weight"][5] *= 5e-13 / arguments["weight"][5].norm()
    loss, expected = prototype_cross_entropy(**arguments), with_logits_in_memory(**arguments)
    torch.testing.assert_close(loss, expected)
    gradients, expected_gradients = gradients_of(loss, arguments), gradients_of(expected, arguments)
    assert expected_gradients["weight"][3].abs().min() > 1e6
    torch.testing.assert_close(gradients, expected_gradients, rtol=1e-5, atol=1e-5)


def test_uniform_logits_give_the_logarithm_of_the_prototypes_however_large_they_are() -> None:
    features, weight = torch.full((3, 1), 1e4), torch.ones(64, 1)
    loss = prototype_cross_entropy(features, weight, torch.randn(3, 64), **TEMPERATURES)
    torch.testing.assert_close(loss, torch.full((3,), 64.0).log())


def test_strided_arguments() -> None:
    arguments = Case(5, 5, 37, J=0).loss_arguments(torch.float64)
    expected = prototype_cross_entropy(**arguments)
    wider = torch.randn(5, 80, dtype=torch.float64)
    wider[:, 7:44] = arguments["teacher_logits"]
    for teacher_logits in (wider[:, 7:44], arguments["teacher_logits"].t().contiguous().t()):
        assert not teacher_logits.is_contiguous()
        loss = prototype_cross_entropy(**arguments | {"teacher_logits": teacher_logits})
        torch.testing.assert_close(loss, expected, rtol=0, atol=0)
    turned = {name: arguments[name].t().contiguous().t() for name in ("features", "weight")}
    torch.testing.assert_close(prototype_cross_entropy(**arguments | turned), expected, rtol=0, atol=0)


def test_dtypes_may_differ() -> None:
    """Logits of the teacher in half precision, parameters in float32, an index of int32."""
    case = Case(8, 4, 37, J=2)
    arguments = case.loss_arguments(torch.float32, gain=True)
    arguments["teacher_logits"] = arguments["teacher_logits"].half()
    expected = with_logits_in_memory(**arguments)
    loss = prototype_cross_entropy(**arguments | {"teacher_index": arguments["teacher_index"].int()})
    torch.testing.assert_close(loss, expected)
    for name in ("teacher_logits", "teacher_bias", "weight"):
        loss = prototype_cross_entropy(**arguments | {name: arguments[name].double()})
        assert loss.dtype == torch.float32
        torch.testing.assert_close(loss, expected)


def test_one_target_per_row_may_be_given_without_the_second_dimension() -> None:
    arguments = Case(8, 4, 37, J=1).loss_arguments(torch.float32)
    flat = arguments | {"teacher_index": arguments["teacher_index"][:, 0]}
    assert torch.equal(prototype_cross_entropy(**flat), prototype_cross_entropy(**arguments))


@pytest.mark.parametrize("case", [Case(4, 3, 37, J=2), Case(3, 3, 5, J=0), Case(0, 0, 5)], ids=str)
def test_opcheck(case: Case) -> None:
    operators = torch.ops.dinov2_kernels
    for label, arguments in chunk_arguments(case, torch.float32).items():
        torch.library.opcheck(getattr(operators, label.partition(" ")[0]).default, arguments)
    given = case.loss_arguments(torch.float32, gain=True)
    names = ("features", "weight", "weight_gain", "teacher_logits", "teacher_bias", "teacher_index", "row_weight")
    tensors = [given[name] if given[name] is None else given[name].detach() for name in names]
    for gain in (True, False):
        tensors[2] = tensors[2] if gain else None
        forward = (*tensors, 0.1, 0.04, torch.bfloat16)
        torch.library.opcheck(operators.prototype_cross_entropy.default, forward)
        loss, state, norm = operators.prototype_cross_entropy(*forward)
        for mask in ([True, True], [True, False], [False, True]):
            backward = (loss, *tensors, state, norm, 0.1, 0.04, torch.bfloat16, mask)
            torch.library.opcheck(operators.prototype_cross_entropy_backward.default, backward)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiles_into_one_graph(backend: str) -> None:
    torch._dynamo.reset()
    arguments = Case(6, 4, 37, J=2).loss_arguments(torch.float32, gain=True)

    def loss(features: Tensor, **rest: Any) -> Tensor:
        return prototype_cross_entropy(features * 2, **rest).sin()

    compiled = torch.compile(loss, fullgraph=True, backend=backend)
    result, expected = compiled(**arguments), loss(**arguments)
    torch.testing.assert_close(result, expected)
    torch.testing.assert_close(gradients_of(result, arguments), gradients_of(expected, arguments))


def test_activation_checkpointing() -> None:
    arguments = Case(6, 4, 37, J=2).loss_arguments(torch.float32)
    again = checkpoint(lambda: prototype_cross_entropy(**arguments), use_reentrant=False)
    expected = prototype_cross_entropy(**arguments)
    torch.testing.assert_close(gradients_of(again, arguments), gradients_of(expected, arguments), rtol=0, atol=0)


def test_weights_of_rows_may_be_integers_as_in_soft_cross_entropy() -> None:
    arguments = Case(4, 4, 37).loss_arguments(torch.float32)
    weight = torch.tensor([0, 1, 2, 1])
    result = prototype_cross_entropy(**arguments | {"row_weight": weight})
    assert torch.equal(result, prototype_cross_entropy(**arguments | {"row_weight": weight.float()}))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.int64])
def test_the_bias_may_have_any_dtype_as_in_soft_cross_entropy(dtype: torch.dtype) -> None:
    arguments = Case(4, 4, 37).loss_arguments(torch.float32)
    bias = arguments["teacher_bias"].detach().mul(4).to(dtype)
    result = prototype_cross_entropy(**arguments | {"teacher_bias": bias})
    assert torch.equal(result, prototype_cross_entropy(**arguments | {"teacher_bias": bias.float()}))


NAN = torch.tensor([0.0, torch.nan, 0.0, 0.0])
WRONG_ARGUMENTS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"features": torch.zeros(4)}, ValueError, r"features: expected shape \[N, D\] .* got \[4\]"),
    ({"features": torch.zeros(4, 0)}, ValueError, r"features: expected .* D >= 1, got \[4, 0\]"),
    ({"features": torch.zeros(4, 5, dtype=torch.int32)}, TypeError, "features: .* got torch.int32"),
    ({"weight": torch.zeros(7, 6)}, ValueError, r"weight: expected shape \[K, 5\] .* got \[7, 6\]"),
    ({"weight": torch.zeros(0, 5)}, ValueError, r"weight: expected .* K >= 1 .* got \[0, 5\]"),
    ({"weight": torch.zeros(7, 5, dtype=torch.int8)}, TypeError, "weight: .* got torch.int8"),
    (
        {"weight": torch.zeros(7, 5, device="meta")},
        ValueError,
        "weight: expected the device of features, cpu, got meta",
    ),
    ({"teacher_logits": torch.zeros(4, 6)}, ValueError, r"teacher_logits: expected shape \[M, 7\] .* got \[4, 6\]"),
    ({"teacher_logits": torch.zeros(3, 7)}, ValueError, "teacher_logits: expected 4 rows, .* teacher_index, got 3"),
    ({"teacher_logits": torch.zeros(4, 7, dtype=torch.bool)}, TypeError, "teacher_logits: .* got torch.bool"),
    ({"teacher_bias": torch.zeros(4)}, ValueError, r"teacher_bias: expected shape \[7\] .* got \[4\]"),
    ({"row_weight": torch.zeros(7)}, ValueError, r"row_weight: expected shape \[4\] .* got \[7\]"),
    ({"row_weight": NAN}, ValueError, "row_weight: expected numbers, got NaN in row 1"),
    ({"weight_gain": torch.zeros(1, 7)}, ValueError, r"weight_gain: expected shape \[7\] or \[7, 1\] .* got \[1, 7\]"),
    ({"weight_gain": torch.zeros(7, dtype=torch.int64)}, TypeError, "weight_gain: .* got torch.int64"),
    ({"teacher_index": torch.zeros(4)}, TypeError, "teacher_index: expected integers, got torch.float32"),
    ({"teacher_index": torch.zeros(4, dtype=torch.bool)}, TypeError, "teacher_index: .* got torch.bool"),
    (
        {"teacher_index": torch.zeros(3, dtype=torch.int64)},
        ValueError,
        r"teacher_index: expected .* \[4\] .* got \[3\]",
    ),
    ({"teacher_index": torch.zeros(4, 0, dtype=torch.int64)}, ValueError, r"teacher_index: .* J >= 1, got \[4, 0\]"),
    ({"teacher_index": torch.tensor([0, 1, 4, 2])}, ValueError, "teacher_index: expected .* 0 to 3, got 4"),
    ({"teacher_index": torch.tensor([0, -1, 3, 2])}, ValueError, "teacher_index: expected .* 0 to 3, got -1"),
    ({"student_temperature": 0}, ValueError, "student_temperature: expected a number above 0, got 0"),
    ({"teacher_temperature": -0.1}, ValueError, "teacher_temperature: expected a number above 0, got -0.1"),
    ({"teacher_temperature": float("nan")}, ValueError, "teacher_temperature: expected a number above 0, got nan"),
]


@pytest.mark.parametrize(("changes", "error", "message"), WRONG_ARGUMENTS)
def test_wrong_arguments_are_named(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments = {"features": torch.zeros(4, 5), "weight": torch.zeros(7, 5), "teacher_logits": torch.zeros(4, 7)}
    with pytest.raises(error, match=message):
        prototype_cross_entropy(**arguments | TEMPERATURES | changes)
