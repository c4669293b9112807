"""Sinkhorn-Knopp in scaling-vector form, in the log domain: the definition every kernel is tested against.

With logits x [B, K], temperature T and E = exp(x / T), DINOv2 (arXiv:2304.07193, section 4, after SwAV,
arXiv:2006.09882) alternates

    u_k = 1 / sum_b E_bk v_b          (every prototype receives the same mass)
    v_b = 1 / sum_k E_bk u_k          (every sample hands out the same mass)

from v = 1, and the targets are the rows of E_bk u_k, normalised: ``softmax(x / T + log u)``. The global
normalisations of the textbook form cancel, so the iterations only have to compute log u.

With the row softmax p_bk = E_bk u_k v_b, an update of u needs no v: ``u_k <- u_k / sum_b p_bk``. Only the first update,
from v = 1, is a plain log-sum-exp over each column. After it, every column of p sums to at least 1 / (B K), so nothing
underflows, however large the logits are.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dinov2_kernels._library import accumulation_dtype


def scale(logits: Tensor, temperature: float) -> Tensor:
    """x / T [B, K], in the accumulation dtype: float64 for float64 logits, float32 otherwise."""
    return logits.to(accumulation_dtype(logits)) / temperature


def column_logsumexp(logits: Tensor, temperature: float) -> Tensor:
    """log sum_b exp(x_bk / T) [K]; -inf where B = 0."""
    return torch.logsumexp(scale(logits, temperature), dim=0)


def column_mass(logits: Tensor, temperature: float, bias: Tensor) -> Tensor:
    """sum_b softmax_k(x_b / T + bias) [K]: the mass that each prototype receives from the rows."""
    return torch.softmax(scale(logits, temperature) + bias, dim=1).sum(dim=0)


def assign(logits: Tensor, temperature: float, bias: Tensor) -> Tensor:
    """softmax_k(x_b / T + bias) [B, K]: the rows' assignments to prototypes."""
    return torch.softmax(scale(logits, temperature) + bias, dim=1)


def zero_if_empty(log_mass: Tensor) -> Tensor:
    """log_mass [K] with 0 instead of -inf: a prototype that receives no mass keeps its bias."""
    return log_mass.nan_to_num(nan=torch.nan, posinf=torch.inf, neginf=0.0)


def sinkhorn_bias(logits: Tensor, temperature: float, n_iterations: int = 3) -> Tensor:
    """log u [K] after the iterations, for a batch that one process holds."""
    bias = -zero_if_empty(column_logsumexp(logits, temperature))
    for _ in range(n_iterations - 1):
        bias = bias - zero_if_empty(column_mass(logits, temperature, bias).log())
    return bias
