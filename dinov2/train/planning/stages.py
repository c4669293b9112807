"""What the student's forward pass keeps for its backward pass, stage by stage and tensor by tensor.

Legend, beside that of :mod:`dinov2.models.vision_transformer`: t tokens that stochastic depth lets through a branch; e
bytes of a product's result, 4, or 2 in 16 bits; s bytes of the tokens between blocks, likewise; the first feed-forward
layer makes Z features, the second takes H; n rows of a head, d its bottleneck, K its prototypes.

Only what grows with tokens, or with tokens and prototypes, is listed, and weights. A tensor that two operators keep
counts once.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import pairwise

from dinov2.models import HeadConfig, ViTConfig
from dinov2.models.dino_head import ROWS
from dinov2.objectives.config import StudentLogits
from dinov2.train.config import ActivationCheckpointing
from dinov2.train.planning.sizes import Rows
from dinov2_kernels.nn import swiglu_hidden_features
from dinov2_kernels.prototype_cross_entropy.chunked import columns_of_a_chunk

FLOAT = 4


@dataclass(frozen=True)
class Moment:
    """A moment of a stage's backward pass that may be the step's peak.

    Attributes:
        working: bytes held beside what the stage keeps; negative where that is partly gone.
        made: bytes of the stage's gradients of weights that are there already.
        fresh: those among them that are there beside older ones, if there are any, and not yet added to them.
    """

    working: float
    made: float = 0.0
    fresh: float = 0.0


@dataclass(frozen=True)
class Stage:
    """One piece of the forward pass.

    Attributes:
        name: what the peak is called if it falls here.
        kept: bytes by kind, from here until the stage's backward pass is over.
        gradient: bytes of the gradients of its weights.
        forward: bytes beside all that, while it runs forward.
        backward: moments of its backward pass.
    """

    name: str
    kept: Mapping[str, float]
    gradient: float = 0.0
    forward: float = 0.0
    backward: tuple[Moment, ...] = field(default=(Moment(0.0),))


def backbone_stages(
    vit: ViTConfig, rows: Rows, e: int, s: int, *, checkpointing: ActivationCheckpointing, casts: bool
) -> Iterator[Stage]:
    """Patches, blocks and the last norm.

    Args:
        vit: the student's architecture.
        rows: that go through it.
        e: bytes of a product's result.
        s: bytes of tokens between blocks.
        checkpointing: what blocks compute again.
        casts: whether blocks cast their weights, which stand in float32, to 16 bits.
    """
    T, D = rows.crops.total_tokens, vit.embed_dim
    prefix = 1 + vit.num_register_tokens
    patches = T - prefix * rows.class_tokens
    pixels = vit.in_chans * vit.patch_size**2
    stream, wide = s * T * D, FLOAT * T * D
    yield Stage(
        "patch embedding",
        {"activations": e * patches * pixels + rows.teacher.total_tokens},  # pixels of each patch, masks
        gradient=FLOAT * (D * (pixels + 1) + D * (prefix + 1 + vit.grid_size**2)),
        backward=(Moment(wide + 2 * e * patches * D),),  # tokens' gradient; patches' before and behind the mask token
    )
    for index, rate in enumerate(vit.drop_path_rates):
        branches = (
            attention_stage(vit, rows, rate, e, s, casts=casts),
            feed_forward_stage(vit, rows, rate, e, s, casts=casts),
        )
        if checkpointing == "none":
            yield from (replace(branch, name=f"{branch.name} of block {index}") for branch in branches)
        else:
            kept = stream + 2 * _subset(T, rows.kept(rate), rate)
            kept += _products(vit, rows, rate, e) if checkpointing == "selective" else 0.0
            yield checkpointed_stage(f"block {index}", *branches, kept=kept)
    tokens = FLOAT * D * (rows.class_tokens + rows.masked)
    yield Stage(
        "last norm",
        {"activations": wide + 2 * FLOAT * T + tokens},  # its argument and statistics; the tokens that heads take
        gradient=2 * FLOAT * D,
        forward=wide,  # its result
        backward=(Moment(2 * wide),),  # gradients of result and argument
    )


def attention_stage(vit: ViTConfig, rows: Rows, rate: float, e: int, s: int, *, casts: bool) -> Stage:
    """LayerNorm, queries, keys and values, attention, output layer; and the sum with their argument."""
    T, t, D = rows.crops.total_tokens, rows.kept(rate), vit.embed_dim
    stream, tokens = s * T * D, e * t * D
    residual = tokens if vit.init_values else 0
    kept = _norm(stream, T, t, rate) + tokens  # the norm's result
    kept += 3 * tokens  # queries, keys, values
    kept += tokens + FLOAT * vit.num_heads * t  # attention's result and log-sum-exps
    kept += residual  # for the gradient of LayerScale
    kept += e * D * (4 * D + 1) if casts else 0  # and the last bias, for the gradient of LayerScale
    return Stage(
        "attention",
        {"activations": kept},
        gradient=FLOAT * (4 * D * D + 7 * D),
        forward=stream,  # the sum
        # The tokens' gradient; gradients of attention's result and of queries, keys, values. The residual is gone.
        backward=(Moment(stream + 4 * tokens - residual, made=FLOAT * D * D),),
    )


def feed_forward_stage(vit: ViTConfig, rows: Rows, rate: float, e: int, s: int, *, casts: bool) -> Stage:
    """LayerNorm, linear layer, activation, linear layer; and the sum with their argument."""
    T, t, D = rows.crops.total_tokens, rows.kept(rate), vit.embed_dim
    H, Z = feed_forward_widths(vit)
    stream, tokens = s * T * D, e * t * D
    residual = tokens if vit.init_values else 0
    kept = _norm(stream, T, t, rate) + tokens  # the norm's result
    kept += e * t * Z  # the activation's argument; its result is made again
    kept += residual + (e * D if casts else 0)  # and the last bias; other weights are cast again
    return Stage(
        "feed-forward layer",
        {"activations": kept},
        gradient=FLOAT * (D * (Z + H) + Z + 4 * D),
        forward=stream,  # the sum
        backward=(
            # The tokens' gradient; that of the branch's result; those of the activation's result and argument.
            Moment(stream + tokens + e * t * (H + Z) - residual, made=FLOAT * D * H),
            # Those of the activation's argument and of the norm's result, which takes the first layer's weights.
            Moment(stream + 2 * tokens + e * t * Z + (e * D * Z if casts else 0) - residual, made=FLOAT * D * (Z + H)),
            # At the norm: gradients of its result, and of the tokens before and after it is added.
            Moment(2 * stream + tokens - residual - e * t * Z, made=FLOAT * D * (Z + H)),
        ),
    )


def checkpointed_stage(name: str, attention: Stage, feed_forward: Stage, *, kept: float) -> Stage:
    """A block that keeps so many bytes, and makes the rest of what its two branches keep again before its backward."""
    activations = attention.kept["activations"], feed_forward.kept["activations"]
    again = sum(activations) - kept
    last = [replace(moment, working=moment.working + again) for moment in feed_forward.backward]
    first = [
        replace(moment, working=moment.working + again - activations[1], made=moment.made + feed_forward.gradient)
        for moment in attention.backward
    ]
    return Stage(
        name,
        {"activations": kept},
        gradient=attention.gradient + feed_forward.gradient,
        forward=max(activations) + feed_forward.forward - kept,
        backward=(*last, *first),
    )


def feed_forward_widths(vit: ViTConfig) -> tuple[int, int]:
    """H and Z: the second layer takes H features, the first makes Z."""
    H = int(vit.embed_dim * vit.mlp_ratio)
    gated = swiglu_hidden_features(H)
    return (gated, 2 * gated) if vit.ffn == "swiglu" else (H, H)


def head_stage(name: str, in_dim: int, head: HeadConfig, n: float, e: int, *, copied: bool, casts: bool) -> Stage:
    """A head short of its prototypes.

    ``copied``: its argument is a tensor of its own, by a cast or a concatenation; ``casts``: it casts its weights.
    """
    widths = [in_dim, *[head.hidden_dim] * (head.num_layers - 1), head.bottleneck_dim]
    hidden = sum(widths[1:-1])
    weights = sum(i * o for i, o in pairwise(widths))
    kept = e * n * ((in_dim if copied else 0) + 2 * hidden + 2 * head.bottleneck_dim)
    return Stage(
        name,
        {"activations": kept + (e * weights if casts else 0)},
        gradient=FLOAT * (weights + sum(widths[1:])),
        backward=(Moment(2 * e * n * max(widths[1:]), made=FLOAT * weights),),
    )


def prototype_stages(
    head: HeadConfig, groups: Mapping[str, tuple[float, float]], student_logits: StudentLogits, e: int, device_type: str
) -> Iterator[Stage]:
    """The prototypes of one head and the losses behind them.

    Args:
        head: the head.
        groups: by name, rows of student and teacher, of each loss that these prototypes serve.
        student_logits: of the objective.
        e: bytes of a logit.
        device_type: where chunks of recomputed logits lie.
    """
    K, d = head.out_dim, head.bottleneck_dim
    weight, gradient = e * K * d, FLOAT * K * (d + 1)
    students = [e * K * n for n, _ in groups.values()]
    name = "prototypes of " + " and ".join(groups)
    if student_logits == "recomputed":
        # Shared prototypes get two gradients, the later of which is added to the earlier one.
        for index, (group, (n, m)) in enumerate(groups.items()):
            c = columns_of_a_chunk(int(n) * e + int(m) * FLOAT + d * FLOAT, K, device_type)
            chunk = c * (n * e + m * FLOAT)  # logits and targets
            chunk += c * d * (2 * e + 4 * FLOAT)  # prototypes and their gradient, and what these are made through
            is_last = index == len(groups) - 1
            yield Stage(
                f"prototypes of {group}",
                {},
                gradient=gradient if is_last else 0.0,
                forward=chunk,
                backward=(Moment(chunk, made=gradient, fresh=gradient),)
                if is_last
                else (Moment(chunk + gradient, fresh=0.0),),
            )
        return
    slices = 3 * FLOAT * min(ROWS, K) * d  # what a slice of the gradient is made through
    yield Stage(
        name,
        {"student logits": sum(students), "activations": weight},
        gradient=gradient,
        forward=max(0.0, FLOAT * K * d - sum(students)) if e < FLOAT else 0.0,  # in float32 before they are rounded
        backward=(
            Moment(weight),  # the gradient of the normalised prototypes by the last loss
            Moment(len(groups) * weight - students[-1] * (len(groups) > 1)),  # those by all losses
            Moment(weight + slices - sum(students) - weight, made=gradient, fresh=gradient),
        ),
    )


def _norm(stream: float, T: int, t: int, rate: float) -> float:
    """What gather and LayerNorm keep: their argument, its mean and deviation, and which tokens went through."""
    return stream + 2 * FLOAT * t + _subset(T, t, rate)


def _subset(T: int, t: int, rate: float) -> float:
    """Where the kept tokens stand, and which of all tokens they are."""
    return FLOAT * (T + t) if rate else 0.0


def _products(vit: ViTConfig, rows: Rows, rate: float, e: int) -> float:
    """Results of the products and the attention of a block."""
    t, D = rows.kept(rate), vit.embed_dim
    return e * t * (3 * D + D + D + feed_forward_widths(vit)[1] + D) + FLOAT * vit.num_heads * t
