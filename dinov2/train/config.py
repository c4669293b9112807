"""The configuration of a pretraining run: frozen dataclasses, built by a recipe, overridden by dotted path.

The text below each field is also its text in ``dinov2 pretrain RECIPE --help``.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from dinov2.configuration import AtLeast0, Config, Count, CountOr0, Positive, Rules, Share
from dinov2.data import DataConfig
from dinov2.models import HeadConfig, ViTConfig
from dinov2.objectives import ObjectiveConfig

Precision = Literal["auto", "fp32", "bf16", "fp16"]
Sharding = Literal["replicate", "full", "hybrid"]
ActivationCheckpointing = Literal["none", "selective", "full"]
STEPS_BEFORE_PROFILE = 5


@dataclass(frozen=True)
class OptimConfig(Config, at="optim"):
    """AdamW, its learning rate and its weight decay."""

    base_lr: AtLeast0 = 4e-3
    """A batch of 1024 images learns at this rate; the run uses base_lr * sqrt(batch_size / 1024)."""
    min_lr: AtLeast0 = 1e-6
    """The learning rate reaches this at the end of its cosine."""
    warmup_fraction: Share = 0.1
    """The learning rate rises from 0 over this part of the run."""
    weight_decay: AtLeast0 = 0.04
    """Weight decay starts at this and follows a cosine to weight_decay_end."""
    weight_decay_end: AtLeast0 = 0.4
    """Weight decay ends at this."""
    beta1: Share = 0.9
    """AdamW decays its mean of gradients by this."""
    beta2: Share = 0.999
    """AdamW decays its mean of squared gradients by this."""
    layer_decay: Positive = 0.9
    """Each backbone block learns slower than the one above it by this factor; 1 turns that off."""
    patch_embed_lr_scale: AtLeast0 = 0.2
    """The learning rate of the patch embedding is multiplied by this as well."""
    clip_grad_norm: Positive = 3.0
    """Gradients of each student module (backbone, dino_head, ibot_head) are clipped to this norm, one by one."""
    freeze_last_layer_fraction: Share = 0.01
    """The prototypes of the heads stand still over this part of the run, at its start."""


@dataclass(frozen=True)
class TeacherConfig(Config, at="teacher"):
    """The EMA teacher: a moving average of the student, whose outputs are the targets."""

    momentum: Share = 0.992
    """Each step keeps this part of the teacher at the start; it follows a cosine to momentum_end."""
    momentum_end: Share = 1.0
    """Each step keeps this part of the teacher at the end."""
    temperature_start: Positive = 0.04
    """The teacher's softmax starts with this temperature; lower is sharper."""
    temperature: Positive = 0.07
    """The teacher's softmax has this temperature after its warm-up."""
    temperature_warmup_fraction: Share = 0.3
    """The temperature rises over this part of the run."""


@dataclass(frozen=True)
class ParallelConfig(Config, at="parallel"):
    """Several processes, as torchrun starts them; one process needs none of it."""

    sharding: Sharding = "replicate"
    """With replicate, every process holds everything. With full, each holds one shard of weights, gradients and
    optimiser state, and gathers a block when it runs: it needs less memory and exchanges more. With hybrid, the
    processes of each machine hold everything together: weights are gathered within machines, and only gradients travel
    between them."""
    shard_size: Count | None = None
    """With hybrid, this many processes hold everything together; None takes those of one machine."""
    timeout_seconds: Positive = 600.0
    """The run fails if a process waits this long for the others."""

    def rules(self) -> Rules:
        """Only hybrid sharding has a size."""
        yield "shard_size", self.shard_size is None or self.sharding == "hybrid", f"None with sharding {self.sharding}"


@dataclass(frozen=True)
class RunConfig(Config):
    """The fields that all kinds of runs have; subclasses add the networks."""

    output: Path
    """The run writes this directory: config.json, metrics.jsonl, tensorboard/, checkpoints/ and, at the end, the
    finished model."""
    steps: Count
    """The run makes this many optimiser steps. All schedules stretch with it."""
    batch_size: Count
    """An optimiser step takes this many images, over all micro-batches and processes."""
    initial_weights: Path | None = None
    """Start from these weights instead of random ones: a run, a checkpoint, or a file or folder of weights (ours,
    facebook's, transformers', timm's). Heads come along where they are there and fit."""
    dino_head: HeadConfig = field(default_factory=HeadConfig)
    """This head turns class tokens into scores over prototypes."""
    ibot_head: HeadConfig | None = None
    """Masked patches have this head; None shares the DINO head. Name one of its fields to add it, as in
    --ibot_head.out_dim 4096; --ibot_head None removes it."""
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    """The losses are these."""
    data: DataConfig = field(default_factory=DataConfig)
    """Images come from here and are augmented like this."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    """AdamW is set like this."""
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    """The EMA teacher follows the student like this."""
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    """Several processes share the work like this."""
    accumulation_steps: Count = 1
    """An optimiser step averages the gradients of this many micro-batches, so it needs memory for batch_size /
    accumulation_steps images, split among the processes. Sinkhorn-Knopp, centring and KoLeo see one micro-batch of all
    processes at a time, so prefer larger micro-batches while they fit."""
    precision: Precision = "auto"
    """Matrix products and attention run in fp32, in bf16, or in fp16 with a scaled loss, for GPUs that lack bf16.
    Weights, their averages and all sums are float32. auto takes bf16 on a GPU and fp32 on a CPU; a resumed run keeps
    what it had."""
    residual_in_fp32: bool = True
    """Keep the residual stream, the tokens between blocks and their gradients, in float32. False, for precision bf16
    alone, keeps it in bfloat16: less memory and fewer bytes to move, but each block rounds its sums to 8 bits, and what
    is below 1/512 of a token is lost, as are branches under a LayerScale of 1e-5 at first."""
    activation_checkpointing: ActivationCheckpointing = "none"
    """The student's blocks compute this again in the backward pass, for less memory and the same results: none;
    selective keeps matrix products and attention and recomputes the rest; full recomputes everything and takes a third
    more time."""
    compile: bool = False
    """Compile the blocks with torch.compile: the first steps take minutes, the others less time."""
    cuda_graph: bool = False
    """Replay each step as CUDA graphs once the teacher's temperature no longer changes. It takes much less time on the
    host, which small models wait for. It needs one process on one GPU, and data.masks.same_total True."""
    profile_steps: CountOr0 = 0
    """Time every operator of this many steps, after the first five; the trace is written to profile/."""
    peak_tflops: Positive | None = None
    """The device computes this much at best in this precision, in 10^12 operations a second, for the metric mfu; None
    looks it up for known GPUs."""
    device: str = "auto"
    """Train here: cpu, cuda, cuda:1, ...; auto takes a GPU if there is one. Each process of torchrun takes the GPU of
    its own number."""
    seed: int = 0
    """This seed decides weights, data order, augmentation, masks and stochastic depth."""
    log_every: Count = 10
    """Write a line of metrics every this many steps; it holds means over them."""
    probe_every: Count = 1000
    """Evaluate by the probe every this many steps, if one is given."""
    checkpoint_every: Count = 1000
    """Save a checkpoint every this many steps."""
    keep_checkpoints: Count = 3
    """Keep this many of the newest checkpoints."""
    keep_every: Count | None = None
    """Keep checkpoints at multiples of this many steps for good; it must be a multiple of checkpoint_every."""

    def rules(self) -> Rules:
        """Rules between fields of different parts."""
        is_kept = self.keep_every is None or self.keep_every % self.checkpoint_every == 0
        yield "keep_every", is_kept, f"None or a multiple of checkpoint_every = {self.checkpoint_every}"
        has_narrow_tokens = self.residual_in_fp32 or self.precision in ("auto", "bf16")
        expected = f"True with precision {self.precision}, because only bfloat16 is narrower and holds the sums"
        yield "residual_in_fp32", has_narrow_tokens, expected
        profiled = max(0, self.steps - STEPS_BEFORE_PROFILE)
        yield "profile_steps", self.profile_steps <= profiled, f"{profiled} at most, those after the first five"
        yield "seed", 0 <= self.seed < 2**63, "a whole number from 0 to 2**63 - 1"
        is_split = self.batch_size % self.accumulation_steps == 0
        yield "batch_size", is_split, f"a multiple of accumulation_steps = {self.accumulation_steps}"
        spreads = self.objective.koleo_weight == 0 or self.micro_batch_size > 1
        sizes = f"batch_size {self.batch_size} / accumulation_steps {self.accumulation_steps}"
        expected = f"0 for a micro-batch of 1 image, because KoLeo compares the images of {sizes}"
        yield "objective.koleo_weight", spreads, expected
        channels = self.data.augmentation.channels
        for name, vit in self.networks.items():
            expected = f"{channels}, the channels of the images by data.augmentation.mean"
            yield f"{name}.in_chans", vit.in_chans == channels, expected
        if self.cuda_graph:
            yield from self._rules_of_graphs()

    def _rules_of_graphs(self) -> Rules:
        yield "precision", self.precision != "fp16", "fp32 or bf16 with cuda_graph, which cannot capture the loss scale"
        yield "compile", not self.compile, "False with cuda_graph, which cannot capture compiled blocks"
        is_kept = self.activation_checkpointing == "none"
        yield "activation_checkpointing", is_kept, "none with cuda_graph, not tried with recomputed activations"
        yield "profile_steps", not self.profile_steps, "0 with cuda_graph, because a replayed step runs no operator"

    @property
    def kind(self) -> str:
        """The name of this kind of run."""
        raise NotImplementedError

    @property
    def networks(self) -> dict[str, ViTConfig]:
        """The architectures of the trained networks, by the path of their field."""
        raise NotImplementedError

    def product_folder(self, name: str) -> Path:
        """The folder of a student's finished backbone."""
        raise NotImplementedError

    @property
    def patch_size(self) -> int:
        """Side of a patch in pixels, the same for all networks."""
        return next(iter(self.networks.values())).patch_size

    @property
    def micro_batch_size(self) -> int:
        """Number of images of one forward and backward pass, over all processes."""
        return self.batch_size // self.accumulation_steps


@dataclass(frozen=True)
class PretrainConfig(RunConfig):
    """A student and the teacher that follows it."""

    vit: ViTConfig = field(default_factory=ViTConfig)
    """Student and teacher have this architecture."""

    def _rules_of_graphs(self) -> Rules:
        yield from super()._rules_of_graphs()
        is_constant = self.data.masks.same_total
        yield "data.masks.same_total", is_constant, "True with cuda_graph, because no shape may change"

    @property
    def kind(self) -> str:
        """The name of this kind of run: pretraining."""
        return "pretraining"

    @property
    def networks(self) -> dict[str, ViTConfig]:
        """The architecture of student and teacher."""
        return {"vit": self.vit}

    def product_folder(self, name: str) -> Path:
        """The folder of the finished teacher."""
        return self.output / "teacher"


@dataclass(frozen=True)
class DistillConfig(RunConfig):
    """One or several students of a frozen teacher. ``dino_head`` and ``ibot_head`` are those of the students; the
    prototypes are as many as the teacher's."""

    students: dict[str, ViTConfig] = field(default_factory=dict)
    """These students learn, by name."""
    frozen_teacher: Path = Path()
    """The teacher has these weights, with its heads: a run, its checkpoint, an export with heads, or facebook's
    teacher_checkpoint.pth."""
    frozen_teacher_sha256: str = ""
    """The teacher's weights have this digest; a resumed run refuses any others."""

    def rules(self) -> Rules:
        """Rules between students."""
        yield "students", bool(self.students), "at least one student"
        yield (
            "students",
            all(map(str.isidentifier, self.students)),
            "names of letters, digits and underscores",
            list(self.students),
        )
        sizes = {name: vit.patch_size for name, vit in self.students.items()}
        yield "students", len({*sizes.values()}) == 1, "patches of one size", sizes
        yield from super().rules()

    @property
    def kind(self) -> str:
        """The name of this kind of run: distillation."""
        return "distillation"

    @property
    def networks(self) -> dict[str, ViTConfig]:
        """The architecture of each student."""
        return {f"students.{name}": vit for name, vit in self.students.items()}

    def product_folder(self, name: str) -> Path:
        """The folder of one finished student."""
        return self.output / "students" / name
