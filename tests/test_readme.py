"""The Python examples of README and docs run as they stand, each in a process of its own, as a reader runs them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from dinov2.cli import main
from dinov2.models import vit_small
from tests import prepared
from tests.cli.test_cli import TINY

ROOT = Path(__file__).parent.parent


def examples(page: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), flags=re.DOTALL)


EXAMPLES = examples("README.md")


@pytest.mark.parametrize("example", EXAMPLES, ids=[f"example{number}" for number in range(1, len(EXAMPLES) + 1)])
def test_example(example: str, tmp_path: Path) -> None:
    prepared.run(example, tmp_path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the run and the weights that the pages name."""
    folder = tmp_path_factory.mktemp("docs")
    assert main(["pretrain", "photos", f"--output={folder / 'runs' / 'first'}", *TINY]) == 0
    (folder / "first").symlink_to(folder / "runs" / "first" / "teacher")
    torch.save(vit_small(img_size=518).state_dict(), folder / "dinov2_vits14_pretrain.pth")
    return folder


SMALLER = {
    "step_00001000": "step_00000002",  # the run of this test has two steps
    "vit_giant_patch14": "vit_small_patch14",
    "pretrained=True": "img_size=56",  # nothing is downloaded
}


@pytest.mark.parametrize("page", ["docs/weights.md", "docs/training.md", "docs/integrations.md"])
def test_examples_of_a_page(page: str, folder: Path) -> None:
    found = examples(page)
    assert found
    for example in found:
        for whole, smaller in SMALLER.items():
            example = example.replace(whole, smaller)
        prepared.run(example, folder)  # examples read and write files
