"""DINO + iBOT + KoLeo: the objective of DINOv2 (arXiv:2304.07193, section 4).

A student sees two large ("global") crops of each image, with some patches masked, and L small ("local") ones. A
teacher, the moving average of the student, sees the global crops unmasked. With CE(s, t) the mean cross-entropy of
student rows against the teacher's targets, and l, g1, g2 the class tokens of the crops,

    dino_local  = sum_{l, t} CE(l, t)          / pairs        every local crop against both global crops
    dino_global = (CE(g1, t2) + CE(g2, t1))    / pairs        each global crop against the other one
    koleo       = KoLeo(g1) + KoLeo(g2)                       on the backbone's tokens, before the head
    ibot        = mean over global crops of the mean cross-entropy of that crop's masked patches
    total       = dino_weight (dino_local + dino_global) + koleo_weight koleo + ibot_weight ibot

    pairs = 2 + max(2 L, 1), so with 8 local crops the two DINO terms carry 16/18 and 2/18 of the whole.

Where the published code has a defect or a surprise, ``docs/differences.md`` says what was decided.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dinov2.models.checkpoints.run import LONE_STUDENT
from dinov2.objectives.batch import MaskedPatches, check_shapes, crop_pairs, send
from dinov2.objectives.losses import ObjectiveConfig, Targets, biases_of, make_centering, prototype_losses
from dinov2.objectives.networks import (
    check_networks,
    check_same_parameters,
    features,
    logits_of,
    num_prototypes,
    project,
)
from dinov2_kernels import koleo_loss
from dinov2_kernels.cross_entropy.reference import soft_targets

if TYPE_CHECKING:
    from typing_extensions import Self  # part of typing from Python 3.11 on


class Views(NamedTuple):
    """What networks see of one batch, and which patches are compared: tensors on their device, and nothing else.

    Attributes:
        global_crops, local_crops: [2B, C, H, W] and [L B, C, h, w].
        hidden: [2B, patches] of the global crops that the student does not see; None if it sees all.
        masked_index, masked_weight: [M] of the patches that iBOT compares, as in
            :class:`~dinov2.objectives.batch.MaskedPatches`.
    """

    global_crops: Tensor
    local_crops: Tensor
    hidden: Tensor | None
    masked_index: Tensor
    masked_weight: Tensor


class SelfDistillation(nn.Module):
    """A student, its teacher and the loss between them; formulas at the top of this module.

    The teacher is always in evaluation mode, runs without gradient, and applies its heads to class tokens and masked
    patches only. In training mode each forward pass also moves the centres of softmax centring, after using them.

    Args:
        student, teacher: modules named backbone, dino_head and, if patches have a head of their own, ibot_head; see
            :func:`build_networks`.
        config: weights, student temperature and centring.
        group: processes whose images form one batch for centring and KoLeo, the same number of images on each; None
            means the images of this process alone.

    Raises:
        ValueError: a module is missing or the two networks' parameters differ.
    """

    def __init__(
        self,
        student: nn.ModuleDict,
        teacher: nn.ModuleDict,
        config: ObjectiveConfig,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        super().__init__()
        self._check_networks(student, teacher)
        self.student = student
        self.teacher = teacher.requires_grad_(False).eval()
        self.config = config
        self.group = group
        patch_head = "ibot_head" if "ibot_head" in teacher else "dino_head"
        self.dino_centering = make_centering(config, num_prototypes(teacher["dino_head"]), group)
        self.ibot_centering = make_centering(config, num_prototypes(teacher[patch_head]), group)

    @property
    def average(self) -> nn.ModuleDict:
        """The moving average of the student, which training is for: here the teacher."""
        return self.teacher

    @property
    def students(self) -> dict[str, nn.ModuleDict]:
        """The networks that learn, by name."""
        return {LONE_STUDENT: self.student}

    @property
    def averages(self) -> dict[str, nn.ModuleDict]:
        """Their moving averages, by the same names."""
        return {LONE_STUDENT: self.average}

    def label(self, student: str, value: str) -> str:
        """What a value of a student is called among the values of all: by its own name, where there is one student."""
        return value

    @property
    def networks(self) -> list[nn.ModuleDict]:
        """Every network of the objective once."""
        return [self.student, self.teacher]

    def train(self, mode: bool = True) -> Self:
        """Set the student's mode; the teacher and the average stay in evaluation mode."""
        super().train(mode)
        self.teacher.eval()
        self.average.eval()
        return self

    def forward(self, batch: Mapping[str, Tensor] | Views, teacher_temperature: float) -> dict[str, Tensor]:
        """Losses of one batch.

        Args:
            batch: global_crops [2B, 3, H, W], all first crops, then all second ones in the same order; local_crops
                [L * B, 3, h, w], crop-major as well, absent or empty for L = 0; masks [2B, patches] bool, true where
                the student sees the mask token. Leave masks in host memory: the number of masked patches is a shape,
                and asking a GPU for it would wait for all work queued there. What :meth:`views` makes of a batch will
                do as well.
            teacher_temperature: temperature of the teacher's softmax at this step.

        Returns:
            Scalars, float32 (float64 for a float64 network): dino_local, dino_global, koleo and ibot, each before its
            weight, and total, the sum to optimise.

        Raises:
            ValueError: shapes do not fit together, or KoLeo has a single image.
        """
        views = self.views(batch)
        return self._losses(self.student, views, self._targets(views, teacher_temperature))

    def views(self, batch: Mapping[str, Tensor] | Views) -> Views:
        """What student and teacher see of a batch, as :meth:`forward` takes it: all that is done on the host for it."""
        if isinstance(batch, Views):
            return batch
        global_crops, masks = batch["global_crops"], batch["masks"]
        local_crops = batch.get("local_crops", global_crops[:0])
        check_shapes(global_crops, local_crops, masks)
        self._check_koleo(len(global_crops) // 2)
        masks, hidden = self._predicted_and_hidden(masks)
        if hidden is not None:
            hidden = send(hidden, global_crops.device)
        dtype = torch.promote_types(global_crops.dtype, torch.float32)
        masked = MaskedPatches.of(masks, global_crops.device, dtype)
        return Views(global_crops, local_crops, hidden, masked.index, masked.weight)

    def _losses(self, student: nn.ModuleDict, views: Views, targets: tuple[Targets, Targets]) -> dict[str, Tensor]:
        """The terms of one student; see :meth:`forward`."""
        class_tokens, patch_tokens = self._student_tokens(student, views)
        students = project(student, class_tokens, patch_tokens)
        config, num_global = self.config, len(views.global_crops)
        dino, ibot = prototype_losses(
            students, targets, config.student_temperature, config.student_logits
        )  # [2B + L B], [M]
        dino_global, dino_local = (part.sum() for part in dino.split([num_global, len(views.local_crops)]))
        global_tokens = class_tokens[:num_global]  # [2B, D]
        koleo = 2 * koleo_loss(global_tokens, n_groups=2, group=self.group)  # the mean of both crops, times two
        ibot = ibot.sum()
        total = (
            config.dino_weight * (dino_local + dino_global) + config.koleo_weight * koleo + config.ibot_weight * ibot
        )
        return {"dino_local": dino_local, "dino_global": dino_global, "koleo": koleo, "ibot": ibot, "total": total}

    @torch.no_grad()
    def update_average(self, momentum: float | Tensor) -> None:
        """Move every parameter of :attr:`average`: ``average = momentum * average + (1 - momentum) * student``.

        Call it after the optimiser's step. Buffers stay as they are.

        Args:
            momentum: from 0 to 1; as a scalar tensor on the device it is not checked, so that nothing waits for it.
        """
        averages: list[Tensor] = list(self.average.parameters())
        students: list[Tensor] = list(self.student.parameters())
        if isinstance(momentum, Tensor):
            for average, student in zip(averages, students, strict=True):
                average.lerp_(student, 1 - momentum)
            return
        if not 0 <= momentum <= 1:
            raise ValueError(f"momentum: expected a number from 0 to 1, got {momentum}")
        torch._foreach_lerp_(averages, students, 1 - momentum)

    @torch.no_grad()
    def collapse_statistics(self, global_crops: Tensor, teacher_temperature: float) -> dict[str, Tensor]:
        """How the teacher spreads its class-token targets over the K prototypes; moves no centre.

        Args:
            global_crops: [N, 3, H, W].
            teacher_temperature: temperature of the teacher's softmax.

        Returns:
            Scalars. target_entropy: mean entropy of a target in nats; ln K says that every target is uniform, the
            first way to collapse. mean_target_entropy: entropy of the mean target; near 0 says that every image has
            the same target, the second way. used_prototypes: share of the prototypes that are the largest entry of
            some target.
        """
        (tokens,) = features(self.teacher, [global_crops], [None])
        logits = self.teacher["dino_head"](tokens["x_norm_clstoken"])  # [N, K]
        targets = soft_targets(logits, teacher_temperature, self.dino_centering(logits, teacher_temperature))
        used = targets.new_zeros(targets.shape[1]).index_fill_(0, targets.argmax(dim=1), 1.0)
        return {
            "target_entropy": torch.special.entr(targets).sum(dim=1).mean(),
            "mean_target_entropy": torch.special.entr(targets.mean(dim=0)).sum(),
            "used_prototypes": used.mean(),
        }

    @torch.no_grad()
    def _targets(self, views: Views, temperature: float) -> tuple[Targets, Targets]:
        """Targets of the class tokens, those of the 2B global crops, and of the masked patches."""
        (tokens,) = features(self.teacher, [views.global_crops], [None])
        patch_tokens = tokens["x_norm_patchtokens"].flatten(0, 1)[views.masked_index]  # [M, D]
        teachers = project(self.teacher, tokens["x_norm_clstoken"], patch_tokens)
        class_logits, patch_logits = logits_of(*teachers)  # [2B, K], [M, K']
        centerings = (self.dino_centering, self.ibot_centering)
        class_bias, patch_bias = biases_of(centerings, (class_logits, patch_logits), temperature)
        if self.training:
            for centering, teacher in zip(centerings, teachers, strict=True):
                centering.update(teacher.features, teacher.prototypes)
        B = len(views.global_crops) // 2
        index, weight = crop_pairs(B, len(views.local_crops) // B, class_logits.device, views.masked_weight.dtype)
        return (
            Targets(class_logits, class_bias, temperature, weight, index),
            Targets(patch_logits, patch_bias, temperature, views.masked_weight),
        )

    def _student_tokens(self, student: nn.ModuleDict, views: Views) -> tuple[Tensor, Tensor]:
        """Class tokens of global, then local crops [2B + L B, D] and masked patches of the global ones [M, D]."""
        if len(views.local_crops):
            outputs = features(student, [views.global_crops, views.local_crops], [views.hidden, None])
        else:
            outputs = features(student, [views.global_crops], [views.hidden])
        patch_tokens = outputs[0]["x_norm_patchtokens"].flatten(0, 1)[views.masked_index]
        return torch.cat([tokens["x_norm_clstoken"] for tokens in outputs]), patch_tokens

    def _check_networks(self, student: nn.ModuleDict, teacher: nn.ModuleDict) -> None:
        check_networks(student, teacher)
        check_same_parameters(student, teacher)

    def _predicted_and_hidden(self, masks: Tensor) -> tuple[Tensor, Tensor | None]:
        """Which patches [2B, patches] of the global crops iBOT compares, and which of them the student does not see."""
        return masks, masks

    def _check_koleo(self, images: int) -> None:
        if self.group is not None:
            images *= dist.get_world_size(self.group)
        if self.config.koleo_weight > 0 and images < 2:
            raise ValueError(
                "batch too small for KoLeo: it spreads the images of a batch and needs at least 2 of them, got"
                f" {images}; raise the batch size or set koleo_weight to 0"
            )
