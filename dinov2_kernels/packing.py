"""PackedLayout: how sequences of different lengths follow each other in one tensor [T, ...], without padding."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from dinov2_kernels._library import is_tracing, refuse_symbols
from dinov2_kernels._tables import table_cache

_INTEGERS = (int, torch.SymInt)


@dataclass(frozen=True)
class PackedLayout:
    """Runs of equally long sequences, laid out one after the other.

    Crops of a training batch come in few sizes, so a handful of runs describes hundreds of sequences:
    ``PackedLayout([(128, 261), (512, 53)])`` is 128 sequences of 261 tokens followed by 512 of 53. The layout lives on
    the host. It is immutable and hashable, and two layouts with the same runs are equal.

    Args:
        runs: (count, length) of each run: the number of its sequences, and the tokens in each. Both may be 0.

    Attributes:
        runs: the runs as a tuple of (count, length).
        flat_runs: the same numbers in one tuple, (count, length, count, length, ...). Operators take this form.
        num_sequences: number of sequences S.
        total_tokens: number of tokens T.
        max_length: length of the longest sequence; 0 if there is none.

    Raises:
        ValueError: a run is not a pair of non-negative integers.

    Examples:
        >>> layout = PackedLayout([(2, 5), (3, 2)])  # two sequences of 5 tokens, then three of 2
        >>> layout.num_sequences, layout.total_tokens, layout.max_length
        (5, 16, 5)
        >>> packed = layout.pack([torch.zeros(2, 5, 8), torch.ones(3, 2, 8)])
        >>> packed.shape
        torch.Size([16, 8])
        >>> [tokens.shape for tokens in layout.unpack(packed)]
        [torch.Size([2, 5, 8]), torch.Size([3, 2, 8])]
        >>> layout.cu_seqlens("cpu")
        tensor([ 0,  5, 10, 12, 14, 16], dtype=torch.int32)
    """

    runs: tuple[tuple[int, int], ...]
    flat_runs: tuple[int, ...] = field(init=False, repr=False, compare=False)
    num_sequences: int = field(init=False, repr=False, compare=False)
    total_tokens: int = field(init=False, repr=False, compare=False)
    max_length: int = field(init=False, repr=False, compare=False)

    def __init__(self, runs: Iterable[Sequence[int]]) -> None:
        if not hasattr(runs, "__iter__"):
            raise _wrong_runs(runs)
        checked = tuple(_check_run(run) for run in runs)
        set_field = object.__setattr__  # the dataclass is frozen
        set_field(self, "runs", checked)
        set_field(self, "flat_runs", tuple(n for run in checked for n in run))
        set_field(self, "num_sequences", sum(count for count, _ in checked))
        set_field(self, "total_tokens", sum(count * length for count, length in checked))
        set_field(self, "max_length", max([0, *(length for count, length in checked if count)]))

    @classmethod
    def from_lengths(cls, lengths: Iterable[int]) -> PackedLayout:
        """Layout of sequences of the given lengths. Consecutive sequences of equal length become one run."""
        return cls([(len(list(group)), length) for length, group in groupby(lengths)])

    @property
    def lengths(self) -> list[int]:
        """Length of every sequence [S]."""
        return [length for count, length in self.runs for _ in range(count)]

    def cu_seqlens(self, device: torch.device | str) -> Tensor:
        """Offsets of the sequences, as variable-length kernels take them.

        The last 128 results are cached, so that a training step copies nothing to the device.

        Returns:
            [S + 1] int32: sequence s occupies the tokens ``cu_seqlens[s]`` to ``cu_seqlens[s + 1] - 1``.
        """
        device = torch.device(device)
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", torch.cuda.current_device())
        # A cached tensor is real, and must not enter a traced graph.
        return (_cu_seqlens if torch.compiler.is_compiling() else _cached_cu_seqlens)(self, device)

    def pack(self, tensors: Sequence[Tensor]) -> Tensor:
        """Join one tensor per run into one packed tensor.

        Args:
            tensors: one [count, length, ...] per run, with equal trailing dimensions.

        Returns:
            [T, ...]; a view if there is only one run.

        Raises:
            ValueError: the tensors do not have the shapes that the layout describes.
        """
        if len(tensors) != len(self.runs):
            raise ValueError(f"tensors: expected one for each of the {len(self.runs)} runs, got {len(tensors)}")
        for index, (run, tensor) in enumerate(zip(self.runs, tensors, strict=True)):
            if tuple(tensor.shape[:2]) != run:
                expected = f"[{run[0]}, {run[1]}, ...]"
                raise ValueError(f"tensors[{index}]: expected shape {expected}, got {list(tensor.shape)}")
        flat = [tensor.flatten(0, 1) for tensor in tensors]
        return flat[0] if len(flat) == 1 else torch.cat(flat)

    def unpack(self, packed: Tensor) -> list[Tensor]:
        """Split [T, ...] into one view [count, length, ...] per run.

        Raises:
            ValueError: ``packed`` does not have the number of tokens that the layout describes.
        """
        self.check(packed, "packed")
        if len(self.runs) == 1:
            return [_sequences(packed, self.runs[0])]
        pieces = packed.split([count * length for count, length in self.runs])
        return [_sequences(piece, run) for piece, run in zip(pieces, self.runs, strict=True)]

    def check(self, packed: Tensor, name: str) -> None:
        """Raise ValueError unless the argument called ``name`` has one row for each token of this layout."""
        if packed.dim() == 0 or packed.shape[0] != self.total_tokens:
            got = packed.shape[0] if packed.dim() else "a tensor without dimensions"
            raise ValueError(f"{name}: expected {self.total_tokens} tokens, as the layout describes, got {got}")


def _sequences(packed: Tensor, run: tuple[int, int]) -> Tensor:
    """The view [count, length, ...] of a run. ``unflatten`` would fix these sizes in an ONNX file."""
    return packed.view(*run, *packed.shape[1:])


def _check_run(run: Sequence[int]) -> tuple[int, int]:
    try:
        count, length = run
    except (TypeError, ValueError):
        raise _wrong_runs(run) from None
    if not (isinstance(count, _INTEGERS) and isinstance(length, _INTEGERS)):
        refuse_symbols(count, length)
        if is_tracing():  # sizes are then tensors, which a check would turn into constants
            return count, length
        if any(isinstance(part, Tensor) for part in (run, count, length)):  # it may be on a GPU
            raise _wrong_runs(run)
        try:  # NumPy's integers become Python's
            count, length = operator.index(count), operator.index(length)
        except TypeError:
            raise _wrong_runs(run) from None
    if not (count >= 0 and length >= 0):
        raise _wrong_runs(run)
    return count, length


def _wrong_runs(came: Any) -> ValueError:
    return ValueError(f"runs: expected pairs (count, length) of integers >= 0, got {came!r}")


def _cu_seqlens(layout: PackedLayout, device: torch.device) -> Tensor:
    # Kernels save this tensor for their backward pass. Autograd does not save tensors made in inference mode.
    with torch.inference_mode(False):
        pieces, token = [torch.zeros(1, dtype=torch.int32, device=device)], 0
        for count, length in layout.runs:  # not sequence by sequence: a traced graph serves every count and length
            pieces.append(token + length * torch.arange(1, count + 1, dtype=torch.int32, device=device))
            token += count * length
        return torch.cat(pieces)  # [S + 1]


_cached_cu_seqlens = table_cache(maxsize=128)(_cu_seqlens)
