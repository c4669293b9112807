"""A run from start to end: metrics, probes, checkpoints and interruptions around the training step."""

from __future__ import annotations

import time
from contextlib import ExitStack, closing
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console

from dinov2.data import ImageDataset, batches, open_dataset
from dinov2.models import save_pretrained
from dinov2.train.checkpoint import CheckpointDirectory, load_checkpoint, non_finite_tensors
from dinov2.train.config import RunConfig
from dinov2.train.initial_weights import start_from_initial_weights
from dinov2.train.interruption import Interrupted, StopSignals
from dinov2.train.metrics import MetricsWriter, NonFiniteError, StepScalars, read_metrics, way_back
from dinov2.train.processes import Processes, StopAgreement, join_processes
from dinov2.train.progress import RunDisplay
from dinov2.train.run_directory import check_run_directory, write_config
from dinov2.train.trainer import Probe, Trainer


def pretrain(
    config: RunConfig, resume: bool = False, *, dataset: ImageDataset | None = None, probe: Probe | None = None
) -> Path:
    """Pretrain as ``config`` says and return the run directory, with the finished teacher in ``teacher/``.

    Args:
        config: the run; see :mod:`dinov2.recipes` for complete ones.
        resume: continue from the newest checkpoint in ``config.output``, or start there if there is none yet.
        dataset: images, instead of those that ``config.data`` names: ``len(dataset)`` and ``dataset[i]``, a uint8 RGB
            array ``[H, W, 3]``.
        probe: called before the first step, every ``probe_every`` steps and after the last one.

    Under torchrun each process calls this with the same arguments, and they train as one; process 0 writes the run
    directory. All of them call the probe, and its values in process 0 count.

    Raises:
        FileExistsError: the run directory is not empty, and ``resume`` is false.
        ValueError: resumed with another configuration, other images, or from a damaged checkpoint.
        NonFiniteError: a loss term or gradient became NaN or infinite; no such state is ever saved.
        PeerError: another process of the run failed or fell silent.
        Interrupted: Ctrl-C or SIGTERM came; a checkpoint was saved.
    """
    with join_processes(config.device, config.parallel.timeout_seconds) as processes:
        processes.first(lambda: check_run_directory(config, resume=resume))
        return Run(config, open_dataset(config.data) if dataset is None else dataset, probe, processes).train()


class Run:
    """The loop around :class:`Trainer`: metrics, probes, checkpoints and interruptions."""

    def __init__(self, config: RunConfig, dataset: ImageDataset, probe: Probe | None, processes: Processes) -> None:
        self.config = config
        self.dataset = dataset
        self.probe = probe
        self.processes = processes
        self.batch_size = processes.share(config.micro_batch_size)
        self.trainer = Trainer(config, processes)
        self.checkpoints = CheckpointDirectory(config.output / "checkpoints", config.keep_checkpoints)
        self.scalars = StepScalars()
        self.finished_steps = 0
        self.origin: str | None = None
        if latest := processes.first(self.checkpoints.latest):
            self._restore(latest)
        else:
            self.origin = start_from_initial_weights(self.trainer.objective, config)
        self.display = RunDisplay(config, self.finished_steps, None if processes.is_first else Console(quiet=True))
        self.writer: MetricsWriter | None = None
        self._restart_clock()

    def train(self) -> Path:
        """Run to the end."""
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
        )
        # From here on the directory holds a run; what was wrong with its input has been said.
        self.processes.first(lambda: write_config(config))
        if self.processes.is_first:
            self.writer = MetricsWriter(config.output, start)
        self.display.header(
            models=self.trainer.products,
            data=f"{len(self.dataset):,} images, {type(self.dataset).__name__}",
            device=self.processes.describe(),
            start_step=start,
            weights=self.origin,
        )
        stop = StopAgreement(self.processes)
        with ExitStack() as stack, closing(micro_batches), self.display, StopSignals() as signals:
            if self.writer is not None:
                stack.callback(self.writer.close)
            if start == 0:
                self._measure()
            for step in range(start, config.steps):
                self.scalars.append(self.trainer.step(step, micro_batches))
                self._after_step()
                if stop.after_step(signals.received) and self.finished_steps < config.steps:
                    self._stop()
        finished = {config.product_folder(name): model for name, model in self.trainer.finished_backbones().items()}
        self.processes.first(lambda: [save_pretrained(model, folder) for folder, model in finished.items()])
        if self.processes.is_first:
            self.display.finish(read_metrics(config.output / "metrics.jsonl"), list(finished))
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
        self._write(values)
        self.display.metrics(self.finished_steps, values)
        self._restart_clock()

    def _write(self, values: dict[str, Any]) -> None:
        if self.writer is not None:
            self.writer.write(self.finished_steps, values)

    def _restart_clock(self) -> None:
        self._interval_start, self._interval_steps = time.monotonic(), 0

    def _measure(self) -> None:
        if self.probe is None:
            return
        values = self.trainer.measure(self.probe)
        self._write(values)
        self.display.probe(self.finished_steps, values)
        self._restart_clock()

    def _save(self) -> Path:
        """Write a checkpoint, after making sure that nothing in it is NaN or infinite."""
        self.scalars.check_finite(self.finished_steps, self.checkpoints.latest())
        state = self.trainer.state_dict()
        path = self.processes.first(lambda: self._write_checkpoint(state))
        self._restart_clock()
        return path

    def _write_checkpoint(self, state: dict[str, Any]) -> Path:
        if spoilt := next(non_finite_tensors(state), None):
            raise NonFiniteError(
                f"training stopped: after step {self.finished_steps} the tensor {spoilt} holds NaN or infinity;"
                f" {way_back(self.checkpoints.latest())}"
            )
        state |= {"step": self.finished_steps, "num_images": len(self.dataset), "scalars": self.scalars.state_dict()}
        return self.checkpoints.save(self.finished_steps, state)

    def _restore(self, checkpoint: Path) -> None:
        state = load_checkpoint(checkpoint)
        if state["num_images"] != len(self.dataset):
            raise ValueError(
                f"cannot resume from {checkpoint}: the run was started on {state['num_images']} images,"
                f" but its {type(self.dataset).__name__} now holds {len(self.dataset)}"
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
