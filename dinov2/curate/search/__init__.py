"""Nearest neighbours between the features of two pools, or within one: exact, or by inverted files of Faiss."""

from dinov2.curate.search.neighbours import Found, Neighbours, search
from dinov2.curate.search.vectors import Layout, SearchConfig, exact_cosines, layout_of, pair_cosines

__all__ = ["Found", "Layout", "Neighbours", "SearchConfig", "exact_cosines", "layout_of", "pair_cosines", "search"]
