"""Files of weights: reads and writes the formats of facebook, transformers and timm."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import safetensors.torch
import torch
from torch import nn

from dinov2.configuration import from_json, replacing, write_json
from dinov2.models.checkpoints.names import (
    CENTERS,
    Source,
    Tensors,
    config_of,
    heads_and_centers,
    to_facebook_names,
    to_transformers_names,
)
from dinov2.models.checkpoints.run import MANIFEST, load_checkpoint
from dinov2.models.config import ViTConfig
from dinov2.models.dino_head import DINOHead, HeadConfig
from dinov2.models.vision_transformer import VisionTransformer, interpolate_position_embedding

WEIGHTS, HEADS, CONFIG = "model.safetensors", "heads.safetensors", "config.json"
FILES_OF_A_FOLDER = (WEIGHTS, "pytorch_model.bin", "teacher_checkpoint.pth")
MODEL_TYPE = "dinov2_vision_transformer"
"""``model_type`` in the config.json that :func:`save_pretrained` writes."""
Format = Literal["facebook", "transformers", "timm"]


@dataclass(frozen=True)
class Weights:
    """A backbone, with its heads and centres if they are known.

    Attributes:
        origin: origin of the weights, in words.
        vit: architecture of the backbone.
        backbone: tensors of the backbone.
        heads: tensors of each head, ``dino_head`` and ``ibot_head``; empty if they are not known.
        centers: ``dino_loss.center`` and ``ibot_patch_loss.center``, K numbers each in any shape; empty if not known.
    """

    origin: str
    vit: ViTConfig
    backbone: Tensors
    heads: dict[str, Tensors] = field(default_factory=dict)
    centers: Tensors = field(default_factory=dict)

    def head_config(self, head: str) -> HeadConfig:
        """Sizes of the head of this name, from the shapes of its tensors."""
        return head_config_of(self.heads[head])

    def network(self) -> nn.ModuleDict:
        """Backbone and heads as float32 modules on the host."""
        with torch.device("meta"):
            modules: dict[str, nn.Module] = {"backbone": VisionTransformer(self.vit)}
            for name in self.heads:
                modules[name] = head_of(self.head_config(name), self.vit.embed_dim)
        network = nn.ModuleDict(modules).to_empty(device="cpu")
        network.load_state_dict(self.named_tensors())
        return network

    def named_tensors(self) -> Tensors:
        """All tensors of backbone and heads: ``backbone.cls_token``, ``dino_head.mlp.0.weight``, ..."""
        parts = {"backbone": self.backbone, **self.heads}
        return {f"{part}.{name}": tensor for part, tensors in parts.items() for name, tensor in tensors.items()}

    def backbone_for(self, vit: ViTConfig) -> Tensors:
        """The backbone's tensors with position embeddings for the image size of ``vit``.

        They are resampled in the mode of the model that the weights are from.

        Raises:
            ValueError: ``vit`` has another architecture; the message names each field and both values.
        """
        check_architecture(self.vit, vit, self.origin)
        grid = (vit.grid_size, vit.grid_size)
        resampled = interpolate_position_embedding(
            self.backbone["pos_embed"],
            grid,
            offset=self.vit.interpolate_offset,
            antialias=self.vit.interpolate_antialias,
        )
        return {**self.backbone, "pos_embed": resampled}


def head_of(config: HeadConfig, embed_dim: int) -> DINOHead:
    """A new head for tokens of width ``embed_dim``."""
    return DINOHead(embed_dim, config.out_dim, config.hidden_dim, config.bottleneck_dim, config.num_layers)


def head_config_of(tensors: Mapping[str, torch.Tensor]) -> HeadConfig:
    """Sizes of a head, from the shapes of its tensors.

    Raises:
        KeyError: a tensor is missing.
    """
    out_dim, bottleneck_dim = tensors["last_layer.weight_v"].shape
    layers = [name for name in tensors if name.startswith("mlp.") and name.endswith("weight")]
    hidden_dim = HeadConfig.hidden_dim if layers == ["mlp.weight"] else len(tensors["mlp.0.weight"])
    return HeadConfig(out_dim, hidden_dim, bottleneck_dim, len(layers))


def split_heads(tensors: Tensors) -> dict[str, Tensors]:
    """Split tensors such as ``dino_head.mlp.0.weight`` into one dictionary for each head."""
    heads: dict[str, Tensors] = {}
    for name, tensor in tensors.items():
        head, _, rest = name.partition(".")
        heads.setdefault(head, {})[rest] = tensor
    return heads


STRUCTURE = (
    "patch_size",
    "in_chans",
    "embed_dim",
    "depth",
    "num_heads",
    "mlp_ratio",
    "ffn",
    "qkv_bias",
    "proj_bias",
    "ffn_bias",
    "init_values",
    "num_register_tokens",
)
"""The fields that decide the names and shapes of weights, or how a model uses them."""


def check_architecture(theirs: ViTConfig, ours: ViTConfig, origin: str) -> None:
    """Raise ValueError if weights of architecture ``theirs`` do not fit a model of ``ours``; it says what to set."""
    differing = [name for name in STRUCTURE if not _agree(name, theirs, ours)]
    if differing:
        listed = ", ".join(f"{name} is {getattr(theirs, name)} there, not {getattr(ours, name)}" for name in differing)
        options = " ".join(f"--vit.{name} {getattr(theirs, name)}" for name in differing)
        raise ValueError(f"weights of {origin} do not fit the model: {listed}; for a model that they fit set {options}")


def _agree(name: str, theirs: ViTConfig, ours: ViTConfig) -> bool:
    if name == "init_values":  # its value matters only at the start of training
        return (theirs.init_values is None) == (ours.init_values is None)
    if name == "mlp_ratio" and (theirs.ffn, theirs.embed_dim) == (ours.ffn, ours.embed_dim):
        return theirs.ffn_width == ours.ffn_width
    return bool(getattr(theirs, name) == getattr(ours, name))


def load_pretrained(path: str | os.PathLike[str], model: VisionTransformer | None = None) -> VisionTransformer:
    """Load a vision transformer, or load weights into an existing one.

    The names of the tensors decide the format: facebook's published weights and training checkpoints (whole or in
    chunks of blocks, also ``teacher_checkpoint.pth``), transformers' Dinov2 and Dinov2WithRegisters, timm's
    ``vit_*_dinov2``, and files of :func:`save_pretrained`. Heads in the file are left out.

    Args:
        path: a file of weights, ``.safetensors`` or anything that :func:`torch.load` reads; or a folder that holds
            ``model.safetensors``, ``pytorch_model.bin`` or ``teacher_checkpoint.pth``; or a checkpoint of pretraining
            (``checkpoints/step_00001000``), from which the teacher is loaded.
        model: the model to load into. The file's position embeddings are resampled to the model's image size. None
            makes a new model in float32 on the CPU, with the architecture in ``config.json`` beside the weights.
            Without this file, the shapes of the weights decide the architecture, with attention heads 64 wide.

    Returns:
        The model.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file cannot be read, holds no known model, or does not fit ``model``.
    """
    file = _find(Path(path))
    try:
        content = _read(file)
        tensors, source = to_facebook_names(content)
        if model is None:
            with torch.device("meta"):
                model = VisionTransformer(_config(file, content, tensors, source))
            model.to_empty(device="cpu")
        _load(model, tensors)
    except KeyError as error:
        raise ValueError(f"{file}: the weights lack {error.args[0]}") from error
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error
    return model


def read_weights(path: str | os.PathLike[str]) -> Weights:
    """Read a file or folder like :func:`load_pretrained`, with heads and centres.

    Heads come from ``heads.safetensors`` beside the file, or from the teacher in facebook's training checkpoints.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file cannot be read or holds no known model.
    """
    file = _find(Path(path))
    try:
        content = _read(file)
        tensors, source = to_facebook_names(content)
        config = _config(file, content, tensors, source)
        beside = file.with_name(HEADS)
        if file.name in FILES_OF_A_FOLDER and beside.is_file():
            content = _read(beside)
        heads, centers = heads_and_centers(content)
        return Weights(str(path), config, tensors, split_heads(heads), centers)
    except KeyError as error:
        raise ValueError(f"{file}: the weights lack {error.args[0]}") from error
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error


def save_heads(weights: Weights, path: str | os.PathLike[str]) -> Path:
    """Write ``heads.safetensors`` into a folder: heads and centres with facebook's names.

    Centres have facebook's shapes, ``dino_loss.center`` [1, K] and ``ibot_patch_loss.center`` [1, 1, K].

    Returns:
        The folder.

    Raises:
        ValueError: the weights have no heads.
    """
    if not weights.heads:
        raise ValueError(f"{weights.origin} has no heads")
    shapes = dict(zip(CENTERS, ((1, -1), (1, 1, -1)), strict=True))
    tensors = {name: tensor for name, tensor in weights.named_tensors().items() if not name.startswith("backbone.")} | {
        name: tensor.reshape(shapes[name]) for name, tensor in weights.centers.items()
    }
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    write_tensors(tensors, folder / HEADS)
    return folder


def save_pretrained(model: VisionTransformer, path: str | os.PathLike[str]) -> Path:
    """Write ``model.safetensors`` (facebook's names, with the mask token) and ``config.json`` into a folder.

    Each file replaces an older one only when it is complete.

    Args:
        model: the model.
        path: the folder; it is created if necessary.

    Returns:
        The folder.
    """
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    write_tensors(model.state_dict(), folder / WEIGHTS)
    write_json({"model_type": MODEL_TYPE, **asdict(model.config)}, folder / CONFIG)
    return folder


def _find(path: Path) -> Path:
    if (path / MANIFEST).is_file():
        return path
    if path.is_dir():
        for name in FILES_OF_A_FOLDER:
            if (path / name).is_file():
                return path / name
        raise FileNotFoundError(f"{path}: the folder holds none of {', '.join(FILES_OF_A_FOLDER)}")
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    return path


def _read(file: Path) -> Any:
    if file.is_dir():
        return _read_run_checkpoint(file)
    try:
        if file.suffix == ".safetensors":
            return safetensors.torch.load_file(file)
        return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # broken files raise errors of many types
        reason = str(error).partition("\n")[0]
        raise ValueError(f"cannot be read as a file of weights ({type(error).__name__}: {reason})") from error


def _read_run_checkpoint(directory: Path) -> dict[str, Any]:
    """The teacher (in a distillation, the only student's moving average) and its configuration ``vit``."""
    content = load_checkpoint(directory, parts=["teacher"])
    if len(content["vit"]) > 1:
        raise ValueError(f"it holds the students {', '.join(content['vit'])}: write one to a file with dinov2 export")
    ((name, vit),) = content["vit"].items()
    return {"teacher": {key.removeprefix(f"{name}."): x for key, x in content["teacher"].items()}, "vit": vit}


def _config(file: Path, content: Any, tensors: Tensors, source: Source) -> ViTConfig:
    """The configuration in our checkpoint or config.json, or else from the shapes of the weights.

    Another library's config.json gives only the number of attention heads.
    """
    if file.is_dir():
        return ViTConfig(**content["vit"])
    beside = file.with_name(CONFIG)
    if file.name not in FILES_OF_A_FOLDER or not beside.is_file():
        return config_of(tensors, source)
    try:
        fields = json.loads(beside.read_text())
        if fields.pop("model_type", None) == MODEL_TYPE:
            return from_json(ViTConfig, fields)
        if "architecture" in fields:  # timm's folders may hold facebook's names
            source = "timm"
        num_heads = fields.get("num_attention_heads") or fields.get("model_args", {}).get("num_heads")
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{CONFIG} beside it cannot be used: {error}") from error
    return config_of(tensors, source, num_heads=num_heads)


def _load(model: VisionTransformer, tensors: Tensors) -> None:
    config, state = model.config, model.state_dict()
    resampled = interpolate_position_embedding(
        tensors["pos_embed"],
        (config.grid_size, config.grid_size),
        offset=config.interpolate_offset,
        antialias=config.interpolate_antialias,
    )
    tensors = {**tensors, "pos_embed": resampled}
    differences = [f"no {name}" for name in state if name not in tensors]
    differences += [f"unexpected {name}" for name in tensors if name not in state]
    differences += [
        f"{name} of shape {list(tensors[name].shape)} for {list(tensor.shape)}"
        for name, tensor in state.items()
        if name in tensors and tensors[name].shape != tensor.shape
    ]
    if differences:
        more = f" and {len(differences) - 5} more differences" if len(differences) > 5 else ""
        raise ValueError(f"the weights do not fit the model: {'; '.join(differences[:5])}{more}")
    model.load_state_dict(tensors)


def write_tensors(tensors: Tensors, file: Path) -> None:
    """Write a safetensors file. It replaces an older file only when it is complete."""
    on_host = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with replacing(file) as partial:
        safetensors.torch.save_file(on_host, partial, metadata={"format": "pt"})


def write_facebook(weights: Weights, folder: Path) -> None:
    """Write our own format: facebook's names, and the fields of :class:`~dinov2.models.ViTConfig`."""
    backbone: Any = weights.network()["backbone"]
    save_pretrained(backbone, folder)


def write_transformers(weights: Weights, folder: Path) -> None:
    """Write ``Dinov2Model``, or ``Dinov2WithRegistersModel`` with registers, for ``AutoModel.from_pretrained``.

    Raises:
        ValueError: transformers has no such model.
    """
    vit = weights.vit
    _require(vit, "transformers", mlp_ratio=int(vit.mlp_ratio), proj_bias=True, ffn_bias=True)
    kind = "dinov2_with_registers" if vit.num_register_tokens else "dinov2"
    config: dict[str, Any] = {
        "model_type": kind,
        "architectures": ["Dinov2WithRegistersModel" if vit.num_register_tokens else "Dinov2Model"],
        "hidden_size": vit.embed_dim,
        "num_hidden_layers": vit.depth,
        "num_attention_heads": vit.num_heads,
        "mlp_ratio": int(vit.mlp_ratio),
        "use_swiglu_ffn": vit.ffn == "swiglu",
        "qkv_bias": vit.qkv_bias,
        "image_size": vit.img_size,
        "patch_size": vit.patch_size,
        "num_channels": vit.in_chans,
        "layer_norm_eps": 1e-6,
        "layerscale_value": 1.0 if vit.init_values is None else vit.init_values,
        "use_mask_token": True,
    }
    if vit.num_register_tokens:
        config["num_register_tokens"] = vit.num_register_tokens
    _write(config, to_transformers_names(weights.backbone, vit), folder)


def write_timm(weights: Weights, folder: Path) -> None:
    """Write for ``timm.create_model("local-dir:FOLDER")``, which converts facebook's names itself.

    Raises:
        ValueError: timm has no such model.
    """
    vit = weights.vit
    _require(vit, "timm", ffn_bias=vit.proj_bias)
    arguments: dict[str, Any] = {
        "img_size": vit.img_size,
        "patch_size": vit.patch_size,
        "in_chans": vit.in_chans,
        "embed_dim": vit.embed_dim,
        "depth": vit.depth,
        "num_heads": vit.num_heads,
        # timm multiplies this by the width and rounds down; its gated layers count both halves.
        "mlp_ratio": ((2 if vit.ffn == "swiglu" else 1) * vit.ffn_width + 0.5) / vit.embed_dim,
        "qkv_bias": vit.qkv_bias,
        "proj_bias": vit.proj_bias,
        "init_values": vit.init_values,
        "dynamic_img_size": True,
    }
    if vit.num_register_tokens:
        arguments["reg_tokens"] = vit.num_register_tokens
    config = {
        "architecture": f"vit_{'giant' if vit.ffn == 'swiglu' else 'small'}_patch14_"
        f"{'reg4_' if vit.num_register_tokens else ''}dinov2",
        "num_classes": 0,
        "num_features": vit.embed_dim,
        "model_args": arguments,
        "pretrained_cfg": {
            "input_size": [vit.in_chans, vit.img_size, vit.img_size],
            "interpolation": "bicubic",
            "num_classes": 0,
            "first_conv": "patch_embed.proj",
            "classifier": "head",
        },
    }
    _write(config, weights.backbone, folder)


WRITERS: dict[Format, Callable[[Weights, Path], None]] = {
    "facebook": write_facebook,
    "transformers": write_transformers,
    "timm": write_timm,
}


def _require(vit: ViTConfig, library: str, **expected: Any) -> None:
    for name, value in expected.items():
        if getattr(vit, name) != value:
            raise ValueError(f"{library} has no model with {name} {getattr(vit, name)}, only with {value}")


def _write(config: dict[str, Any], tensors: Tensors, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    write_tensors(tensors, folder / WEIGHTS)
    write_json(config, folder / CONFIG)
