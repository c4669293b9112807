"""Everything that a file or folder of weights may be instead: one error that names the file and says what came."""

from __future__ import annotations

import argparse
import io
import json
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import nn

from dinov2.models import VisionTransformer, load_pretrained, read_weights, save_pretrained

TinyViT = Callable[..., VisionTransformer]
HTML = b"\n<!DOCTYPE html>\n<html><head><title>404</title></head></html>"
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 88283115\n"


def saved(content: object) -> bytes:
    stream = io.BytesIO()
    torch.save(content, stream)
    return stream.getvalue()


def archive(**entries: bytes) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as file:
        for name, data in entries.items():
            file.writestr(name, data)
    return stream.getvalue()


def scripted() -> bytes:
    stream = io.BytesIO()
    torch.jit.save(torch.jit.script(nn.Linear(2, 2)), stream)
    return stream.getvalue()


def arrays() -> bytes:
    stream = io.BytesIO()
    np.savez(stream, a=np.zeros(2))
    return stream.getvalue()


class Network(nn.Module):
    """A class that only an unsafe unpickler would build."""


WHOLE = {"cls_token": torch.zeros(1, 1, 128), "pos_embed": torch.zeros(1, 17, 128)}
NO_FILES_OF_WEIGHTS: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "it is empty"),
    "an HTML page": (HTML, "it is an HTML page"),
    "a server's error": (
        b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>',
        "it is XML, perhaps a server",
    ),
    "git LFS": (LFS, "it is a pointer of git LFS.*git lfs pull"),
    "JSON": (b'{"model_type": "dinov2"}', "it is JSON text"),
    "GGUF": (b"GGUF\x03\x00\x00\x00", "it is a GGUF file"),
    "HDF5": (b"\x89HDF\r\n\x1a\n", "it is an HDF5 file"),
    "gzip": (b"\x1f\x8b\x08\x00", "it is compressed by gzip; unpack it first"),
    "tar": (b"a" * 257 + b"ustar" + b"0" * 250, "it is a tar archive"),
    "text": (b"not a file of weights", r"it begins with b'not a file of we'"),
    "arrays": (arrays(), "it is an archive of NumPy arrays"),
    "zip": (archive(readme=b"hello"), "it is a zip archive of readme"),
    "TorchScript": (scripted(), r"it is a TorchScript program; save its weights: torch\.save"),
    "a whole model": (saved(Network()), r"it holds a pickled [\w.]+\.Network, not only tensors.*state_dict"),
    "cut off": (saved(WHOLE)[:-700], r"it is cut off after [\d,]+ bytes; download"),
    "cut off, safetensors": (
        safetensors.torch.save(WHOLE)[:-100],
        r"it is cut off after 9,\d+ bytes of at least 9,\d+",
    ),
    "cut off in the header": (safetensors.torch.save(WHOLE)[:50], "it is cut off after 50 bytes of at least"),
}


@pytest.mark.parametrize("name", ["weights.pth", "model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize("case", NO_FILES_OF_WEIGHTS)
def test_what_is_no_file_of_weights(tmp_path: Path, name: str, case: str) -> None:
    data, message = NO_FILES_OF_WEIGHTS[case]
    (tmp_path / name).write_bytes(data)
    for read in (load_pretrained, read_weights):
        with pytest.raises(ValueError, match=rf"{name}: cannot be read as a file of weights: {message}") as error:
            read(tmp_path / name)
        assert "\n" not in str(error.value)


def test_a_pickle_of_the_old_form_that_is_cut_off(tmp_path: Path) -> None:
    torch.save(WHOLE, tmp_path / "weights.pth", _use_new_zipfile_serialization=False)
    data = (tmp_path / "weights.pth").read_bytes()
    for size in (20, 200, len(data) - 100):
        (tmp_path / "weights.pth").write_bytes(data[:size])
        with pytest.raises(ValueError, match=r"weights\.pth: cannot be read as a file of weights: ") as error:
            load_pretrained(tmp_path / "weights.pth")
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["weights.pth", "weights.safetensors", "weights"])
def test_the_content_decides_how_a_file_is_read(tiny_vit: TinyViT, tmp_path: Path, name: str) -> None:
    model = tiny_vit(embed_dim=128)
    for data in (saved(model.state_dict()), safetensors.torch.save(dict(model.state_dict()))):
        (tmp_path / name).write_bytes(data)
        assert torch.equal(load_pretrained(tmp_path / name).cls_token, model.cls_token)


def test_arguments_beside_the_weights_are_read(tiny_vit: TinyViT, tmp_path: Path) -> None:
    model = tiny_vit(embed_dim=128)
    arguments = argparse.Namespace(lr=0.1, patch_size=14)
    torch.save({"model": model.state_dict(), "args": arguments, "epoch": 3}, tmp_path / "weights.pth")
    assert torch.equal(load_pretrained(tmp_path / "weights.pth").cls_token, model.cls_token)


def in_shards(model: VisionTransformer, folder: Path, name: str) -> list[str]:
    """Write a model in two shards with their index, as transformers does; returns the shards' names."""
    save_pretrained(model, folder)
    (folder / "model.safetensors").unlink()
    tensors, (stem, suffix) = dict(model.state_dict()), name.split(".")
    shards = [f"{stem}-0000{number}-of-00002.{suffix}" for number in (1, 2)]
    places = {tensor: shards[index % 2] for index, tensor in enumerate(sorted(tensors))}
    for shard in shards:
        part = {tensor: tensors[tensor] for tensor, place in places.items() if place == shard}
        write = safetensors.torch.save_file if suffix == "safetensors" else torch.save
        write(part, folder / shard)
    (folder / f"{name}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return shards


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_shards(tiny_vit: TinyViT, tmp_path: Path, name: str) -> None:
    model = tiny_vit()
    first, second = in_shards(model, tmp_path, name)
    loaded = load_pretrained(tmp_path)
    assert loaded.config == model.config
    torch.testing.assert_close(dict(loaded.state_dict()), dict(model.state_dict()), rtol=0, atol=0)
    with pytest.raises(ValueError, match=rf"{first}: it is one of 2 shards; give the folder"):
        load_pretrained(tmp_path / first)
    whole = (tmp_path / second).read_bytes()
    (tmp_path / second).write_bytes(whole[:-100])
    with pytest.raises(ValueError, match=rf"{name}\.index\.json: shard {second}: cannot be read .*: it is cut off"):
        load_pretrained(tmp_path)
    (tmp_path / second).unlink()
    with pytest.raises(ValueError, match=rf"{name}\.index\.json: 1 of 2 shards are missing: {second}"):
        load_pretrained(tmp_path)
    (tmp_path / f"{name}.index.json").write_text("{}")
    with pytest.raises(ValueError, match=rf"{name}\.index\.json: cannot be read .*: it is no index of shards"):
        load_pretrained(tmp_path)


def test_a_shard_that_lacks_a_tensor_of_its_index(tiny_vit: TinyViT, tmp_path: Path) -> None:
    first, _ = in_shards(tiny_vit(), tmp_path, "model.safetensors")
    tensors = safetensors.torch.load_file(tmp_path / first)
    lost = min(tensors)
    safetensors.torch.save_file({name: x for name, x in tensors.items() if name != lost}, tmp_path / first)
    with pytest.raises(ValueError, match=rf"shard {first} lacks {lost}, which the index places there"):
        load_pretrained(tmp_path)


def test_an_index_names_files_of_its_folder_only(tiny_vit: TinyViT, tmp_path: Path) -> None:
    in_shards(tiny_vit(), tmp_path / "inside", "model.safetensors")
    (tmp_path / "outside.bin").write_bytes(saved(WHOLE))
    index = {"weight_map": {"cls_token": "../outside.bin"}}
    (tmp_path / "inside" / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"1 of 1 shards are missing: \.\./outside\.bin"):
        load_pretrained(tmp_path / "inside")


def test_heads_that_are_cut_off(tiny_vit: TinyViT, tmp_path: Path) -> None:
    """The error names the file of the heads, not that of the backbone beside it."""
    save_pretrained(tiny_vit(), tmp_path)
    (tmp_path / "heads.safetensors").write_bytes(safetensors.torch.save(WHOLE)[:-1])
    with pytest.raises(ValueError, match=r"/heads\.safetensors: cannot be read as a file of weights: it is cut off"):
        read_weights(tmp_path)
    assert isinstance(load_pretrained(tmp_path), VisionTransformer)


def test_folders_without_weights(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"the folder holds none of .*; it is empty"):
        load_pretrained(tmp_path)
    (tmp_path / "dinov2_vits14_pretrain.pth").touch()
    (tmp_path / "config.json").touch()
    with pytest.raises(FileNotFoundError, match=r"it holds config\.json, dinov2_vits14_pretrain\.pth$"):
        load_pretrained(tmp_path)
    (tmp_path / ".metadata").touch()
    with pytest.raises(FileNotFoundError, match=r"it is a checkpoint of torch\.distributed\.checkpoint"):
        load_pretrained(tmp_path)


def test_a_folder_without_a_configuration(tiny_vit: TinyViT, tmp_path: Path) -> None:
    (save_pretrained(tiny_vit(embed_dim=128), tmp_path) / "config.json").unlink()
    assert load_pretrained(tmp_path).config.num_heads == 2
    (save_pretrained(tiny_vit(), tmp_path) / "config.json").unlink()
    with pytest.raises(ValueError, match=r"a width of 32 does not tell the number of heads; config\.json must tell it"):
        load_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        (
            "facebook/dinov2-small",
            "no such file; if it is a name on the Hugging Face Hub, .* hf download facebook/dino",
        ),
        ("https://dl.fbaipublicfiles.com/dinov2/dinov2_vits14_pretrain.pth", "no such file; only local files are read"),
        ("nowhere/weights.pth", "no such file$"),
    ],
)
def test_what_is_no_local_path(path: str, message: str) -> None:
    with pytest.raises(FileNotFoundError, match=message):
        load_pretrained(path)


def test_what_is_no_path(tiny_vit: TinyViT) -> None:
    with pytest.raises(TypeError, match="path: expected the path of a file or folder of weights, got dict"):
        load_pretrained(dict(tiny_vit().state_dict()))


def test_what_is_no_model(tiny_vit: TinyViT, tmp_path: Path) -> None:
    folder, model = save_pretrained(tiny_vit(), tmp_path), tiny_vit()
    with pytest.raises(TypeError, match="model: expected a VisionTransformer, got Linear"):
        load_pretrained(folder, nn.Linear(2, 2))
    with pytest.raises(TypeError, match=r"got OptimizedModule; give the model inside it, model\._orig_mod"):
        load_pretrained(folder, torch.compile(model))
    with pytest.raises(TypeError, match=r"got DataParallel; give the model inside it, model\.module"):
        load_pretrained(folder, nn.DataParallel(model))
    with torch.device("meta"):
        empty = VisionTransformer(model.config)
    with pytest.raises(ValueError, match="model: expected parameters with memory, got the meta device"):
        load_pretrained(folder, empty)
