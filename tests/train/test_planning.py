"""A plan against the run itself: bytes at the peak, tensors that a block keeps, and what processes hold and send."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from dinov2.cli import main
from dinov2.models import HeadConfig, VisionTransformer, ViTConfig
from dinov2.recipes import RECIPES, recipe
from dinov2.train.planning import plan
from dinov2.train.planning.memory import Recorder, make_fake
from dinov2.train.planning.sizes import Rows
from dinov2_kernels.residual import draw_subsets

ROOT = Path(__file__).parents[2]

MEASURE = """
import sys
import torch
from benchmarks.memory import extra_peak
from tests.train.test_planning import example, example_batch
from dinov2.train.trainer import Trainer

def train(config):
    trainer, batch = Trainer(config), example_batch(config)
    for step in range(2):  # the optimiser makes its moments in the first one
        trainer.step(step, iter([batch]))

train(example(sys.argv[1], small=True))  # threads, and modules that are imported late
print(extra_peak(lambda: train(example(sys.argv[1]))))
"""


def example(name, *, small=False):
    """Configurations whose memory is that of a large head, of the logits of its teacher, or of activations.

    Products of bfloat16 are slow on a processor without instructions for them, so that network and its head are small.
    """
    config = recipe("vitl16_short")
    two_blocks = ViTConfig.of("vit_small", patch_size=16, drop_path_rate=0.3, depth=2)
    three_blocks = ViTConfig(patch_size=16, embed_dim=192, num_heads=3, depth=3)
    vit, images, head, separate, logits = {
        "large head, float32": (two_blocks, 2, HeadConfig(out_dim=65536), True, "stored"),
        "teacher logits, float32": (two_blocks, 16, HeadConfig(out_dim=32768), False, "recomputed"),
        "activations, bfloat16": (three_blocks, 4, HeadConfig(out_dim=1024, hidden_dim=256), False, "recomputed"),
    }[name.removesuffix(" tokens")]
    if small:
        vit, images, head = replace(vit, embed_dim=64, num_heads=1, depth=1), 2, HeadConfig(out_dim=64)
    return replace(
        config,
        batch_size=images,
        accumulation_steps=1,
        precision="bf16" if "bfloat16" in name else "fp32",
        residual_in_fp32=not name.endswith("tokens"),
        vit=vit,
        dino_head=head,
        ibot_head=head if separate else None,
        objective=replace(config.objective, student_logits=logits),
        device="cpu",
    )


def example_batch(config):
    """A batch whose masks have the expected number of patches."""
    views, images = config.data.augmentation, config.batch_size
    masks = torch.zeros(2 * images, (views.global_size // config.vit.patch_size) ** 2, dtype=torch.bool)
    masked = round(Rows.of(config, images).masked / images)
    masks[::2, :masked] = True
    return {
        "global_crops": torch.randn(2 * images, 3, views.global_size, views.global_size),
        "local_crops": torch.randn(views.local_crops * images, 3, views.local_size, views.local_size),
        "masks": masks,
    }


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(
    "name",
    ["large head, float32", "teacher logits, float32", "activations, bfloat16", "activations, bfloat16 tokens"],
)
def test_peak_is_what_a_run_takes(name: str) -> None:
    """glibc is told to give freed tensors back at once: what it holds back otherwise depends on what came before."""
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "131072", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", MEASURE, name]
    output = subprocess.run(command, capture_output=True, text=True, check=True, env=environment, cwd=ROOT).stdout
    assert plan(example(name), world_size=1, device_type="cpu").peak.total == pytest.approx(int(output), rel=0.1)


@pytest.mark.parametrize("ffn", ["mlp", "swiglu"])
@pytest.mark.parametrize("rate", [0.0, 0.3])
@pytest.mark.parametrize(("e", "s"), [(4, 4), (2, 4), (2, 2)], ids=["float32", "bfloat16", "tokens in bfloat16"])
@pytest.mark.parametrize("init_values", [None, 1e-5])
def test_what_a_block_keeps_to_the_byte(ffn: str, rate: float, e: int, s: int, init_values: float | None) -> None:
    config = example("activations, bfloat16")
    vit = replace(config.vit, embed_dim=64, num_heads=2, depth=1, ffn=ffn, drop_path_rate=rate, init_values=init_values)
    rows = Rows.of(replace(config, vit=vit), 3)
    layout = rows.crops
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    def forward(block: nn.Module) -> Tensor:
        dtype = {4: torch.float32, 2: torch.bfloat16}[s]
        x = torch.randn(layout.total_tokens, 64, dtype=dtype, requires_grad=True)
        subsets = [draw_subsets(x, layout, [rate])[0] for _ in range(2)]  # apart, so that there is no gap between them
        with torch.autocast("cpu", torch.bfloat16, enabled=e == 2):
            return block(x, layout, subsets)

    block = VisionTransformer(vit).blocks[0]
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = forward(block)
    assert y.requires_grad
    for parameter in block.parameters():
        kept.pop(parameter.untyped_storage().data_ptr(), None)
    got = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    with FakeTensorMode():
        make_fake(block)
        recorder = Recorder(e, "cpu")
        recorder.ignore(block.parameters())
        with recorder:
            result = forward(block)
    scale = 4 * rows.kept(rate) if rate else 0  # a table of both draws, which is made for each where tensors are fake
    assert got + scale == sum(storage.size for storage in recorder.there) - result.untyped_storage().nbytes()


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_has_a_plan(name: str) -> None:
    config = recipe(name)
    whole = plan(config, world_size=1, device_type="cuda")
    assert whole.sent["gradients"] == whole.sent["weights"] == whole.sent["statistics"] == 0
    assert all(size >= 0 for size in whole.peak.bytes.values())
    assert whole.peak.bytes["weights"] == 4 * whole.parameters.student


def test_networks_that_are_split() -> None:
    config = replace(recipe("vitb14"), accumulation_steps=1)
    split = replace(config, parallel=replace(config.parallel, sharding="full"))
    whole, part = (plan(run, world_size=256, device_type="cuda") for run in (config, split))
    for kind in ("weights", "moments", "teacher"):
        assert part.peak.bytes[kind] * 256 == whole.peak.bytes[kind]
    assert part.peak.total < whole.peak.total
    assert part.sent["weights"] > 0 == whole.sent["weights"]
    assert part.sent["gradients"] == whole.sent["gradients"] / 2


@pytest.mark.parametrize("more", ["selective", "full"])
def test_recomputed_blocks_take_less(more: str) -> None:
    config = recipe("vitb14")
    less = replace(config, activation_checkpointing=more)
    peaks = [plan(run, world_size=1, device_type="cuda").peak.total for run in (less, config)]
    assert peaks[0] < 0.85 * peaks[1]


def test_graphs_take_memory_beside_them() -> None:
    config = recipe("vits14_small_data")
    config = replace(config, data=replace(config.data, masks=replace(config.data.masks, same_total=True)))
    graphed = replace(config, cuda_graph=True)
    peaks = [plan(run, world_size=1, device_type="cuda").peak.bytes for run in (graphed, config)]
    assert peaks[0].pop("beside the graphs") > peaks[0]["batch"]  # the inputs twice, and more
    assert peaks[0] == peaks[1]
    with pytest.raises(ValueError, match="cuda_graph: expected False with several processes"):
        plan(graphed, world_size=2, device_type="cuda")
    with pytest.raises(ValueError, match="cuda_graph: expected False on cpu, a device without CUDA, got True"):
        plan(graphed, world_size=1, device_type="cpu")


def test_dry_run_prints_and_trains_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = [f"--output={tmp_path}/run", "--dry_run", "--world_size=4", "--device=cpu"]
    assert main(["pretrain", "photos", *options]) == 0
    text = capsys.readouterr().out
    for words in (
        "4 processes on cpu",
        "head of class tokens and patches",
        "together, at its peak",
        "of one image",
        "GFLOP",
    ):
        assert words in text
    assert not (tmp_path / "run").exists()


def test_errors_of_a_dry_run(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["pretrain", "photos", "--dry_run", "--world_size=3", "--device=cpu"]) == 1
    assert "expected a multiple of the number of processes, 3, got 16" in capsys.readouterr().err
    assert main(["pretrain", "photos", "--world_size=3"]) == 1
    assert "--world_size goes with --dry_run" in capsys.readouterr().err
