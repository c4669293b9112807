"""Processes forked from one that has imported everything, so that each starts at once.

Python has one such server, and curation uses it, too. Whoever starts it, it imports what all need: otherwise each
process of the others imports it anew, for seconds. All tests are collected before the first one runs, so the list is
complete by then.
"""

from __future__ import annotations

import multiprocessing

from dinov2.curate.engines import PRELOADED

PRELOADED.extend(["tests.train.lives", "tests.curate.test_killed", "torch.utils.tensorboard", "torch._dynamo"])
PRELOADED.extend(["skimage.data", "sklearn.datasets"])  # of the bundled photographs
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(PRELOADED)
