from typing import Any

import numpy as np
from numpy.typing import NDArray

def sample_block_masks(
    height: int,
    width: int,
    counts: NDArray[np.int64],
    *,
    seed: int,
    min_patches: int,
    max_patches: int,
    min_log_aspect: float,
    max_log_aspect: float,
) -> NDArray[np.bool_]: ...
def join_components(
    parent: NDArray[np.uint32] | NDArray[np.int64], first: NDArray[np.int64], second: NDArray[np.int64]
) -> None: ...
def label_components(parent: NDArray[np.uint32] | NDArray[np.int64]) -> None: ...
def build_info() -> dict[str, Any]: ...
