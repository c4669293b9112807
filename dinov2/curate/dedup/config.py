"""The settings of deduplication."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from dinov2.configuration import Config, Cosine, Count
from dinov2.curate.search import SearchConfig


@dataclass(frozen=True, kw_only=True)
class DedupConfig(Config, at="dedup"):
    """These settings decide which images are copies. Two images are linked if their cosine exceeds a threshold and, if
    pictures are checked, they show the same picture."""

    check: Literal["auto", "pictures", "none"] = "auto"
    """pictures compares the two images of every link: the link counts only if points of one image are found again in
    the other and the pixels agree there. none trusts the features, as for SSCD. auto compares pictures if the features
    are built in, which find candidates but cannot tell copies from images that look alike."""
    neighbours: Count = 64
    """An image is linked to at most this many nearest neighbours."""
    threshold: Cosine = 0.6
    """Two images of the pool are linked above this cosine. Linked images form a component, and one of them is kept."""
    guard_threshold: Cosine = 0.6
    """A member of a component is dropped only if its cosine to the kept image is above this. Other members are copies
    of copies: the best of them is kept too, for those near it, and so on. -1 keeps one image of each component. If
    pictures are checked, the two must show the same picture instead."""
    guard_rounds: Count = 8
    """A component keeps at most this many images in this way; after that, all its other members are kept unseen."""
    reference_threshold: Cosine = 0.45
    """An image of the pool is linked to a reference image above this cosine."""
    reference_reach: Cosine = 0.6
    """Images of the pool are also linked above this cosine to find what is near a reference image: if one member of a
    component is linked to a reference image, all its members are dropped. If pictures are checked, links are those of
    the threshold."""
    plain_threshold: Cosine = 0.45
    """If pictures are checked, an image of the pool is also linked to a reference image above this cosine if one of the
    two has too little detail to be compared, such as a clear sky."""
    search: SearchConfig = field(default_factory=SearchConfig)
    """This is how neighbours are found."""

    @property
    def checks_pictures(self) -> bool:
        """Whether links are checked by comparing images."""
        return self.check == "pictures"
