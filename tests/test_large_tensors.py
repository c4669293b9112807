"""Logits of more than 2^31 elements: what lies beyond is found. Untouched zeros take no memory, so 4 GB take little."""

from __future__ import annotations

import torch

import dinov2_kernels as dk

N, K, T = 2**15 + 3, 65536, 0.07


def logits_with_a_tail() -> tuple[torch.Tensor, torch.Tensor]:
    """Logits [N, K] that are zero but for the last three rows, and these."""
    logits = torch.zeros(N, K, dtype=torch.bfloat16)
    tail = torch.randn(3, K, generator=torch.Generator().manual_seed(0)).bfloat16()
    logits[-3:] = tail
    assert logits.numel() > 2**31
    return logits, tail


def test_sinkhorn_bias() -> None:
    logits, tail = logits_with_a_tail()
    scaled = tail.double() / T
    bias = -torch.log(N - 3 + scaled.exp().sum(dim=0))
    mass = (N - 3) * torch.softmax(bias, dim=0) + torch.softmax(scaled + bias, dim=1).sum(dim=0)
    expected = bias - mass.log()
    torch.testing.assert_close(dk.sinkhorn_bias(logits, T, n_iterations=2).double(), expected, rtol=1e-5, atol=1e-5)


def test_soft_cross_entropy() -> None:
    logits, tail = logits_with_a_tail()
    teacher = torch.randn(1, K, generator=torch.Generator().manual_seed(1)).bfloat16()
    operators = torch.ops.dinov2_kernels
    index = torch.zeros(N, 1, dtype=torch.int64)
    loss, *norms = operators.soft_cross_entropy(logits, teacher, index, None, None, 0.1, T)
    expected, *tail_norms = operators.soft_cross_entropy(tail, teacher, index[:3], None, None, 0.1, T)
    assert torch.equal(loss[-3:], expected)
    grad = torch.ones(N)
    operators.soft_cross_entropy_backward_(logits, grad, teacher, index, None, None, 0.1, T, *norms)
    gradient = operators.soft_cross_entropy_backward(
        grad[:3], tail, teacher, index[:3], None, None, 0.1, T, *tail_norms
    )
    assert torch.equal(logits[-3:], gradient)
