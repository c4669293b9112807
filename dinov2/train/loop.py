"""A run from start to end: metrics, probes, checkpoints and interruptions around the training step."""

from __future__ import annotations

from contextlib import ExitStack, closing
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console

from dinov2.data import ImageDataset, batches, finishes_crops, lost_workers_explained, open_dataset
from dinov2.models import save_pretrained
from dinov2.models.checkpoints.run import RunCheckpoint
from dinov2.train.config import RunConfig
from dinov2.train.graphed_step import first_replay
from dinov2.train.metrics import IntervalClock, MetricsWriter, StepProfiler, StepScalars, check_loss_scale, read_metrics
from dinov2.train.networks import start_from_initial_weights
from dinov2.train.precision import settle_precision
from dinov2.train.processes import Interrupted, Processes, StepAgreement, StopSignals, join_processes
from dinov2.train.progress import RunDisplay
from dinov2.train.run_directory import check_run_directory, write_config
from dinov2.train.saving import CheckpointDirectory, CheckpointSaver
from dinov2.train.trainer import Probe, Trainer


def pretrain(
    config: RunConfig, resume: bool = False, *, dataset: ImageDataset | None = None, probe: Probe | None = None
) -> Path:
    """Train as ``config`` says, and return the run directory, which then contains the finished model.

    Args:
        config: the run; see :mod:`dinov2.recipes` for complete ones.
        resume: continue from the newest checkpoint in ``config.output``, or start a new run if there is none.
        dataset: images to use instead of those that ``config.data`` names: ``len(dataset)`` and ``dataset[i]``, a uint8
            RGB array ``[H, W, 3]``.
        probe: called before the first step, every ``probe_every`` steps and after the last one.

    Under torchrun, each process calls this with the same arguments, and all train as one. Process 0 writes the run
    directory. All processes call the probe; the values in process 0 are logged.

    Raises:
        FileExistsError: the run directory is not empty, and ``resume`` is false.
        ValueError: the resumed run has another configuration, other images, or a damaged checkpoint.
        NonFiniteError: a loss term or gradient became NaN or infinite; such a state is never saved.
        CheckpointError: a checkpoint could not be written; earlier checkpoints are complete.
        PeerError: another process of the run failed or did not answer.
        LostWorkerError: a process that prepares batches was killed.
        Interrupted: Ctrl-C or SIGTERM came; a checkpoint was saved.
    """
    with join_processes(config.device, config.parallel.timeout_seconds) as processes, lost_workers_explained():
        config = processes.first(lambda: _checked(config, processes, resume=resume))
        return Run(config, open_dataset(config.data) if dataset is None else dataset, probe, processes).train()


def _checked(config: RunConfig, processes: Processes, *, resume: bool) -> RunConfig:
    """The configuration with a definite precision, after a check that the run may use its directory."""
    config = settle_precision(config, processes.device)
    check_run_directory(config, resume=resume)
    return config


class Run:
    """The loop around :class:`Trainer`: metrics, probes, checkpoints and interruptions."""

    def __init__(self, config: RunConfig, dataset: ImageDataset, probe: Probe | None, processes: Processes) -> None:
        self.config = config
        self.dataset = dataset
        self.probe = probe
        self.processes = processes
        self.batch_size = processes.share(config.micro_batch_size)
        self.trainer = Trainer(config, processes)
        self.checkpoints = CheckpointDirectory(
            config.output / "checkpoints", config.keep_checkpoints, config.keep_every
        )
        self.saver = CheckpointSaver(self.checkpoints, processes)
        self.scalars = StepScalars()
        self.finished_steps = 0
        self.origin: str | None = None
        if latest := processes.first(self.checkpoints.latest):
            self._restore(latest)
        else:
            self.origin = start_from_initial_weights(self.trainer.objective, config)
        self.display = RunDisplay(config, self.finished_steps, None if processes.is_first else Console(quiet=True))
        self.writer: MetricsWriter | None = None
        self.profiler = StepProfiler(config, self.finished_steps) if processes.is_first else None
        self.clock = IntervalClock(config, self.trainer.objective.teacher, processes)

    def train(self) -> Path:
        """Train until the last step and write the finished model."""
        config = self.config
        start = self.finished_steps
        micro_batches = batches(
            self.dataset,
            config.data,
            batch_size=self.batch_size,
            patch_size=config.patch_size,
            seed=config.seed,
            start_step=start * config.accumulation_steps,
            rank=self.processes.rank,
            world_size=self.processes.world_size,
            raw=finishes_crops(self.trainer.device),
        )
        # The input has been checked; from here on the directory holds a run.
        self.processes.first(lambda: write_config(config))
        if self.processes.is_first:
            self.writer = MetricsWriter(config.output, start)
        self.display.header(
            models=self.trainer.products,
            data=f"{len(self.dataset):,} images, {type(self.dataset).__name__}",
            device=self.processes.describe(),
            start_step=start,
            weights=self.origin,
            graph=first_replay(config, start) if config.cuda_graph else None,
        )
        agreement = StepAgreement(self.processes, first=(True, 0))
        with ExitStack() as stack, closing(micro_batches), self.display, StopSignals() as signals, self.saver:
            if self.writer is not None:
                stack.callback(self.writer.close)
            if self.profiler is not None:
                stack.enter_context(self.profiler)
            if start == 0:
                self._measure()
            timed = self.clock.waiting(micro_batches)
            for step in range(start, config.steps):
                self.scalars.append(self.trainer.step(step, timed))
                self._after_step()
                go_on, progress = agreement.after_step(not signals.received, self.saver.progress)
                self.saver.after_step(progress)
                if not go_on and self.finished_steps < config.steps:
                    self._stop()
        finished = {config.product_folder(name): model for name, model in self.trainer.finished_backbones().items()}
        self.processes.first(lambda: [save_pretrained(model, folder) for folder, model in finished.items()])
        if self.processes.is_first:
            self.display.finish(read_metrics(config.output / "metrics.jsonl"), list(finished))
        return config.output

    def _after_step(self) -> None:
        config = self.config
        self.finished_steps += 1
        self.clock.step()
        self.display.advance()
        if self.profiler is not None and self.profiler.step():
            self.display.profiled(self.profiler.trace)
        is_last = self.finished_steps == config.steps
        if is_last or self.finished_steps % config.log_every == 0:
            self._log()
        if is_last or self.finished_steps % config.probe_every == 0:
            self._measure()
        if is_last or self.finished_steps % config.checkpoint_every == 0:
            self._save()

    def _log(self) -> None:
        self.scalars.check_finite(self.finished_steps, self._last_checkpoint)
        speed = self.clock.values()  # measured here, because the check above has waited for the device
        values = {
            **self.scalars.means(),
            **self.trainer.collapse_statistics(self.finished_steps - 1),
            **asdict(self.trainer.schedules(self.finished_steps - 1)),
            **self.trainer.arithmetic.metrics(),
            **speed,
        }
        check_loss_scale(values.get("loss_scale", 1.0), self._last_checkpoint)
        self.scalars.clear()
        self._write(values)
        self.display.metrics(self.finished_steps, values)
        self.clock.restart()

    def _write(self, values: dict[str, Any]) -> None:
        if self.writer is None:
            return
        try:
            self.writer.write(self.finished_steps, values)
        except OSError as error:
            raise OSError(
                f"metrics of step {self.finished_steps} cannot be written to {self.config.output} ({error});"
                " once there is room, --resume continues from the newest checkpoint"
            ) from error

    def _measure(self) -> None:
        if self.probe is None:
            return
        values = self.trainer.measure(self.probe)
        self._write(values)
        self.display.probe(self.finished_steps, values)
        self.clock.restart()

    def _save(self) -> None:
        """Begin to write a checkpoint, unless it holds a NaN or an infinity."""
        self.scalars.check_finite(self.finished_steps, self._last_checkpoint)
        values = {
            "step": self.finished_steps,
            "num_images": len(self.dataset),
            "scalars": self.scalars.state_dict(),
            "loss_scale": self.trainer.arithmetic.state_dict(),
            "vit": {name: asdict(backbone.config) for name, backbone in self.trainer.products.items()},
        }
        self.saver.save(self.finished_steps, self.trainer.state_dict(), values)
        self.clock.restart()

    def _last_checkpoint(self) -> Path | None:
        """The newest checkpoint; waits for the save in flight. All processes must call it."""
        self.saver.finish()
        return self.checkpoints.latest()

    def _restore(self, path: Path) -> None:
        checkpoint = RunCheckpoint(path)
        mine = sorted(checkpoint.files)[self.processes.rank :: self.processes.world_size]
        self.processes.together(lambda: checkpoint.verify(mine))
        values = checkpoint.values
        if values["num_images"] != len(self.dataset):
            raise ValueError(
                f"cannot resume from {path}: the run was started on {values['num_images']} images,"
                f" but its {type(self.dataset).__name__} now holds {len(self.dataset)}"
            )
        self.trainer.restore(checkpoint)
        self.trainer.arithmetic.load_state_dict(values["loss_scale"])
        self.scalars.load_state_dict(values["scalars"])
        self.finished_steps = values["step"]

    def _stop(self) -> None:
        checkpoint = self.checkpoints.path(self.finished_steps)
        if self._last_checkpoint() != checkpoint:
            self._save()
            self.saver.finish()
        raise Interrupted(
            f"stopped after step {self.finished_steps} of {self.config.steps} and saved {checkpoint};"
            " run the same command with --resume to continue"
        )
