"""One optimiser step: forward, backward, gradient clipping, update, and the update of the EMA teacher.

All random numbers of a micro-batch depend only on the seed and on the micro-batch's number in the run. This holds for
the data (see :func:`dinov2.data.batches`) and for stochastic depth, because PyTorch's generator is seeded before each
micro-batch. So a checkpoint holds no generator states, a probe may draw random numbers, and a resumed run repeats the
uninterrupted run bitwise on the CPU. (GPUs add up in no fixed order.)

Several processes train as one on their joint batch: the objective's statistics cover all processes, and gradients are
averaged over them during the backward pass of the last micro-batch. DistributedDataParallel averages them, or FSDP if
the networks are split among the processes.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from typing import Any, cast

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from dinov2.data import Batch, RawBatch, finish
from dinov2.models import VisionTransformer
from dinov2.models.checkpoints.run import RunCheckpoint
from dinov2.objectives import Distillation, SelfDistillation, Views, build_network, build_networks
from dinov2.train.blocks import prepare_blocks
from dinov2.train.config import DistillConfig, RunConfig
from dinov2.train.graphed_step import Graph, GraphedStep, check_graphable, cuda_graphs
from dinov2.train.metrics import SKIPPED
from dinov2.train.networks import load_centers, read_frozen_teacher
from dinov2.train.optimization import Schedules, apply_settings, parameter_groups
from dinov2.train.precision import Arithmetic, WeightCopies, keeps_weight_copies, with_definite_precision
from dinov2.train.processes import Processes, resolve_device
from dinov2.train.run_directory import flatten
from dinov2.train.sharding import exchange_gradients, gathered, split_objective

Probe = Callable[[VisionTransformer], dict[str, float]]
"""Measures the teacher's backbone in eval mode and without gradients, for example by k-NN accuracy."""


class Trainer:
    """Networks, objective and optimiser of a run, and its optimiser step.

    Args:
        config: the run.
        processes: the processes of the run; None means this one alone.
    """

    def __init__(self, config: RunConfig, processes: Processes | None = None) -> None:
        self.processes = processes = processes or Processes(resolve_device(config.device))
        self.device = processes.device
        if config.cuda_graph:
            check_graphable(processes)
        self.config = config = with_definite_precision(config, self.device)
        self.arithmetic = Arithmetic(config.precision, self.device)
        torch.manual_seed(config.seed)
        self._is_split = processes.group is not None and config.parallel.sharding != "replicate"
        self._replicas = None
        if self._is_split:
            self.objective = split_objective(self._build, config.parallel, processes, self.arithmetic.dtype)
        else:
            self.objective = self._build().to(self.device)
            if processes.group is not None:
                self._replicas = _replicated(self.objective, processes.group)
        kept = keeps_weight_copies(config, self.device.type, is_split=self._is_split)
        running = [*self.objective.students.values(), self.objective.teacher]
        self._weight_copies = WeightCopies(running if kept else [], self.arithmetic.dtype)
        self.schedules = Schedules(config)
        optim = config.optim
        groups = [
            group
            for student in self.objective.students.values()
            for group in parameter_groups(
                student, layer_decay=optim.layer_decay, patch_embed_lr_scale=optim.patch_embed_lr_scale
            )
        ]
        self.optimizer = torch.optim.AdamW(groups, betas=(optim.beta1, optim.beta2), fused=True)
        self._names: dict[Tensor, str] = {
            parameter: name for name, parameter in self.objective.student.named_parameters()
        }
        self._graphed: GraphedStep | None = None
        if config.cuda_graph:
            self.replay_steps(cuda_graphs(self.device))

    def replay_steps(self, new_graph: Callable[[], Graph]) -> None:
        """Capture the step in graphs and replay them, as soon as the teacher temperature is constant."""
        temperature = self.schedules.temperature.base

        def gradients(views: Views) -> dict[str, Tensor]:
            return self._gradients(views, temperature)

        self._graphed = GraphedStep(gradients, self._update, self.optimizer, new_graph)

    def _build(self) -> SelfDistillation:
        objective = build_objective(self.config, self.processes.group)
        prepare_blocks(objective, self.config)
        return objective

    def step(self, step: int, micro_batches: Iterator[Batch | RawBatch]) -> dict[str, Tensor]:
        """One optimiser step over ``accumulation_steps`` micro-batches.

        Returns:
            Scalars on the device: the objective's terms (means over micro-batches and processes) and the gradient norm
            of each student module before clipping.
        """
        config, settings = self.config, self.schedules(step)
        graphed = self._graphed if step >= self.schedules.first_resting_step else None
        if graphed is None:
            apply_settings(self.optimizer.param_groups, settings)
            self.optimizer.zero_grad()
        else:
            graphed.begin()
        self._weight_copies.renew()  # here, because the weights may have changed outside of steps
        first = step * config.accumulation_steps
        last = first + config.accumulation_steps - 1
        terms = []
        for number in range(first, last + 1):
            if self._is_split:
                for student in self.objective.students.values():
                    exchange_gradients(student, number == last)
            with nullcontext() if self._replicas is None or number == last else self._replicas.no_sync():
                batch = self._on_device(next(micro_batches), number)
                if graphed is None:
                    terms.append(self._gradients(batch, settings.teacher_temperature))
                else:
                    terms.append(graphed.gradients(self._views(batch), is_first=number == first))
        norms = self._update(settings.teacher_momentum) if graphed is None else graphed.update(settings)
        scalars = {name: torch.stack([term[name] for term in terms]).mean() for name in terms[0]} | norms
        return self.processes.mean(scalars)

    def _trained_modules(self) -> Iterator[tuple[str, nn.Module]]:
        """The backbone and the heads of every student, each with its name."""
        for student, network in self.objective.students.items():
            for name, module in network.items():
                yield self.objective.label(student, name), module

    def _on_device(self, batch: Batch | RawBatch, number: int) -> Batch:
        """Finish micro-batch ``number`` of the run on the device, and seed the random numbers of its passes."""
        on_device = finish(batch, self.config.data.augmentation, self.device)
        world_size, rank = self.processes.world_size, self.processes.rank
        torch.manual_seed(micro_batch_seed(self.config.seed, number * world_size + rank))
        self._last_crops = on_device["global_crops"]
        return on_device

    def _views(self, batch: Batch) -> Views:
        return self.objective.views(cast(Mapping[str, Tensor], batch))

    def _gradients(self, batch: Batch | Views, teacher_temperature: float) -> dict[str, Tensor]:
        """Add the gradients of a micro-batch; returns its loss terms."""
        with self._weight_copies.in_place():
            with self.arithmetic.autocast():
                terms: dict[str, Tensor] = (self._replicas or self.objective)(batch, teacher_temperature)
            self.arithmetic.backward(terms["total"] / self.config.accumulation_steps)
        return {name: term.detach().float() for name, term in terms.items()}

    def _update(self, momentum: float | Tensor) -> dict[str, Tensor]:
        """Clip the gradients and update students and averages; returns the norms and, in float16, the skipped flag."""
        self.arithmetic.unscale(self.optimizer)
        scalars = {
            f"grad_norm/{name}": _whole(nn.utils.clip_grad_norm_(module.parameters(), self.config.optim.clip_grad_norm))
            for name, module in self._trained_modules()
        }
        self.arithmetic.step(self.optimizer)
        if self.arithmetic.scaler is not None:
            skipped = ~torch.stack(list(scalars.values())).isfinite().all()
            scalars[SKIPPED] = skipped.float()
            momentum = torch.where(skipped, 1.0, momentum)
        self.objective.update_average(momentum)
        return scalars

    def collapse_statistics(self, step: int) -> dict[str, float]:
        """Measure how the targets of the last micro-batch spread over the prototypes, as a mean over processes.

        It needs a forward pass of the teacher. All processes must call it.
        """
        with self.arithmetic.autocast():
            statistics = self.objective.collapse_statistics(self._last_crops, self.schedules(step).teacher_temperature)
        return {name: float(value) for name, value in self.processes.mean(statistics).items()}

    def measure(self, probe: Probe) -> dict[str, float]:
        """Run ``probe`` on each of the :attr:`products`. They run uncompiled, because its images may have any size."""
        uncompiled = torch.compiler.set_stance("force_eager") if self.config.compile else nullcontext()
        with torch.no_grad(), self.arithmetic.autocast(), uncompiled:
            return {
                self.objective.label(name, metric): value
                for name, backbone in self.products.items()
                for metric, value in probe(backbone).items()
            }

    @property
    def products(self) -> dict[str, VisionTransformer]:
        """The backbones that a run produces, by the name of the student."""
        return {name: cast(VisionTransformer, network["backbone"]) for name, network in self.objective.averages.items()}

    def state_dict(self) -> dict[str, Any]:
        """The state: networks by facebook's names, the objective's buffers (centres), moments by parameter name.

        The moving average of the student is called teacher, also in a distillation; the frozen teacher is not part of
        the state. Nothing is copied or gathered: these are the tensors that training changes, and they may be split.
        """
        return {**self._weights(), "optimizer": self._moments()}

    def restore(self, checkpoint: RunCheckpoint) -> None:
        """Load a checkpoint of the same run; number of processes and sharding may differ.

        Each process reads only the tensors that it holds.

        Raises:
            ValueError: the checkpoint does not fit the run.
        """
        parameters = dict(self.objective.student.named_parameters())
        moments: dict[str, dict[str, Tensor]] = {}
        for name, stored in checkpoint.tensors.items():
            if name.startswith("optimizer."):
                _, parameter, moment = checkpoint.place(name)
                like = parameters.get(parameter)
                moments.setdefault(parameter, {})[moment] = (
                    torch.zeros_like(like, requires_grad=False)
                    if like is not None and like.shape == stored.size
                    else torch.zeros(stored.size, dtype=stored.properties.dtype)
                )
        targets = dict(flatten({**self._weights(), "optimizer": moments}))
        if surplus := sorted(checkpoint.tensors.keys() - targets.keys()):
            raise ValueError(f"checkpoint {checkpoint.path} does not fit: this run has no {surplus[0]}")
        checkpoint.read_into(targets)
        order = [self._names[parameter] for group in self.optimizer.param_groups for parameter in group["params"]]
        by_index = {index: moments[name] for index, name in enumerate(order) if name in moments}
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": by_index})
        if self._graphed is not None:
            self._graphed.forget()  # the moments are new tensors

    def _weights(self) -> dict[str, Any]:
        return {
            "student": self.objective.student.state_dict(),
            "teacher": self.objective.average.state_dict(),
            "objective": dict(self.objective.named_buffers()),
        }

    def _moments(self) -> dict[str, dict[str, Tensor]]:
        return {self._names[parameter]: state for parameter, state in self.optimizer.state.items()}

    def finished_backbones(self) -> dict[str, VisionTransformer]:
        """The :attr:`products` with whole weights; split ones are copied to the host."""
        return {name: self._whole(backbone) if self._is_split else backbone for name, backbone in self.products.items()}

    def _whole(self, backbone: VisionTransformer) -> VisionTransformer:
        with torch.device("meta"):
            whole = VisionTransformer(backbone.config)
        whole.load_state_dict(gathered(backbone.state_dict()), assign=True)
        return whole


def _whole(norm: Tensor) -> Tensor:
    """A gradient norm over all shards of a module."""
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def _replicated(objective: SelfDistillation, group: dist.ProcessGroup) -> DistributedDataParallel:
    """The objective with gradients averaged over the processes.

    The centres are equal in all processes without broadcasts. DistributedDataParallel gets no device, because it would
    move its inputs there, but masks stay on the host.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # PyTorch 2.10 lacks the new name of broadcast_buffers
        return DistributedDataParallel(
            objective, process_group=group, broadcast_buffers=False, gradient_as_bucket_view=True
        )


def micro_batch_seed(seed: int, number: int) -> int:
    """Seed of PyTorch's generators for one micro-batch; it is hashed, so neighbouring seeds are independent."""
    return int(np.random.SeedSequence((seed, number)).generate_state(1, np.uint64)[0] >> 1)


def build_objective(config: RunConfig, group: dist.ProcessGroup | None) -> SelfDistillation:
    """Students, teacher and objective of a run on the host, with weights drawn by PyTorch's generator.

    A frozen teacher and its centres are read from the path in the configuration.

    Raises:
        FileNotFoundError, ValueError: the frozen teacher does not exist, has no heads, or has changed.
    """
    if isinstance(config, DistillConfig):
        students = {
            name: build_network(vit, config.dino_head, config.ibot_head) for name, vit in config.students.items()
        }
        with torch.device("cpu"):  # also in processes that build their students on the meta device
            weights = read_frozen_teacher(config)
            teacher = weights.network()
        distillation = Distillation(students, teacher, config.objective, group)
        load_centers(distillation, weights, list(weights.heads))
        return distillation
    student, teacher = build_networks(config.networks["vit"], config.dino_head, config.ibot_head)
    return SelfDistillation(student, teacher, config.objective, group)
