"""The training loop.

Everything random in a micro-batch is a pure function of the seed and its number in the run: the data (see
:func:`dinov2.data.batches`) and, because PyTorch's generator is seeded anew before each, stochastic depth. A checkpoint
therefore holds no generator states, a probe that draws random numbers disturbs nothing, and a resumed run repeats the uninterrupted one bit by bit
(on the CPU; GPUs add up in no fixed order).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dinov2.data import Batch, ImageDataset, batches, open_dataset
from dinov2.models import VisionTransformer, save_pretrained
from dinov2.objectives import SelfDistillation, build_networks
from dinov2.train.checkpoint import CheckpointDirectory, load_checkpoint, non_finite_tensors
from dinov2.train.config import PretrainConfig
from dinov2.train.interruption import Interrupted, StopSignals
from dinov2.train.metrics import MetricsWriter, NonFiniteError, StepScalars, read_metrics, way_back
from dinov2.train.parameter_groups import apply_settings, parameter_groups
from dinov2.train.progress import RunDisplay
from dinov2.train.run_directory import check_run_directory, write_config
from dinov2.train.schedules import Schedules, StepSettings

Probe = Callable[[VisionTransformer], dict[str, float]]
"""Measures the teacher's backbone, in eval mode and without gradients, e.g. the k-NN accuracy on labelled images."""


class Trainer:
    """Networks, objective and optimiser of a run, and one optimiser step of it."""

    def __init__(self, config: PretrainConfig) -> None:
        self.config = config
        self.device = resolve_device(config.device)
        torch.manual_seed(config.seed)
        student, teacher = build_networks(config.vit, config.dino_head, config.ibot_head)
        self.objective = SelfDistillation(student, teacher, config.objective).to(self.device)
        self.schedules = Schedules(config)
        optim = config.optim
        groups = parameter_groups(
            student, layer_decay=optim.layer_decay, patch_embed_lr_scale=optim.patch_embed_lr_scale
        )
        self.optimizer = torch.optim.AdamW(groups, betas=(optim.beta1, optim.beta2), fused=True)

    def step(self, step: int, micro_batches: Iterator[Batch]) -> dict[str, Tensor]:
        """One optimiser step over ``accumulation_steps`` micro-batches.

        Returns its scalars, still on the device: the objective's terms (means over micro-batches) and each student
        module's gradient norm before clipping.
        """
        config, settings = self.config, self.schedules(step)
        apply_settings(self.optimizer.param_groups, settings)
        self.optimizer.zero_grad()
        first = step * config.accumulation_steps
        terms = [
            self._forward_backward(next(micro_batches), settings, number)
            for number in range(first, first + config.accumulation_steps)
        ]
        norms = {
            f"grad_norm/{name}": nn.utils.clip_grad_norm_(module.parameters(), config.optim.clip_grad_norm)
            for name, module in self.objective.student.items()
        }
        self.optimizer.step()
        self.objective.update_teacher(settings.teacher_momentum)
        return {name: torch.stack([term[name] for term in terms]).mean() for name in terms[0]} | norms

    def _forward_backward(self, batch: Batch, settings: StepSettings, number: int) -> dict[str, Tensor]:
        """Add the gradient of micro-batch ``number`` of the run."""
        crops = batch["global_crops"].to(self.device, non_blocking=True)
        local_crops = batch["local_crops"].to(self.device, non_blocking=True)
        # Masks stay on the host: the number of masked patches is a shape, and asking a GPU for it would wait for it.
        on_device = Batch(global_crops=crops, local_crops=local_crops, masks=batch["masks"])
        torch.manual_seed(micro_batch_seed(self.config.seed, number))
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.precision == "bf16"):
            terms: dict[str, Tensor] = self.objective(on_device, settings.teacher_temperature)
        (terms["total"] / self.config.accumulation_steps).backward()
        self._last_crops = crops
        return {name: term.detach().float() for name, term in terms.items()}

    def collapse_statistics(self, step: int) -> dict[str, float]:
        """How the targets of the last micro-batch spread over the prototypes; costs a forward pass of the teacher."""
        statistics = self.objective.collapse_statistics(self._last_crops, self.schedules(step).teacher_temperature)
        return {name: float(value) for name, value in statistics.items()}

    def measure(self, probe: Probe) -> dict[str, float]:
        """What ``probe`` says of the teacher's backbone."""
        with torch.no_grad():
            return probe(self.teacher_backbone)

    @property
    def teacher_backbone(self) -> VisionTransformer:
        """The network that a run is for."""
        backbone = self.objective.teacher["backbone"]
        assert isinstance(backbone, VisionTransformer)
        return backbone

    def state_dict(self) -> dict[str, Any]:
        """Networks by the names of facebook's files, the objective's own buffers (centres), the optimiser."""
        own = {
            name: tensor
            for name, tensor in self.objective.state_dict().items()
            if not name.startswith(("student.", "teacher."))
        }
        return {
            "student": self.objective.student.state_dict(),
            "teacher": self.objective.teacher.state_dict(),
            "objective": own,
            "optimizer": self.optimizer.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what :meth:`state_dict` returned."""
        networks = {f"{role}.{name}": tensor for role in ("student", "teacher") for name, tensor in state[role].items()}
        self.objective.load_state_dict(networks | state["objective"])
        self.optimizer.load_state_dict(state["optimizer"])


def pretrain(
    config: PretrainConfig, resume: bool = False, *, dataset: ImageDataset | None = None, probe: Probe | None = None
) -> Path:
    """Pretrain as ``config`` says and return the run directory, with the finished teacher in ``teacher/``.

    Args:
        config: the run; see :mod:`dinov2.recipes` for complete ones.
        resume: continue from the newest checkpoint in ``config.output``, or start there if there is none yet.
        dataset: images, instead of those that ``config.data`` names: ``len(dataset)`` and ``dataset[i]``, a uint8 RGB
            array ``[H, W, 3]``.
        probe: called before the first step, every ``probe_every`` steps and after the last one.

    Raises:
        FileExistsError: the run directory is not empty, and ``resume`` is false.
        ValueError: resumed with another configuration, other images, or from a damaged checkpoint.
        NonFiniteError: a loss term or gradient became NaN or infinite; no such state is ever saved.
        Interrupted: Ctrl-C or SIGTERM came; a checkpoint was saved.
    """
    check_run_directory(config, resume=resume)
    return Run(config, dataset or open_dataset(config.data), probe).train()


class Run:
    """The loop around :class:`Trainer`: metrics, probes, checkpoints and interruptions."""

    def __init__(self, config: PretrainConfig, dataset: ImageDataset, probe: Probe | None) -> None:
        self.config = config
        self.dataset = dataset
        self.probe = probe
        self.trainer = Trainer(config)
        self.checkpoints = CheckpointDirectory(config.output / "checkpoints", config.keep_checkpoints)
        self.scalars = StepScalars()
        self.finished_steps = 0
        if latest := self.checkpoints.latest():
            self._restore(latest)
        self.display = RunDisplay(config, self.finished_steps)
        self._restart_clock()

    def train(self) -> Path:
        """Run to the end."""
        config = self.config
        start = self.finished_steps
        micro_batches = batches(
            self.dataset,
            config.data,
            batch_size=config.micro_batch_size,
            patch_size=config.vit.patch_size,
            seed=config.seed,
            start_step=start * config.accumulation_steps,
        )
        write_config(config)  # from here on the directory holds a run; what was wrong with its input has been said
        self.writer = MetricsWriter(config.output, start)
        self.display.header(
            parameters=sum(parameter.numel() for parameter in self.trainer.teacher_backbone.parameters()),
            images=len(self.dataset),
            device=str(self.trainer.device),
            start_step=start,
        )
        try:
            with self.display, StopSignals() as signals:
                if start == 0:
                    self._measure()
                for step in range(start, config.steps):
                    self.scalars.append(self.trainer.step(step, micro_batches))
                    self._after_step()
                    if signals.received:
                        self._stop()
        finally:
            self.writer.close()
        teacher = config.output / "teacher"
        save_pretrained(self.trainer.teacher_backbone, teacher)
        lines = read_metrics(config.output / "metrics.jsonl")
        self.display.finish(lines, teacher)
        return config.output

    def _after_step(self) -> None:
        config = self.config
        self.finished_steps += 1
        self._interval_steps += 1
        self.display.advance()
        is_last = self.finished_steps == config.steps
        if is_last or self.finished_steps % config.log_every == 0:
            self._log()
        if is_last or self.finished_steps % config.probe_every == 0:
            self._measure()
        if is_last or self.finished_steps % config.checkpoint_every == 0:
            self._save()

    def _log(self) -> None:
        self.scalars.check_finite(self.finished_steps, self.checkpoints.latest())
        seconds = time.monotonic() - self._interval_start
        values = {
            **self.scalars.means(),
            **self.trainer.collapse_statistics(self.finished_steps - 1),
            **asdict(self.trainer.schedules(self.finished_steps - 1)),
            "images_per_second": self._interval_steps * self.config.batch_size / seconds,
        }
        self.scalars.clear()
        self.writer.write(self.finished_steps, values)
        self.display.metrics(self.finished_steps, values)
        self._restart_clock()

    def _restart_clock(self) -> None:
        self._interval_start, self._interval_steps = time.monotonic(), 0

    def _measure(self) -> None:
        if self.probe is None:
            return
        values = self.trainer.measure(self.probe)
        self.writer.write(self.finished_steps, values)
        self.display.probe(self.finished_steps, values)
        self._restart_clock()

    def _save(self) -> Path:
        """Write a checkpoint, after making sure that nothing in it is NaN or infinite."""
        self.scalars.check_finite(self.finished_steps, self.checkpoints.latest())
        state = self.trainer.state_dict()
        if spoilt := next(non_finite_tensors(state), None):
            raise NonFiniteError(
                f"training stopped: after step {self.finished_steps} the tensor {spoilt} holds NaN or infinity;"
                f" {way_back(self.checkpoints.latest())}"
            )
        state |= {"step": self.finished_steps, "num_images": len(self.dataset), "scalars": self.scalars.state_dict()}
        path = self.checkpoints.save(self.finished_steps, state)
        self._restart_clock()
        return path

    def _restore(self, checkpoint: Path) -> None:
        state = load_checkpoint(checkpoint)
        if state["num_images"] != len(self.dataset):
            raise ValueError(
                f"cannot resume from {checkpoint}: the run was started on {state['num_images']} images, but"
                f" {self.config.data.root or 'the bundled photographs'} now holds {len(self.dataset)}"
            )
        self.trainer.load_state_dict(state)
        self.scalars.load_state_dict(state["scalars"])
        self.finished_steps = state["step"]

    def _stop(self) -> None:
        checkpoint = self._save()
        raise Interrupted(
            f"stopped after step {self.finished_steps} of {self.config.steps} and saved {checkpoint};"
            " run the same command with --resume to continue"
        )


def resolve_device(name: str) -> torch.device:
    """The device that ``device`` of the configuration names; ``"auto"`` takes an accelerator if there is one."""
    if name != "auto":
        return torch.device(name)
    return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")


def micro_batch_seed(seed: int, number: int) -> int:
    """Seed of PyTorch's generators for one micro-batch, well mixed so that neighbouring ones share nothing."""
    return int(np.random.SeedSequence((seed, number)).generate_state(1, np.uint64)[0] >> 1)
