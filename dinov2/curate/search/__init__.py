"""Nearest neighbours between the features of two pools, or within one: exact, or by inverted files of Faiss."""

from dinov2.curate.search.config import SearchConfig
from dinov2.curate.search.layout import Layout, layout_of
from dinov2.curate.search.neighbours import Found, Neighbours
from dinov2.curate.search.stage import search
from dinov2.curate.search.vectors import exact_cosines, pair_cosines

__all__ = ["Found", "Layout", "Neighbours", "SearchConfig", "exact_cosines", "layout_of", "pair_cosines", "search"]
