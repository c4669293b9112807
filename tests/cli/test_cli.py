"""The command line: help that is instant and complete, overrides of any field, errors that suggest."""

from __future__ import annotations

import io
import json
import os
import shlex
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from dinov2.cli import COMMANDS, main, warnings_in_a_line
from dinov2.cli.counting import counting_bar
from dinov2.cli.pretrain import parse
from dinov2.data import UnreadableImageWarning
from dinov2.recipes import RECIPES
from dinov2.train import read_metrics

TINY = [
    "--steps=2",
    "--batch_size=2",
    "--vit.depth=1",
    "--vit.embed_dim=16",
    "--vit.num_heads=2",
    "--dino_head.out_dim=16",
    "--dino_head.hidden_dim=8",
    "--dino_head.bottleneck_dim=8",
    "--data.num_workers=0",
    "--device=cpu",
    "--log_every=1",
]


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == main([]) == 0
    text = capsys.readouterr().out
    assert all(name in text and description in text for name, description in COMMANDS.items())


def test_help_imports_next_to_nothing() -> None:
    code = "import sys; from dinov2.cli import main; main([]); print(*({'torch', 'tyro', 'numpy'} & {*sys.modules}))"
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert output.splitlines()[-1] == ""


def test_pretrain_help_names_every_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["pretrain", "--help"]) == main(["pretrain"]) == 0
    text = capsys.readouterr().out
    assert all(name in text for name in RECIPES)
    assert "--resume" in text


@pytest.mark.parametrize("name", RECIPES)
def test_help_of_a_recipe_explains_every_field(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(["pretrain", name, "--help"])
    assert exit_.value.code == 0
    text = capsys.readouterr().out
    for option in (
        "--steps",
        "--optim.base_lr",
        "--vit.depth",
        "--data.augmentation.local_crops",
        "--resume",
        "--probe",
    ):
        assert option in text
    assert "A batch of 1024 images learns at this rate" in text


def test_any_field_can_be_changed() -> None:
    arguments = parse(
        "vitl14",
        shlex.split(
            "--optim.base_lr 0.5 --ibot_head.out_dim 7 --data.augmentation.global_scale 0.5 1 --vit.init_values None"
            " --data.masks.probability 1 --vit.interpolate_antialias False --precision fp32 --output here --resume"
        ),
    )
    config = arguments.config
    assert arguments.resume
    assert config.optim.base_lr == 0.5
    assert config.ibot_head is not None
    assert config.ibot_head.out_dim == 7
    assert config.data.augmentation.global_scale == (0.5, 1.0)
    assert config.data.masks.probability == 1
    assert config.vit.init_values is None
    assert config.vit.interpolate_antialias is False
    assert config.precision == "fp32"
    assert config.output == Path("here")
    assert config.optim.weight_decay_end == RECIPES["vitl14"]().optim.weight_decay_end


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["pretain"], 2, "unknown command 'pretain': did you mean 'pretrain'?"),
        (["pretrain", "photo"], 1, "unknown recipe 'photo': did you mean 'photos'?"),
        (["pretrain", "photos", "--batch_size", "1"], 1, "KoLeo compares the images of batch_size 1"),
        (["pretrain", "photos", "--data.root", "nowhere"], 1, "root: expected a folder of images, got 'nowhere'"),
        (["pretrain", "photos", "--output", "run\udce9"], 1, "output: expected a path that is UTF-8, because"),
        (["pretrain", "photos", "--probe", "nowhere"], 1, "root: expected a folder of images, got 'nowhere/train'"),
    ],
)
def test_errors_are_one_line(
    arguments: list[str], code: int, message: str, capsys: pytest.CaptureFixture[str], monkeypatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == code
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--optim.bas_lr=1", "--optim.base_lr"),
        ("--steps=many", "expected a whole number, got 'many'"),
        ("--optim.base_lr=x", "expected a number, got 'x'"),
        ("--precision=fp8", "fp32"),
    ],
)
def test_bad_options_are_explained(option: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(["pretrain", "photos", option])
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err


def test_run_refuse_and_resume(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = ["pretrain", "photos", f"--output={tmp_path / 'run'}", *TINY]
    assert main(run) == 0
    assert "model.safetensors" in {path.name for path in (tmp_path / "run" / "teacher").iterdir()}
    assert main(run) == 1
    assert "is not empty: continue the run in it with --resume" in capsys.readouterr().err
    assert main([*run, "--resume", "--seed=9"]) == 1
    assert "seed: was 0, now 9" in capsys.readouterr().err
    assert main([*run, "--resume", "--steps=3"]) == 0
    assert [line["step"] for line in read_metrics(tmp_path / "run" / "metrics.jsonl")] == [1, 2, 3]
    assert json.loads((tmp_path / "run" / "config.json").read_text())["steps"] == 3


def test_probe_on_a_labelled_folder(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    for part in ("train", "test"):
        for name, level in (("bright", 230), ("dark", 20)):
            folder = tmp_path / "labelled" / part / name
            folder.mkdir(parents=True)
            for index in range(4):
                pixels = random.integers(level - 20, level + 20, (40, 50, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{index}.png")
    output = tmp_path / "run"
    # LayerScale 1: at 1e-5 a new network cannot tell bright from dark
    options = [f"--output={output}", f"--probe={tmp_path / 'labelled'}", "--vit.init_values=1", *TINY]
    assert main(["pretrain", "photos", *options]) == 0
    accuracies = [line["knn_accuracy"] for line in read_metrics(output / "metrics.jsonl") if "knn_accuracy" in line]
    assert accuracies == [1.0, 1.0]


def test_interrupted_by_ctrl_c(tmp_path: Path) -> None:
    """In a process of its own, as in a terminal: exit code 130, a checkpoint, and a line that says how to go on."""
    code = (
        "import os, signal, sys\n"
        "from dinov2.cli import main\n"
        "from dinov2.train.trainer import Trainer; step = Trainer.step\n"
        "def interrupts(self, index, batches): os.kill(os.getpid(), signal.SIGINT); return step(self, index, batches)\n"
        "Trainer.step = interrupts; sys.exit(main(sys.argv[1:]))"
    )
    run = ["pretrain", "photos", f"--output={tmp_path / 'run'}", *TINY]
    process = subprocess.run(
        [sys.executable, "-c", code, *run], capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    assert process.returncode == 130, process.stderr
    assert "stopped after step 1 of 2 and saved" in process.stderr
    assert "Traceback" not in process.stderr
    assert (tmp_path / "run" / "checkpoints" / "step_00000001").exists()


def test_info(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info"]) == 0
    text = capsys.readouterr().out
    assert "torch" in text
    assert "sinkhorn" in text


def test_the_patch_head_can_be_added_and_removed() -> None:
    shared = parse("vitl16_short", []).config
    assert shared.ibot_head is None
    for option in ("--ibot_head.out_dim", "--ibot-head.out-dim"):
        added = parse("vitl16_short", [option, "4096"]).config.ibot_head
        assert added is not None
        assert (added.out_dim, added.bottleneck_dim) == (4096, shared.dino_head.bottleneck_dim)
    assert parse("vitl14", []).config.ibot_head is not None
    removed = parse("vitl14", ["--ibot_head", "None", "--steps", "7"]).config
    assert removed.ibot_head is None
    assert removed.steps == 7


@pytest.mark.parametrize(("term", "is_shown"), [("xterm", True), ("dumb", False)])
def test_a_dumb_terminal_gets_no_bar(term: str, is_shown: bool) -> None:
    text = io.StringIO()
    with counting_bar("images", Console(file=text, force_terminal=True, _environ={"TERM": term})) as bar:
        bar.add_task("", total=1)
    assert bool(text.getvalue()) == is_shown


def test_warnings_are_shown_in_a_line() -> None:
    before = warnings.formatwarning
    with warnings_in_a_line("pretrain"):
        ours, other = UnreadableImageWarning("skipped one"), UserWarning("of PyTorch")
        assert warnings.formatwarning(ours, type(ours), "file.py", 7) == "dinov2 pretrain: skipped one\n"
        assert warnings.formatwarning(other, type(other), "file.py", 7) == "file.py:7: UserWarning: of PyTorch\n"
    assert warnings.formatwarning is before
