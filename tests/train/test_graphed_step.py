"""Steps as graphs: they do what eager steps do, nothing on the host changes between them, and the rest is refused.

A graph of operators stands in for CUDA's: see :mod:`tests.train.recorded_graph`.
"""

from __future__ import annotations

import gc
import signal
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dinov2.data import DataConfig, MaskConfig
from dinov2.models import HeadConfig
from dinov2.objectives import ObjectiveConfig
from dinov2.objectives.batch import crop_pairs
from dinov2.train import Interrupted, PretrainConfig, graphed_step, pretrain
from dinov2.train import trainer as trainer_module
from dinov2.train.graphed_step import WARM_UP, CudaGraph, check_graphable, first_replay
from dinov2.train.processes import Processes
from dinov2.train.trainer import Trainer
from dinov2_kernels.residual.sampling import _cached_plan
from tests.train.graphed_runs import (
    REPLAYED,
    RESTING,
    STEPS,
    Waves,
    assert_close,
    copied_state,
    draw,
    flat_state,
    in_float64,
    resume,
    steps,
    with_static_shapes,
)
from tests.train.recorded_graph import FreedTensorError, RecordedGraph, Recorder
from tests.train.same_run import assert_same_run
from tests.train.test_resume import StopsAt


@pytest.fixture
def static(config: PretrainConfig) -> PretrainConfig:
    return with_static_shapes(config)


@pytest.fixture
def float64() -> Iterator[None]:
    """Networks are made in float64."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


class Graphs:
    """Makes recorded graphs, and keeps them."""

    def __init__(self) -> None:
        self.made: list[RecordedGraph] = []

    def __call__(self) -> RecordedGraph:
        self.made.append(RecordedGraph())
        return self.made[-1]


def graphed(config: PretrainConfig) -> tuple[Trainer, Graphs]:
    trainer, graphs = Trainer(config), Graphs()
    trainer.replay_steps(graphs)
    return trainer, graphs


CHANGES: dict[str, dict[str, Any]] = {
    "softmax": {},
    "sinkhorn, accumulated": {
        "objective": ObjectiveConfig(centering="sinkhorn_knopp"),
        "accumulation_steps": 3,
        "batch_size": 6,
    },
    "two heads, recomputed logits": {
        "objective": ObjectiveConfig(student_logits="recomputed"),
        "ibot_head": HeadConfig(out_dim=48, hidden_dim=32, bottleneck_dim=16),
    },
}


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("changes", CHANGES.values(), ids=CHANGES.keys())
def test_replayed_steps_are_eager_steps(config: PretrainConfig, changes: dict[str, Any]) -> None:
    """In float64, where all that differs is that rates, decay and momentum are rounded to float32."""
    config = with_static_shapes(config, **changes)
    drawn = in_float64(draw(config))
    (trainer, graphs), eager = graphed(config), Trainer(config)
    for ours, theirs in zip(steps(trainer, drawn), steps(eager, drawn), strict=True):
        assert_close(ours, theirs, rtol=1e-5, atol=0)
    before = copied_state(Trainer(config))
    after = flat_state(eager)
    assert all(not torch.equal(before[name], after[name]) for name in before)
    assert_close(flat_state(trainer), after, rtol=1e-6, atol=1e-7)
    assert [graph.replays for graph in graphs.made] == [
        times * (STEPS - REPLAYED) for times in ([1, 2, 1] if config.accumulation_steps == 3 else [1, 1])
    ]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_in_the_precision_of_training(static: PretrainConfig, precision: str) -> None:
    static = replace(static, precision=precision)
    drawn, (trainer, _), eager = draw(static), graphed(static), Trainer(static)
    tolerance = 1e-4 if precision == "fp32" else 2e-2
    for ours, theirs in zip(steps(trainer, drawn), steps(eager, drawn), strict=True):
        assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


def test_a_resumed_run_repeats_the_uninterrupted_one(static: PretrainConfig, tmp_path: Path) -> None:
    """Its warm-up falls on other steps, and changes nothing."""
    drawn, (whole, _), (first, _), (second, graphs) = draw(static), *(graphed(static) for _ in range(3))
    expected = list(steps(whole, drawn))
    middle = REPLAYED + 1
    for ours, theirs in zip(steps(first, drawn, end=middle), expected, strict=False):
        assert_close(ours, theirs, rtol=0, atol=0)
    resume(first, second, middle, tmp_path)
    for ours, theirs in zip(steps(second, drawn, first=middle), expected[middle:], strict=True):
        assert_close(ours, theirs, rtol=0, atol=0)
    assert_close(flat_state(second), flat_state(whole), rtol=0, atol=0)
    assert graphs.made[0].replays == STEPS - middle - WARM_UP


def test_a_trainer_that_is_restored_captures_anew(static: PretrainConfig, tmp_path: Path) -> None:
    """Moments are other tensors then."""
    drawn, (trainer, graphs) = draw(static), graphed(static)
    list(steps(trainer, drawn, end=RESTING))
    other = Trainer(static)
    list(steps(other, drawn, end=RESTING))
    expected = list(steps(trainer, drawn, first=RESTING))
    resume(other, trainer, RESTING, tmp_path)
    for ours, theirs in zip(steps(trainer, drawn, first=RESTING), expected, strict=True):
        assert_close(ours, theirs, rtol=0, atol=0)
    assert [graph.replays for graph in graphs.made] == [STEPS - REPLAYED] * 4


def test_probes_and_statistics_between_replays_change_nothing(static: PretrainConfig) -> None:
    drawn, (trainer, _), (other, _) = draw(static), graphed(static), graphed(static)
    expected = list(steps(trainer, drawn))
    for step, (ours, theirs) in enumerate(zip(steps(other, drawn), expected, strict=True)):
        assert_close(ours, theirs, rtol=0, atol=0)
        statistics = other.collapse_statistics(step)
        other.measure(lambda backbone: {"mean": float(backbone(torch.rand(3, 3, 24, 16)).mean())})
    assert statistics == trainer.collapse_statistics(STEPS - 1)


def test_a_whole_run(
    static: PretrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It says from when on steps are replayed, and goes on exactly after it was stopped."""
    monkeypatch.setattr(trainer_module, "check_graphable", lambda processes: None)
    monkeypatch.setattr(trainer_module, "cuda_graphs", lambda device: RecordedGraph)
    run = replace(static, cuda_graph=True)
    whole = pretrain(replace(run, output=tmp_path / "whole"), dataset=Waves())
    assert f"steps are replayed from step {REPLAYED + 1} on; until then" in capsys.readouterr().out
    with monkeypatch.context() as patched:
        StopsAt(REPLAYED + 2, signal.SIGTERM, patched)
        with pytest.raises(Interrupted):
            pretrain(run, dataset=Waves())
    assert_same_run(whole, pretrain(run, resume=True, dataset=Waves()))
    assert f"steps are replayed from step {REPLAYED + 2 + WARM_UP + 1} on\n" in capsys.readouterr().out


def test_scalars_of_a_step_outlive_the_next_step(static: PretrainConfig) -> None:
    drawn, (trainer, _) = draw(static), graphed(static)
    stream = steps(trainer, drawn)
    kept = [(scalars, {name: x.clone() for name, x in scalars.items()}) for scalars in stream]
    assert all(torch.equal(scalars[name], copies[name]) for scalars, copies in kept for name in copies)
    assert len({float(scalars["total"]) for scalars, _ in kept}) == STEPS


class Uncaptured:
    """Lets a trainer go the way of replayed steps without graphs, and notes the operators of each part and step."""

    def __init__(self, trainer: Trainer, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(graphed_step, "WARM_UP", STEPS)
        self.calls: dict[str, list[list[list[Any]]]] = defaultdict(list)
        trainer.replay_steps(RecordedGraph)
        assert trainer._graphed is not None
        monkeypatch.setattr(trainer._graphed, "_run", self.run)

    def run(self, name, function) -> dict[str, Tensor]:
        with Recorder() as recorder:
            results = function()
        self.calls[name].append([call.host_arguments for call in recorder.calls])
        return results


@pytest.mark.parametrize("changes", CHANGES.values(), ids=CHANGES.keys())
def test_no_operator_has_an_argument_on_the_host_that_changes(
    config: PretrainConfig, changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A graph would repeat the one that it saw. There is no exception."""
    config = with_static_shapes(config, **changes)
    trainer = Trainer(config)
    uncaptured = Uncaptured(trainer, monkeypatch)
    list(steps(trainer, draw(config)))
    parts = ["first", "further", "update"] if config.accumulation_steps > 1 else ["first", "update"]
    assert sorted(uncaptured.calls) == parts
    for name, calls in uncaptured.calls.items():
        assert len(calls) >= STEPS - RESTING
        assert len(calls[0]) > 30
        for later in calls[1:]:
            assert later == calls[0], name


@pytest.mark.parametrize(
    ("warmup", "expected"),
    [
        (RESTING / STEPS, {"aten._fused_adamw_.default", "aten._foreach_lerp_.Scalar"}),
        (
            0.9,
            {
                "aten._fused_adamw_.default",
                "aten._foreach_lerp_.Scalar",
                "aten.div.Tensor",  # the centres
                "dinov2_kernels.soft_cross_entropy.default",
                "dinov2_kernels.soft_cross_entropy_backward_.default",
            },
        ),
    ],
    ids=["temperature at rest", "temperature rises"],
)
def test_changing_arguments_are_seen(static: PretrainConfig, warmup: float, expected: set[str]) -> None:
    """Those of eager steps: learning rates and weight decay, momentum, temperature."""
    static = replace(static, teacher=replace(static.teacher, temperature_warmup_fraction=warmup))
    stream, seen = steps(Trainer(static), draw(static), first=RESTING), []
    next(stream)  # the optimiser makes its moments
    for _ in range(2):
        with Recorder() as recorder:
            next(stream)
        seen.append([call.host_arguments for call in recorder.calls])
    assert {first[0] for first, second in zip(*seen, strict=True) if first != second} == expected


def test_no_autograd_graph_outlives_a_step(static: PretrainConfig) -> None:
    """One that did would tie the gradients of the next step to the stream that it ran on, which cannot be captured."""
    drawn, trainer = draw(static), Trainer(static)
    weights = [weight for weight in trainer.objective.student.parameters() if weight.requires_grad]

    def node(weight: Tensor) -> Any:
        function = weight.view_as(weight).grad_fn
        assert function is not None
        return function.next_functions[0][0]

    def mark(*_: Any) -> None:
        held.extend(node(weight) for weight in weights)
        for accumulate in held:
            accumulate.metadata["step"] = 0

    held: list[Any] = []
    hook = trainer.objective.student["dino_head"].last_layer.register_forward_pre_hook(mark)
    stream = steps(trainer, drawn)
    next(stream)
    hook.remove()
    mark()
    assert all("step" in node(weight).metadata for weight in weights)
    held.clear()
    gc.collect()
    assert not any("step" in node(weight).metadata for weight in weights)


def test_what_a_graph_reads_stays(static: PretrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tables that operators keep may be dropped between two replays."""
    drawn = draw(static)

    def last_step(trainer: Trainer) -> dict[str, Tensor]:
        list(steps(trainer, drawn, end=STEPS - 1))
        crop_pairs.cache_clear()
        _cached_plan.cache_clear()
        gc.collect()
        return next(steps(trainer, drawn, first=STEPS - 1))

    assert_close(last_step(graphed(static)[0]), last_step(Trainer(static)), rtol=1e-4, atol=1e-4)
    monkeypatch.setattr(RecordedGraph, "is_known_to_caches", False)
    with pytest.raises(FreedTensorError):
        last_step(graphed(static)[0])


def test_another_shape_is_refused(static: PretrainConfig) -> None:
    drawn, (trainer, _) = draw(static), graphed(static)
    list(steps(trainer, drawn, end=REPLAYED + 1))
    batch = dict(drawn[-1])
    batch["masks"] = batch["masks"].clone().fill_(True)
    with pytest.raises(ValueError, match=r"tensor 3 .* \[\d+\], .* got \[128\]; with data\.masks\.same_total True"):
        trainer.step(REPLAYED + 1, iter([batch]))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"precision": "fp16"}, "precision: expected fp32 or bf16 with cuda_graph, .*, got 'fp16'"),
        ({"compile": True}, "compile: expected False with cuda_graph, .*, got True"),
        (
            {"activation_checkpointing": "full"},
            "activation_checkpointing: expected none with cuda_graph, .* got 'full'",
        ),
        ({"profile_steps": 2}, "profile_steps: expected 0 with cuda_graph, .*, got 2"),
        (
            {"data": DataConfig(masks=MaskConfig())},
            "data.masks.same_total: expected True with cuda_graph, .* got False",
        ),
    ],
    ids=lambda changes: next(iter(changes)) if isinstance(changes, dict) else "",
)
def test_what_cannot_be_captured_is_refused(static: PretrainConfig, changes: dict[str, Any], message: str) -> None:
    replace(static, **changes)
    with pytest.raises(ValueError, match=message):
        replace(static, cuda_graph=True, **changes)


def test_where_it_cannot_be_captured(static: PretrainConfig) -> None:
    with pytest.raises(ValueError, match="cuda_graph: expected False on cpu, a device without CUDA, got True"):
        Trainer(replace(static, cuda_graph=True))
    several = Processes(torch.device("cuda", 1), rank=1, world_size=2, group=object())  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"cuda_graph: expected False with several processes.*True in process 1 of 2"):
        check_graphable(several)
    check_graphable(Processes(torch.device("cuda")))


def test_a_step_that_no_graph_can_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA complains once more when the capture ends; what counts is the first complaint."""

    @contextmanager
    def capture(graph: Any, *, pool: Any, capture_error_mode: str) -> Iterator[None]:
        assert (pool, capture_error_mode) == ("pool", "thread_local")
        try:
            yield
        finally:
            raise RuntimeError("operation failed due to a previous error during capture")

    def waits() -> dict[str, Tensor]:
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(torch.cuda, "CUDAGraph", object)
    monkeypatch.setattr(torch.cuda, "graph", capture)
    monkeypatch.setattr(torch.cuda, "device", nullcontext)
    graph = CudaGraph(torch.device("cuda"), "pool")
    with pytest.raises(
        RuntimeError, match=r"cuda_graph: expected False for this run, .*\(operation not permitted.*True"
    ):
        graph.capture(waits)


def test_a_run_says_when_it_begins(static: PretrainConfig) -> None:
    long = replace(static, steps=1000)  # whose temperature rises for 100 steps
    assert first_replay(long, 0) == "steps are replayed from step 104 on; until then the teacher temperature rises"
    assert first_replay(long, 100) == "steps are replayed from step 104 on"
    assert first_replay(long, 500) == "steps are replayed from step 504 on"
    assert first_replay(long, 998) == "none: the run ends before step 1,002, the first that could be replayed"
    resting = replace(long, teacher=replace(long.teacher, temperature_start=long.teacher.temperature))
    assert first_replay(resting, 0) == "steps are replayed from step 4 on"
    graphs = graphed(static)
    list(steps(graphs[0], draw(static), end=REPLAYED))
    assert not graphs[1].made
    assert first_replay(static, 0).startswith(f"steps are replayed from step {REPLAYED + 1} on")
    list(steps(graphs[0], draw(static), first=REPLAYED, end=REPLAYED + 1))
    assert graphs[1].made[0].replays == 1
