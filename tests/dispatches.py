"""How often operators run: what reaches PyTorch's dispatcher, by the name of the operator."""

from __future__ import annotations

from collections import Counter
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

VIEWS = {"view", "_unsafe_view", "t", "transpose", "split", "detach", "select", "unbind", "alias", "expand", "slice"}
"""Operators that make no tensor: they cost the dispatcher, but launch nothing."""


class Calls(TorchDispatchMode):
    """Counts calls within a ``with`` block; PyTorch's own operators stand without their ``aten::``."""

    def __init__(self) -> None:
        super().__init__()
        self.of: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.of[function._schema.name.removeprefix("aten::")] += 1
        return function(*args, **(kwargs or {}))

    def __str__(self) -> str:
        return "\n".join(f"{count:4d}  {name}" for name, count in self.of.most_common())
