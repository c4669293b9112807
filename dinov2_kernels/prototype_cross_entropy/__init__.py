"""Cross-entropy of a linear layer's prototypes against soft targets, without the layer's logits."""

from dinov2_kernels.prototype_cross_entropy.op import prototype_cross_entropy

__all__ = ["prototype_cross_entropy"]
