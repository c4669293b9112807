"""The GPU that computes nothing finds what it is there to find, and says of values that they are fine."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from gpu import outcomes, stand_in

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="nothing stands in for a GPU that is there")

TESTS = """
import pytest, torch
import dinov2_kernels as dk
from dinov2_kernels.cross_entropy import triton_kernel

def logits(rows): return torch.randn(rows, 40, device="cuda", dtype=torch.bfloat16)

def test_good():
    x = torch.randn(2**22, 2048, device="cuda", generator=torch.Generator("cuda").manual_seed(0), requires_grad=True)
    assert x.device == torch.device("cuda", 0)
    (dx,) = torch.autograd.grad(dk.swiglu(x).sum(), x)
    assert not dx.isnan().any()
    assert (dx > 3).all() and float(dx.max()) == dx.max().item() and dx[0].tolist()
    torch.testing.assert_close(dx[x > 0], x[x > 0])
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        dk.sinkhorn_bias(logits(33), 0.07)
    graph.replay()
    with torch.autocast("cuda", torch.bfloat16):
        assert torch.nn.functional.linear(x, x[:5]).dtype == torch.bfloat16

def test_bad_shape(): torch.testing.assert_close(torch.ones(3, device="cuda"), torch.ones(4, device="cuda"))

def test_bad_dtype(): assert dk.swiglu(logits(3)).dtype == torch.float32

def test_bad_argument(): dk.sinkhorn_bias(logits(3)[0], 0.07)

def test_bad_index(): logits(3)[[0]] + logits(2)[:, :7]

def test_bad_launch(): triton_kernel._forward[(3,)](logits(3))

def test_bad_import(): import a_package_that_nobody_has
"""


def test_finds_what_can_be_found(tmp_path: Path) -> None:
    (tmp_path / "test_some.py").write_text(TESTS)
    found = tmp_path / "outcomes.jsonl"
    plugins = ["-p", "gpu.stand_in", "-p", "gpu.outcomes", "-p", "no:cacheprovider", "--outcomes", str(found)]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment[stand_in.LAUNCHES] = str(tmp_path)
    command = [sys.executable, "-m", "pytest", "-q", *plugins, str(tmp_path / "test_some.py")]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    of = {x.test.rpartition("::")[2]: x for x in outcomes.read([found])}
    assert len(of) == 7, result.stdout
    assert of["test_good"].outcome == "passed", of["test_good"].message
    for name, outcome in of.items():
        assert outcome.outcome == ("passed" if name == "test_good" else "failed"), name
    (launches,) = tmp_path.glob("*.txt")
    kernels = {line.split("\t")[0].rpartition(".")[2] for line in launches.read_text().splitlines()}
    assert {"_forward", "_backward", "_balance"} <= kernels
