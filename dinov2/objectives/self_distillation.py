"""DINO + iBOT + KoLeo: the objective of DINOv2 (arXiv:2304.07193, section 4).

A student sees two large ("global") crops of each image, with some patches masked, and L small ("local") crops. The EMA
teacher, the moving average of the student, sees the global crops unmasked. CE(s, t) is the mean cross-entropy of
student rows s with the teacher's targets t, and l, g1, g2 are the class tokens of the crops:

    dino_local  = sum_{l, t} CE(l, t)          / pairs        every local crop against both global crops
    dino_global = (CE(g1, t2) + CE(g2, t1))    / pairs        each global crop against the other one
    koleo       = KoLeo(g1) + KoLeo(g2)                       on the backbone's tokens, before the head
    ibot        = mean over global crops of the mean cross-entropy of that crop's masked patches
    total       = dino_weight (dino_local + dino_global) + koleo_weight koleo + ibot_weight ibot

    pairs = 2 + max(2 L, 1), so with 8 local crops the two DINO terms have the weights 16/18 and 2/18.

``docs/differences.md`` lists the differences from the published code.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dinov2.models.checkpoints.run import LONE_STUDENT
from dinov2.objectives.batch import MaskedPatches, check_shapes, crop_pairs, send
from dinov2.objectives.config import ObjectiveConfig
from dinov2.objectives.losses import Targets, biases_of, make_centering, prototype_losses
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
    from typing_extensions import Self  # typing has it from Python 3.11 on


class Views(NamedTuple):
    """The networks' inputs for one batch, and the patches that iBOT compares. All tensors are on the networks' device.

    Attributes:
        global_crops, local_crops: [2B, C, H, W] and [L B, C, h, w].
        hidden: [2B, patches] bool, patches of the global crops that the student does not see; None if it sees all.
        masked_index, masked_weight: [M], index and weight of the patches that iBOT compares, as in
            :class:`~dinov2.objectives.batch.MaskedPatches`.
    """

    global_crops: Tensor
    local_crops: Tensor
    hidden: Tensor | None
    masked_index: Tensor
    masked_weight: Tensor


class SelfDistillation(nn.Module):
    """A student, its EMA teacher and the loss between them; the formulas are at the top of this module.

    The teacher is always in evaluation mode and runs without gradients. Its heads see only class tokens and masked
    patches. In training mode, each forward pass also moves the centres of softmax centring, after it has used them.

    Args:
        student, teacher: modules named backbone, dino_head and, if patches have a head of their own, ibot_head; see
            :func:`build_networks`.
        config: weights, student temperature and centring.
        group: processes whose images form one batch for centring and KoLeo; each has the same number of images. None
            means this process alone.

    Raises:
        ValueError: a module is missing, or the parameters of the two networks differ.
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
        """The moving average of the student, the product of training: here the teacher."""
        return self.teacher

    @property
    def students(self) -> dict[str, nn.ModuleDict]:
        """The networks that learn, by name."""
        return {LONE_STUDENT: self.student}

    @property
    def averages(self) -> dict[str, nn.ModuleDict]:
        """The students' moving averages, by the same names."""
        return {LONE_STUDENT: self.average}

    def label(self, student: str, value: str) -> str:
        """The name of a student's value among the values of all students; here its own name, for a single student."""
        return value

    @property
    def networks(self) -> list[nn.ModuleDict]:
        """All networks of the objective."""
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
            batch: global_crops [2B, 3, H, W], all first crops, then all second crops in the same order; local_crops
                [L * B, 3, h, w], also crop-major, absent or empty for L = 0; masks [2B, patches] bool, True for patches
                that the student sees as mask tokens. Keep masks in host memory: the number of masked patches is a
                shape, and reading it from a GPU would wait for all work in its queue. The result of :meth:`views` is
                also accepted.
            teacher_temperature: temperature of the teacher's softmax at this step.

        Returns:
            Scalars, float32 (float64 for a float64 network): dino_local, dino_global, koleo and ibot, each before its
            weight, and total, the sum to optimise.

        Raises:
            ValueError: the shapes do not match, or KoLeo has a single image.
        """
        views = self.views(batch)
        return self._losses(self.student, views, self._targets(views, teacher_temperature))

    def views(self, batch: Mapping[str, Tensor] | Views) -> Views:
        """The networks' inputs for a batch, as :meth:`forward` takes them. All work on the host is done here."""
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
        """The loss terms of one student; see :meth:`forward`."""
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

        Call it after the optimiser's step. Buffers do not change.

        Args:
            momentum: a number from 0 to 1. A scalar tensor on the device is not checked, because a check would wait.
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
        """Measure how the teacher's class-token targets spread over the K prototypes. No centre moves.

        Args:
            global_crops: [N, 3, H, W].
            teacher_temperature: temperature of the teacher's softmax.

        Returns:
            Scalars. target_entropy: mean entropy of a target in nats; ln K means that all targets are uniform, the
            first kind of collapse. mean_target_entropy: entropy of the mean target; near 0 means that all images have
            the same target, the second kind. used_prototypes: share of the prototypes that are the largest entry of at
            least one target.
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
        """Targets of the 2B global crops' class tokens, and targets of the masked patches."""
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
        """Class tokens of global, then local crops [2B + L B, D], and masked patches of global crops [M, D]."""
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
        """Masks [2B, patches] of the patches that iBOT compares, and of those that the student does not see."""
        return masks, masks

    def _check_koleo(self, images: int) -> None:
        if self.group is not None:
            images *= dist.get_world_size(self.group)
        if self.config.koleo_weight > 0 and images < 2:
            raise ValueError(
                "batch too small for KoLeo: it spreads the images of a batch and needs at least 2 images, got"
                f" {images}; raise the batch size or set koleo_weight to 0"
            )
