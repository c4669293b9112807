"""Ways to deduplicate vectors. ``dedup_methods.py METHOD FOLDER`` runs one of them.

A folder holds ``vectors.npy`` (float16, unit length, [N, D]), and the same vectors in shards, as a pool of the
curation. A method prints its seconds, without imports, and writes ``METHOD.npy``: which rows it keeps, bool [N].
"""

from __future__ import annotations

import itertools
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt

THRESHOLD = 0.6
NEIGHBOURS = 64
SHARD = 10_000
DIMENSIONS = 384

Vectors = npt.NDArray[np.float16]
Kept = npt.NDArray[np.bool_]


def plant(folder: Path, rows: int, topic: float, seed: int = 0) -> npt.NDArray[np.int64]:
    """Write vectors in random order, 30 in 100 of them copies of others; return the original of each row [rows].

    Each original belongs to one of 1,000 topics, which do not depend on the seed. ``topic`` is the cosine of two
    originals of the same topic; 0 makes originals isotropic. A copy has a cosine between 0.8 and 0.99 to its original.
    Two copies of one original therefore have a cosine of at least about 0.6.
    """
    random = np.random.default_rng(seed)
    originals = rows * 7 // 10
    source = np.concatenate([np.arange(originals), random.integers(originals, size=rows - originals)])
    place = random.permutation(rows)  # row of each vector in the file
    topics = _unit(np.random.default_rng(1000).standard_normal((1000, DIMENSIONS), dtype=np.float32))
    vectors = np.lib.format.open_memmap(folder / "vectors.npy", "w+", np.float16, (rows, DIMENSIONS))
    starts = [*range(0, originals, SHARD), *range(originals, rows, SHARD)]
    for start, stop in itertools.pairwise([*starts, rows]):
        numbers = np.arange(start, stop)
        noise = _unit(random.standard_normal((len(numbers), DIMENSIONS), dtype=np.float32))
        is_copy = numbers >= originals
        base = topics[random.integers(1000, size=len(numbers))]
        share = np.full((len(numbers), 1), np.sqrt(topic), np.float32)
        base[is_copy] = vectors[place[source[numbers[is_copy]]]]
        share[is_copy, 0] = random.uniform(0.8, 0.99, size=is_copy.sum())
        noise[is_copy] = _unit(noise[is_copy] - (noise[is_copy] * base[is_copy]).sum(1, keepdims=True) * base[is_copy])
        vectors[place[numbers]] = _unit(share * base + np.sqrt(1 - share**2) * noise)
    truth = np.empty(rows, np.int64)
    truth[place] = source
    np.save(folder / "truth.npy", truth)
    _write_pool(folder, vectors)
    return truth


def flat(folder: Path) -> tuple[float, Kept]:
    """This package, exact."""
    return _ours(folder, "flat")


def ivf_rabitq(folder: Path) -> tuple[float, Kept]:
    """This package, inverted files with one bit a dimension."""
    return _ours(folder, "ivf_rabitq")


def ivf_sq8(folder: Path) -> tuple[float, Kept]:
    """This package, inverted files with eight bits a dimension."""
    return _ours(folder, "ivf_sq8")


def _ours(folder: Path, index: str) -> tuple[float, Kept]:
    from dinov2.curate.dedup import DedupConfig, dedup
    from dinov2.curate.engines import ProcessPool
    from dinov2.curate.pool import Pool
    from dinov2.curate.runner import Watcher, run_steps
    from dinov2.curate.search import SearchConfig
    from dinov2.curate.steps import Step

    class Times(Watcher):
        def started(self, step: Step, done: int) -> None:
            self.begun = time.perf_counter()

        def ended(self, step: Step) -> None:
            print(f"{step.name} {time.perf_counter() - self.begun:.2f}", file=sys.stderr)

    pool = Pool(str(folder / "pool"), features=str(folder / "pool/features"))
    config = DedupConfig(search=SearchConfig(index=index), threshold=THRESHOLD, neighbours=NEIGHBOURS)
    with tempfile.TemporaryDirectory(dir=folder) as output, ProcessPool() as engine:
        start = time.perf_counter()
        result = run_steps(dedup(pool, {}, config, output), engine, watcher=Times())
        seconds = time.perf_counter() - start
        return seconds, np.concatenate([result.kept(shard) for shard in result.shards()])


def faiss_brute_force(folder: Path) -> tuple[float, Kept]:
    """``faiss.knn`` on all threads, connected components by scipy; the first row of each component stays."""
    import faiss
    import scipy.sparse

    vectors = np.load(folder / "vectors.npy").astype(np.float32)
    start = time.perf_counter()
    cosines, neighbours = faiss.knn(vectors, vectors, NEIGHBOURS + 1, faiss.METRIC_INNER_PRODUCT)
    row, slot = np.nonzero(cosines > THRESHOLD)
    graph = scipy.sparse.coo_array((np.ones(len(row)), (row, neighbours[row, slot])), (len(vectors),) * 2)
    _, labels = scipy.sparse.csgraph.connected_components(graph, directed=False)
    kept = np.zeros(len(vectors), bool)
    kept[np.unique(labels, return_index=True)[1]] = True
    return time.perf_counter() - start, kept


def semdedup(folder: Path) -> tuple[float, Kept]:
    """SemDeDup's rule (arXiv 2303.09540) in plain PyTorch: drop what is similar to an earlier row of its cluster."""
    import torch

    vectors = torch.from_numpy(np.load(folder / "vectors.npy").astype(np.float32))
    start = time.perf_counter()
    clusters = max(len(vectors) // 1000, 1)
    generator = torch.Generator().manual_seed(0)
    centres = vectors[torch.randperm(len(vectors), generator=generator)[:clusters]]
    nearest = torch.empty(len(vectors), dtype=torch.int64)
    for _ in range(20):
        for chunk in range(0, len(vectors), 8192):
            nearest[chunk : chunk + 8192] = (vectors[chunk : chunk + 8192] @ centres.T).argmax(1)
        sums = torch.zeros_like(centres).index_add_(0, nearest, vectors)
        centres = torch.nn.functional.normalize(sums)
    kept = torch.ones(len(vectors), dtype=torch.bool)
    for cluster in range(clusters):
        rows = (nearest == cluster).nonzero()[:, 0]
        if len(rows) > 1:
            similar = (vectors[rows] @ vectors[rows].T).triu(1)
            kept[rows] = similar.amax(0) <= THRESHOLD
    return time.perf_counter() - start, kept.numpy()


def imagededup(folder: Path) -> tuple[float, Kept]:
    """``find_duplicates_to_remove`` of imagededup, given the vectors."""
    import torch
    from imagededup.methods import CNN
    from imagededup.utils import CustomModel

    vectors = np.load(folder / "vectors.npy").astype(np.float32)
    model = CNN(
        verbose=False, model_config=CustomModel(name="none", model=torch.nn.Identity(), transform=lambda image: image)
    )
    encodings = {str(row): vector for row, vector in enumerate(vectors)}
    start = time.perf_counter()
    removed = model.find_duplicates_to_remove(encoding_map=encodings, min_similarity_threshold=THRESHOLD)
    seconds = time.perf_counter() - start
    kept = np.ones(len(vectors), bool)
    kept[[int(row) for row in removed]] = False
    return seconds, kept


def fastdup(folder: Path) -> tuple[float, Kept]:
    """Connected components of fastdup, given the vectors; the first row of each component stays."""
    import csv

    import fastdup as package

    vectors = np.load(folder / "vectors.npy").astype(np.float32)
    with tempfile.TemporaryDirectory(dir=folder) as work:
        names = [f"{work}/{row:09d}.jpg" for row in range(len(vectors))]
        package.save_binary_feature(work, names, vectors)
        start = time.perf_counter()
        settings = {"threshold": THRESHOLD, "turi_param": f"ccthreshold={THRESHOLD}", "nearest_neighbors_k": 5}
        package.run(str(folder), work_dir=work, run_mode=2, d=vectors.shape[1], **settings)
        seconds = time.perf_counter() - start
        with open(f"{work}/connected_components.csv") as file:
            labels = [int(row["component_id"]) for row in csv.DictReader(file)]
    kept = np.zeros(len(vectors), bool)
    kept[np.unique(labels, return_index=True)[1]] = True
    return seconds, kept


METHODS: dict[str, Callable[[Path], tuple[float, Kept]]] = {
    method.__name__: method for method in (flat, ivf_rabitq, ivf_sq8, faiss_brute_force, semdedup, imagededup, fastdup)
}


def quality(kept: Kept, truth: npt.NDArray[np.int64]) -> dict[str, float]:
    """Recall, the share of surplus rows that are dropped, and precision, the share of drops whose group keeps a row."""
    groups = np.unique(truth)
    has_kept = np.isin(truth, truth[kept])
    surplus = len(truth) - len(groups)
    removed = int((~kept & has_kept).sum())
    return {"recall": round(removed / surplus, 5), "precision": round(removed / max(int((~kept).sum()), 1), 5)}


def _unit(vectors: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def _write_pool(folder: Path, vectors: Vectors) -> None:
    import pyarrow
    import pyarrow.parquet

    for name in ("index", "features"):
        (folder / "pool" / name).mkdir(parents=True)
    for number, start in enumerate(range(0, len(vectors), SHARD)):
        part = np.asarray(vectors[start : start + SHARD])
        np.save(folder / f"pool/features/{number:05d}.npy", part)
        ones = np.ones(len(part), np.int32)
        table = pyarrow.table({"size": ones, "width": ones, "height": ones})
        pyarrow.parquet.write_table(table, folder / f"pool/index/{number:05d}.parquet")


if __name__ == "__main__":
    where = Path(sys.argv[2])
    taken, keeps = METHODS[sys.argv[1]](where)
    np.save(where / f"{sys.argv[1]}.npy", keeps)
    print(taken)
