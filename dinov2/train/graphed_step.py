"""A training step as CUDA graphs: two or three launches in place of thousands, and hardly any time on the host.

A graph repeats the kernel launches that were captured, with the same arguments. So every value that changes from step
to step has a fixed place in device memory, which is filled before a replay:

======================================  ===============================================================================
crops, masks, index of masked patches   :class:`~dinov2.objectives.Views`, made on the host and copied
learning rates, weight decay, momentum  one vector, :func:`numbers_of_step`
random numbers                          a replay uses the current seed of PyTorch's generator, so ``torch.manual_seed``
                                        before it gives the same numbers as in eager mode
teacher temperature                     an argument of kernels: steps run eagerly until it is constant
======================================  ===============================================================================

Each micro-batch has its own seed, so each micro-batch is one replay, and the update is another. The first micro-batch
makes the gradients, the later ones add to them, and the update reads them, all at the same addresses. The graphs of a
step share one pool of memory.

A graph stores addresses and keeps no tensor alive. The trainer keeps weights, moments, averages and centres. This
module keeps inputs and results. :func:`dinov2_kernels._tables.table_cache` keeps the operators' tables on the device.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from dinov2.objectives import Views
from dinov2.objectives.batch import send
from dinov2.train.config import RunConfig
from dinov2.train.optimization import Schedules, StepSettings, apply_settings
from dinov2.train.processes import Processes

WARM_UP = 3
"""This many steps run without a graph before the capture. They compile and load all kernels, and they create what a
capture cannot create: library handles, the optimiser's moments and the operators' tables."""

Scalars = dict[str, Tensor]


class Graph(Protocol):
    """Records a function of tensors on one device, and repeats it."""

    def capture(self, function: Callable[[], Scalars]) -> Scalars:
        """Record ``function`` and return its results, which have no values before the first replay."""

    def replay(self) -> None:
        """Repeat the recorded function in the same memory."""


class CudaGraph:
    """A CUDA graph.

    Args:
        device: device of all tensors.
        pool: memory that the graphs of a step share.
    """

    def __init__(self, device: torch.device, pool: Any) -> None:
        self._device, self._pool = device, pool
        self._graph = torch.cuda.CUDAGraph()

    def capture(self, function: Callable[[], Scalars]) -> Scalars:
        """Record the kernel launches of ``function``.

        Raises:
            RuntimeError: it does something that no graph can hold, for instance it waits for the device.
        """
        gc.collect()  # an old autograd graph would tie the gradients to the stream of an earlier step
        mode = "thread_local"  # meanwhile other threads pin memory for the next batches
        try:
            with (
                torch.cuda.device(self._device),
                torch.cuda.graph(self._graph, pool=self._pool, capture_error_mode=mode),
            ):
                return function()
        except RuntimeError as error:
            raise RuntimeError(
                "cuda_graph: expected False for this run, because its step cannot be captured"
                f" ({error.__context__ or error}), got True"
            ) from error

    def replay(self) -> None:
        """Launch the graph on the current stream."""
        self._graph.replay()


def cuda_graphs(device: torch.device) -> Callable[[], Graph]:
    """A function that makes the graphs of one step on ``device``."""
    pool = torch.cuda.graph_pool_handle()
    return lambda: CudaGraph(device, pool)


def first_replay(config: RunConfig, start_step: int) -> str:
    """A sentence: the first step that a run replays if it starts after ``start_step`` finished steps."""
    resting = Schedules(config).first_resting_step
    first = max(resting, start_step) + WARM_UP + 1
    if first > config.steps:
        return f"none: the run ends before step {first:,}, the first that could be replayed"
    rising = "; until then the teacher temperature rises" if resting > start_step else ""
    return f"steps are replayed from step {first:,} on{rising}"


def check_graphable(processes: Processes) -> None:
    """Raise ValueError unless these processes can replay their steps."""
    if processes.device.type != "cuda":
        raise ValueError(f"cuda_graph: expected False on {processes.device}, a device without CUDA, got True")
    if processes.group is not None or processes.world_size > 1:
        raise ValueError(
            "cuda_graph: expected False with several processes or under torchrun, because graphs do not capture the"
            f" exchange between processes, got True in process {processes.rank} of {processes.world_size}"
        )


class GraphedStep:
    """The parts of a training step that run on the device. They are captured once and then replayed.

    Args:
        gradients: adds the gradients of a micro-batch to the existing ones, or makes them if there are none.
        update: clips gradients, steps the optimiser and moves the averages; takes the teacher momentum, on the device.
        optimizer: a fused AdamW.
        new_graph: makes a graph.
    """

    def __init__(
        self,
        gradients: Callable[[Views], Scalars],
        update: Callable[[Tensor], Scalars],
        optimizer: torch.optim.Optimizer,
        new_graph: Callable[[], Graph],
    ) -> None:
        self._gradients, self._update, self._optimizer = gradients, update, optimizer
        self._new_graph = new_graph
        self.forget()

    def forget(self) -> None:
        """Capture again, after a new warm-up. Call it when tensors of the step have been replaced by others."""
        self._steps = 0
        self._views, self._numbers = StaticInputs("batch"), StaticInputs("numbers of a step")
        self._parts: dict[str, _Part] = {}

    def begin(self) -> None:
        """Call it before each step's first micro-batch."""
        self._steps += 1
        if self._steps <= WARM_UP + 1:
            self._optimizer.zero_grad()  # so that the captured step makes the gradients in the graphs' memory

    def gradients(self, views: Views, *, is_first: bool) -> Scalars:
        """Compute the gradients of one micro-batch of the step; returns its loss terms."""
        inputs = self._views.fill(views)
        return self._run("first" if is_first else "further", lambda: self._gradients(Views(*inputs)))

    def update(self, settings: StepSettings) -> Scalars:
        """Update the networks after the last micro-batch; returns the gradients' norms."""
        groups = self._optimizer.param_groups
        (numbers,) = self._numbers.fill([numbers_of_step(groups, settings, self._views.device)])

        def update() -> Scalars:
            return self._update(decay_and_set_rates(groups, numbers))

        return self._run("update", update)

    def _run(self, name: str, function: Callable[[], Scalars]) -> Scalars:
        if self._steps <= WARM_UP:
            return function()
        if name not in self._parts:
            self._parts[name] = _Part(self._new_graph(), function)
        return self._parts[name].replay()


class _Part:
    """A captured function and its results."""

    def __init__(self, graph: Graph, function: Callable[[], Scalars]) -> None:
        self._graph = graph
        self._results = graph.capture(function)

    def replay(self) -> Scalars:
        self._graph.replay()
        return {name: result.clone() for name, result in self._results.items()}  # the next replay overwrites them


class StaticInputs:
    """Fixed memory for the inputs of graphs. It is filled before each replay; the host does not wait for the copies.

    Args:
        name: what the inputs are, for error messages.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._places: list[Tensor | None] | None = None

    @property
    def device(self) -> torch.device:
        """Device of the inputs; it is known after the first fill."""
        assert self._places is not None
        return next(place.device for place in self._places if place is not None)

    def fill(self, tensors: Sequence[Tensor | None]) -> list[Any]:
        """Copy the tensors of a step into the memory of the first step's tensors, and return that memory.

        Raises:
            ValueError: the shapes differ from those of the first step.
        """
        if self._places is None:
            self._places = [None if tensor is None else tensor.clone() for tensor in tensors]
        for number, (place, tensor) in enumerate(zip(self._places, tensors, strict=True)):
            if place is None or tensor is None:
                continue
            if place.shape != tensor.shape:
                raise ValueError(
                    f"{self._name}: expected tensor {number} to keep its shape {list(place.shape)}, as a CUDA graph"
                    f" needs it, got {list(tensor.shape)}; with data.masks.same_total True and batches of one size, no"
                    " shape changes"
                )
            place.copy_(tensor, non_blocking=True)
        return self._places


def numbers_of_step(groups: list[dict[str, Any]], settings: StepSettings, device: torch.device) -> Tensor:
    """The scheduled numbers of an update, [2 G + 1] float32 for G groups of parameters.

    They are the learning rates [G], the factors of weight decay [G], 1 - rate * weight decay, and the teacher momentum.
    """
    apply_settings(groups, settings)
    rates = [group["lr"] for group in groups]
    left = [1 - group["lr"] * group["weight_decay"] for group in groups]
    return send(torch.tensor([*rates, *left, settings.teacher_momentum], dtype=torch.float32), device)


@torch.no_grad()
def decay_and_set_rates(groups: list[dict[str, Any]], numbers: Tensor) -> Tensor:
    """Give AdamW its learning rates on the device, and apply its weight decay, which it can read only from the host.

    Decoupled weight decay (arXiv:1711.05101) scales the weights before Adam's step. The factor is rounded to the
    weights' dtype.

    Returns:
        The teacher momentum, a scalar.
    """
    *factors, momentum = numbers.unbind()
    for group, rate, left in zip(groups, factors, factors[len(groups) :], strict=False):
        decayed = [weight for weight in group["params"] if weight.grad is not None and group["weight_decay_scale"]]
        if decayed:
            torch._foreach_mul_(decayed, left)
        group["lr"], group["weight_decay"], group["capturable"] = rate, 0.0, True
    return momentum
