"""Curations: the paper's numbers, and what suits the images of one disk."""

from __future__ import annotations

from dinov2.curate import CurateConfig
from dinov2.curate.clusters import ClusterConfig
from dinov2.curate.dedup import DedupConfig
from dinov2.curate.embed import EmbedConfig
from dinov2.curate.retrieve import RetrieveConfig


def laptop() -> CurateConfig:
    """Curate thousands to a million images on one machine, with features that are built in.

    Near-copies go, and nothing like an evaluation image stays. With seeds, images of their clusters are retrieved.
    Better features are a setting: --embed_copies.model takes SSCD's TorchScript file, --embed.model any ViT.
    """
    return CurateConfig(
        embed_copies=EmbedConfig(model="copies"),
        dedup=DedupConfig(threshold=0.8, guard_threshold=0.8, reference_threshold=0.6, reference_reach=0.8),
        embed=EmbedConfig(model="colour-texture"),
    )


def lvd142m() -> CurateConfig:
    """Run the pipeline of DINOv2's LVD-142M with its published numbers; you give the models.

    Copies by SSCD at a cosine of 0.6 among 64 neighbours, and of 0.45 to evaluation images; 4 neighbours for each seed
    of sets of a million images or more (32 for ImageNet-1k), and for smaller sets up to 10,000 images of each of
    100,000 clusters that holds more than 3 of their seeds, up to a million for each set. How many images its k-means
    starts from is not published: 8 for each cluster here, then five passes over all.
    """
    return CurateConfig(
        output="lvd142m",
        embed_copies=EmbedConfig(model="sscd_disc_mixup.torchscript.pt", size=320, view="squash"),
        dedup=DedupConfig(neighbours=64, threshold=0.6, guard_threshold=0.6, reference_threshold=0.45),
        embed=EmbedConfig(model="vith16"),
        retrieve=RetrieveConfig(neighbours_of=("imagenet1k=32",), clusters=ClusterConfig(clusters=100_000, sample=8)),
    )
