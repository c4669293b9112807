"""The version, in the one place that packaging and :func:`dinov2_kernels.info` read."""

__version__ = "0.1.0"
