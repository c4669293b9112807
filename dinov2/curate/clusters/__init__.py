"""Clusters of a pool's features, a hierarchy of them, and what a balanced sample takes of each."""

from dinov2.curate.clusters.balance import balanced_quotas, water_fill
from dinov2.curate.clusters.choose import choose
from dinov2.curate.clusters.config import ClusterConfig
from dinov2.curate.clusters.stage import Clusters, k_means

__all__ = ["ClusterConfig", "Clusters", "balanced_quotas", "choose", "k_means", "water_fill"]
