"""Files of other models: the error says which model came."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import transformers
from torch import Tensor

from dinov2.models import VisionTransformer, load_pretrained
from dinov2.models.checkpoints.foreign import foreign_model, hidden_under
from dinov2.models.checkpoints.names import to_facebook_names

TinyViT = Callable[..., VisionTransformer]
EXPECTED = "expected a DINOv2 model of facebook, transformers or timm, got "
OF_TIMM = {
    "vit_small_patch16_dinov3": "timm's DINOv3, EVA or BEiT",
    "vit_small_patch16_dinov3_qkvb": "timm's DINOv3, EVA or BEiT",
    "beit_base_patch16_224": "timm's DINOv3, EVA or BEiT",
    "eva02_tiny_patch14_224": "a BEiT, EVA or Swin transformer",
    "swin_tiny_patch4_window7_224": "a BEiT, EVA or Swin transformer",
    "vit_base_patch16_clip_224": "a CLIP, SigLIP or dino.txt model",
    "vit_base_patch16_siglip_224": "a CLIP, SigLIP or dino.txt model",
    "convnext_tiny": "a convolutional network such as ConvNeXt",
    "resnet18": "a ResNet",
    "deit_tiny_distilled_patch16_224": "a DeiT with a distillation token",
    "samvit_base_patch16": "a Segment Anything model",
    "vit_base_patch16_gap_224": "a ViT without a class token",
    "vit_mediumd_patch16_reg4_gap_256": "a ViT that averages its patches",
}
OF_TRANSFORMERS = {
    "DINOv3ViT": "transformers' DINOv3, which has rotary positions",
    "ViT": r"transformers' ViT \(or DeiT, ViT-MAE, I-JEPA\), not its Dinov2",
    "ViTMSN": "transformers' ViT",
    "CLIPVision": "a CLIP or SigLIP model",
    "CLIP": "a CLIP, SigLIP or dino.txt model",
    "Bert": "a language model",
    "Sam": "a Segment Anything model",
}
BY_NAMES = {
    "facebook's DINOv3, which has rotary positions": ["cls_token", "storage_tokens", "rope_embed.periods"],
    "a LoRA adapter": ["base_model.model.blocks.0.attn.qkv.lora_A.weight"],
    "a linear classifier without its backbone": ["weight", "bias"],
    "a segmentation or depth head without its backbone": ["decode_head.conv_seg.weight"],
    "a masked autoencoder": ["cls_token", "pos_embed", "patch_embed.proj.weight", "decoder_embed.weight"],
}


def assert_refused(tensors: dict[str, Tensor], what: str) -> None:
    with pytest.raises(ValueError, match=EXPECTED + what):
        to_facebook_names(tensors)


@pytest.mark.parametrize("architecture", OF_TIMM)
def test_models_of_timm(architecture: str) -> None:
    with torch.device("meta"):
        model = timm.create_model(architecture)
    assert_refused(model.state_dict(), OF_TIMM[architecture])


@pytest.mark.parametrize("name", OF_TRANSFORMERS)
def test_models_of_transformers(name: str) -> None:
    config = getattr(transformers, f"{name}Config")()
    with torch.device("meta"):
        model = getattr(transformers, f"{name}Model")(config)
    assert_refused(model.state_dict(), OF_TRANSFORMERS[name])


@pytest.mark.parametrize("what", BY_NAMES)
def test_models_by_the_names_of_their_tensors(what: str) -> None:
    assert_refused({name: torch.zeros(1) for name in BY_NAMES[what]}, what)


@pytest.mark.parametrize("folder", ["DINOv3ViT", "ViT"])
def test_files_of_transformers(folder: str, tmp_path: Path) -> None:
    """As its own ``save_pretrained`` writes them, where names differ from those of the model."""
    sizes = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 64}
    config = getattr(transformers, f"{folder}Config")(**sizes)
    getattr(transformers, f"{folder}Model")(config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=rf"model\.safetensors: {EXPECTED}{OF_TRANSFORMERS[folder]}"):
        load_pretrained(tmp_path)


def test_a_dinov2_is_not_foreign(tiny_vit: TinyViT) -> None:
    for model in (
        tiny_vit(num_register_tokens=4, ffn="swiglu"),
        timm.create_model("vit_small_patch14_reg4_dinov2", depth=1),
        transformers.Dinov2WithRegistersModel(transformers.Dinov2WithRegistersConfig(num_hidden_layers=1)),
    ):
        assert foreign_model(model.state_dict()) is None


def test_a_vit_under_a_prefix(tiny_vit: TinyViT, tmp_path: Path) -> None:
    tensors = {f"pretrained.{name}": x for name, x in tiny_vit().state_dict().items()}
    torch.save({**tensors, "depth_head.weight": torch.zeros(1)}, tmp_path / "weights.pth")
    with pytest.raises(ValueError, match=r"; a ViT is under the prefix 'pretrained\.': save its tensors without"):
        load_pretrained(tmp_path / "weights.pth")
    assert hidden_under(["net.embeddings.cls_token", "net.embeddings.position_embeddings"]).count("'net.'") == 1
    assert hidden_under(["a.cls_token", "b.pos_embed"]) == ""


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"net": {"a": torch.zeros(1)}, "epoch": 3}, "got tensors none; its keys are net, epoch"),
        ({0: torch.zeros(1)}, "got tensors none; its keys are 0"),
        (torch.zeros(2), "expected tensors by name, got Tensor"),
    ],
    ids=str,
)
def test_content_without_named_tensors(content: Any, message: str, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "weights.pth")
    with pytest.raises(ValueError, match=rf"weights\.pth: .*{message}"):
        load_pretrained(tmp_path / "weights.pth")
