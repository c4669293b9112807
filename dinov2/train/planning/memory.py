"""Bytes that one process holds at the peak of a training step, which is rehearsed on tensors without memory.

Weights, moments, the teacher and the batch are there all the time, and their sizes follow from the numbers of
parameters. The rest comes and goes, and is observed: one forward and one backward pass run on tensors that have shapes
but no values (FakeTensorMode), and a :class:`Recorder` notes when each storage comes and when it goes. So nobody writes
down what a kernel keeps, and a kernel that changes also changes the plan. The update after the two passes works in
place and is not rehearsed.

The rehearsal is that of one process on a CPU, and it does not look inside operators. Three things are therefore added
by arithmetic:

- A GPU. It runs the same operators on the same shapes. Precision, copies of weights and the size of chunks follow the
  type of the device. Fake tensors of a GPU cannot be used: where PyTorch was built without CUDA, autograd ends the
  process when it meets one.
- Memory that an operator takes while it runs. Only the chunks of
  :func:`dinov2_kernels.prototype_cross_entropy` are large.
- Other processes: the buckets of DistributedDataParallel, and what FSDP keeps and gathers.

Libraries' own buffers are left out. Measured in float32 and bfloat16 on a CPU, runs took 0.2 to 1.6 % more than their
plan says. FSDP, on fake tensors, took 4 to 7 % less (``tests/train/test_planning_split.py``).

PyTorch's own ``torch.distributed._tools.mem_tracker.MemTracker`` was tried (2.13) and does not serve here. It fails on
parameters that need no gradient, such as the teacher's. Its hooks on all modules turn off the layers that are computed
as one, so it saw a quarter more activations than a run keeps, and it took ten times as long.
"""

from __future__ import annotations

import weakref
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dinov2.models import VisionTransformer
from dinov2.objectives import SelfDistillation, Views, build_networks
from dinov2.train.blocks import prepare_blocks
from dinov2.train.config import PretrainConfig
from dinov2.train.planning.sizes import FLOAT, Parameters, Rows, batch_bytes, dtype_of_products, shards
from dinov2.train.precision import WeightCopies, keeps_weight_copies
from dinov2_kernels.prototype_cross_entropy.chunked import columns_of_a_chunk

TEACHER, STUDENT, BACKWARD = "forward pass of the teacher", "forward pass of the student", "backward pass"

CHUNKED = frozenset(
    {
        torch.ops.dinov2_kernels.prototype_cross_entropy.default,
        torch.ops.dinov2_kernels.prototype_cross_entropy_backward.default,
    }
)

Bytes = Mapping[str, float]
"""Bytes by kind."""


@dataclass(frozen=True)
class Peak:
    """The largest sum of a step.

    Attributes:
        moment: where it falls: a phase of the step, and the operator that runs.
        bytes: what is held then, by kind.
    """

    moment: str
    bytes: Bytes

    @property
    def total(self) -> float:
        """All kinds together."""
        return sum(self.bytes.values())


def peak_memory(
    config: PretrainConfig, parameters: Parameters, rows: Rows, *, world_size: int, device_type: str
) -> Peak:
    """The peak of a step after the first one, in which the optimiser's moments are already there.

    It takes as long as Python needs for the operators of a step: 2 to 3 s for the 40 blocks of a ViT-g.

    Args:
        config: the run.
        parameters: of its networks.
        rows: of one pass of one process.
        world_size: processes.
        device_type: where they train.
    """
    e = dtype_of_products(config, device_type).itemsize
    share = shards(config, world_size)
    is_split = share > 1
    held = {
        "weights": FLOAT * parameters.student / share,
        "moments": 2 * FLOAT * parameters.student / share,
        "teacher": FLOAT * parameters.teacher / share,
        "batch": batch_bytes(config, rows),
    }
    # Gradients of earlier micro-batches are whole; DistributedDataParallel keeps buckets for all of them at any time.
    has_gradients = config.accumulation_steps > 1 or (world_size > 1 and not is_split)
    held["gradients"] = FLOAT * parameters.student if has_gradients else 0.0
    leaving = 0.0
    if is_split:
        # A block, the next one, and the buffer in which that arrives; or prototypes, in float32, and their buffer.
        held["gathered weights"] = max(3 * e * parameters.block, 2 * FLOAT * parameters.prototypes)
        # Gradients as they are made, and in float32 to be averaged.
        leaving = max((e + FLOAT) * parameters.block, 2 * FLOAT * parameters.prototypes)
    if keeps_weight_copies(config, device_type, is_split=is_split):
        held["copies of weights"] = e * parameters.copied
    recorder = rehearse(config, rows, device_type, is_split=is_split, has_gradients=has_gradients)
    if is_split:
        for storage in recorder.gradients:  # each process keeps a part, averaged in float32
            storage.size = FLOAT * storage.shape.numel() / share
    peaks = recorder.peaks({head.out_dim for head in (config.dino_head, config.ibot_head) if head}, leaving)
    if config.cuda_graph:
        # Graphs keep their memory. Inputs are copied for them, and statistics of the targets take memory beside it.
        logits = e * rows.teacher.num_sequences * config.dino_head.out_dim
        held["beside the graphs"] = held["batch"] + peaks[TEACHER].bytes.get("working memory", 0.0) + logits
    return max((Peak(peak.moment, _sum(held, peak.bytes)) for peak in peaks.values()), key=lambda peak: peak.total)


def rehearse(config: PretrainConfig, rows: Rows, device_type: str, *, is_split: bool, has_gradients: bool) -> Recorder:
    """Record both passes of one micro-batch.

    Args:
        config: the run.
        rows: of the pass.
        device_type: where the run trains.
        is_split: whether its networks are split among processes.
        has_gradients: whether there are gradients already, which those of this pass are added to.
    """
    dtype = dtype_of_products(config, device_type)
    with torch.device("meta"):  # to draw weights is to look at values, which fake tensors lack
        student, teacher = networks = build_networks(config.vit, config.dino_head, config.ibot_head)
    if is_split:
        for network in networks:
            cast(VisionTransformer, network["backbone"]).blocks.to(dtype)  # FSDP gathers them so
    with FakeTensorMode(), torch.device("cpu"):
        for network in networks:
            make_fake(network)
        objective = SelfDistillation(student, teacher, config.objective)
        prepare_blocks(objective, replace(config, compile=False))
        keeps_copies = keeps_weight_copies(config, device_type, is_split=is_split)
        copies = WeightCopies(networks if keeps_copies else [], dtype)
        if has_gradients and not is_split:
            for parameter in student.parameters():
                parameter.grad = torch.zeros_like(parameter)
        views = views_of(config, rows)
        recorder = Recorder(dtype.itemsize, device_type)
        recorder.ignore(objective.parameters(), objective.buffers(), _gradients(student), copies.tensors, views)
        with recorder, copies.in_place():
            with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
                recorder.phase = TEACHER
                targets = objective._targets(views, 0.07)
                recorder.phase = STUDENT
                loss = objective._losses(student, views, targets)["total"]
            del targets
            recorder.phase = BACKWARD
            loss.backward()
        recorder.gradients = recorder.storages_of(_gradients(student))
    return recorder


@dataclass(eq=False)
class Storage:
    """Memory that an operator made.

    Attributes:
        size: in bytes.
        shape: of the tensor that it was made for.
        born, died: the phases in which it came and went; died is empty while it is there.
    """

    size: float
    shape: torch.Size
    born: str
    died: str = ""


class Recorder(TorchDispatchMode):
    """Notes when storages come and go while operators run.

    Args:
        itemsize: bytes of an element of the result of a product.
        device_type: where chunks of recomputed logits lie.

    Attributes:
        phase: of the step; whoever runs it says so.
        gradients: storages of the weights' gradients; likewise, afterwards.
    """

    def __init__(self, itemsize: int, device_type: str) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._itemsize, self._device_type = itemsize, device_type
        self.phase = ""
        self.gradients: list[Storage] = []
        self._ignored: dict[int, torch.UntypedStorage] = {}
        self._there: dict[int, tuple[Storage, weakref.ref[torch.UntypedStorage]]] = {}
        self._events: list[tuple[Storage, int, str, str]] = []  # storage, 1 or -1, phase, operator

    def ignore(self, *tensors: Iterable[Tensor | None]) -> None:
        """Leave these tensors out, which were there before."""
        for tensor in chain.from_iterable(tensors):
            if tensor is not None:
                storage = tensor.untyped_storage()
                self._ignored[id(storage)] = storage

    @property
    def there(self) -> list[Storage]:
        """Those that came and did not go."""
        return [storage for storage, _ in self._there.values()]

    def storages_of(self, tensors: Iterable[Tensor]) -> list[Storage]:
        """Those that are there and were not ignored."""
        keys = (id(tensor.untyped_storage()) for tensor in tensors)
        return [self._there[key][0] for key in keys if key in self._there]

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = operator(*args, **(kwargs or {}))
        name = operator._schema.name.partition("::")[2]
        for result in tree_leaves(results):
            if isinstance(result, Tensor):
                self.note(result.untyped_storage(), result.shape, name)
        if operator in CHUNKED:
            names = (argument.name for argument in operator._schema.arguments)
            chunk = Storage(
                self._chunk_bytes(**dict(zip(names, args, strict=False))), torch.Size(), self.phase, self.phase
            )
            self._events += [(chunk, 1, self.phase, name), (chunk, -1, self.phase, name)]
        return results

    def note(self, memory: torch.UntypedStorage, shape: torch.Size, operator: str) -> None:
        """An operator returned a tensor in this memory, which may be new."""
        key = id(memory)
        if key in self._ignored or key in self._there:
            return
        storage = Storage(memory.nbytes(), shape, self.phase)
        self._there[key] = storage, weakref.ref(memory, lambda _: self.forget(key))
        self._events.append((storage, 1, self.phase, operator))

    def forget(self, key: int) -> None:
        """The memory with this id is gone."""
        storage, _ = self._there.pop(key)
        storage.died = self.phase
        self._events.append((storage, -1, self.phase, ""))

    def _chunk_bytes(self, features: Tensor, weight: Tensor, teacher_logits: Tensor, **_: Any) -> float:
        """Logits and targets of a chunk, and prototypes, their gradient and what these are made through."""
        (N, d), (M, K), e = features.shape, teacher_logits.shape, self._itemsize
        c = columns_of_a_chunk(N * e + M * FLOAT + d * FLOAT, K, self._device_type)
        return c * (N * e + M * FLOAT + d * (2 * e + 4 * FLOAT))

    def peaks(self, prototypes: Collection[int], leaving: float) -> dict[str, Peak]:
        """The peak of each phase.

        Args:
            prototypes: numbers of columns by which logits are known.
            leaving: bytes that are there beside the gradients from the first one on.
        """
        peaks: dict[str, Peak] = {}
        gradients = set(self.gradients)
        now: defaultdict[str, float] = defaultdict(float)
        for storage, sign, phase, operator in self._events:
            kind = _kind(storage, gradients, prototypes)
            now[kind] += sign * storage.size
            if kind == "gradients":
                now[kind], leaving = now[kind] + leaving, 0.0
            total = sum(now.values())
            if sign > 0 and (phase not in peaks or total > peaks[phase].total):
                peaks[phase] = Peak(f"{phase}, at {operator}", dict(now))
        return peaks


def _kind(storage: Storage, gradients: Collection[Storage], prototypes: Collection[int]) -> str:
    """What a plan calls it."""
    if storage in gradients:
        return "gradients"
    if storage.born in (BACKWARD, storage.died):
        return "working memory"
    if len(storage.shape) == 2 and storage.shape[1] in prototypes:
        return "teacher logits" if storage.born == TEACHER else "student logits"
    return "activations"


def make_fake(network: nn.Module) -> None:
    """Put fake tensors on the CPU in the place of its parameters; call it under FakeTensorMode."""
    for module in network.modules():
        for name, parameter in module.named_parameters(recurse=False):
            fake = torch.empty(parameter.shape, dtype=parameter.dtype)
            setattr(module, name, nn.Parameter(fake, parameter.requires_grad))


def views_of(config: PretrainConfig, rows: Rows) -> Views:
    """What the networks see of one micro-batch, with the expected number of masked patches."""
    crops, channels, masked = config.data.augmentation, config.vit.in_chans, round(rows.masked)
    patches = (crops.global_size // config.vit.patch_size) ** 2
    n = rows.teacher.num_sequences
    return Views(
        torch.empty(n, channels, crops.global_size, crops.global_size),
        torch.empty(rows.local, channels, crops.local_size, crops.local_size),
        torch.empty(n, patches, dtype=torch.bool),
        torch.empty(masked, dtype=torch.int64),
        torch.empty(masked),
    )


def _gradients(network: nn.Module) -> list[Tensor]:
    return [parameter.grad for parameter in network.parameters() if parameter.grad is not None]


def _sum(*terms: Bytes) -> dict[str, float]:
    total: dict[str, float] = {}
    for term in terms:
        for kind, size in term.items():
            total[kind] = total.get(kind, 0.0) + size
    return total
