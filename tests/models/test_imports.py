"""The models need PyTorch and nothing that wraps it."""

from __future__ import annotations

import subprocess
import sys


def test_models_import_no_other_vision_library() -> None:
    code = "import sys, dinov2.models; print(*{'torchvision', 'timm', 'transformers', 'xformers'} & sys.modules.keys())"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == ""
