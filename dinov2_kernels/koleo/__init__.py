"""The KoLeo regulariser and the nearest neighbours it is made of."""

from dinov2_kernels.koleo.op import koleo_loss, nearest_neighbors

__all__ = ["koleo_loss", "nearest_neighbors"]
