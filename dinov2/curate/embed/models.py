"""Models that give an image its features, from wherever they are."""

from __future__ import annotations

import hashlib
import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dinov2.curate.embed.config import EmbedConfig
from dinov2.data import normalize
from dinov2.data.cropping import resized
from dinov2.data.decoding import Pixels
from dinov2.evaluate.handmade import colour_histogram, texture_histogram
from dinov2.evaluate.probe import central_crop
from dinov2.models import load_pretrained
from dinov2.train.processes import resolve_device
from dinov2_kernels._extras import require

Features = npt.NDArray[np.float32]
Model = Callable[[list[Pixels]], Features]
"""Takes uint8 RGB images [H, W, 3] of any sizes and gives their features [b, D], of any length."""

COPIES, COLOUR_TEXTURE = "copies", "colour-texture"
DEFAULT_SIZE = 224


def open_model(config: EmbedConfig) -> Model:
    """The model that a configuration names, other than ``copies``.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no model, or takes other images than the configuration says.
        ImportError: a package is missing; the message names the extra.
    """
    if config.model == COLOUR_TEXTURE:
        return colour_texture
    kind = Path(config.model).suffix
    if kind == ".onnx":
        return _seen(_open_onnx(config.model), config, DEFAULT_SIZE)
    if kind in (".pt", ".torchscript") and _is_torchscript(config.model):
        return _seen(_open_torchscript(config.model, config.device), config, DEFAULT_SIZE)
    if is_function(config.model):
        return load_function(config.model)
    device = resolve_device(config.device)
    network = load_pretrained(config.model).eval().to(device)
    size = config.size or network.config.img_size
    if size % network.config.patch_size:
        raise ValueError(f"embed.size must be a multiple of {network.config.patch_size}, the model's patch, but is {size}")
    return _seen(lambda views: network(views.to(device)).float().cpu(), config, size)


def identity(config: EmbedConfig) -> str:
    """What stands for the model in a folder's name: a digest of its file, so that other weights make other features."""
    path = Path(config.model)
    if config.model in (COPIES, COLOUR_TEXTURE) or is_function(config.model):
        return config.model
    files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as content:
            digest.update(hashlib.file_digest(content, "sha256").digest() if hasattr(hashlib, "file_digest") else content.read())
    return digest.hexdigest()[:16]


def is_function(name: str) -> bool:
    """Whether a name is ``MODULE:FUNCTION``."""
    module, _, function = name.partition(":")
    return function.isidentifier() and all(part.isidentifier() for part in module.split("."))


def load_function(name: str) -> Callable[..., Any]:
    """What ``MODULE:FUNCTION`` names.

    Raises:
        ValueError: there is none, or it cannot be called.
    """
    module, _, function = name.partition(":")
    try:
        found = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"expected MODULE:FUNCTION that can be imported, but {name!r} cannot: {error}") from error
    if not callable(found):
        raise ValueError(f"expected MODULE:FUNCTION that can be called, but {name!r} is {type(found).__name__}")
    return found  # type: ignore[no-any-return]


def colour_texture(images: list[Pixels]) -> Features:
    """Colours and textures of each image, their histograms compared by their square roots (Hellinger): [b, 86]."""
    rows = [np.concatenate([colour_histogram(image[None]), 2 * texture_histogram(image[None])], axis=1) for image in images]
    return np.sqrt(np.concatenate(rows))


def _seen(network: Callable[[Tensor], Tensor], config: EmbedConfig, size: int) -> Model:
    """A model of images from a network of batches."""
    size = config.size or size

    @torch.inference_mode()
    def features(images: list[Pixels]) -> Features:
        views = [_view(image, config, size) for image in images]
        result: Features = network(torch.stack(views)).numpy()  # [b, D]
        return result

    return features


def _view(image: Pixels, config: EmbedConfig, size: int) -> Tensor:
    """What a network sees of an image, float32 [3, size, size]."""
    seen = central_crop(image, size) if config.view == "centre" else resized(image, size, size)
    return torch.from_numpy(normalize(seen, config.mean, config.std))


def _is_torchscript(path: str) -> bool:
    """TorchScript files are zip archives with code in them; files of weights have none."""
    try:
        return any(name.startswith("code/") or "/code/" in name for name in torch._C.PyTorchFileReader(path).get_all_records())
    except RuntimeError:
        return False


def _open_torchscript(path: str, device_name: str) -> Callable[[Tensor], Tensor]:
    device = resolve_device(device_name)
    network = torch.jit.load(path, map_location=device).eval()
    return lambda views: network(views.to(device)).float().cpu()


def _open_onnx(path: str) -> Callable[[Tensor], Tensor]:
    onnxruntime = require("onnxruntime", extra="onnx", purpose="embedding by an ONNX model")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    providers = [name for name in onnxruntime.get_available_providers() if name != "AzureExecutionProvider"]
    session = onnxruntime.InferenceSession(path, options, providers=providers)
    (name, *others) = [entry.name for entry in session.get_inputs()]
    if others:
        raise ValueError(f"embed.model must take one batch of images, but {path!r} takes {[name, *others]}")
    return lambda views: torch.from_numpy(session.run(None, {name: views.numpy()})[0])
