"""Profile of a pretraining step of ViT-L/14: the 30 kernels that take the most time.

python -m gpu.profile_step FILE
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, supported_activities

from benchmarks.pretraining_step_gpu import DROP_PATH, IMAGES, VITS, step_of
from dinov2.models import ViTConfig

NAME, STEPS, KERNELS = "ViT-L/14", 2, 30


def main(path: Path) -> None:
    architecture, patch_size = VITS[NAME]
    vit = ViTConfig.of(architecture, patch_size=patch_size, drop_path_rate=DROP_PATH)
    step = step_of("stored", vit, IMAGES, "cuda")
    for _ in range(2):
        step()
    torch.cuda.synchronize()
    with profile(activities={ProfilerActivity.CPU, ProfilerActivity.CUDA} & supported_activities()) as profiler:
        for _ in range(STEPS):
            step()
        torch.cuda.synchronize()
    table = profiler.key_averages().table(sort_by="self_device_time_total", row_limit=KERNELS, max_name_column_width=80)
    path.write_text(f"{NAME}, {IMAGES} images, {STEPS} steps\n{table}\n")
    print(f"profile: {path.name}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
