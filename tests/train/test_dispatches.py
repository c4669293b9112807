"""How often a step of training calls the dispatcher for one block: on a GPU each call costs the host some 5 us."""

from __future__ import annotations

from collections import Counter

import torch
from torch import nn

from dinov2.models import VisionTransformer, ViTConfig
from dinov2.train.precision import WeightCopies
from tests.dispatches import VIEWS, Calls

MOST = 41
"""It was 68 while linear layers cast their weights, biases were summed by themselves, and each branch drew samples, and
44 while each block began with a gather and ended with a scatter."""


def calls_of_step(depth: int) -> Counter[str]:
    """Forward and backward pass of a student, and forward pass of its teacher, in bfloat16."""
    calls = Calls()
    for is_student in (True, False):
        config = ViTConfig(
            img_size=16, patch_size=8, embed_dim=32, depth=depth, num_heads=2, drop_path_rate=0.3, init_values=1e-5
        )
        network = VisionTransformer(config).train(is_student).requires_grad_(is_student)
        copies = WeightCopies([nn.ModuleDict({"backbone": network})], torch.bfloat16)
        copies.renew()
        with calls, copies.in_place():
            with torch.autocast("cpu", torch.bfloat16):
                tokens = network.forward_packed([torch.randn(4, 3, 16, 16)], [None])[2]
            if is_student:
                tokens.backward(torch.ones_like(tokens))
    return calls.of


def test_calls_of_a_block() -> None:
    """What a network of three blocks calls beyond one of two, without views."""
    calls = calls_of_step(3)
    calls.subtract(calls_of_step(2))
    launching = {name: count for name, count in calls.items() if count and name not in VIEWS}
    assert sum(launching.values()) <= MOST, launching
