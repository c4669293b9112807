"""Operations of a step, against those that PyTorch counts while it runs."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from dinov2.data import batches, open_dataset
from dinov2.models import HeadConfig, VisionTransformer, ViTConfig
from dinov2.train import PretrainConfig
from dinov2.train.flops import backbone_flops, masked_patches, peak_flops, step_flops
from dinov2.train.trainer import Trainer


def attention(q, k, v, cu_seqlens, runs, *rest, **options) -> int:
    """Scores and weighted values, forward; shapes stand in for tensors."""
    _, H, D = q
    return sum(4 * count * length**2 * H * D for count, length in zip(runs[::2], runs[1::2], strict=True))


def attention_backward(grad, q, k, v, out, lse, cu_seqlens, runs, *rest, **options) -> int:
    return 2 * attention(q, k, v, cu_seqlens, runs)


COUNTED = {
    torch.ops.dinov2_kernels.attention_forward: attention,
    torch.ops.dinov2_kernels.attention_backward: attention_backward,
}


@pytest.mark.parametrize("ffn", ["mlp", "swiglu"])
def test_backbone(ffn: str) -> None:
    """The counter is exact, and so is the formula."""
    vit = ViTConfig(img_size=32, patch_size=8, embed_dim=64, depth=3, num_heads=2, ffn=ffn, num_register_tokens=2)
    vit = dataclasses.replace(vit, drop_path_rate=0.4, drop_path_uniform=False)
    model = VisionTransformer(vit)
    with FlopCounterMode(display=False, custom_mapping=COUNTED) as counter:
        model.forward_features([torch.zeros(6, 3, 32, 32), torch.zeros(10, 3, 16, 16)])
    assert counter.get_total_flops() == backbone_flops(vit, [(6, 32), (10, 16)])


@pytest.mark.parametrize("separate", [False, True])
def test_step(config: PretrainConfig, separate: bool) -> None:
    """The formula has three products for every layer, where the patch embedding needs no gradient of the images."""
    config = dataclasses.replace(
        config,
        batch_size=16,
        accumulation_steps=2,
        ibot_head=HeadConfig(out_dim=96, hidden_dim=32, bottleneck_dim=16) if separate else None,
    )
    trainer = Trainer(config)
    stream = batches(open_dataset(config.data), config.data, batch_size=8, patch_size=8, seed=3)
    with FlopCounterMode(display=False, custom_mapping=COUNTED) as counter:
        trainer.step(0, stream)
    assert counter.get_total_flops() == pytest.approx(step_flops(config, trainer.objective.teacher), rel=0.1)


def test_masked_patches(config: PretrainConfig) -> None:
    stream = batches(open_dataset(config.data), config.data, batch_size=8, patch_size=1, seed=3)
    counts = [int(next(stream)["masks"].sum()) for _ in range(3)]
    assert sum(counts) / 3 == pytest.approx(masked_patches(config.data.masks, 16, 256), rel=0.05)


def test_peak(config: PretrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = torch.device("cuda:1")
    names = {"NVIDIA H100 80GB HBM3": 989e12, "NVIDIA H100 PCIe": 756e12, "NVIDIA A100-SXM4-80GB": 312e12}
    for name, expected in names.items():
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device, name=name: name)
        assert peak_flops(config, gpu) == expected
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Voodoo 2")
    assert peak_flops(config, gpu) is None
    assert peak_flops(config, torch.device("cpu")) is None
    assert peak_flops(dataclasses.replace(config, peak_tflops=2.5), torch.device("cpu")) == 2.5e12
