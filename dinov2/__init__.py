"""DINOv2 on top of :mod:`dinov2_kernels`: models, objectives, data, pretraining and evaluation."""
