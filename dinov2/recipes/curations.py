"""Curations: one with the paper's numbers, and one for the images on one machine."""

from __future__ import annotations

from collections.abc import Callable

from dinov2.curate import CurateConfig
from dinov2.curate.clusters import ClusterConfig
from dinov2.curate.collect import CollectConfig
from dinov2.curate.dedup import DedupConfig
from dinov2.curate.embed import EmbedConfig
from dinov2.curate.materialize import MaterializeConfig
from dinov2.curate.retrieve import RetrieveConfig


def laptop() -> CurateConfig:
    """Curate thousands to a million images on one machine, with built-in features.

    It removes near-copies, and images that resemble an evaluation image. With seeds, it retrieves images of the seeds'
    clusters, or the nearest images of each seed if the pool is small. Shards are small, so that all cores have work.
    For better features, set --embed_copies.model to SSCD's TorchScript file and --embed.model to any ViT.
    """
    return CurateConfig(
        collect=CollectConfig(shard_size=500),
        embed_copies=EmbedConfig(model="copies"),
        dedup=DedupConfig(check="pictures", neighbours=16, threshold=0.25, reference_threshold=0.15),
        embed=EmbedConfig(model="colour-texture"),
        materialize=MaterializeConfig(shard_size=1_000),
    )


def lvd142m() -> CurateConfig:
    """Run the pipeline of DINOv2's LVD-142M with its published numbers; you give the models.

    SSCD finds copies at a cosine of 0.6 among 64 nearest neighbours, and at a cosine of 0.45 to evaluation images. For
    seed sets of a million images or more, it retrieves 4 nearest neighbours of each seed (32 for ImageNet-1k). For
    smaller sets, it takes up to 10,000 images from each of 100,000 clusters that holds more than 3 of their seeds, up
    to a million images for each set. The number of images that start k-means is not published. Here it is 8 for each
    cluster, and five passes over all images follow.
    """
    return CurateConfig(
        output="lvd142m",
        embed_copies=EmbedConfig(model="sscd_disc_mixup.torchscript.pt", size=320, view="squash"),
        dedup=DedupConfig(neighbours=64, threshold=0.6, guard_threshold=0.6, reference_threshold=0.45),
        embed=EmbedConfig(model="vith16"),
        retrieve=RetrieveConfig(neighbours_of=("imagenet1k=32",), clusters=ClusterConfig(clusters=100_000, sample=8)),
    )


CURATIONS: dict[str, Callable[[], CurateConfig]] = {function.__name__: function for function in (laptop, lvd142m)}
