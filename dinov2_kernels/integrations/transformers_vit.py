"""transformers: DINOv2 with and without registers, and the ViTs that share their code: ViT, DeiT, MAE, MSN, I-JEPA.

transformers itself is never imported here. A class is recognised by the place where its forward is defined, and by a
trial. There are two generations of these classes. In the earlier one (4.57, and 5.16 for DINOv2), an attention module
contains a "self-attention" and its output layer, and the SwiGLU layer has one linear layer for gate and value.

Legend: B samples of N tokens of width C; H heads of width D.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, ClassVar

from torch import Tensor, nn

from dinov2_kernels._modules import is_unwatched
from dinov2_kernels.attention import varlen_attention
from dinov2_kernels.integrations.attentions import AcceleratedAttention, replaced_sdpa
from dinov2_kernels.integrations.blocks import (
    AcceleratedBlock,
    ResidualBranch,
    add_branches,
    block_parts,
    drop_rate,
    in_use,
)
from dinov2_kernels.integrations.swap import Accelerated, forward_name
from dinov2_kernels.integrations.trial import WIDTH, Part, Sides, matrix
from dinov2_kernels.nn.fused_mlp import SWIGLU, fused_mlp
from dinov2_kernels.packing import PackedLayout

DINOV2 = {"dinov2": "Dinov2", "dinov2_with_registers": "Dinov2WithRegisters"}
VIT = {"vit": "ViT", "deit": "DeiT", "vit_mae": "ViTMAE", "vit_msn": "ViTMSN", "ijepa": "IJepa"}


def _forwards(models: dict[str, str], kind: str) -> set[tuple[str, str]]:
    """Module and qualified name of the forward of each model's class of one kind, for instance "Layer"."""
    return {
        (f"transformers.models.{name}.modeling_{name}", f"{prefix}{kind}.forward") for name, prefix in models.items()
    }


ATTENTIONS = _forwards(DINOV2 | VIT, "Attention")
SELF_ATTENTIONS = _forwards(DINOV2 | VIT, "SelfAttention")
DINOV2_LAYERS = _forwards(DINOV2, "Layer")
VIT_LAYERS = _forwards(VIT, "Layer")
SWIGLUS = _forwards(DINOV2, "SwiGLUFFN")

ATTENTION_FUNCTIONS = {
    ("transformers.integrations.sdpa_attention", "sdpa_attention_forward"),
    ("transformers.integrations.flash_attention", "flash_attention_forward"),
}
"""Module and name of the functions that compute what the kernels do, beside the eager one in the file of a model.

Flex attention is not among them, because its calls always have a mask.
"""

_REPLACEABLE: set[Any] = set()
"""Attention functions that were found to be among these, so that no call has to look again."""

OUTPUTS = {"output_attentions", "output_hidden_states", "return_dict"}
"""Arguments that say what a model returns, and change nothing that an attention layer computes."""


class Transformers(Accelerated):
    """Base of the classes below."""

    @classmethod
    def obstacle(cls, module: nn.Module) -> str | None:
        if "output_attentions" in inspect.signature(type(module).forward).parameters:
            return "a version that passes attention weights from layer to layer"
        return super().obstacle(module)


class SelfAttention(AcceleratedAttention, Transformers):
    """Three linear layers and the attention itself, for the attention functions that compute the same."""

    parts: ClassVar[tuple[str, ...]] = (
        "query",
        "key",
        "value",
        "attention_head_size",
        "scaling",
        "dropout_prob",
        "config",
    )
    query: nn.Module
    key: nn.Module
    value: nn.Module
    scaling: float
    config: Any

    @classmethod
    def recognises(cls, module: nn.Module) -> bool:
        return forward_name(module) in SELF_ATTENTIONS

    @classmethod
    def stand_ins(cls, module: nn.Module) -> Iterator[Sides]:
        numbers = {"num_attention_heads": 2, "attention_head_size": 4, "all_head_size": 8, "dropout_prob": 0.0}
        yield cls._stand_in(numbers, ("query", "key", "value"))

    @classmethod
    def _stand_in(cls, numbers: dict[str, Any], linears: tuple[str, ...]) -> Sides:
        settings = {"scaling": 0.3, "is_causal": False, "config": SimpleNamespace(_attn_implementation="eager")}
        layers = {name: matrix(WIDTH, WIDTH, first) for first, name in enumerate(linears)}
        attributes = numbers | settings | layers
        return attributes, attributes

    def detour(self) -> str | None:
        if reason := super().detour():
            return reason
        implementation = self.config._attn_implementation
        if self.__dict__.get("is_causal") and implementation != "eager":
            return "it is causal"
        if not self._knows_function(implementation):
            return f"its attention function {implementation!r} is not transformers' eager, sdpa or flash attention"
        return None if implementation == "eager" else replaced_sdpa()

    def _knows_function(self, implementation: str | None) -> bool:
        """Whether the function that the library's forward would call now is one that the kernels can replace."""
        names: dict[str, Any] = type(self).library_function.__globals__  # type: ignore[union-attr]
        eager, functions = names.get("eager_attention_forward"), names.get("ALL_ATTENTION_FUNCTIONS")
        if functions is None:
            return True  # the forward computes the attention itself
        is_eager = implementation is None or implementation == "eager"
        function = eager if is_eager else None
        if not is_eager or hasattr(functions, "get_interface"):  # in earlier versions nobody can register "eager"
            function = functions.get(implementation, function)
        if not inspect.isfunction(function):
            return False
        if function in _REPLACEABLE:
            return True
        # A decorator copies the name of a function, but neither its code nor its globals.
        place, name = function.__globals__["__name__"], function.__code__.co_name
        is_of_model = name == "eager_attention_forward" and place.startswith("transformers.models.")
        if is_of_model or (place, name) in ATTENTION_FUNCTIONS:
            _REPLACEABLE.add(function)
        return function in _REPLACEABLE

    def takes(self, *args: Any, **kwargs: Any) -> bool:
        """Whether the kernels can serve a call, and nobody reads the attention weights."""
        return not self._weights_are_read() and self.serves(*args, **kwargs)

    def serves(self, hidden_states: object, *args: Any, **kwargs: Any) -> bool:
        """Whether the input is tokens [B, N, C], nothing masks them, and no weights are dropped."""
        if not isinstance(hidden_states, Tensor) or hidden_states.dim() != 3 or in_use(*args):
            return False
        if kwargs and any(in_use(kwargs[name]) for name in kwargs.keys() - OUTPUTS):
            return False
        return not self.drops()

    def on_kernels(self, hidden_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor | None]:
        """hidden_states: [B, N, C]."""
        layout = PackedLayout([(hidden_states.shape[0], hidden_states.shape[1])])
        heads = (-1, self._head_dim())
        q, k, v = (y.flatten(0, 1).unflatten(1, heads) for y in self._project(hidden_states))  # [B N, H, D]
        y = varlen_attention(q, k, v, layout, scale=self.scaling)  # [B N, H, D]
        return self._output(layout.unpack(y.flatten(1))[0]), None

    def _weights_are_read(self) -> bool:
        """Whether weights are read: only eager attention returns them, and a hook or another forward records them."""
        return self.config._attn_implementation == "eager" and not is_unwatched(self)

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, computed in the order of transformers."""
        k, v, q = self.key(x), self.value(x), self.query(x)
        return q, k, v

    def _head_dim(self) -> Any:
        return self.attention_head_size

    def drop_rate(self) -> float:
        return self.dropout_prob  # type: ignore[return-value]

    def _output(self, y: Tensor) -> Tensor:
        return y


class Attention(SelfAttention):
    """The attention of the later generation, which includes the output's linear layer."""

    parts = ("q_proj", "k_proj", "v_proj", "o_proj", "head_dim", "scaling", "attention_dropout", "config")
    q_proj: nn.Module
    k_proj: nn.Module
    v_proj: nn.Module
    o_proj: nn.Module

    @classmethod
    def recognises(cls, module: nn.Module) -> bool:
        return forward_name(module) in ATTENTIONS and not hasattr(module, "attention")  # the earlier generation has it

    @classmethod
    def stand_ins(cls, module: nn.Module) -> Iterator[Sides]:
        numbers = {"num_attention_heads": 2, "head_dim": 4, "attention_dropout": 0.0}
        yield cls._stand_in(numbers, ("q_proj", "k_proj", "v_proj", "o_proj"))

    def without_weights(self, *args: Any, **kwargs: Any) -> Tensor:
        """The first result of a call, for a block, which does not read the second one."""
        if is_unwatched(self) and self.detour() is None and self.serves(*args, **kwargs):
            return self.on_kernels(*args, **kwargs)[0]
        result: Tensor = self(*args, **kwargs)[0]
        return result

    def _weights_are_read(self) -> bool:
        """Whether a caller may read weights: eager attention returns them. Blocks use :meth:`without_weights`."""
        return bool(self.config._attn_implementation == "eager")

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.q_proj(x), self.k_proj(x), self.v_proj(x)

    def _head_dim(self) -> Any:
        return self.head_dim

    def drop_rate(self) -> float:
        return self.attention_dropout  # type: ignore[return-value]

    def _output(self, y: Tensor) -> Tensor:
        projected: Tensor = self.o_proj(y)
        return projected


class Dinov2Layer(AcceleratedBlock, Transformers):
    """The block of DINOv2: one DropPath for both branches."""

    parts = ("norm1", "attention", "layer_scale1", "drop_path", "norm2", "mlp", "layer_scale2")
    scales = ("layer_scale1", "layer_scale2")
    drop_paths = ("drop_path",)
    norm1: nn.Module
    attention: nn.Module
    layer_scale1: nn.Module
    drop_path: nn.Module
    norm2: nn.Module
    mlp: nn.Module
    layer_scale2: nn.Module

    @classmethod
    def recognises(cls, module: nn.Module) -> bool:
        return forward_name(module) in DINOV2_LAYERS

    @classmethod
    def stand_ins(cls, module: nn.Module) -> Iterator[Sides]:
        is_later = "attention_mask" in inspect.signature(type(module).forward).parameters
        theirs, ours = block_parts(("norm1", "norm2"), "attention", "mlp", cls.scales, returns_weights=is_later)
        yield theirs | {"drop_path": Part(lambda x: 3 * x)}, ours | {"drop_path": nn.Identity()}

    def takes(self, hidden_states: object, *args: Any, **kwargs: Any) -> bool:
        """Whether there is no mask, and the input is tokens [B, N, C] that the block can take."""
        return not _has_mask(args, kwargs) and self.fits(hidden_states)

    def on_kernels(self, hidden_states: Tensor, *_: Any, **kwargs: Any) -> Tensor:
        """hidden_states: [B, N, C]; arguments by name go to the attention."""
        attention, masks = self.attention, self.library_defaults
        if "attention_mask" in masks:  # the later generation
            kwargs, masks = masks | kwargs, {}

        def attend(x: Tensor) -> Tensor:
            if isinstance(attention, Attention):
                return attention.without_weights(x, *masks.values(), **kwargs)
            attended: Any = attention(x, *masks.values(), **kwargs)  # in the later generation, a tuple with the weights
            y: Tensor = attended[0] if isinstance(attended, tuple) else attended
            return y

        rate = drop_rate(self.drop_path)
        branch = ResidualBranch(attend, self.norm1, self.layer_scale1, rate)
        return add_branches(hidden_states, [branch, ResidualBranch(self.mlp, self.norm2, self.layer_scale2, rate)])


class ViTLayer(AcceleratedBlock, Transformers):
    """The block of ViT and similar models, in the later generation: no LayerScale, no stochastic depth."""

    parts = ("layernorm_before", "attention", "dropout", "layernorm_after", "mlp")
    layernorm_before: nn.Module
    attention: nn.Module
    dropout: nn.Module
    layernorm_after: nn.Module
    mlp: nn.Module

    @classmethod
    def recognises(cls, module: nn.Module) -> bool:
        return forward_name(module) in VIT_LAYERS

    @classmethod
    def stand_ins(cls, module: nn.Module) -> Iterator[Sides]:
        norms = ("layernorm_before", "layernorm_after")
        theirs, ours = block_parts(norms, "attention", "mlp", (), returns_weights=True)
        dropout = {"dropout": Part(lambda x: 3 * x)}
        yield theirs | dropout, ours | dropout

    def takes(self, hidden_states: object, *_: Any, **__: Any) -> bool:
        """Whether the input is tokens [B, N, C]; a mask is for the attention."""
        return self.fits(hidden_states)

    def on_kernels(self, hidden_states: Tensor, attention_mask: Any = None, **kwargs: Any) -> Tensor:
        """hidden_states: [B, N, C]; the mask and arguments by name go to the attention."""

        def attend(x: Tensor) -> Tensor:
            attention = self.attention
            if isinstance(attention, Attention):
                y: Tensor = self.dropout(attention.without_weights(x, attention_mask, **kwargs))
            else:
                y = self.dropout(attention(x, attention_mask, **kwargs)[0])
            return y

        def feed_forward(x: Tensor) -> Tensor:
            y: Tensor = self.dropout(self.mlp(x))
            return y

        branches = ResidualBranch(attend, self.layernorm_before), ResidualBranch(feed_forward, self.layernorm_after)
        return add_branches(hidden_states, branches)


class SwiGLU(Transformers):
    """The feed-forward layer of ViT-g, in the earlier generation."""

    runs_on = "swiglu"
    parts = ("weights_in", "weights_out")
    weights_in: nn.Module
    weights_out: nn.Module

    @classmethod
    def recognises(cls, module: nn.Module) -> bool:
        return forward_name(module) in SWIGLUS and hasattr(module, "weights_in")

    @classmethod
    def stand_ins(cls, module: nn.Module) -> Iterator[Sides]:
        attributes = {"weights_in": matrix(WIDTH, 4 * WIDTH), "weights_out": matrix(2 * WIDTH, WIDTH)}
        yield attributes, attributes

    def takes(self, hidden_state: object) -> bool:
        """Whether the input is a tensor; torch.fx passes something else."""
        return isinstance(hidden_state, Tensor)

    def on_kernels(self, hidden_state: Tensor) -> Tensor:
        """hidden_state: [..., C]; returns the same shape."""
        return fused_mlp(self.weights_in, SWIGLU, self.weights_out, hidden_state)


def _has_mask(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a call has a mask, of tokens (later generation) or of heads (versions of the earlier one)."""
    return in_use(*args, kwargs.get("attention_mask"), kwargs.get("head_mask"))
