"""This library's attention behind ``F.scaled_dot_product_attention`` and ``torch.nn.attention.varlen.varlen_attn``.

A library can replace the kernels of PyTorch's flash attention; a user then activates them by name
(``torch.nn.attention.activate_flash_attention_impl``). Our kernels serve the calls that a ViT makes, see
:func:`_is_served`. Every other call goes to PyTorch's own kernel. Both define the log-sum-exp in the same way, so the
backward of one works with the forward of the other.

Legend: B sequences of N tokens, H heads of width D; T tokens packed. SDPA's tensors are [B, H, N, D]. Its results have
the strides of the query, as PyTorch's fake kernels promise to ``torch.compile``.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.attention
from torch import Tensor

from dinov2_kernels.attention.op import KERNEL_DTYPES, MAX_HEAD_DIM

NAME = "DINOV2"

_forward = torch.ops.dinov2_kernels.attention_forward.default
_backward = torch.ops.dinov2_kernels.attention_backward.default


def register_flash_attention() -> None:
    """Register this library's attention with PyTorch under the name ``"DINOV2"``, so that a user can activate it.

    Raises:
        RuntimeError: this version of PyTorch cannot replace and restore its flash attention.

    Examples:
        >>> register_flash_attention()
        >>> torch.nn.attention.activate_flash_attention_impl("DINOV2")
        >>> q, k, v = torch.randn(3, 2, 4, 10, 64)  # 2 sequences, 4 heads, 10 tokens
        >>> nn.functional.scaled_dot_product_attention(q, k, v).shape
        torch.Size([2, 4, 10, 64])
        >>> torch.nn.attention.restore_flash_attention_impl()
    """
    if not hasattr(torch.nn.attention, "restore_flash_attention_impl"):
        raise RuntimeError(
            "register_flash_attention: expected PyTorch 2.11 or later, whose flash attention can be replaced and "
            f"restored, got {torch.__version__}"
        )
    torch.nn.attention.register_flash_attention_impl(NAME, register_fn=_Overrides)


class _Overrides:
    """Our kernels, registered in place of PyTorch's until :meth:`remove`."""

    def __init__(self) -> None:
        self.library: torch.library.Library | None = torch.library.Library("aten", "IMPL")
        for key, overrides in _OVERRIDES.items():
            for name, function in overrides.items():
                _override(self.library, key, name, function)

    def remove(self) -> None:
        self.library = None  # its kernels are removed with it


def _override(library: torch.library.Library, key: str, name: str, function: Callable[..., Any]) -> None:
    """Register a function as a kernel. If it returns NotImplemented, the call goes to PyTorch's own kernel."""
    operator = f"aten::{name}"
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key(operator, key)
    original = torch.library.get_kernel(operator, key) if has_kernel else None

    def kernel(keyset: Any, *args: Any, **kwargs: Any) -> Any:
        result = function(*args, **kwargs)
        if result is not NotImplemented:
            return result
        if original is None:
            raise NotImplementedError(
                f"{operator}: PyTorch has no kernel for {key}, and {NAME} serves only full attention without dropout, "
                f"window, bias or cache, with as many queries as keys, and heads of width 1 to {MAX_HEAD_DIM} in "
                "float32, bfloat16 or float16"
            )
        return original.call_boxed(keyset, *args, **kwargs)

    with warnings.catch_warnings():  # PyTorch warns that this overrides a kernel, which is the purpose
        warnings.simplefilter("ignore", UserWarning)
        library.impl(name, kernel, key, with_keyset=True)


def _is_served(query: Tensor, key: Tensor, value: Tensor, dropout_p: float, is_causal: bool) -> bool:
    """Whether there is a kernel: full attention, equal shapes, no dropout, heads of width up to 128."""
    return (
        query.shape == key.shape == value.shape
        and query.dtype == key.dtype == value.dtype
        and query.dtype in KERNEL_DTYPES
        and query.shape[-1] <= MAX_HEAD_DIM
        and query.numel() > 0
        and dropout_p == 0
        and not is_causal
    )


# ------------------------------------------------------------------------------------------ dense: tensors [B, H, N, D]


def _sdpa_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    return_debug_mask: bool = False,
    *,
    scale: float | None = None,
) -> Any:
    if return_debug_mask or not _is_served(query, key, value, dropout_p, is_causal):
        return NotImplemented
    out, lse = _dense_forward(query, key, value, scale)
    N = query.shape[2]
    return out, lse.contiguous(), None, None, N, N, *_unused(query)


def _sdpa_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    cum_seq_q: Tensor | None,
    cum_seq_k: Tensor | None,
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    philox_seed: Tensor,
    philox_offset: Tensor,
    *,
    scale: float | None = None,
) -> Any:
    if not _is_served(query, key, value, dropout_p, is_causal):
        return NotImplemented
    gradients = _dense_backward(grad, query, key, value, out, lse, scale)
    return tuple(_in_layout_of(x, dx) for x, dx in zip((query, key, value), gradients, strict=True))


def _cpu_sdpa_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    attn_mask: Tensor | None = None,
    scale: float | None = None,
) -> Any:
    if attn_mask is not None or not _is_served(query, key, value, dropout_p, is_causal):
        return NotImplemented
    out, lse = _dense_forward(query, key, value, scale)
    return out, lse.transpose(1, 2).contiguous().transpose(1, 2)  # stored as [B, N, H]


def _cpu_sdpa_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    dropout_p: float,
    is_causal: bool,
    *,
    attn_mask: Tensor | None = None,
    scale: float | None = None,
) -> Any:
    if attn_mask is not None or not _is_served(query, key, value, dropout_p, is_causal):
        return NotImplemented
    gradients = _dense_backward(grad, query, key, value, out, lse, scale)
    return tuple(dx.transpose(1, 2).contiguous().transpose(1, 2) for dx in gradients)  # stored as [B, N, H, D]


def _dense_forward(query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> tuple[Tensor, Tensor]:
    """The result [B, H, N, D] and lse [B, H, N]."""
    B, H, N, D = query.shape
    q, k, v = (_tokens(x) for x in (query, key, value))  # [B N, H, D]
    out, lse = _forward(q, k, v, None, (B, N), D**-0.5 if scale is None else scale)
    return _in_layout_of(query, out.view(B, N, H, D).transpose(1, 2)), lse.view(H, B, N).transpose(0, 1)


def _dense_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, scale: float | None
) -> tuple[Tensor, ...]:
    """Gradients [B, H, N, D] of query, key and value."""
    B, H, N, D = query.shape
    g, q, k, v, o = (_tokens(x) for x in (grad, query, key, value, out))  # [B N, H, D]
    scale = D**-0.5 if scale is None else scale
    lse = lse.transpose(0, 1).reshape(H, B * N).contiguous()
    dqkv: Tensor = _backward(g.contiguous(), q, k, v, o.contiguous(), lse, None, (B, N), scale)
    return dqkv.view(B, N, 3, H, D).permute(2, 0, 3, 1, 4).unbind(0)


def _tokens(x: Tensor) -> Tensor:
    """[B, H, N, D] as [B N, H, D]: a view if tokens of a linear layer were split into heads, else a copy."""
    return _dense(x.transpose(1, 2).flatten(0, 1))


# ------------------------------------------------------------------------------------------- packed: tensors [T, H, D]


def _varlen_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cum_seq_q: Tensor | None,
    cum_seq_k: Tensor | None,
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    return_debug_mask: bool,
    *,
    scale: float | None = None,
    window_size_left: int | None = None,
    window_size_right: int | None = None,
    **options: Any,  # key cache and bias options: alibi_slopes, seqused_k, block_table, num_splits
) -> Any:
    is_plain = not return_debug_mask and all(option is None for option in options.values())
    window = (window_size_left, window_size_right)
    if not (is_plain and _is_full(window, cum_seq_q, cum_seq_k)):
        return NotImplemented
    if not _is_served(query, key, value, dropout_p, is_causal):
        return NotImplemented
    q, k, v = (_dense(x) for x in (query, key, value))
    out, lse = _forward(q, k, v, cum_seq_q, (), q.shape[-1] ** -0.5 if scale is None else scale)
    return _in_layout_of(query, out), lse, *_unused(query)


def _varlen_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    cum_seq_q: Tensor,
    cum_seq_k: Tensor,
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    rng_state: Tensor,
    unused: Tensor,
    *,
    scale: float | None = None,
    window_size_left: int | None = None,
    window_size_right: int | None = None,
) -> Any:
    if not _is_full((window_size_left, window_size_right), cum_seq_q, cum_seq_k):
        return NotImplemented
    if not _is_served(query, key, value, dropout_p, is_causal):
        return NotImplemented
    q, k, v = (_dense(x) for x in (query, key, value))
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    dqkv = _backward(grad.contiguous(), q, k, v, out.contiguous(), lse.contiguous(), cum_seq_q, (), scale)
    return tuple(_in_layout_of(x, dx) for x, dx in zip((query, key, value), dqkv.unbind(1), strict=True))


def _is_full(window: tuple[int | None, int | None], cum_seq_q: Tensor | None, cum_seq_k: Tensor | None) -> bool:
    """Whether every query sees all keys of its own sequence, and no others.

    Offsets of queries and keys count as equal if they are the same memory. A comparison of their values would wait for
    the GPU.
    """
    if cum_seq_q is None or cum_seq_k is None or any(side not in (None, -1) for side in window):
        return False
    is_same = cum_seq_q.data_ptr() == cum_seq_k.data_ptr() and cum_seq_q.shape == cum_seq_k.shape
    return is_same and cum_seq_q.dtype == torch.int32 and cum_seq_q.is_contiguous()


# --------------------------------------------------------------------------------------------------------------- layout


def _dense(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _in_layout_of(x: Tensor, result: Tensor) -> Tensor:
    """The result with the strides of ``empty_like(x)``."""
    if result.stride() == torch.empty_like(x, device="meta").stride():
        return result
    return torch.empty_like(x).copy_(result)


def _unused(query: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The values that flash attention returns for its dropout: random state, offset, mask."""
    state = query.new_empty(2, dtype=torch.uint64)
    return state, query.new_empty((), dtype=torch.uint64), query.new_empty(0)


_VARLEN: dict[str, Callable[..., Any]] = {
    "_flash_attention_forward": _varlen_forward,
    "_flash_attention_backward": _varlen_backward,
}
_OVERRIDES: dict[str, dict[str, Callable[..., Any]]] = {
    "CUDA": {
        "_scaled_dot_product_flash_attention": _sdpa_forward,
        "_scaled_dot_product_flash_attention_backward": _sdpa_backward,
        **_VARLEN,
    },
    "CPU": {
        "_scaled_dot_product_flash_attention_for_cpu": _cpu_sdpa_forward,
        "_scaled_dot_product_flash_attention_for_cpu_backward": _cpu_sdpa_backward,
        **_VARLEN,  # PyTorch has no kernel for CPU
    },
}
