"""Make the weights of the built-in copy features: offline, on one core, in about half an hour.

    python examples/copy_network.py copies.safetensors [--steps 2400] [--seed 0]

The network learns to tell apart patches at random places of the left halves of the bundled photographs. It sees two
views of each patch: crops, flips, colours, blur, noise, stickers and bars. The words are typical descriptors of points
of the same halves. Neither sees the right halves, nor any of the photographs by which ``docs/curation/dedup.md``
measures them.
"""

from __future__ import annotations

import argparse
import time

import faiss
import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

import dinov2_kernels as dk
from dinov2.curate.copies import sketch
from dinov2.curate.copies.network import SIZE, CopyNetwork
from dinov2.curate.copies.points import mirror_descriptors
from dinov2.data import BundledPhotographs
from dinov2.data.cropping import resized
from dinov2.data.decoding import Pixels
from dinov2.demo.patches import half_of

BATCH = 192
PATCH = (96, 160)  # pixels of a side
TEMPERATURE = 0.07
KOLEO = 0.3
WORDS = 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", help="safetensors file to write")
    parser.add_argument("--steps", type=int, default=2400, help="training steps (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the run (default: %(default)s)")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(arguments.seed)
    rng = np.random.default_rng(arguments.seed)
    photographs = [half_of(photograph, "left") for photograph in BundledPhotographs()]  # type: ignore[attr-defined]
    words = typical_descriptors(photographs, arguments.seed)
    network = CopyNetwork().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = torch.optim.AdamW(network.parameters(), lr=2e-3, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=arguments.steps)
    own = torch.arange(BATCH)
    started = time.monotonic()
    for step in range(arguments.steps):
        patches = sample(photographs, rng)
        vectors = network(torch.cat([views(patches), views(patches)]))  # [2 BATCH, 128]
        logits = (vectors @ vectors.T / TEMPERATURE).fill_diagonal_(-torch.inf)
        loss = F.cross_entropy(logits, torch.cat([own + BATCH, own])) + KOLEO * dk.koleo_loss(vectors)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 50 == 0:
            print(f"step {step}: loss {loss.item():.3f}, {time.monotonic() - started:.0f} s", flush=True)
        if step % 400 == 399 or step == arguments.steps - 1:
            weights = {name: tensor.half().contiguous() for name, tensor in network.state_dict().items()}
            weights = {name: tensor for name, tensor in weights.items() if "num_batches" not in name}
            save_file(weights | {"words": words}, arguments.output)


def typical_descriptors(photographs: list[Pixels], seed: int) -> Tensor:
    """Centres float16 [WORDS, 128] of the descriptors of photographs, of their quarters and of their mirror images."""
    parts = [
        photograph[top : top + height, left : left + width]
        for photograph in photographs
        for height, width in [photograph.shape[:2], (photograph.shape[0] // 2, photograph.shape[1] // 2)]
        for top in range(0, photograph.shape[0] - height + 1, height)
        for left in range(0, photograph.shape[1] - width + 1, width)
    ]
    descriptors = np.concatenate([sketch(part).descriptors for part in parts])
    k_means = faiss.Kmeans(descriptors.shape[1], WORDS, niter=20, seed=seed)
    k_means.train(np.concatenate([descriptors, mirror_descriptors(descriptors)]))
    return torch.from_numpy(k_means.centroids.copy()).half()


def sample(photographs: list[Pixels], rng: np.random.Generator) -> Tensor:
    """Patches [BATCH, 3, SIZE, SIZE] on a scale from 0 to 1. They come from six photographs, so many are similar."""
    some = rng.choice(len(photographs), 6, replace=False)
    patches = []
    for number in range(BATCH):
        photograph = photographs[some[number % len(some)]]
        side = min(int(rng.integers(PATCH[0], PATCH[1] + 1)), *photograph.shape[:2])
        top = int(rng.integers(0, photograph.shape[0] - side + 1))
        left = int(rng.integers(0, photograph.shape[1] - side + 1))
        patch = resized(photograph[top : top + side, left : left + side], SIZE, SIZE)
        patches.append(torch.from_numpy(patch.copy()).permute(2, 0, 1))
    return torch.stack(patches).float() / 255


def views(x: Tensor) -> Tensor:
    """Random copies of images [b, 3, s, s], in the same shape."""
    b, _, s, _ = x.shape
    side = torch.where(torch.rand(b) < 0.6, (torch.rand(b) * 0.5 + 0.5).sqrt(), torch.ones(b))
    affine = torch.zeros(b, 2, 3)
    affine[:, 0, 0] = side * torch.where(torch.rand(b) < 0.5, -1.0, 1.0)
    affine[:, 1, 1] = side
    affine[:, :, 2] = (torch.rand(b, 2) * 2 - 1) * (1 - side)[:, None]
    x = F.grid_sample(x, F.affine_grid(affine, list(x.shape), align_corners=False), align_corners=False)
    factors = torch.rand(3, b, 1, 1, 1) * 0.8 + 0.6
    x = x * factors[0]
    mean = x.mean(dim=(1, 2, 3), keepdim=True)
    x = (x - mean) * factors[1] + mean
    grey = x.mean(dim=1, keepdim=True)
    x = (x - grey) * factors[2] + grey
    blurred = F.interpolate(F.avg_pool2d(x, 2), scale_factor=2, mode="bilinear")
    x = torch.where((torch.rand(b) < 0.35)[:, None, None, None], blurred, x)
    x = x + torch.randn_like(x) * torch.rand(b, 1, 1, 1) * 0.05
    for number in torch.where(torch.rand(b) < 0.35)[0].tolist():
        height, radius = int(s * (0.08 + 0.12 * torch.rand(1))), int(s * (0.1 + 0.15 * torch.rand(1)))
        top = 0 if torch.rand(1) < 0.5 else s - height
        x[number, :, top : top + height] = torch.rand(3, 1, 1) * (torch.rand(1) < 0.5)
        row, column = torch.randint(0, s - radius, (2,)).tolist()
        x[number, :, row : row + radius, column : column + radius] = torch.rand(3, 1, 1)
    return x.clamp(0, 1)


if __name__ == "__main__":
    main()
