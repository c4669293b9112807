"""Models that give an image its features, from wherever they are."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dinov2.curate.embed.config import EmbedConfig
from dinov2.curate.embed.copy_network import describe_copies
from dinov2.curate.plugins import is_function, load_function, open_onnx
from dinov2.data import normalize
from dinov2.data.cropping import resized
from dinov2.data.decoding import Pixels
from dinov2.evaluate.handmade import colour_histogram, texture_histogram
from dinov2.evaluate.probe import central_crop
from dinov2.models import load_pretrained
from dinov2.train.processes import resolve_device

Features = npt.NDArray[np.float32]
Model = Callable[[list[Pixels]], Features]
"""Takes uint8 RGB images [H, W, 3] of any sizes and gives their features [b, D], of any length."""

DEFAULT_SIZE = 224


def open_model(config: EmbedConfig) -> Model:
    """The model that a configuration names.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no model, or takes other images than the configuration says.
        ImportError: a package is missing; the message names the extra.
    """
    if config.model in BUILT_IN:
        return BUILT_IN[config.model]
    kind = Path(config.model).suffix
    if kind == ".onnx":
        run = open_onnx(config.model)
        return _seen(lambda views: torch.from_numpy(run(views.numpy())), config, DEFAULT_SIZE)
    if kind in (".pt", ".torchscript") and _is_torchscript(config.model):
        return _seen(_open_torchscript(config.model, config.device), config, DEFAULT_SIZE)
    if is_function(config.model):
        return load_function(config.model)
    device = resolve_device(config.device)
    network = load_pretrained(config.model).eval().to(device)
    size = config.size or network.config.img_size
    if size % network.config.patch_size:
        raise ValueError(
            f"embed.size must be a multiple of {network.config.patch_size}, the model's patch, but is {size}"
        )
    return _seen(lambda views: network(views.to(device)).float().cpu(), config, size)


def colour_texture(images: list[Pixels]) -> Features:
    """Colours and textures of each image, their histograms compared by their square roots (Hellinger): [b, 86]."""
    rows = [
        np.concatenate([colour_histogram(image[None]), 2 * texture_histogram(image[None])], axis=1) for image in images
    ]
    features: Features = np.sqrt(np.concatenate(rows))
    return features


BUILT_IN: dict[str, Model] = {"copies": describe_copies, "colour-texture": colour_texture}


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
        return any(
            name.startswith("code/") or "/code/" in name for name in torch._C.PyTorchFileReader(path).get_all_records()
        )
    except RuntimeError:
        return False


def _open_torchscript(path: str, device_name: str) -> Callable[[Tensor], Tensor]:
    device = resolve_device(device_name)
    network = torch.jit.load(path, map_location=device).eval()
    return lambda views: network(views.to(device)).float().cpu()
