"""Checks of plain numbers among arguments. It is a file of its own because every layer of the package uses it."""

from __future__ import annotations

import operator
from typing import Any

import torch


def check_above_0(name: str, value: Any) -> None:
    """Raise ValueError unless an argument is a number above 0, of Python or NumPy."""
    try:
        holds = bool(value > 0)
    except TypeError:
        holds = False
    if not holds:
        raise ValueError(f"{name}: expected a number above 0, got {value!r}")


def is_whole(value: Any) -> bool:
    """Whether this is a whole number, of Python or NumPy. 2.0 is none: PyTorch would cut off what follows the point."""
    if type(value) is int or isinstance(value, torch.SymInt):
        return True
    try:
        operator.index(value)
    except TypeError:
        return False
    return True
