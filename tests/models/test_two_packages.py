"""facebook's package of the same name in the same process: a checkout like torch.hub's, in miniature."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import dinov2
from dinov2._facebooks_package import THEIRS

OURS = Path(dinov2.__file__).parent
CHECKOUT = {
    "hubconf.py": "from dinov2.hub.backbones import dinov2_vits14, dinov2_words\ndependencies = ['torch']\n",
    "dinov2/__init__.py": "__version__ = '0.0.1'\n",
    "dinov2/hub/__init__.py": "",
    "dinov2/hub/utils.py": "BASE = 'https://example.org'\n",
    "dinov2/hub/backbones.py": """
from .utils import BASE
def dinov2_vits14(*, pretrained=True, **kwargs):
    from ..models import vision_transformer as vits
    return vits.__dict__["vit_small"](img_size=28, patch_size=14, block_chunks=0, **kwargs)
def dinov2_words(**kwargs):
    from .text.tokenizer import words
    return words
""",
    "dinov2/hub/text/tokenizer.py": "from dinov2.thirdparty.CLIP.words import words\n",
    "dinov2/thirdparty/CLIP/words.py": "words = 'of a folder without __init__.py'\n",
    "dinov2/layers/__init__.py": "from .mlp import Mlp\n",
    "dinov2/layers/mlp.py": "from torch import nn\nclass Mlp(nn.Linear):\n    pass\n",
    "dinov2/models/__init__.py": "from . import vision_transformer as vits\n",
    "dinov2/models/vision_transformer.py": """
from torch import nn
from dinov2.layers import Mlp
class DinoVisionTransformer(nn.Module):
    def __init__(self, img_size, patch_size, block_chunks):
        super().__init__()
        self.mlp = Mlp(img_size, patch_size)
    def forward(self, x):
        return self.mlp(x)
def vit_small(patch_size=16, **kwargs):
    return DinoVisionTransformer(patch_size=patch_size, **kwargs)
""",
    "dinov2/data/__init__.py": "from .loaders import make_data_loader\n",
    "dinov2/data/loaders.py": "def make_data_loader():\n    pass\n",
}
LOAD = "theirs = torch.hub.load(checkout, 'dinov2_vits14', source='local', pretrained=False)\n"
USE_THEIRS = "assert theirs(torch.zeros(1, 28)).shape == (1, 14), theirs\n"
USE_OURS = """
import dinov2.models, dinov2.data, dinov2.train
from dinov2.models import ViTConfig, VisionTransformer
model = VisionTransformer(ViTConfig(img_size=28, embed_dim=64, depth=1, num_heads=1)).eval()
assert model(torch.zeros(1, 3, 28, 28)).shape == (1, 64)
assert dinov2.models.__file__.startswith(ours), dinov2.models.__file__
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    folder = tmp_path / "facebookresearch_dinov2_main"
    for name, text in CHECKOUT.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


def run(code: str, checkout: Path, *, package: Path = OURS) -> str:
    """Run code in a new process that finds ``package``; returns what it printed."""
    names = f"import sys, torch\ncheckout, ours = {str(checkout)!r}, {str(package)!r}\n"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(package.parent), str(OURS.parent)])}
    process = subprocess.run(
        [sys.executable, "-c", names + code], capture_output=True, text=True, cwd=checkout.parent, env=environment
    )
    assert process.returncode == 0, process.stderr
    return process.stdout


def test_ours_first(checkout: Path) -> None:
    """facebook's models work, also after torch.hub took the checkout from sys.path, and ours stay ours."""
    more = """
import copy, pickle
assert type(theirs).__module__ == "facebookresearch_dinov2.models.vision_transformer"
assert checkout not in sys.path
again = torch.hub.load(checkout, 'dinov2_vits14', source='local', pretrained=False)
assert type(again) is type(theirs)
assert type(pickle.loads(pickle.dumps(theirs))) is type(copy.deepcopy(theirs)) is type(theirs)
assert torch.hub.load(checkout, 'dinov2_words', source='local') == 'of a folder without __init__.py'
import dinov2.layers.mlp, dinov2.hub
from dinov2.layers import Mlp
from facebookresearch_dinov2.models.vision_transformer import DinoVisionTransformer
assert type(theirs.mlp) is Mlp is dinov2.layers.mlp.Mlp and type(theirs) is DinoVisionTransformer
"""
    run(USE_OURS + LOAD + USE_THEIRS + more + USE_OURS, checkout)


def test_only_the_name_of_ours_first(checkout: Path) -> None:
    run("import dinov2\n" + LOAD + USE_THEIRS + USE_OURS, checkout)


def test_theirs_first(checkout: Path) -> None:
    """Two lines make room for ours; facebook's models go on working, and more of them can be loaded."""
    before = LOAD + "import dinov2.data\nassert dinov2.data.make_data_loader\n"
    room = "del sys.modules['dinov2']\nimport dinov2\n"
    run(before + room + "from dinov2.models import ViTConfig\nassert dinov2.models.ViTConfig is ViTConfig\n", checkout)
    run(before + room + USE_OURS + USE_THEIRS + "assert 'make_data_loader' not in vars(dinov2.data)\n", checkout)
    run(before + room + USE_OURS + LOAD + USE_THEIRS + USE_OURS, checkout)


def test_theirs_first_without_these_lines(checkout: Path) -> None:
    """None of our code runs then; Python's own error names the folder that came first."""
    error = run(
        LOAD + "try:\n    from dinov2.models import ViTConfig\nexcept ImportError as e:\n    print(e)\n", checkout
    )
    assert error.startswith("cannot import name 'ViTConfig' from 'dinov2.models'")
    assert str(checkout) in error


def test_parts_of_theirs_without_a_checkout(checkout: Path) -> None:
    code = """
import dinov2
for name in ("hub", "layers.attention", "modles"):
    try:
        __import__(f"dinov2.{name}")
    except ModuleNotFoundError as error:
        print(error)
"""
    hub, layers, typo = run(code, checkout).splitlines()
    assert hub.startswith(
        "No module named 'dinov2.hub': facebook's package dinov2 has it, and the one that is imported"
    )
    assert str(OURS) in hub
    assert "docs/two_packages.md" in hub
    assert layers.startswith("No module named 'dinov2.layers': facebook's package")
    assert typo == "No module named 'dinov2.modles'"
    loaded = run(f"import dinov2\n{LOAD}{code}", checkout).splitlines()
    assert loaded[-1] == typo


def test_both_in_one_folder(checkout: Path) -> None:
    """As pip leaves it if it installs both in one environment, ours last."""
    package = checkout.parent / "environment" / "dinov2"
    package.parent.mkdir()
    subprocess.run(["cp", "-r", str(checkout / "dinov2"), str(package)], check=True)
    for name in ("__init__.py", "_facebooks_package.py"):
        (package / name).write_bytes((OURS / name).read_bytes())
    code = "import dinov2\ntry:\n    import dinov2.hub\nexcept ImportError as error:\n    print(error)\n"
    error = run(code, checkout, package=package)
    assert error.startswith(f"{package} holds the files of two packages named dinov2, dinov2-kernels' and facebook's")
    assert "install each in its own environment" in error


def test_names_of_parts_do_not_meet() -> None:
    assert THEIRS.isdisjoint(entry.stem for entry in OURS.iterdir())


def test_importing_the_name_alone_stays_cheap() -> None:
    code = "import sys, dinov2; print(*sorted({'torch', 'numpy', 'dinov2.models'} & sys.modules.keys()))"
    result = subprocess.run(
        [sys.executable, "-S", "-c", code], capture_output=True, text=True, cwd=OURS.parent, check=True
    )
    assert result.stdout.strip() == ""
