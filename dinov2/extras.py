"""Optional dependencies: one import helper, one error message that names the extra to install."""

from __future__ import annotations

import importlib
from types import ModuleType


def require(module: str, *, extra: str, purpose: str) -> ModuleType:
    """Import an optional dependency.

    Args:
        module: name to import, e.g. ``"tensorboard"``.
        extra: the extra of this distribution that installs it, e.g. ``"train"``.
        purpose: the task that needs it, for the error message, e.g. ``"writing TensorBoard metrics"``.

    Raises:
        ImportError: the module is not installed; the message names the extra.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            f"{purpose} needs the package {module!r}, which is not installed: pip install 'dinov2-kernels[{extra}]'",
            name=module,
        ) from error
