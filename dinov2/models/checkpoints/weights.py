"""Files of weights: reads those of facebook, transformers and timm, writes safetensors with facebook's names."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from dinov2.models.architecture import config_of
from dinov2.models.config import ViTConfig
from dinov2.models.position_embedding import interpolate_position_embedding
from dinov2.models.run_checkpoint import MANIFEST, load_checkpoint
from dinov2.models.state_dict_formats import CENTERS, Source, Tensors, heads_and_centers, to_facebook_names
from dinov2.models.vision_transformer import VisionTransformer
from dinov2.models.weights import Weights, split_heads

WEIGHTS, HEADS, CONFIG = "model.safetensors", "heads.safetensors", "config.json"
FILES_OF_A_FOLDER = (WEIGHTS, "pytorch_model.bin", "teacher_checkpoint.pth")
MODEL_TYPE = "dinov2_vision_transformer"
"""``model_type`` in the config.json that :func:`save_pretrained` writes."""


def load_pretrained(path: str | os.PathLike[str], model: VisionTransformer | None = None) -> VisionTransformer:
    """Load a vision transformer, or load its weights into one.

    Recognised by the names of their tensors: facebook's published weights and training checkpoints (whole or in
    chunks of blocks; of ``teacher_checkpoint.pth`` the backbone), transformers' Dinov2 and Dinov2WithRegisters, timm's
    ``vit_*_dinov2`` and what :func:`save_pretrained` wrote. Heads in the file are left out.

    Args:
        path: a file of weights, ``.safetensors`` or anything :func:`torch.load` reads; or a folder that holds
            ``model.safetensors``, ``pytorch_model.bin`` or ``teacher_checkpoint.pth``, or is a checkpoint of
            pretraining (``checkpoints/step_00001000``), of which the teacher is taken.
        model: the model to load into; its position embeddings may be for another image size than the file's, which are
            then resampled. By default a new one in float32 on the CPU, whose architecture is that of ``config.json``
            beside the weights, or is told from the shapes of the weights, with attention heads 64 wide.

    Returns:
        The model.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file cannot be read, holds no known model, or one that does not fit ``model``.
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
    """Read a file or folder as :func:`load_pretrained` does, heads and centres included.

    Heads are those of facebook's training checkpoints (the teacher's), or of ``heads.safetensors`` beside the file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it cannot be read or holds no known model.
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
    """Write ``heads.safetensors`` into a folder: heads and centres by facebook's names.

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
    """Write ``model.safetensors`` (facebook's names, the mask token included) and ``config.json`` into a folder.

    Each file replaces an older one only when it is complete.

    Args:
        model: the model.
        path: the folder; created if need be.

    Returns:
        The folder.
    """
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    config = json.dumps({"model_type": MODEL_TYPE, **asdict(model.config)}, indent=2) + "\n"
    write_tensors(model.state_dict(), folder / WEIGHTS)
    _replace(folder / CONFIG, lambda file: file.write_text(config))
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
    except Exception as error:  # each kind of broken file raises its own
        reason = str(error).partition("\n")[0]
        raise ValueError(f"cannot be read as a file of weights ({type(error).__name__}: {reason})") from error


def _read_run_checkpoint(directory: Path) -> dict[str, Any]:
    """The teacher, or the only student's moving average, and its configuration ``vit``."""
    content = load_checkpoint(directory, parts=["teacher"])
    if len(content["vit"]) > 1:
        raise ValueError(f"it holds the students {', '.join(content['vit'])}: write one to a file with dinov2 export")
    ((name, vit),) = content["vit"].items()
    prefix = f"{name}." if name else ""
    return {"teacher": {key.removeprefix(prefix): x for key, x in content["teacher"].items()}, "vit": vit}


def _config(file: Path, content: Any, tensors: Tensors, source: Source) -> ViTConfig:
    """The configuration in our checkpoint or config.json, else that of the weights, with heads from another's."""
    if file.is_dir():
        return ViTConfig(**content["vit"])
    beside = file.with_name(CONFIG)
    if file.name not in FILES_OF_A_FOLDER or not beside.is_file():
        return config_of(tensors, source)
    try:
        fields = json.loads(beside.read_text())
        if fields.pop("model_type", None) == MODEL_TYPE:
            return ViTConfig(**fields)
        if "architecture" in fields:  # a folder of timm, which may hold facebook's names
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
    """Write a safetensors file, which replaces an older one only when it is complete."""
    on_host = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    _replace(file, lambda partial: safetensors.torch.save_file(on_host, partial, metadata={"format": "pt"}))


def _replace(file: Path, write: Callable[[Path], object]) -> None:
    """Write a file under another name and move it to its place, so that a crash leaves the old one whole."""
    partial = file.with_name(f".{file.name}.partial")
    write(partial)
    partial.replace(file)
