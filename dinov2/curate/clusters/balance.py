"""How many images a balanced sample takes of each cluster (Vo et al., arXiv:2405.15613, section 3.4)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Integers = npt.NDArray[np.int64]


def water_fill(sizes: Integers, total: int) -> Integers:
    """Shares of ``total`` as equal as ``sizes`` allow: nobody gets more than his size, and none more than another who
    would have room for it, but for the remainder, of which the first get one each.

    Args:
        sizes: int64 [K], not negative.
        total: to be shared; where it exceeds their sum, all get their size.

    Returns:
        int64 [K] whose sum is the smaller of ``total`` and the sum of sizes.
    """
    if total >= sizes.sum():
        return sizes.copy()
    low, high = 0, int(sizes.max(initial=0))  # the largest level that does not overflow
    while low < high:
        level = (low + high + 1) // 2
        if np.minimum(sizes, level).sum() <= total:
            low = level
        else:
            high = level - 1
    shares = np.minimum(sizes, low)
    room = np.flatnonzero(sizes > low)
    shares[room[: total - int(shares.sum())]] += 1
    return shares


def balanced_quotas(sizes: Integers, parents: Sequence[Integers], total: int) -> Integers:
    """Shares of the lowest clusters in a hierarchy: on each level, from the top, a cluster's share is filled into its
    own clusters like water.

    Args:
        sizes: images of each of the lowest clusters, int64 [K].
        parents: for each level from below the cluster on the next one that each belongs to; none for a single level.
        total: images wanted.

    Returns:
        int64 [K].
    """
    if not parents:
        return water_fill(sizes, total)
    parent = parents[0]
    number = len(parents[1]) if len(parents) > 1 else 0  # of clusters there; the last ones may be without any of these
    above = np.zeros(max(number, int(parent.max(initial=-1)) + 1), np.int64)
    np.add.at(above, parent, sizes)
    shares = balanced_quotas(above, parents[1:], total)
    quotas = np.zeros_like(sizes)
    order = np.argsort(parent, kind="stable")
    cuts = np.searchsorted(parent[order], np.arange(len(shares) + 1))
    for cluster, share in enumerate(shares.tolist()):
        members = order[cuts[cluster] : cuts[cluster + 1]]
        quotas[members] = water_fill(sizes[members], share)
    return quotas
