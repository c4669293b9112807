"""A run whose worker is killed ends in one line."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

KILLED = (
    "import os, signal, sys\n"
    "from dinov2.cli import main\n"
    "from dinov2.data.loader import _Steps; prepare = _Steps.__getitem__\n"
    "def dies(self, step): os.kill(os.getpid(), signal.SIGKILL) if step == 3 else None; return prepare(self, step)\n"
    "_Steps.__getitem__ = dies; sys.exit(main(sys.argv[1:]))"
)


def test_one_line(tmp_path: Path) -> None:
    tiny = "--vit.depth=1 --vit.embed_dim=16 --vit.num_heads=2 --dino_head.out_dim=16 --batch_size=2 --steps=60"
    run = ["pretrain", "photos", f"--output={tmp_path / 'run'}", *tiny.split(), "--data.num_workers=1", "--device=cpu"]
    process = subprocess.run(
        [sys.executable, "-c", KILLED, *run], capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    assert process.returncode == 1
    assert process.stderr.startswith("dinov2 pretrain: lost a process that prepares batches (DataLoader worker (pid")
    assert process.stderr.count("\n") == 1
