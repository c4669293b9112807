"""Several processes train as one: same losses, same weights, one run directory, one end."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from dinov2.data import Batch, DataConfig, ImageDataset, batches, open_dataset
from dinov2.models import load_pretrained
from dinov2.models.checkpoints.run import RunCheckpoint, load_checkpoint
from dinov2.objectives import ObjectiveConfig
from dinov2.train import ParallelConfig, PretrainConfig, pretrain, read_metrics
from dinov2.train.processes import Processes, StepAgreement, join_processes
from dinov2.train.saving import CheckpointDirectory, CheckpointSaver
from dinov2.train.sharding import gathered
from dinov2.train.trainer import Trainer, micro_batch_seed
from tests.process_group import in_processes
from tests.train.lives import ends, start, with_small_images
from tests.train.test_synchronisation import Reads

WORLD_SIZE = 2
STEPS = 4  # prototypes are frozen in the first two of them
TOLERANCE = {"softmax": 1e-9, "sinkhorn_knopp": 1e-5}  # weights in float64; log u of Sinkhorn passes through float32


@functools.cache
def photographs() -> ImageDataset:
    return open_dataset(DataConfig())


def micro_batches(config: PretrainConfig, rank: int) -> Iterator[Batch]:
    """What process ``rank`` of two reads, in the default dtype."""
    dtype = torch.get_default_dtype()
    stream = batches(
        photographs(),
        config.data,
        batch_size=config.micro_batch_size // WORLD_SIZE,
        patch_size=config.patch_size,
        seed=config.seed,
        rank=rank,
        world_size=WORLD_SIZE,
    )
    for batch in stream:
        yield Batch(
            global_crops=batch["global_crops"].to(dtype),
            local_crops=batch["local_crops"].to(dtype),
            masks=batch["masks"],
        )


def merged(config: PretrainConfig) -> Iterator[Batch]:
    """The micro-batches of both processes as one, crop by crop."""
    images = config.micro_batch_size // WORLD_SIZE
    for parts in zip(*(micro_batches(config, rank) for rank in range(WORLD_SIZE)), strict=True):
        yield {name: interleaved([part[name] for part in parts], images) for name in parts[0]}


def interleaved(parts: list[torch.Tensor], images: int) -> torch.Tensor:
    """Crops of ``images`` images of each process, as one batch of all images, crop by crop."""
    crops = zip(*(part.split(images) for part in parts), strict=True)
    return torch.cat([crop for of_all in crops for crop in of_all])


def draw_as_two(trainer: Trainer) -> None:
    """Let the student of one process run the images of each of two processes apart, under the seeds of those."""
    backbone = trainer.objective.student["backbone"]
    images = trainer.config.micro_batch_size // WORLD_SIZE
    forward, numbers = backbone.forward_features, iter(range(1000))

    def forward_apart(crops, masks):
        number, outputs = next(numbers), []
        for rank in range(WORLD_SIZE):
            torch.manual_seed(micro_batch_seed(trainer.config.seed, number * WORLD_SIZE + rank))
            mine = [torch.cat(x.split(images)[rank::WORLD_SIZE]) for x in crops]
            my_masks = [None if x is None else torch.cat(x.split(images)[rank::WORLD_SIZE]) for x in masks]
            outputs.append(forward(mine, masks=my_masks))
        return [
            {name: interleaved([output[name] for output in both], images) for name in both[0]}
            for both in zip(*outputs, strict=True)
        ]

    backbone.forward_features = forward_apart


CASES: dict[str, dict] = {
    "split, softmax, separate, drop": {"separate": True, "drop": 0.3, "sharding": "full"},
    "split, sinkhorn, shared, accumulated": {"centering": "sinkhorn_knopp", "accumulation": 2, "sharding": "full"},
    "replicas of one, recomputed logits": {"sharding": "hybrid", "shard_size": 1, "student_logits": "recomputed"},
    "one replica of two, recomputed blocks, drop": {
        "sharding": "hybrid",
        "shard_size": 2,
        "drop": 0.3,
        "activation_checkpointing": "selective",
    },
    "split, recomputed logits and blocks, drop, separate, accumulated": {
        "sharding": "full",
        "student_logits": "recomputed",
        "activation_checkpointing": "full",
        "drop": 0.3,
        "separate": True,
        "accumulation": 2,
    },
    "softmax, shared": {},
    "softmax, separate, drop": {"separate": True, "drop": 0.3},
    "sinkhorn, shared, drop, accumulated": {"centering": "sinkhorn_knopp", "drop": 0.3, "accumulation": 2},
    "sinkhorn, separate": {"centering": "sinkhorn_knopp", "separate": True},
}


def configured(
    config,
    *,
    centering="softmax",
    student_logits="stored",
    separate=False,
    drop=0.0,
    accumulation=1,
    sharding="replicate",
    shard_size=None,
    **options,
):
    return dataclasses.replace(
        config,
        batch_size=4 * accumulation,
        accumulation_steps=accumulation,
        vit=dataclasses.replace(config.vit, drop_path_rate=drop, init_values=1.0),
        ibot_head=config.dino_head if separate else None,
        objective=ObjectiveConfig(centering=centering, student_logits=student_logits),
        parallel=ParallelConfig(sharding=sharding, shard_size=shard_size),
        **options,
    )


def train_beside_one_process(rank: int, world_size: int, directory: Path, config: PretrainConfig) -> None:
    torch.set_default_dtype(torch.float64)
    processes = Processes(torch.device("cpu"), rank, world_size, dist.group.WORLD)
    for case, options in CASES.items():
        changed = configured(config, **options)
        tolerance = TOLERANCE[changed.objective.centering]
        split, single = Trainer(changed, processes), Trainer(plain(changed))
        assert_same_weights(gathered(split.objective.state_dict()), single.objective.state_dict(), 0, case)
        draw_as_two(single)
        mine, whole = micro_batches(changed, rank), merged(changed)
        for step in range(STEPS):
            actual, expected = split.step(step, mine), single.step(step, whole)
            for name, value in expected.items():  # float32, as they are logged
                torch.testing.assert_close(actual[name], value.float(), rtol=2e-6, atol=2e-6, msg=f"{case}: {name}")
        assert_same_weights(gathered(split.objective.state_dict()), single.objective.state_dict(), tolerance, case)
        if changed.parallel.sharding == "full" and changed.activation_checkpointing == "none":  # which changes no state
            replicate = dataclasses.replace(changed, parallel=ParallelConfig(sharding="replicate"))
            check_state(split, Trainer(replicate, processes), Trainer(changed, processes), directory / case)
    for sharding in ("replicate", "full"):
        accumulated = configured(config, accumulation=2, sharding=sharding)
        check_communication(Trainer(accumulated, processes), accumulated)
    check_agreement(processes)
    torch.set_default_dtype(torch.float32)
    check_low_precision(config, processes)
    check_overflow_of_one(config, processes)


def plain(config: PretrainConfig) -> PretrainConfig:
    """The run without what must not change its results."""
    objective = dataclasses.replace(config.objective, student_logits="stored")
    return dataclasses.replace(config, objective=objective, activation_checkpointing="none")


def assert_same_weights(actual: dict, expected: dict, tolerance: float, case: str) -> None:
    assert list(actual) == list(expected)
    for name, tensor in expected.items():
        torch.testing.assert_close(actual[name], tensor, rtol=0, atol=tolerance, msg=f"{case}: {name}")


def check_state(trainer: Trainer, replicated: Trainer, split: Trainer, directory: Path) -> None:
    """What processes save, replicated and split, processes of the other sharding, and one alone, take over."""
    processes = trainer.processes
    state = gathered(trainer.state_dict())
    for number, other in enumerate([replicated, split, trainer], start=1):
        with CheckpointSaver(CheckpointDirectory(directory, keep=3), processes) as saver:
            saver.save(number, trainer.state_dict(), {"step": number})
        path = saver.directory.path(number)
        assert sorted(RunCheckpoint(path).files) == [".metadata", "__0_0.distcp", "__1_0.distcp"]
        whole = load_checkpoint(path)
        assert whole.pop("step") == number
        torch.testing.assert_close(whole, state, rtol=0, atol=0)
        other.restore(RunCheckpoint(path))
        torch.testing.assert_close(gathered(other.state_dict()), state, rtol=0, atol=0)
        trainer = other
    alone = Trainer(trainer.config)
    alone.restore(RunCheckpoint(path))
    torch.testing.assert_close(alone.state_dict(), state, rtol=0, atol=0)
    backbone = trainer.finished_backbones()["student"].state_dict()
    assert all(torch.equal(state["teacher"][f"backbone.{name}"], tensor) for name, tensor in backbone.items())
    part = split.objective.student["dino_head"].last_layer.weight_v.to_local()
    assert len(part) == 64 // WORLD_SIZE


def check_low_precision(config: PretrainConfig, processes: Processes) -> None:
    """Split in bfloat16: blocks are gathered in it, what goes between them is float32, and training is nearly the same.

    The whole network, under autocast, multiplies with the same rounded weights; only norms and LayerScales differ.
    """
    half = dataclasses.replace(configured(config, sharding="full"), precision="bf16")
    split, single = Trainer(half, processes), Trainer(half)
    gathered_in, tokens = set(), set()
    block = split.objective.student["backbone"].blocks[1]
    block.mlp.fc1.register_forward_pre_hook(lambda fc1, args: gathered_in.add(fc1.weight.dtype))
    block.register_forward_hook(lambda block, args, output: tokens.update((args[0].dtype, output.dtype)))
    draw_as_two(single)
    mine, whole = micro_batches(half, processes.rank), merged(half)
    for step in range(3):
        actual, expected = split.step(step, mine), single.step(step, whole)
        for name, value in expected.items():
            torch.testing.assert_close(actual[name], value, rtol=0.03, atol=3e-3, msg=f"bf16: {name}")
    assert (gathered_in, tokens) == ({torch.bfloat16}, {torch.float32})
    assert all(p.dtype == p.grad.dtype == torch.float32 for p in block.parameters())
    split.collapse_statistics(2)
    split.measure(lambda model: {"norm": float(model(torch.zeros(1, 3, 16, 16)).norm())})


def check_overflow_of_one(config: PretrainConfig, processes: Processes) -> None:
    """An overflow in the part of one process makes all skip the step."""
    half = dataclasses.replace(configured(config, sharding="full"), precision="fp16")
    trainer = Trainer(half, processes)
    trainer.arithmetic.load_state_dict(trainer.arithmetic.state_dict() | {"scale": 4.0})
    unscale, stream = trainer.arithmetic.unscale, micro_batches(half, processes.rank)

    def spoilt(optimizer: torch.optim.Optimizer) -> None:
        if processes.rank == 1:
            trainer.objective.student["backbone"].blocks[0].mlp.fc1.weight.grad.to_local()[0] = float("inf")
        unscale(optimizer)

    assert trainer.step(4, stream)["skipped"] == 0
    before = gathered(trainer.state_dict())
    trainer.arithmetic.unscale = spoilt
    assert trainer.step(5, stream)["skipped"] == 1
    assert trainer.arithmetic.metrics() == {"loss_scale": 2.0}
    after = gathered(trainer.state_dict())
    for part in ("student", "teacher", "optimizer"):
        torch.testing.assert_close(after[part], before[part], rtol=0, atol=0)


def check_communication(trainer: Trainer, config: PretrainConfig) -> None:
    """Gradients are exchanged in the last micro-batch alone, and nobody asks the device for a value."""
    started, exchanges = [], []  # micro-batches begun, and how many had at each exchange

    def averages(state, bucket):
        exchanges.append(len(started))
        future = torch.futures.Future()
        future.set_result(bucket.buffer())
        return future

    def scatters(*arguments, **options):
        exchanges.append(len(started))
        return reduce_scatter(*arguments, **options)

    name = (
        "reduce_scatter_single" if hasattr(dist, "reduce_scatter_single") else "reduce_scatter_tensor"
    )  # PyTorch 2.10
    forward, reduce_scatter = trainer._gradients, getattr(dist, name)
    trainer._gradients = lambda *arguments: (started.append(1), forward(*arguments))[1]
    if trainer._replicas is not None:
        trainer._replicas.register_comm_hook(None, averages)
    setattr(dist, name, scatters)
    of_one_step = list(itertools.islice(micro_batches(config, trainer.processes.rank), 2))
    with Reads() as reads:
        trainer.step(0, iter(of_one_step))
    setattr(dist, name, reduce_scatter)
    assert exchanges
    assert set(exchanges) == {2}
    reads.check()


def check_agreement(processes: Processes) -> None:
    """What one process says after step 2, both know after step 3."""
    agreement = StepAgreement(processes, first=(1, 0))
    answers = [agreement.after_step(not (processes.rank == 1 and step == 2), step) for step in range(1, 4)]
    assert answers == [(1, 0), (1, 1), (0, 2)]


def leave_with_an_exchange_in_flight(rank: int, world_size: int) -> None:
    with join_processes("cpu", timeout_seconds=60):
        if rank == 1:
            time.sleep(1)
        exchange = dist.all_reduce(torch.ones(1), async_op=True)
    assert exchange.is_completed()


def test_no_exchange_outlives_a_run(tmp_path: Path) -> None:
    in_processes(WORLD_SIZE, tmp_path, leave_with_an_exchange_in_flight)


def test_two_processes_train_as_one(config: PretrainConfig, tmp_path: Path) -> None:
    in_processes(WORLD_SIZE, tmp_path, train_beside_one_process, tmp_path, config)


RUN = "import pickle, sys; from dinov2.train import pretrain; pretrain(pickle.load(open(sys.argv[1], 'rb')))"
FAILS = (
    "import os; from dinov2.train.trainer import Trainer; step = Trainer.step\n"
    "def fails(self, number, batches):\n"
    "    if number == 2 and self.processes.rank == 1: raise ValueError('the disk of process 1 is gone')\n"
    "    return step(self, number, batches)\n"
    "Trainer.step = fails\n"
)


def torchrun(tmp_path: Path, config: PretrainConfig, *, before: str = "") -> subprocess.Popen:
    """Two processes of ``pretrain``; ``before`` is what each runs first."""
    (tmp_path / "script.py").write_text(before + RUN)
    (tmp_path / "config").write_bytes(pickle.dumps(config))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={WORLD_SIZE}"]
    return subprocess.Popen(
        [*launcher, str(tmp_path / "script.py"), str(tmp_path / "config")],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(path or "." for path in sys.path)},
    )


def test_a_run_of_two_is_stopped_and_goes_on_exactly(config: PretrainConfig, tmp_path: Path) -> None:
    config = with_small_images(config, tmp_path / "images")
    config = dataclasses.replace(config, steps=40, checkpoint_every=40)
    whole = dataclasses.replace(config, output=tmp_path / "whole")
    assert ends(start(whole, None, None)) == [0, 0]
    process = torchrun(tmp_path, config)
    while process.poll() is None and len(read_metrics(config.output / "metrics.jsonl")) < 3:
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    errors = process.communicate()[1]
    assert "Interrupted: stopped after step" in errors
    stopped = CheckpointDirectory(config.output / "checkpoints", 1).latest()
    assert stopped is not None
    assert 3 <= load_checkpoint(stopped)["step"] < 40
    assert ends(start(config, None, None)) == [0, 0]
    first, second = (read_metrics(output / "metrics.jsonl") for output in (whole.output, config.output))
    assert [line["step"] for line in second] == list(range(1, 41))
    assert [line["total"] for line in first] == [line["total"] for line in second]


def test_a_split_run_is_continued_by_one_process_and_back(config: PretrainConfig, tmp_path: Path) -> None:
    config = dataclasses.replace(config, parallel=ParallelConfig(sharding="full"))
    for steps, processes in ((3, WORLD_SIZE), (5, 1), (8, WORLD_SIZE)):
        longer = dataclasses.replace(config, steps=steps)
        if processes == 1:
            pretrain(longer, resume=True)
        else:
            assert ends(start(longer, None, None)) == [0, 0]
    assert [line["step"] for line in read_metrics(config.output / "metrics.jsonl")] == list(range(1, 9))
    newest = CheckpointDirectory(config.output / "checkpoints", 1).latest()
    assert newest is not None
    weights = load_checkpoint(newest)["teacher"]
    teacher = load_pretrained(config.output / "teacher").state_dict()
    assert all(torch.equal(weights[f"backbone.{name}"], tensor) for name, tensor in teacher.items())


def test_the_others_of_a_failed_process_say_so(config: PretrainConfig, tmp_path: Path) -> None:
    process = torchrun(tmp_path, with_small_images(config, tmp_path / "images"), before=FAILS)
    errors = process.communicate(timeout=200)[1]
    assert process.returncode != 0
    assert "the disk of process 1 is gone" in errors


def test_images_that_do_not_split_are_refused() -> None:
    processes = Processes(torch.device("cpu"), rank=0, world_size=3)
    assert processes.share(6) == 2
    with pytest.raises(
        ValueError, match=r"batch_size / accumulation_steps: expected a multiple of the number of processes, 3, got 4"
    ):
        processes.share(4)
