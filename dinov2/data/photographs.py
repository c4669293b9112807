"""The photographs in the wheels of scikit-image and scikit-learn: real images that need no download."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from dinov2.extras import require

# Name here -> function of skimage.data. These files are part of the wheel; skimage.data downloads all others.
_SCIKIT_IMAGE = {
    "astronaut": "astronaut",
    "brick": "brick",
    "camera": "camera",
    "cat": "cat",
    "cell": "cell",
    "clock": "clock",
    "coffee": "coffee",
    "coins": "coins",
    "grass": "grass",
    "gravel": "gravel",
    "hubble": "hubble_deep_field",
    "immunohistochemistry": "immunohistochemistry",
    "moon": "moon",
    "motorcycle": "stereo_motorcycle",  # left view, right view, disparity
    "page": "page",
    "retina": "retina",
    "rocket": "rocket",
    "text": "text",
}
_SCIKIT_LEARN = {"china": "china.jpg", "flower": "flower.jpg"}  # CC-BY 2.0: danielbuechele and vultilion on Flickr

_COLOUR = (
    "astronaut",
    "cat",
    "china",
    "coffee",
    "flower",
    "hubble",
    "immunohistochemistry",
    "motorcycle",
    "retina",
    "rocket",
)


class BundledPhotographs:
    """Twenty photographs, ten of them in colour, from the installed scikit-image and scikit-learn.

    A map-style dataset: ``len(photographs)``, ``photographs[i]`` -> uint8 RGB ``[H, W, 3]`` (the ten grey ones have
    three equal channels), ``photographs.names[i]``. Sizes range from 172 x 448 to 1411 x 1411.

    Args:
        colour_only: leave out the ten grey photographs.

    Raises:
        ImportError: scikit-image or scikit-learn is missing; the message names the extra ``demo``.
    """

    def __init__(self, *, colour_only: bool = False) -> None:
        names = _COLOUR if colour_only else sorted([*_SCIKIT_IMAGE, *_SCIKIT_LEARN])
        self.names: tuple[str, ...] = tuple(names)
        self._images = [_load(name) for name in self.names]

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> npt.NDArray[np.uint8]:
        return self._images[index]


def _load(name: str) -> npt.NDArray[np.uint8]:
    """One photograph, uint8 RGB ``[H, W, 3]``."""
    purpose = "BundledPhotographs (the built-in images)"
    if name in _SCIKIT_LEARN:
        datasets = require("sklearn.datasets", extra="demo", purpose=purpose)
        image = datasets.load_sample_image(_SCIKIT_LEARN[name])
    else:
        data = require("skimage.data", extra="demo", purpose=purpose)
        image = getattr(data, _SCIKIT_IMAGE[name])()
    image = np.asarray(image[0] if isinstance(image, tuple) else image)
    return np.ascontiguousarray(image if image.ndim == 3 else np.stack([image] * 3, axis=-1))
