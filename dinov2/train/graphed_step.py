"""A training step as CUDA graphs: its thousands of launches become two or three, and hardly any host time is left.

A graph repeats the launches of the step in which it was captured, with the arguments that they had then. So whatever
changes from step to step lies in memory of the device, always the same, that is filled before a replay:

======================================  ===============================================================================
crops, masks, places of masked patches  :class:`~dinov2.objectives.Views`, made on the host and copied
learning rates, weight decay, momentum  one vector, :func:`numbers_of_step`
random numbers                          a replay draws by the seed that PyTorch's generator has at that moment, so
                                        ``torch.manual_seed`` before it gives the draws of an eager pass
teacher temperature                     an argument of kernels: steps are eager until it has come to rest
======================================  ===============================================================================

A seed belongs to a micro-batch, so each micro-batch is a replay, and the update behind them another. The first
micro-batch makes the gradients, the later ones add to them, and the update reads them, all at one place. The graphs of
a step share one pool of memory.

A graph knows addresses, and holds no tensor. Weights, moments, averages and centres live as long as the trainer; inputs
and results are held here; what operators keep on the device is held by :func:`dinov2_kernels._tables.table_cache`.
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
"""Steps before the captured one that run without a graph: they compile and load all kernels, and make what a capture
cannot make, such as handles of libraries, the optimiser's moments, and tables of operators."""

Scalars = dict[str, Tensor]


class Graph(Protocol):
    """What can repeat a function of tensors on one device."""

    def capture(self, function: Callable[[], Scalars]) -> Scalars:
        """Note what ``function`` does, and return its results, which have no values before the first replay."""

    def replay(self) -> None:
        """Do it again, with the same memory."""


class CudaGraph:
    """A CUDA graph.

    Args:
        device: of all tensors.
        pool: memory that it shares with the other graphs of a step.
    """

    def __init__(self, device: torch.device, pool: Any) -> None:
        self._device, self._pool = device, pool
        self._graph = torch.cuda.CUDAGraph()

    def capture(self, function: Callable[[], Scalars]) -> Scalars:
        """Note the launches of ``function``.

        Raises:
            RuntimeError: it does something that no graph can hold, for instance wait for the device.
        """
        gc.collect()  # an autograd graph that lived on would tie the gradients to the stream of an earlier step
        mode = "thread_local"  # other threads go on meanwhile, and pin memory for the batches to come
        try:
            with (
                torch.cuda.device(self._device),
                torch.cuda.graph(self._graph, pool=self._pool, capture_error_mode=mode),
            ):
                return function()
        except RuntimeError as error:
            raise RuntimeError(
                f"cuda_graph must be False for this run, whose step cannot be captured ({error.__context__ or error})"
            ) from error

    def replay(self) -> None:
        """Launch the graph on the current stream."""
        self._graph.replay()


def cuda_graphs(device: torch.device) -> Callable[[], Graph]:
    """What makes the graphs of one step on ``device``."""
    pool = torch.cuda.graph_pool_handle()
    return lambda: CudaGraph(device, pool)


def first_replay(config: RunConfig, start_step: int) -> str:
    """The step from which on a run replays graphs that begins after ``start_step`` finished steps, in words."""
    resting = Schedules(config).first_resting_step
    first = max(resting, start_step) + WARM_UP + 1
    if first > config.steps:
        return f"none: the run ends before step {first:,}, the first that could be replayed"
    rising = "; until then the teacher temperature rises" if resting > start_step else ""
    return f"steps are replayed from step {first:,} on{rising}"


def check_graphable(processes: Processes) -> None:
    """Raise ValueError unless these processes can replay their steps."""
    if processes.device.type != "cuda":
        raise ValueError(f"cuda_graph must be False on a device without CUDA, but the device is {processes.device}")
    if processes.group is not None or processes.world_size > 1:
        raise ValueError(
            "cuda_graph must be False with several processes, or one that torchrun started: their exchange is not"
            f" captured, and this is process {processes.rank} of {processes.world_size}"
        )


class GraphedStep:
    """The parts of a training step on the device, captured once and replayed from then on.

    Args:
        gradients: adds the gradients of a micro-batch to those that are there, or makes them.
        update: clips, steps the optimiser, moves the averages; its argument is the teacher momentum, on the device.
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
        """Capture anew, after a warm-up: for tensors that were put in the places of others."""
        self._steps = 0
        self._views, self._numbers = StaticInputs("batch"), StaticInputs("numbers of a step")
        self._parts: dict[str, _Part] = {}

    def begin(self) -> None:
        """Call it before each step's first micro-batch."""
        self._steps += 1
        if self._steps <= WARM_UP + 1:
            self._optimizer.zero_grad()  # those of the captured step are then made in the graphs' memory, and stay

    def gradients(self, views: Views, *, is_first: bool) -> Scalars:
        """The gradients of one micro-batch of the step; returns its loss terms."""
        inputs = self._views.fill(views)
        return self._run("first" if is_first else "further", lambda: self._gradients(Views(*inputs)))

    def update(self, settings: StepSettings) -> Scalars:
        """What follows on the last micro-batch; returns the gradients' norms."""
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
        return {name: result.clone() for name, result in self._results.items()}  # the next replay writes over them


class StaticInputs:
    """Memory for the inputs of graphs, filled before each replay without waiting for it.

    Args:
        name: of what they are, for errors.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._places: list[Tensor | None] | None = None

    @property
    def device(self) -> torch.device:
        """Where they are, once they were filled."""
        assert self._places is not None
        return next(place.device for place in self._places if place is not None)

    def fill(self, tensors: Sequence[Tensor | None]) -> list[Any]:
        """Copy the tensors of a step to where those of the first one are, and return these places.

        Raises:
            ValueError: they have other shapes than those of the first step.
        """
        if self._places is None:
            self._places = [None if tensor is None else tensor.clone() for tensor in tensors]
        for number, (place, tensor) in enumerate(zip(self._places, tensors, strict=True)):
            if place is None or tensor is None:
                continue
            if place.shape != tensor.shape:
                raise ValueError(
                    f"{self._name}: expected the shapes of the first one, as a CUDA graph needs them, but tensor"
                    f" {number} is {list(tensor.shape)}, not {list(place.shape)}; with data.masks.same_total True and"
                    " batches of one size, no shape changes"
                )
            place.copy_(tensor, non_blocking=True)
        return self._places


def numbers_of_step(groups: list[dict[str, Any]], settings: StepSettings, device: torch.device) -> Tensor:
    """What the update takes from the schedules: [2 G + 1] float32, for G groups of parameters.

    Learning rates [G]; what is left of weights after their decay [G], 1 - rate * weight decay; teacher momentum.
    """
    apply_settings(groups, settings)
    rates = [group["lr"] for group in groups]
    left = [1 - group["lr"] * group["weight_decay"] for group in groups]
    return send(torch.tensor([*rates, *left, settings.teacher_momentum], dtype=torch.float32), device)


@torch.no_grad()
def decay_and_set_rates(groups: list[dict[str, Any]], numbers: Tensor) -> Tensor:
    """Give AdamW its learning rates on the device and do its weight decay, which it takes from the host alone.

    Decoupled weight decay (arXiv:1711.05101) scales the weights before Adam's step. The factor is rounded as weights
    are.

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
