"""Curation: from a web crawl to a balanced set of images to pretrain on (DINOv2, section 3 and appendix A)."""

from dinov2.curate.overlaps import OverlapWarning
from dinov2.curate.pipeline import STAGES, CurateConfig, Curated, curate, only
from dinov2.curate.pool import Pool
from dinov2.curate.runner import FailedShardsError, Part, Watcher, run_steps
from dinov2.curate.steps import Counts, Step, Steps

__all__ = [
    "STAGES",
    "Counts",
    "CurateConfig",
    "Curated",
    "FailedShardsError",
    "OverlapWarning",
    "Part",
    "Pool",
    "Step",
    "Steps",
    "Watcher",
    "curate",
    "only",
    "run_steps",
]
