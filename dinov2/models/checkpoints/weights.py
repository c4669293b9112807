"""Files of weights: reads the formats of facebook, transformers and timm."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dinov2.configuration import from_json
from dinov2.models.checkpoints.fields import Told, of_arguments, of_facebook_run, of_timm, of_transformers
from dinov2.models.checkpoints.finding import find_weights, is_of_a_folder
from dinov2.models.checkpoints.names import (
    Source,
    Tensors,
    config_of,
    heads_and_centers,
    to_facebook_names,
)
from dinov2.models.checkpoints.reading import read_content
from dinov2.models.config import HeadConfig, ViTConfig
from dinov2.models.dino_head import DINOHead
from dinov2.models.vision_transformer import VisionTransformer, interpolate_position_embedding

HEADS, CONFIG = "heads.safetensors", "config.json"
MODEL_TYPE = "dinov2_vision_transformer"
"""``model_type`` in the config.json that :func:`save_pretrained` writes."""


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
        return _resampled(self.backbone, self.vit, vit.grid_size)


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
            ``model.safetensors``, ``pytorch_model.bin`` (one file, or shards with an index) or
            ``teacher_checkpoint.pth``; or a checkpoint of pretraining (``checkpoints/step_00001000``), from which the
            teacher is loaded.
        model: the model to load into. The file's position embeddings are resampled to the model's image size, in the
            way of the model that they are from; and since other sizes need the same way, ``model.config`` gets the
            file's ``interpolate_offset`` and ``interpolate_antialias``. Only a model of the file's own image size
            computes the same at every size: a smaller table has lost details. None makes such a model in float32 on
            the CPU, with the architecture in ``config.json`` beside the weights. Without this file, the shapes of the
            weights decide the architecture, with attention heads 64 wide.

    Returns:
        The model.

    Raises:
        FileNotFoundError: the file does not exist.
        TypeError: ``path`` is no path, or ``model`` is no VisionTransformer.
        ValueError: the file cannot be read, holds no known model, has a part that our models do not have (the message
            names the field of its configuration), or does not fit ``model``.

    Example:
        >>> model = load_pretrained("dinov2_vits14_pretrain.pth").eval()  # doctest: +SKIP
        >>> small = load_pretrained("dinov2_vits14_pretrain.pth", vit_small(img_size=224))  # doctest: +SKIP
    """
    if model is not None:
        _check_model(model)
    file = find_weights(path)
    with _named_in_errors(file):
        content = read_content(file)
        tensors, source = to_facebook_names(content)
        config = _config(file, content, tensors, source, model.config.num_heads if model else None)
        if model is None:
            with torch.device("meta"):
                model = VisionTransformer(config)
            model.to_empty(device="cpu")
        _load(model, tensors, config)
    return model


def read_weights(path: str | os.PathLike[str]) -> Weights:
    """Read a file or folder like :func:`load_pretrained`, with heads and centres.

    Heads come from ``heads.safetensors`` beside the file, or from the teacher in facebook's training checkpoints.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file cannot be read or holds no known model.
    """
    file = find_weights(path)
    with _named_in_errors(file):
        content = read_content(file)
        tensors, source = to_facebook_names(content)
        config = _config(file, content, tensors, source)
    beside = file.with_name(HEADS)
    if is_of_a_folder(file) and beside.is_file():
        with _named_in_errors(beside):
            content = read_content(beside)
    heads, centers = heads_and_centers(content)
    return Weights(str(path), config, tensors, split_heads(heads), centers)


@contextmanager
def _named_in_errors(file: Path) -> Iterator[None]:
    try:
        yield
    except KeyError as error:
        raise ValueError(f"{file}: the weights lack {error.args[0]}") from error
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error


def _check_model(model: Any) -> None:
    if not isinstance(model, VisionTransformer):
        inner = next((name for name in ("_orig_mod", "module") if hasattr(model, name)), None)
        hint = f"; give the model inside it, model.{inner}" if inner else ""
        raise TypeError(f"model: expected a VisionTransformer, got {type(model).__name__}{hint}")
    if model.pos_embed.is_meta:
        raise ValueError("model: expected parameters with memory, got the meta device; call model.to_empty first")


def _config(file: Path, content: Any, tensors: Tensors, source: Source, num_heads: int | None = None) -> ViTConfig:
    """The architecture: from our checkpoint or config.json, or from shapes and another library's configuration.

    Args:
        file, content, tensors, source: the file, what is in it, its weights under facebook's names, and their source.
        num_heads: attention heads if nothing else tells them.
    """
    if file.is_dir():
        return ViTConfig(**content["vit"])
    gated = any(".mlp.w12." in name for name in tensors)
    beside = file.with_name(CONFIG)
    if is_of_a_folder(file) and beside.is_file():
        where = f"{CONFIG} beside it cannot be used"
        with _blamed(where):
            fields = json.loads(beside.read_text(encoding="utf-8"))
            if not isinstance(fields, dict):
                raise ValueError(f"expected fields by name, got {type(fields).__name__}")
            if fields.get("model_type") == MODEL_TYPE:
                return from_json(ViTConfig, {name: value for name, value in fields.items() if name != "model_type"})
            if "architecture" in fields:  # timm's folders may hold facebook's names
                told, source = of_timm(fields, gated=gated), "timm"
            else:
                told = of_transformers(fields)
    else:
        where = "the arguments in it cannot be used"
        with _blamed(where):
            told = of_arguments(content, gated=gated)
        if source == "facebook" and told == Told():
            where = "config.yaml of its run cannot be used"
            with _blamed(where):
                told = of_facebook_run(file)
    with _blamed(where):
        shown = config_of(tensors, source, num_heads=1)
        told.check_shapes(shown)
        if "num_heads" in told.fields:
            return replace(shown, **told.fields)
    return replace(config_of(tensors, source, num_heads=num_heads), **told.fields)


@contextmanager
def _blamed(where: str) -> Iterator[None]:
    try:
        yield
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{where}: {error}") from error


def _resampled(tensors: Tensors, theirs: ViTConfig, grid_size: int) -> Tensors:
    """Weights with position embeddings for another grid of patches, resampled as the model does that they are from.

    The result of half-precision embeddings is float32: as the model reads them, so they are rounded once.
    """
    table = tensors["pos_embed"]
    if table.shape[1] == 1 + grid_size**2:
        return tensors
    resampled = interpolate_position_embedding(
        table.to(torch.promote_types(table.dtype, torch.float32)),
        (grid_size, grid_size),
        offset=theirs.interpolate_offset,
        antialias=theirs.interpolate_antialias,
    )
    return {**tensors, "pos_embed": resampled}


def _load(model: VisionTransformer, tensors: Tensors, theirs: ViTConfig) -> None:
    """Load weights of a model of configuration ``theirs``; the model then resamples as they need it."""
    config, state = model.config, model.state_dict()
    tensors = _resampled(tensors, theirs, config.grid_size)
    differences = [f"no {name}" for name in state if name not in tensors]
    differences += [f"unexpected {name}" for name in tensors if name not in state]
    differences += [
        f"{name} of shape {list(tensors[name].shape)} for {list(tensor.shape)}"
        for name, tensor in state.items()
        if name in tensors and tensors[name].shape != tensor.shape
    ]
    if theirs.num_heads != config.num_heads:
        differences.append(f"num_heads of {theirs.num_heads} for {config.num_heads}")
    if differences:
        more = f" and {len(differences) - 5} more differences" if len(differences) > 5 else ""
        raise ValueError(f"the weights do not fit the model: {'; '.join(differences[:5])}{more}")
    model.load_state_dict(tensors)
    offset, antialias = theirs.interpolate_offset, theirs.interpolate_antialias
    model.config = replace(config, interpolate_offset=offset, interpolate_antialias=antialias)
