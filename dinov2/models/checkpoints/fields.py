"""Fields of other libraries' configurations: those that we take from them, and those that our models do not have.

Shapes of weights tell most of an architecture. A configuration tells the rest: attention heads, how position embeddings
are resampled, drop rates. It may also name parts that our models do not have, such as another activation. Weights of
such a model would load and compute something else, so each such field is an error that names it.
"""

from __future__ import annotations

import json
import re
from argparse import Namespace
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dinov2.models.config import ARCHITECTURES, ViTConfig
from dinov2_kernels.nn import swiglu_hidden_features

Fields = Mapping[str, Any]

DINOV2_OF_TRANSFORMERS = ("dinov2", "dinov2_with_registers")
PARTS_OF_TRANSFORMERS = ("backbone_config", "vision_config", "encoder")
"""Fields of a composite model that hold the configuration of its vision transformer."""
ONLY_IN_TRANSFORMERS: Mapping[str, tuple[Any, ...]] = {
    "layer_norm_eps": (1e-6,),
    "hidden_dropout_prob": (0.0,),
    "attention_probs_dropout_prob": (0.0,),
    "pruned_heads": ({}, None),
    "quantization_config": (None,),
}
"""Fields that change what transformers' model computes -> the values that our models have."""

GELU, SILU = ("gelu", "gelu_python"), ("silu", "swish")

ONLY_IN_TIMM: Mapping[str, tuple[Any, ...]] = {
    "class_token": (True,),
    "pos_embed": ("learn",),
    "pre_norm": (False,),
    "final_norm": (True,),
    "qk_norm": (False,),
    "scale_attn_norm": (False,),
    "scale_mlp_norm": (False,),
    "pos_drop_rate": (0.0,),
    "patch_drop_rate": (0.0,),
    "proj_drop_rate": (0.0,),
    "attn_drop_rate": (0.0,),
    "embed_norm_layer": (None,),
    "norm_layer": (None, "layernorm"),
}
"""Arguments that change what timm's model computes -> the values that our models have."""
INERT_IN_TIMM = frozenset(
    [
        "img_size",
        "patch_size",
        "in_chans",
        "embed_dim",
        "depth",
        "num_heads",
        "mlp_ratio",
        "qkv_bias",
        "proj_bias",
        "init_values",
        "reg_tokens",
        "act_layer",
        "no_embed_class",
        "dynamic_img_size",
        "dynamic_img_pad",
        "strict_img_size",
        "num_classes",
        "global_pool",
        "fc_norm",
        "pool_include_prefix",
        "drop_rate",
        "drop_path_rate",
        "weight_init",
        "fix_init",
        "features_only",
        "pretrained",
        "checkpoint_path",
        "device",
        "dtype",
    ]
)
"""Arguments that shapes of weights tell as well, that belong to the head, or that are looked at one by one."""
TIMM_GATED = re.compile(r"vit_giant_patch14_.*(dinov2|tipsv2)(\.|$)")
"""timm's architectures whose feed-forward layers are ours: SiLU of the first half times the second half."""

IN_FACEBOOK = [
    "arch",
    "patch_size",
    "ffn_layer",
    "act_layer",
    "qkv_bias",
    "proj_bias",
    "ffn_bias",
    "num_register_tokens",
    "interpolate_offset",
    "interpolate_antialias",
]
"""Fields of the section ``student`` that decide what a model computes."""
FFN_OF_FACEBOOK = {"mlp": "mlp", "swiglu": "swiglu", "swiglufused": "swiglu"}


@dataclass(frozen=True)
class Told:
    """The facts that a configuration tells.

    Attributes:
        shapes: what shapes of weights must confirm: the configuration's field -> the attribute of :class:`ViTConfig`
            and its value; None if the configuration does not tell it.
        fields: fields of :class:`ViTConfig` that shapes of weights do not tell.
    """

    shapes: Mapping[str, tuple[str, Any]] = field(default_factory=dict)
    fields: Mapping[str, Any] = field(default_factory=dict)

    def check_shapes(self, vit: ViTConfig) -> None:
        """Raise ValueError if the shapes of the weights, from which ``vit`` is, contradict the configuration."""
        for name, (attribute, value) in self.shapes.items():
            shown = getattr(vit, attribute)
            if value is not None and value != shown:
                meaning = "" if name.endswith(attribute) else f"{attribute} "
                raise _error(name, f"{meaning}{shown!r}, as the weights have it", value)


def of_transformers(config: Fields) -> Told:
    """Read a ``config.json`` of transformers, whose DINOv2 may be a part of a larger model.

    Raises:
        ValueError: it names what our models do not have.
    """
    parts = [config, *(config[part] for part in PARTS_OF_TRANSFORMERS if isinstance(config.get(part), Mapping))]
    own = next((part for part in parts if part.get("model_type") in DINOV2_OF_TRANSFORMERS), None)
    is_known = own is not None
    if own is None:
        _check(config, {"model_type": (None, *DINOV2_OF_TRANSFORMERS)})
        own = config
    _check(own, ONLY_IN_TRANSFORMERS)
    heads = own.get("num_attention_heads", 12 if is_known else None)
    gated = own.get("use_swiglu_ffn", False if is_known else None)
    if not gated:  # transformers' gated layers use SiLU, whatever this field says
        _check(own, {"hidden_act": GELU})
    width, ratio = own.get("hidden_size"), own.get("mlp_ratio")
    if width and heads:
        _check(own, {"head_dim": (None, width / heads)})
    patch_size, image_size = _side(own.get("patch_size")), _side(own.get("image_size"))
    shapes: dict[str, tuple[str, Any]] = {
        "hidden_size": ("embed_dim", width),
        "num_hidden_layers": ("depth", own.get("num_hidden_layers")),
        "num_channels": ("in_chans", own.get("num_channels")),
        "patch_size": ("patch_size", patch_size),
        "use_swiglu_ffn": ("ffn", None if gated is None else "swiglu" if gated else "mlp"),
        "qkv_bias": ("qkv_bias", own.get("qkv_bias")),
        "num_register_tokens": ("num_register_tokens", own.get("num_register_tokens")),
        "mlp_ratio": ("ffn_width", _ffn_width(width, ratio, bool(gated)) if width and ratio else None),
        "image_size": ("grid_size", _patches(image_size, patch_size)),
    }
    drop_path = {"drop_path_rate": own.get("drop_path_rate", 0.0), "drop_path_uniform": True}
    return Told(shapes, drop_path | ({"num_heads": heads} if heads is not None else {}))


def of_timm(config: Fields, *, gated: bool) -> Told:
    """Read a ``config.json`` of timm.

    Args:
        config: its content.
        gated: whether the weights have gated feed-forward layers.

    Raises:
        ValueError: it names what our models do not have.
    """
    architecture, arguments = config.get("architecture") or "", config.get("model_args") or {}
    if not isinstance(arguments, Mapping):
        raise _error("model_args", "arguments by name", arguments)
    for name in arguments:
        if name not in ONLY_IN_TIMM and name not in INERT_IN_TIMM:
            raise _error(f"model_args.{name}", "an argument that is known here", arguments[name])
    _check(arguments, ONLY_IN_TIMM, "model_args.")
    _check(arguments, {"act_layer": (None, *(SILU if gated else GELU))}, "model_args.")
    if gated and architecture and not TIMM_GATED.match(architecture):
        raise _error("architecture", "vit_giant_patch14_dinov2 for weights with gated layers", architecture)
    img_size = _side(arguments.get("img_size"))
    input_size = (config.get("pretrained_cfg") or {}).get("input_size") or [None]
    for name, size in (("model_args.img_size", img_size), ("pretrained_cfg.input_size", _side(input_size[1:]))):
        if isinstance(size, list | tuple) and size:
            raise _error(name, "a square image", list(size))
    patch_size = _side(arguments.get("patch_size"))
    shapes: dict[str, tuple[str, Any]] = {
        f"model_args.{name}": (name, arguments.get(name))
        for name in ("in_chans", "embed_dim", "depth", "qkv_bias", "proj_bias")
    }
    shapes["model_args.reg_tokens"] = ("num_register_tokens", arguments.get("reg_tokens"))
    shapes["model_args.patch_size"] = ("patch_size", patch_size)
    shapes["model_args.img_size"] = ("grid_size", _patches(img_size, patch_size))
    fields = {"num_heads": arguments["num_heads"]} if "num_heads" in arguments else {}
    if "drop_path_rate" in arguments:  # it grows from block to block
        fields |= {"drop_path_rate": arguments["drop_path_rate"], "drop_path_uniform": False}
    return Told(shapes, fields)


def of_facebook(student: Fields) -> Told:
    """Read the section ``student`` of facebook's ``config.yaml``, or the arguments in a checkpoint.

    Its drop rates are left out, because facebook's programs build the teacher without them.

    Raises:
        ValueError: it names what our models do not have.
    """
    _check(student, {"ffn_layer": tuple(FFN_OF_FACEBOOK), "act_layer": GELU})
    shapes: dict[str, tuple[str, Any]] = {
        name: (name, student.get(name))
        for name in ("patch_size", "qkv_bias", "proj_bias", "ffn_bias", "num_register_tokens")
    }
    shapes["ffn_layer"] = ("ffn", FFN_OF_FACEBOOK.get(str(student.get("ffn_layer"))))
    fields = {name: student[name] for name in ("interpolate_offset", "interpolate_antialias") if name in student}
    if "arch" in student:
        architecture = str(student["arch"]).removesuffix("_memeff")
        _check({"arch": architecture}, {"arch": tuple(ARCHITECTURES)})
        shapes["arch"] = ("embed_dim", ARCHITECTURES[architecture]["embed_dim"])
        fields["num_heads"] = ARCHITECTURES[architecture]["num_heads"]
    return Told(shapes, fields)


def of_arguments(content: Any, *, gated: bool) -> Told:
    """Read the arguments ``args`` of a training program, which stand in its checkpoint.

    Raises:
        ValueError: it names what our models do not have.
    """
    arguments = content.get("args") if isinstance(content, Mapping) else None
    if isinstance(arguments, Namespace):
        arguments = vars(arguments)
    if not isinstance(arguments, Mapping):
        return Told()
    if isinstance(arguments.get("model_kwargs"), Mapping):  # timm's program
        return of_timm({"architecture": arguments.get("model"), "model_args": arguments["model_kwargs"]}, gated=gated)
    student = arguments["student"] if isinstance(arguments.get("student"), Mapping) else arguments
    told = {name: student[name] for name in IN_FACEBOOK if student.get(name) is not None}
    if told.get("arch") not in ARCHITECTURES:  # another program's name
        told.pop("arch", None)
    return of_facebook(told)


def of_facebook_run(file: Path) -> Told:
    """Read the ``config.yaml`` that facebook's training writes beside a checkpoint.

    The run's folder is the file's own, or the one that holds ``eval/training_1249/teacher_checkpoint.pth``.

    Raises:
        ValueError: it names what our models do not have.
    """
    for folder in [file.parent, *([file.parents[2]] if file.parent.parent.name == "eval" else [])]:
        if (folder / "config.yaml").is_file():
            text = (folder / "config.yaml").read_text(encoding="utf-8", errors="replace")
            student = _section(text, "student")
            if "arch" in student:
                return of_facebook(student)
    return Told()


def _section(text: str, name: str) -> dict[str, Any]:
    """The plain values of one section in facebook's YAML, which has one line for each of them."""
    values: dict[str, Any] = {}
    inside = False
    for line in text.splitlines():
        if line[:1].strip() and not line.startswith("#"):
            inside = line.split("#")[0].strip() == f"{name}:"
        elif inside and (match := re.fullmatch(r"\s+(\w+):\s*([^#]*?)\s*(#.*)?", line)):
            values[match[1]] = _scalar(match[2])
    return values


def _scalar(text: str) -> Any:
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    if text.lower() in ("null", "~", ""):
        return None
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text.strip("'\"")


def _side(size: Any) -> Any:
    """The side of a square, which a configuration may tell twice; anything else stays as it is."""
    return size[0] if isinstance(size, list | tuple) and len(set(size)) == 1 else size


def _patches(image_size: Any, patch_size: Any) -> int | None:
    """Patches along the side of an image; None if this is not known."""
    return image_size // patch_size if isinstance(image_size, int) and isinstance(patch_size, int) else None


def _ffn_width(embed_dim: int, ratio: float, gated: bool) -> int:
    width = int(embed_dim * ratio)
    return swiglu_hidden_features(width) if gated else width


def _check(fields: Fields, known: Mapping[str, tuple[Any, ...]], at: str = "") -> None:
    for name, accepted in known.items():
        if name in fields and fields[name] not in accepted:
            values = [json.dumps(value) for value in accepted if value is not None]
            raise _error(at + name, f"{' or '.join(values) or 'nothing'}, as in all models here", fields[name])


def _error(name: str, expected: str, value: Any) -> ValueError:
    return ValueError(f"{name}: expected {expected}, got {value!r}")
