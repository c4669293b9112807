"""``python -m dinov2.cli``, the same as the command ``dinov2``."""

from __future__ import annotations

import sys

from dinov2.cli import main

sys.exit(main())
