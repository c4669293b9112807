"""The configuration of a pretraining run: frozen dataclasses, built by a recipe, overridden by dotted path.

Every field is documented where it stands; ``dinov2 pretrain RECIPE --help`` prints these very lines.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args

from dinov2.data import DataConfig
from dinov2.models import HeadConfig, ViTConfig
from dinov2.objectives import ObjectiveConfig

Precision = Literal["auto", "fp32", "bf16", "fp16"]
Sharding = Literal["replicate", "hybrid", "full"]
ActivationCheckpointing = Literal["none", "selective", "full"]
STEPS_BEFORE_PROFILE = 5
COUNTS = (
    "steps",
    "batch_size",
    "accumulation_steps",
    "log_every",
    "probe_every",
    "checkpoint_every",
    "keep_checkpoints",
)


@dataclass(frozen=True)
class OptimConfig:
    """AdamW, its learning rate and its weight decay."""

    base_lr: float = 4e-3
    """Learning rate of a batch of 1024 images; the run uses base_lr * sqrt(batch_size / 1024)."""
    min_lr: float = 1e-6
    """Learning rate at the end of the cosine."""
    warmup_fraction: float = 0.1
    """Part of the run over which the learning rate rises from 0."""
    weight_decay: float = 0.04
    """Weight decay at the start; follows a cosine to weight_decay_end."""
    weight_decay_end: float = 0.4
    """Weight decay at the end."""
    beta1: float = 0.9
    """AdamW's decay of the mean of gradients."""
    beta2: float = 0.999
    """AdamW's decay of the mean of squared gradients."""
    layer_decay: float = 0.9
    """Each backbone block learns this much slower than the one above it; 1 turns it off."""
    patch_embed_lr_scale: float = 0.2
    """Further factor on the learning rate of the patch embedding."""
    clip_grad_norm: float = 3.0
    """Largest gradient norm of each student module (backbone, dino_head, ibot_head), clipped one by one."""
    freeze_last_layer_fraction: float = 0.01
    """Part of the run at whose start the prototypes of the heads stand still."""


@dataclass(frozen=True)
class TeacherConfig:
    """The teacher: a moving average of the student, whose outputs are the targets."""

    momentum: float = 0.992
    """Part of the teacher kept at each step, at the start; follows a cosine to momentum_end."""
    momentum_end: float = 1.0
    """Momentum at the end."""
    temperature_start: float = 0.04
    """Teacher temperature at the start; lower is sharper."""
    temperature: float = 0.07
    """Teacher temperature after its warm-up."""
    temperature_warmup_fraction: float = 0.3
    """Part of the run over which the temperature rises."""


@dataclass(frozen=True)
class ParallelConfig:
    """Several processes, as torchrun starts them; one process needs none of it."""

    sharding: Sharding = "replicate"
    """replicate: every process holds everything. full: each holds its part of weights, gradients and optimiser state,
    and gathers a block when it runs; needs less memory and exchanges more. hybrid: the processes of each machine hold
    everything together, so that weights are gathered within machines and only gradients travel between them."""
    shard_size: int | None = None
    """Processes that hold everything together, with hybrid; None for those of one machine."""
    timeout_seconds: float = 600.0
    """How long a process waits for the others before the run fails."""

    def __post_init__(self) -> None:
        if self.sharding not in get_args(Sharding):
            raise ValueError(f"sharding must be one of {', '.join(get_args(Sharding))}, but is {self.sharding!r}")
        if self.shard_size is not None and (self.shard_size < 1 or self.sharding != "hybrid"):
            raise ValueError(
                "shard_size must be at least 1, and is for sharding hybrid alone, but shard_size is"
                f" {self.shard_size} and sharding {self.sharding}"
            )
        if not self.timeout_seconds > 0:
            raise ValueError(f"timeout_seconds must be above 0, but is {self.timeout_seconds}")


@dataclass(frozen=True)
class RunConfig:
    """What every kind of run is made of; the networks that it trains come on top."""

    output: Path
    """Run directory: config.json, metrics.jsonl, tensorboard/, checkpoints/ and, at the end, the finished model."""
    steps: int
    """Optimiser steps of the run. All schedules stretch with it."""
    batch_size: int
    """Images per optimiser step, over all micro-batches and processes."""
    initial_weights: Path | None = None
    """Weights to start from, in place of random ones: a run, a checkpoint, or a file or folder of weights (ours,
    facebook's, transformers', timm's). Heads come along where they are there and fit."""
    dino_head: HeadConfig = field(default_factory=HeadConfig)
    ibot_head: HeadConfig | None = None
    """Head of the masked patches; None shares the DINO head. Naming one of its fields, as in --ibot_head.out_dim 4096,
    adds it; --ibot_head None removes it."""
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    accumulation_steps: int = 1
    """Micro-batches per optimiser step. Gradients are averaged over them, so memory is that of batch_size /
    accumulation_steps images, split among the processes; Sinkhorn-Knopp, centring and KoLeo see one micro-batch of all
    processes at a time, so prefer larger micro-batches while they fit."""
    precision: Precision = "auto"
    """Of matrix products and attention: fp32; bf16; fp16, with a scaled loss, for GPUs that lack bf16. Weights, their
    averages and all sums are float32. auto: bf16 on a GPU and fp32 on a CPU; a resumed run keeps what it had."""
    residual_in_fp32: bool = True
    """Keep the residual stream, the tokens between blocks and their gradients, in float32. False, for precision bf16
    alone, keeps it in bfloat16: less memory and fewer bytes to move, but each block rounds its sums to 8 bits, and what
    is below 1/512 of a token is lost, as are branches under a LayerScale of 1e-5 at first."""
    activation_checkpointing: ActivationCheckpointing = "none"
    """What the student's blocks compute again in the backward pass, for less memory and the same results: nothing; all
    but products and attention (selective); or everything (full), which takes a third more time."""
    compile: bool = False
    """Compile the blocks with torch.compile: the first steps take minutes, the others less time."""
    cuda_graph: bool = False
    """Replay each step as CUDA graphs, once the teacher temperature has come to rest: much less time on the host, which
    is what small models wait for. For one process on one GPU, with data.masks.same_total True."""
    profile_steps: int = 0
    """Steps whose every operator is timed, after the first five; the trace is written to profile/."""
    peak_tflops: float | None = None
    """What the device computes at best in this precision, in 10^12 operations a second, for the metric mfu; None looks
    it up for known GPUs."""
    device: str = "auto"
    """Where to train: cpu, cuda, cuda:1, ...; auto takes a GPU if there is one. Each process of torchrun takes the GPU
    of its own number."""
    seed: int = 0
    """Seed of weights, data order, augmentation, masks and stochastic depth."""
    log_every: int = 10
    """Steps between lines of metrics; each line holds means over these steps."""
    probe_every: int = 1000
    """Steps between evaluations by the probe, if one is given."""
    checkpoint_every: int = 1000
    """Steps between checkpoints."""
    keep_checkpoints: int = 3
    """How many of the newest checkpoints to keep."""
    keep_every: int | None = None
    """Checkpoints at multiples of this many steps stay for good; a multiple of checkpoint_every. None: none does."""

    def __post_init__(self) -> None:
        for name in COUNTS:
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, but is {getattr(self, name)}")
        if self.keep_every is not None and (self.keep_every < 1 or self.keep_every % self.checkpoint_every):
            raise ValueError(
                "keep_every must be a multiple of checkpoint_every, or None, but there is no checkpoint every"
                f" {self.keep_every} steps with one every {self.checkpoint_every}"
            )
        if self.precision not in get_args(Precision):
            raise ValueError(f"precision must be one of {', '.join(get_args(Precision))}, but is {self.precision!r}")
        if not self.residual_in_fp32 and self.precision not in ("auto", "bf16"):
            raise ValueError(
                "residual_in_fp32 can be False with precision bf16 alone, but precision is"
                f" {self.precision}: fp32 has no narrower dtype, and sums over the blocks can overflow float16"
            )
        if self.activation_checkpointing not in get_args(ActivationCheckpointing):
            raise ValueError(
                f"activation_checkpointing must be one of {', '.join(get_args(ActivationCheckpointing))}, but is"
                f" {self.activation_checkpointing!r}"
            )
        if self.profile_steps < 0 or self.profile_steps > max(0, self.steps - STEPS_BEFORE_PROFILE):
            raise ValueError(
                f"profile_steps must lie between 0 and steps - {STEPS_BEFORE_PROFILE}, the first of which are not"
                f" profiled, but is {self.profile_steps} of {self.steps} steps"
            )
        if self.cuda_graph:
            self._check_graphable()
        if self.peak_tflops is not None and not self.peak_tflops > 0:
            raise ValueError(f"peak_tflops must be above 0, but is {self.peak_tflops}")
        if self.batch_size % self.accumulation_steps:
            raise ValueError(
                f"batch_size must be a multiple of accumulation_steps, but {self.batch_size} images"
                f" do not split into {self.accumulation_steps} micro-batches"
            )
        if self.objective.koleo_weight > 0 and self.micro_batch_size < 2:
            raise ValueError(
                "KoLeo spreads the images of a micro-batch and needs at least 2 of them, but batch_size"
                f" {self.batch_size} over accumulation_steps {self.accumulation_steps} leaves {self.micro_batch_size}:"
                " raise batch_size, or set objective.koleo_weight to 0"
            )
        for part, fraction in (
            ("optim.warmup_fraction", self.optim.warmup_fraction),
            ("optim.freeze_last_layer_fraction", self.optim.freeze_last_layer_fraction),
            ("teacher.temperature_warmup_fraction", self.teacher.temperature_warmup_fraction),
        ):
            if not 0 <= fraction <= 1:
                raise ValueError(f"{part} must lie between 0 and 1, but is {fraction}")
        for name, vit in self.networks.items():
            if vit.in_chans != self.data.augmentation.channels:
                raise ValueError(
                    f"{name}.in_chans must be the number of channels of the images,"
                    f" {self.data.augmentation.channels} by data.augmentation.mean, but is {vit.in_chans}"
                )

    def _check_graphable(self) -> None:
        for name, is_fine, expected, reason in (
            ("precision", self.precision != "fp16", "fp32 or bf16", "the scale of the loss is not captured"),
            ("compile", not self.compile, "False", "compiled blocks are not captured"),
            (
                "activation_checkpointing",
                self.activation_checkpointing == "none",
                "none",
                "blocks that compute their activations again have not been captured yet",
            ),
            ("profile_steps", not self.profile_steps, "0", "a replayed step runs no operator that could be timed"),
        ):
            if not is_fine:
                raise ValueError(f"{name} must be {expected} with cuda_graph, but is {getattr(self, name)}: {reason}")

    @property
    def kind(self) -> str:
        """What a run of this configuration is called."""
        raise NotImplementedError

    @property
    def networks(self) -> dict[str, ViTConfig]:
        """The networks that are trained, by the field that describes each."""
        raise NotImplementedError

    def product_folder(self, name: str) -> Path:
        """Where the finished backbone of a student is written; a lone student's name is empty."""
        raise NotImplementedError

    @property
    def patch_size(self) -> int:
        """Side of a patch in pixels, the same for all networks."""
        return next(iter(self.networks.values())).patch_size

    @property
    def micro_batch_size(self) -> int:
        """Images of one forward and backward pass, over all processes."""
        return self.batch_size // self.accumulation_steps


@dataclass(frozen=True)
class PretrainConfig(RunConfig):
    """A student and the teacher that follows it."""

    vit: ViTConfig = field(default_factory=ViTConfig)

    def _check_graphable(self) -> None:
        super()._check_graphable()
        if not self.data.masks.same_total:
            raise ValueError(
                "data.masks.same_total must be True with cuda_graph, but is False: the number of masked patches is a"
                " shape, and no shape may change from step to step"
            )

    @property
    def kind(self) -> str:
        """Pretraining."""
        return "pretraining"

    @property
    def networks(self) -> dict[str, ViTConfig]:
        """The architecture of student and teacher."""
        return {"vit": self.vit}

    def product_folder(self, name: str) -> Path:
        """The teacher's."""
        return self.output / "teacher"


@dataclass(frozen=True)
class DistillConfig(RunConfig):
    """One or several students of a frozen teacher. ``dino_head`` and ``ibot_head`` are those of the students; the
    prototypes are as many as the teacher's."""

    students: dict[str, ViTConfig] = field(default_factory=dict)
    """The students by name."""
    frozen_teacher: Path = Path()
    """Weights of the teacher with its heads: a run, its checkpoint, an export with heads, facebook's
    teacher_checkpoint.pth."""
    frozen_teacher_sha256: str = ""
    """Digest of those weights: a resumed run refuses any others."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.students:
            raise ValueError("students must hold at least one student, but is empty")
        for name, vit in self.students.items():
            if not name.isidentifier():
                raise ValueError(f"students must have names of letters, digits and underscores, but one is {name!r}")
            if vit.patch_size != self.patch_size:
                raise ValueError(
                    "students must have patches of one size, but they have"
                    f" {', '.join(f'{vit.patch_size} in {name}' for name, vit in self.students.items())}"
                )

    @property
    def kind(self) -> str:
        """Distillation."""
        return "distillation"

    @property
    def networks(self) -> dict[str, ViTConfig]:
        """The architecture of each student."""
        return {f"students.{name}": vit for name, vit in self.students.items()}

    def product_folder(self, name: str) -> Path:
        """That of one student."""
        return self.output / "students" / name
