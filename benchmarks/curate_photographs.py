"""Speed and memory of curation on photographs of 12 megapixels, stage by stage: images a second of one core.

``python benchmarks/curate_photographs.py`` makes JPEG files of 3 to 5 MB from the bundled photographs, enlarged and
with noise. It curates them with a set of seeds in one process: without a detector of faces, with CenterFace if it is
installed, and with the bundled cascade. ``--beside PATH`` runs another checkout in turns with this one, on the first
few photographs in case it is slow. Seconds are processor time, medians of the rounds. Memory is the largest resident
memory of the process during a stage. ``--photographs FOLDER`` takes other files.

Predicted on 2026-11-30, before the first run: 90 ms an image for all stages without faces, 190 with them; before the
change about 10 s, because local binary patterns take 9 s and decoding takes 120 ms, three times.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

import numpy as np
from PIL import Image

from dinov2.curate.published import CENTERFACE

SIZE = (4000, 3000)


def write_photographs(folder: Path, number: int) -> None:
    """Write JPEG files of about 12 megapixels, each different from the others."""
    from dinov2.data import BundledPhotographs

    bundled = BundledPhotographs()
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for i in range(number):
        photograph = Image.fromarray(bundled[i % len(bundled)])
        left, top = (int(rng.integers(0, side // 3)) for side in photograph.size)
        box = (left, top, left + photograph.width * 2 // 3, top + photograph.height * 2 // 3)
        pixels = np.asarray(photograph.crop(box).resize(SIZE, Image.Resampling.BICUBIC)).astype(np.float32)
        coarse = Image.fromarray(rng.normal(0, 6, (SIZE[1] // 2, SIZE[0] // 2)).astype(np.float32))
        pixels += np.asarray(coarse.resize(SIZE, Image.Resampling.BICUBIC))[..., None]
        pixels += rng.normal(0, 5, (SIZE[1], SIZE[0], 1)).astype(np.float32)
        Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).save(folder / f"{i:03d}.jpg", quality=92)


def peak() -> int:
    """The largest resident memory since the last call, in MB."""
    found = Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]
    Path("/proc/self/clear_refs").write_text("5")
    return int(found) // 1024


def measure(photographs: str, seeds: str, faces: str) -> None:
    """Curate in this process and print seconds and memory by stage, as JSON."""
    from dinov2.curate import CurateConfig, curate, run_steps
    from dinov2.curate.dedup import DedupConfig
    from dinov2.curate.engines import Inline
    from dinov2.curate.overlaps import OverlapWarning
    from dinov2.curate.retrieve import RetrieveConfig
    from dinov2.curate.runner import Watcher
    from dinov2.curate.screen import ScreenConfig

    class Clock(Watcher):
        def __init__(self) -> None:
            self.begun, self.stages = 0.0, dict[str, list[float]]()

        def started(self, step: object, done: int) -> None:
            self.begun = time.process_time()
            peak()

        def ended(self, step: object) -> None:
            name = step.stage  # type: ignore[attr-defined]
            seconds, memory = self.stages.get(name, [0.0, 0])
            self.stages[name] = [seconds + time.process_time() - self.begun, max(memory, peak())]

    screen = ScreenConfig(faces=faces, nsfw="none", max_distance=-1)
    warnings.simplefilter("ignore", OverlapWarning)  # in the first round, the seeds are the pool, too
    for images in (seeds, photographs):  # the first round loads libraries
        clock = Clock()
        with tempfile.TemporaryDirectory() as output:
            config = CurateConfig(
                output=output,
                images=images,
                seeds=(seeds,),
                screen=screen,  # no image is dropped on the way, so that each stage sees all
                dedup=DedupConfig(threshold=1.0),
                retrieve=RetrieveConfig(method="sample", neighbours=10**6),
            )
            run_steps(curate(config), Inline(), watcher=clock)
    print(json.dumps(clock.stages))


def run(checkout: str, photographs: str, seeds: str, faces: str) -> dict[str, list[float]]:
    """Measure a checkout in a process of its own."""
    env = os.environ | {"PYTHONPATH": checkout, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, "--worker", photographs, seeds, faces]
    result = subprocess.run(command, env=env, cwd=checkout, check=True, stdout=subprocess.PIPE, text=True)
    found: dict[str, list[float]] = json.loads(result.stdout.splitlines()[-1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--number", type=int, default=60, help="number of photographs")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--photographs", help="folder of photographs to take instead")
    parser.add_argument("--beside", help="another checkout, measured in turns with this one")
    parser.add_argument("--beside_number", type=int, default=4, help="photographs that the other checkout curates")
    parser.add_argument("--worker", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        measure(*options.worker)
        return
    here = str(Path(__file__).resolve().parent.parent)
    checkouts = {"this checkout": here}
    if options.beside:
        checkouts[options.beside] = str(Path(options.beside).resolve())
    with tempfile.TemporaryDirectory() as folder:
        photographs = options.photographs or f"{folder}/photographs"
        if not options.photographs:
            write_photographs(Path(photographs), options.number)
        write_seeds(photographs, Path(folder) / "seeds")
        files = sorted(path for path in Path(photographs).rglob("*") if path.is_file())
        few = Path(folder) / "few"
        few.mkdir()
        for file in files[: options.beside_number]:
            (few / file.name).write_bytes(file.read_bytes())
        megabytes = sum(path.stat().st_size for path in files) / 2**20
        print(f"{len(files)} files of {megabytes / len(files):.1f} MB; ms of one core an image, and MB of memory")
        for faces in ("none", *([CENTERFACE.name] if CENTERFACE.find() else []), "bundled"):
            rounds: dict[str, list[dict[str, list[float]]]] = {name: [] for name in checkouts}
            for _ in range(options.rounds):
                for name, path in checkouts.items():
                    images = photographs if path == here else str(few)
                    rounds[name].append(run(path, images, f"{folder}/seeds", faces))
            for name, found in rounds.items():
                number = len(files) if checkouts[name] == here else options.beside_number
                stages = {stage: statistics.median(one[stage][0] for one in found) / number for stage in found[0]}
                memory = {stage: max(one[stage][1] for one in found) for stage in found[0]}
                times = ", ".join(f"{k} {1000 * v:.1f} ({memory[k]:.0f})" for k, v in stages.items())
                total = sum(stages.values())
                print(
                    f"{name}, faces {faces}: {1 / total:.1f} images a second, {1000 * total:.0f} ms: {times}",
                    flush=True,
                )


def write_seeds(photographs: str, folder: Path) -> None:
    """A set of seeds: one small image."""
    folder.mkdir()
    first = min(path for path in Path(photographs).rglob("*") if path.is_file())
    with Image.open(first) as image:
        image.convert("RGB").resize((320, 240)).save(folder / "seed.png")


if __name__ == "__main__":
    main()
