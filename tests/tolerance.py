"""The rule for every kernel: at most twice the error of plain PyTorch in the same dtype, both against float64."""

from __future__ import annotations

from torch import Tensor


def assert_at_most_twice_the_error(name: str, result: Tensor, plain: Tensor, exact: Tensor, floor: float) -> None:
    """Compare one result of a kernel with what plain PyTorch makes of the same inputs, and with float64.

    Args:
        name: of the result, for the message.
        result, plain: of the kernel, and of plain PyTorch in the same dtype.
        exact: in float64.
        floor: error that is always allowed, because plain PyTorch may be exact by chance: a few roundings in float32.
    """
    assert result.shape == exact.shape, f"{name}: shape {list(result.shape)}, expected {list(exact.shape)}"
    if exact.numel() == 0:
        return
    error, allowed = ((x.double() - exact).abs().max().item() for x in (result, plain))
    assert error <= 2 * allowed + floor, f"{name}: error {error:.3g}, of plain PyTorch {allowed:.3g}, floor {floor:.3g}"
