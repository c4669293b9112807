"""Fields of other libraries' configurations: carried, or refused by name; and always the same outputs as theirs."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import transformers
from timm.models._hub import save_for_hf
from torch import Tensor, nn

from dinov2.models import VisionTransformer, load_pretrained, read_weights

TinyViT = Callable[..., VisionTransformer]
TRANSFORMERS = {
    "dinov2": (transformers.Dinov2Config, transformers.Dinov2Model),
    "dinov2_with_registers": (transformers.Dinov2WithRegistersConfig, transformers.Dinov2WithRegistersModel),
}
SIZES = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 28, "patch_size": 14}


def tokens(model: VisionTransformer, x: Tensor) -> Tensor:
    """All tokens [B, 1 + R + N, D] after the last norm."""
    with torch.no_grad():
        features = model.eval().forward_features(x)
    return torch.cat(
        [features["x_norm_clstoken"][:, None], features["x_norm_regtokens"], features["x_norm_patchtokens"]], 1
    )


def randomized(model: Any) -> Any:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            around = 1.0 if "norm" in name and name.endswith("weight") else 0.0
            parameter.copy_(around + 0.2 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def of_transformers(kind: str, folder: Path, **fields: Any) -> Any:
    config_class, model_class = TRANSFORMERS[kind]
    model = randomized(model_class(config_class(**{**SIZES, **fields})))
    model.save_pretrained(folder)
    return model


def edit(folder: Path, **fields: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))


CARRIED: list[dict[str, Any]] = [
    {"num_attention_heads": 6},
    {"mlp_ratio": 3},
    {"use_swiglu_ffn": True},
    {"use_swiglu_ffn": True, "hidden_act": "relu"},  # gated layers ignore it
    {"use_swiglu_ffn": True, "mlp_ratio": 3},
    {"qkv_bias": False},
    {"num_channels": 5},
    {"image_size": [42, 42], "patch_size": [7, 7]},
    {"image_size": [14, 56]},  # transformers' table of 4 patches is 2 x 2, whatever the image
    {"image_size": 35},
    {"hidden_act": "gelu_python"},
    {"layerscale_value": 0.1},
    {"drop_path_rate": 0.2},
    {"apply_layernorm": False, "reshape_hidden_states": False, "out_features": ["stage1"]},
    {"initializer_range": 0.5, "torch_dtype": "bfloat16", "id2label": {0: "a"}},
]


@pytest.mark.parametrize("kind", TRANSFORMERS)
@pytest.mark.parametrize("fields", CARRIED, ids=str)
def test_fields_of_transformers_that_are_carried(kind: str, fields: dict[str, Any], tmp_path: Path) -> None:
    theirs = of_transformers(kind, tmp_path, **fields)
    model = load_pretrained(tmp_path)
    for size in ((28, 28), (42, 70)):
        x = torch.randn(2, fields.get("num_channels", 3), *size)
        with torch.no_grad():
            expected = theirs(x.to(theirs.dtype)).last_hidden_state
        torch.testing.assert_close(tokens(model, x), expected, rtol=0, atol=2e-5)
    assert model.config.drop_path_rate == fields.get("drop_path_rate", 0.0)


def test_a_model_without_a_mask_token(tmp_path: Path) -> None:
    theirs = of_transformers("dinov2", tmp_path, use_mask_token=False)
    model, x = load_pretrained(tmp_path), torch.randn(2, 3, 28, 28)
    with torch.no_grad():
        torch.testing.assert_close(tokens(model, x), theirs(x).last_hidden_state, rtol=0, atol=2e-5)
    assert not model.mask_token.any()


REFUSED: dict[str, tuple[Any, str]] = {
    "hidden_act": ("relu", r'expected "gelu" or .*, got \'relu\''),
    "layer_norm_eps": (1e-5, "expected 1e-06, as in all models here, got 1e-05"),
    "hidden_dropout_prob": (0.1, r"expected 0\.0, as in all models here, got 0\.1"),
    "attention_probs_dropout_prob": (0.1, r"expected 0\.0, as in all models here, got 0\.1"),
}


@pytest.mark.parametrize("kind", TRANSFORMERS)
@pytest.mark.parametrize("field", REFUSED)
def test_fields_of_transformers_that_are_refused(tiny_vit: TinyViT, kind: str, field: str, tmp_path: Path) -> None:
    value, expected = REFUSED[field]
    theirs = of_transformers(kind, tmp_path, **{field: value})
    registers = getattr(theirs.config, "num_register_tokens", 0)
    message = rf"model\.safetensors: config\.json beside it cannot be used: {field}: {expected}"
    given = tiny_vit(img_size=28, embed_dim=48, num_heads=4, num_register_tokens=registers)
    for read in (load_pretrained, read_weights, lambda folder: load_pretrained(folder, given)):
        with pytest.raises(ValueError, match=message):
            read(tmp_path)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_hidden_layers": 1}, "num_hidden_layers: expected depth 2, as the weights have it, got 1"),
        ({"hidden_size": 64, "num_attention_heads": 4}, "hidden_size: expected embed_dim 48, as the weights"),
        ({"image_size": 42}, "image_size: expected grid_size 2, as the weights have it, got 3"),
        ({"patch_size": 7}, "patch_size: expected 14, as the weights have it, got 7"),
        ({"qkv_bias": False}, "qkv_bias: expected True, as the weights have it, got False"),
        ({"use_swiglu_ffn": True}, "use_swiglu_ffn: expected 'mlp', as the weights have it, got 'swiglu'"),
        ({"mlp_ratio": 2}, "mlp_ratio: expected ffn_width 192, as the weights have it, got 96"),
        ({"num_channels": 4}, "num_channels: expected in_chans 3, as the weights have it, got 4"),
        ({"num_attention_heads": 5}, r"vit\.num_heads: expected a divisor of embed_dim = 48, got 5"),
        ({"head_dim": 24}, r"head_dim: expected 12\.0, as in all models here, got 24"),
        ({"quantization_config": {"bits": 4}}, "quantization_config: expected nothing, as in all models here"),
        ({"pruned_heads": {"0": [1]}}, "pruned_heads: expected {}, as in all models here"),
        ({"model_type": "vit_msn"}, "model_type: expected \"dinov2\" or .*, got 'vit_msn'"),
    ],
    ids=str,
)
def test_a_configuration_of_another_model(fields: dict[str, Any], message: str, tmp_path: Path) -> None:
    of_transformers("dinov2", tmp_path)
    edit(tmp_path, **fields)
    with pytest.raises(ValueError, match=f"config.json beside it cannot be used: {message}"):
        load_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1]", "expected fields by name, got list"),
        ("", "Expecting value"),
        (
            '{"architecture": "vit_small_patch14_dinov2", "model_args": [1]}',
            "model_args: expected arguments by name, got",
        ),
        ('{"num_attention_heads": 0}', "num_heads: expected at least 1, got 0"),
        ('{"num_attention_heads": "four"}', "num_heads: expected at least 1, got 'four'"),
    ],
)
def test_a_configuration_of_nothing(text: str, message: str, tmp_path: Path) -> None:
    of_transformers("dinov2", tmp_path)
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=rf"config\.json beside it cannot be used: .*{message}"):
        load_pretrained(tmp_path)


def test_a_configuration_with_defaults_left_out(tmp_path: Path) -> None:
    """transformers takes 12 heads if the file tells no number."""
    theirs = of_transformers("dinov2", tmp_path, hidden_size=96, num_attention_heads=12)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "dinov2"}))
    model, x = load_pretrained(tmp_path), torch.randn(2, 3, 28, 28)
    with torch.no_grad():
        torch.testing.assert_close(tokens(model, x), theirs(x).last_hidden_state, rtol=0, atol=2e-5)


def test_the_backbone_of_a_larger_model(tmp_path: Path) -> None:
    """Its configuration stands in a part of the whole one."""
    config = transformers.Dinov2Config(**SIZES, out_indices=[1, 2], reshape_hidden_states=False)
    whole = transformers.DepthAnythingConfig(
        backbone_config=config, reassemble_hidden_size=48, neck_hidden_sizes=[8, 8], reassemble_factors=[1, 1]
    )
    theirs = randomized(transformers.DepthAnythingForDepthEstimation(whole))
    theirs.save_pretrained(tmp_path)
    model, x = load_pretrained(tmp_path), torch.randn(2, 3, 28, 28)
    with torch.no_grad():
        expected = theirs.backbone(x).feature_maps[-1]  # normed, as apply_layernorm says
    torch.testing.assert_close(tokens(model, x), expected, rtol=0, atol=2e-5)
    edit(tmp_path, backbone_config={**config.to_dict(), "hidden_act": "relu"})
    with pytest.raises(ValueError, match="hidden_act: expected"):
        load_pretrained(tmp_path)


@pytest.mark.parametrize("swiglu", [False, True])
@pytest.mark.parametrize("kind", TRANSFORMERS)
def test_the_state_dict_of_a_transformers_model(kind: str, swiglu: bool, tmp_path: Path) -> None:
    """Its names differ from those in transformers' own files."""
    theirs = of_transformers(kind, tmp_path, hidden_size=128, num_attention_heads=2, use_swiglu_ffn=swiglu)
    torch.save(theirs.state_dict(), tmp_path / "weights.pth")
    expected = load_pretrained(tmp_path).state_dict()
    torch.testing.assert_close(load_pretrained(tmp_path / "weights.pth").state_dict(), expected, rtol=0, atol=0)


def of_timm(folder: Path, architecture: str = "vit_small_patch14_dinov2", **arguments: Any) -> Any:
    sizes = {"img_size": 28, "depth": 2, "embed_dim": 48, "num_heads": 4, "num_classes": 0, "dynamic_img_size": True}
    model = randomized(timm.create_model(architecture, **{**sizes, **arguments}))
    save_for_hf(model, folder, safe_serialization=True)
    return model


@pytest.mark.parametrize(
    ("architecture", "arguments"),
    [
        ("vit_small_patch14_dinov2", {}),
        ("vit_small_patch14_dinov2", {"num_heads": 6, "mlp_ratio": 3.0, "qkv_bias": False, "init_values": None}),
        ("vit_small_patch14_dinov2", {"act_layer": "gelu", "norm_layer": "layernorm", "patch_size": 7}),
        ("vit_small_patch14_dinov2", {"no_embed_class": True, "num_classes": 3, "drop_rate": 0.2}),
        ("vit_small_patch14_dinov2", {"weight_init": "jax", "dynamic_img_pad": False}),
        ("vit_small_patch14_reg4_dinov2", {"reg_tokens": 2}),
        ("vit_giant_patch14_dinov2", {"act_layer": "silu"}),
        ("vit_giant_patch14_reg4_dinov2", {}),
        ("vit_small_patch16_224", {"img_size": 32}),
    ],
    ids=str,
)
def test_arguments_of_timm_that_are_carried(architecture: str, arguments: dict[str, Any], tmp_path: Path) -> None:
    theirs = of_timm(tmp_path, architecture, **arguments)
    model = load_pretrained(tmp_path)
    for grid in ((2, 2), (3, 5)):
        x = torch.randn(2, 3, *(n * model.config.patch_size for n in grid))
        with torch.no_grad():
            expected = theirs.forward_features(x)
        torch.testing.assert_close(tokens(model, x), expected, rtol=0, atol=2e-5)
    edit(tmp_path, model_args={"num_heads": theirs.blocks[0].attn.num_heads, "drop_path_rate": 0.2})
    assert load_pretrained(tmp_path).config.drop_path_rates == [0.0, 0.2]  # timm's grow from block to block


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"act_layer": "relu"}, r"model_args\.act_layer: expected \"gelu\" or .*, got 'relu'"),
        (
            {"norm_layer": "layernorm2d"},
            "model_args.norm_layer: expected \"layernorm\", as in all models here, got 'layernorm2d'",
        ),
        ({"proj_drop_rate": 0.1}, r"model_args\.proj_drop_rate: expected 0\.0, as in all models here, got 0\.1"),
        ({"qk_norm": True}, r"model_args\.qk_norm: expected false, as in all models here, got True"),
        ({"final_norm": False}, r"model_args\.final_norm: expected true, as in all models here, got False"),
        ({"attn_layer": "diff"}, r"model_args\.attn_layer: expected an argument that is known here, got 'diff'"),
        ({"img_size": [14, 56]}, r"model_args\.img_size: expected a square image, got \[14, 56\]"),
        ({"depth": 3}, r"model_args\.depth: expected 2, as the weights have it, got 3"),
        ({"num_heads": 5}, r"vit\.num_heads: expected a divisor of embed_dim = 48, got 5"),
    ],
    ids=str,
)
def test_arguments_of_timm_that_are_refused(arguments: dict[str, Any], message: str, tmp_path: Path) -> None:
    of_timm(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())["model_args"]
    edit(tmp_path, model_args={**written, **arguments})
    with pytest.raises(ValueError, match=f"model.safetensors: config.json beside it cannot be used: {message}"):
        load_pretrained(tmp_path)


def test_timm_models_that_look_alike(tmp_path: Path) -> None:
    """The same names and shapes, and other outputs."""
    of_timm(tmp_path / "relu", act_layer="relu")
    with pytest.raises(ValueError, match=r"model_args\.act_layer: expected"):
        load_pretrained(tmp_path / "relu")
    of_timm(tmp_path / "oblong", img_size=(14, 56))
    with pytest.raises(ValueError, match=r"model_args\.img_size: expected a square image, got \[14, 56\]"):
        load_pretrained(tmp_path / "oblong")
    of_timm(tmp_path / "gated", "vit_giant_patch14_dinov2")
    edit(tmp_path / "gated", architecture="vit_small_patch14_dinov2")  # GluMlp has the same names, too
    with pytest.raises(
        ValueError, match="architecture: expected vit_giant_patch14_dinov2 for weights with gated layers"
    ):
        load_pretrained(tmp_path / "gated")


@pytest.mark.parametrize("flags", [(0.1, False), (0.0, True), (0.0, False)], ids=str)
@pytest.mark.parametrize("kind", ["dinov2", "dinov2_with_registers", "timm"])
def test_a_given_model_resamples_as_theirs(tiny_vit: TinyViT, kind: str, flags: Any, tmp_path: Path) -> None:
    """At the given model's image size, and its configuration says the same for other sizes."""
    is_timm = kind == "timm"
    theirs = of_timm(tmp_path, img_size=70) if is_timm else of_transformers(kind, tmp_path, image_size=70)
    registers = 4 if kind == "dinov2_with_registers" else 0
    own = {"interpolate_offset": flags[0], "interpolate_antialias": flags[1], "num_register_tokens": registers}
    model, x = tiny_vit(img_size=28, embed_dim=48, num_heads=4, **own), torch.randn(2, 3, 28, 28)
    load_pretrained(tmp_path, model)
    with torch.no_grad():
        expected = theirs.forward_features(x) if is_timm else theirs(x).last_hidden_state
    torch.testing.assert_close(tokens(model, x), expected, rtol=0, atol=2e-5)
    assert (model.config.interpolate_offset, model.config.interpolate_antialias) == (0.0, kind != "dinov2")


def test_heads_of_wide_models_are_not_guessed(tmp_path: Path) -> None:
    """timm's ViT-H has 16 heads 80 wide, not 20 heads 64 wide."""
    with torch.device("meta"):
        theirs = timm.create_model("vit_huge_patch14_224", depth=1, img_size=28, num_classes=0)
    torch.save({name: torch.zeros(x.shape) for name, x in theirs.state_dict().items()}, tmp_path / "weights.pth")
    with pytest.raises(ValueError, match="a width of 1280 does not tell the number of heads"):
        load_pretrained(tmp_path / "weights.pth")


def test_registers_with_position_embeddings(tmp_path: Path) -> None:
    theirs = timm.create_model(
        "vit_small_patch14_dinov2", img_size=42, depth=1, num_classes=0, reg_tokens=4, no_embed_class=False
    )
    torch.save(theirs.state_dict(), tmp_path / "weights.pth")
    with pytest.raises(ValueError, match=r"pos_embed: expected one for each patch .* none for registers .*, got 14"):
        load_pretrained(tmp_path / "weights.pth")


def test_heads_of_the_file_and_of_the_given_model(tiny_vit: TinyViT, tmp_path: Path) -> None:
    of_transformers("dinov2", tmp_path)
    with pytest.raises(ValueError, match="do not fit the model: num_heads of 4 for 2"):
        load_pretrained(tmp_path, tiny_vit(img_size=28, embed_dim=48, num_heads=2))
    assert load_pretrained(tmp_path, tiny_vit(img_size=28, embed_dim=48, num_heads=4)).config.num_heads == 4


RUN = """
student:
  arch: vit_small  # one of four
  patch_size: 14
  drop_path_rate: 0.3
  ffn_layer: {ffn_layer}
  qkv_bias: true
  num_register_tokens: 4
  interpolate_antialias: false
  interpolate_offset: 0.1
teacher:
  momentum_teacher: 0.992
crops:
  global_crops_size: 224
"""


@pytest.mark.parametrize("file", ["teacher_checkpoint.pth", "eval/training_1249/teacher_checkpoint.pth"])
def test_the_configuration_of_facebooks_run(tiny_vit: TinyViT, tmp_path: Path, file: str) -> None:
    """A run of facebook's code with registers resamples as its config.yaml says, not as the published models do."""
    model = tiny_vit(embed_dim=384, num_heads=6, num_register_tokens=4)
    (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
    teacher = {f"backbone.{name}": x for name, x in model.state_dict().items()}
    torch.save({"teacher": teacher}, tmp_path / file)
    assert load_pretrained(tmp_path / file).config.interpolate_antialias
    (tmp_path / "config.yaml").write_text(RUN.format(ffn_layer="mlp"))
    config = load_pretrained(tmp_path / file).config
    assert (config.interpolate_offset, config.interpolate_antialias, config.num_heads) == (0.1, False, 6)
    assert config.drop_path_rate == 0.0  # facebook's teacher has none
    for layer, message in {
        "swiglufused": "ffn_layer: expected ffn 'mlp', as the weights have it, got 'swiglu'",
        "identity": "ffn_layer: expected .*, as in all models here, got 'identity'",
    }.items():
        (tmp_path / "config.yaml").write_text(RUN.format(ffn_layer=layer))
        with pytest.raises(ValueError, match=f"config.yaml of its run cannot be used: {message}"):
            load_pretrained(tmp_path / file)


def test_a_configuration_of_something_else_is_no_run(tiny_vit: TinyViT, tmp_path: Path) -> None:
    torch.save(tiny_vit(embed_dim=128).state_dict(), tmp_path / "weights.pth")
    (tmp_path / "config.yaml").write_text("model:\n  arch: resnet\nstudent: none\n")
    assert load_pretrained(tmp_path / "weights.pth").config.num_heads == 2


@pytest.mark.parametrize("kind", [dict, argparse.Namespace])
def test_arguments_in_a_checkpoint(tiny_vit: TinyViT, tmp_path: Path, kind: Any) -> None:
    model, file = tiny_vit(embed_dim=128, num_register_tokens=4), tmp_path / "weights.pth"

    def save(**arguments: Any) -> None:
        torch.save({"model": model.state_dict(), "args": kind(**arguments)}, file)

    save(lr=0.1, interpolate_offset=0.1, interpolate_antialias=False, arch="vit_of_mine")
    config = load_pretrained(file).config
    assert (config.interpolate_offset, config.interpolate_antialias) == (0.1, False)
    for arguments, message in (
        ({"act_layer": "relu"}, "act_layer: expected \"gelu\" or .*, got 'relu'"),
        ({"patch_size": 16}, "patch_size: expected 14, as the weights have it, got 16"),
        ({"arch": "vit_small"}, "arch: expected embed_dim 128, as the weights have it, got 384"),
        ({"model_kwargs": {"act_layer": "relu"}}, r"model_args\.act_layer: expected"),
    ):
        save(**arguments)
        with pytest.raises(ValueError, match=f"weights.pth: the arguments in it cannot be used: {message}"):
            load_pretrained(file)


@pytest.mark.parametrize(
    "prefix", ["module.", "_orig_mod.", "module._orig_mod.", "module.backbone.", "teacher.backbone."]
)
def test_prefixes_of_wrapped_models(tiny_vit: TinyViT, tmp_path: Path, prefix: str) -> None:
    model = tiny_vit(embed_dim=128)
    torch.save({f"{prefix}{name}": x for name, x in model.state_dict().items()}, tmp_path / "weights.pth")
    torch.testing.assert_close(
        dict(load_pretrained(tmp_path / "weights.pth").state_dict()), dict(model.state_dict()), rtol=0, atol=0
    )


def test_parts_that_our_models_lack(tiny_vit: TinyViT, tmp_path: Path) -> None:
    tensors = {**tiny_vit(embed_dim=128).state_dict(), "blocks.0.attn.q_norm.weight": torch.ones(64)}
    torch.save(tensors, tmp_path / "weights.pth")
    with pytest.raises(ValueError, match=r"do not fit the model: unexpected blocks\.0\.attn\.q_norm\.weight"):
        load_pretrained(tmp_path / "weights.pth")


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn, torch.complex64])
def test_dtypes_of_weights(tiny_vit: TinyViT, tmp_path: Path, dtype: torch.dtype) -> None:
    tensors = dict(tiny_vit(embed_dim=128).state_dict())
    tensors["blocks.0.mlp.fc1.weight"] = tensors["blocks.0.mlp.fc1.weight"].to(dtype)
    torch.save(tensors, tmp_path / "weights.pth")
    if dtype == torch.float8_e4m3fn:
        loaded = load_pretrained(tmp_path / "weights.pth").blocks[0].mlp.fc1.weight
        torch.testing.assert_close(loaded.detach(), tensors["blocks.0.mlp.fc1.weight"].float(), rtol=0, atol=0)
        return
    with pytest.raises(ValueError, match=rf"fc1\.weight: expected dense floating-point numbers, .*, got {dtype}"):
        load_pretrained(tmp_path / "weights.pth")


def test_linear_layers_that_were_quantised(tmp_path: Path, tiny_vit: TinyViT) -> None:
    model = torch.ao.quantization.quantize_dynamic(tiny_vit(embed_dim=128), {nn.Linear})
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    with pytest.raises(ValueError, match=r"weights\.pth: .*, got a quantised model \(give the weights"):
        load_pretrained(tmp_path / "weights.pth")
