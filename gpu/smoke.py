"""Smoke test on a GPU: run each operator once, forward and backward in bfloat16, and compare it with its reference.

    python -m gpu.smoke [OPERATOR ...]

If an operator raises an exception, it is printed, and the next operators still run.
"""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable

import torch
from torch import Tensor

import dinov2_kernels as dk
from dinov2_kernels import PackedLayout
from dinov2_kernels.gelu import gelu_backward_
from dinov2_kernels.residual import Connection, draw_subsets, residual_chain

Tensors = dict[str, Tensor]
LAYOUT = PackedLayout([(4, 257), (16, 50)])


def random(*shape: int, dtype: torch.dtype = torch.bfloat16, requires_grad: bool = True) -> Tensor:
    """Random numbers with gradients; after the same seed they are the same."""
    return torch.randn(*shape, device="cuda", dtype=dtype).requires_grad_(requires_grad)


def with_gradients(result: Tensor, **inputs: Tensor) -> Tensors:
    """The result, and the gradients of the inputs for one gradient of the result."""
    direction = torch.linspace(-1, 1, result.numel(), device="cuda", dtype=result.dtype).view_as(result)
    gradients = torch.autograd.grad(result, list(inputs.values()), direction)
    return {"result": result, **dict(zip(inputs, gradients, strict=True))}


def attention() -> Tensors:
    qkv = random(LAYOUT.total_tokens, 3, 6, 64)
    return with_gradients(dk.varlen_attention_qkvpacked(qkv, LAYOUT), qkv=qkv)


def residual() -> Tensors:
    """Two connections; between them one kernel does scatter, gather and norm."""
    x, gamma, bias = random(LAYOUT.total_tokens, 384), random(384), random(384)
    norm = torch.nn.LayerNorm(384, device="cuda", dtype=torch.bfloat16)
    subsets = draw_subsets(x, LAYOUT, [0.3, 0.3])
    connections = [Connection(lambda h, _: h.tanh(), subset, norm, gamma, bias) for subset in subsets]
    y = residual_chain(x, LAYOUT, connections)
    return with_gradients(y, x=x, gamma=gamma, bias=bias, weight=norm.weight, norm_bias=norm.bias)


def gelu() -> Tensors:
    grad, z = random(1000, 1024, requires_grad=False), random(1000, 1024, requires_grad=False)
    h, total = gelu_backward_(grad, z)
    return {"h": h, "dz": grad, "sum": total}


def swiglu() -> Tensors:
    x12 = random(1000, 2 * 1024)
    return with_gradients(dk.swiglu(x12), x12=x12)


def sinkhorn() -> Tensors:
    logits = random(300, 8192)
    return {"bias": dk.sinkhorn_bias(logits, 0.07), "assignments": dk.sinkhorn_knopp(logits, 0.07)}


def koleo() -> Tensors:
    x = random(64, 384)
    return with_gradients(dk.koleo_loss(x), x=x)


def cross_entropy() -> Tensors:
    student, teacher = random(300, 8192), random(300, 8192, requires_grad=False)
    bias = random(8192, dtype=torch.float32, requires_grad=False)
    temperatures = {"student_temperature": 0.1, "teacher_temperature": 0.07}
    return with_gradients(dk.soft_cross_entropy(student, teacher, teacher_bias=bias, **temperatures), student=student)


def prototype_cross_entropy() -> Tensors:
    features, weight, teacher = random(300, 256), random(8192, 256), random(300, 8192, requires_grad=False)
    temperatures = {"student_temperature": 0.1, "teacher_temperature": 0.07}
    loss = dk.prototype_cross_entropy(features, weight, teacher, **temperatures)
    return with_gradients(loss, features=features, weight=weight)


def photometric() -> Tensors:
    import numpy as np

    images = torch.randint(0, 256, (8, 96, 96, 3), dtype=torch.uint8, device="cuda")
    plan = dk.draw_plan(dk.PhotometricDistribution(), [np.random.default_rng(n) for n in range(8)]).to("cuda")
    return {"result": dk.photometric(images, plan, mean=(0.5,) * 3, std=(0.2,) * 3)}


OPERATORS: dict[str, Callable[[], Tensors]] = {
    function.__name__: function
    for function in (
        attention,
        residual,
        gelu,
        swiglu,
        sinkhorn,
        koleo,
        cross_entropy,
        prototype_cross_entropy,
        photometric,
    )
}


def largest_error(function: Callable[[], Tensors]) -> float:
    """Largest error in all results of an operator, as a share of each result's largest value."""
    torch.manual_seed(0)
    own = function()
    torch.manual_seed(0)
    with dk.use_backend("reference"):
        expected = function()
    shares = [
        (own[name].double() - value.double()).abs().max() / value.double().abs().max().clamp(min=1e-9)
        for name, value in expected.items()
    ]
    return max(share.item() for share in shares)


def main(names: list[str]) -> int:
    """Run these operators, or all; return how many fail. Unknown names are ignored."""
    failures = 0
    for name in [name for name in OPERATORS if name in (names or OPERATORS)]:
        try:
            error = largest_error(OPERATORS[name])
            verdict = "ok" if error < 0.05 else "WRONG"
            print(f"smoke {name}: {verdict}, largest error {error:.2g}", flush=True)
            failures += verdict != "ok"
        except Exception:
            failures += 1
            print(f"smoke {name}: EXCEPTION\n{traceback.format_exc()}", flush=True)
    return failures


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
