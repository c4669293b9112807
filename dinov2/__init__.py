"""DINOv2 on top of :mod:`dinov2_kernels`: models, objectives, data, pretraining and evaluation."""

from dinov2._facebooks_package import make_room as _make_room

_make_room()
