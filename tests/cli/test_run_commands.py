"""``dinov2 distill`` and ``dinov2 adapt``: their own options beside any field, and resumption by the same command."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from dinov2.cli import adapt, main
from dinov2.train import read_metrics
from dinov2.train.run_directory import read_config
from tests.cli.test_cli import TINY


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A tiny run of two steps."""
    assert main(["pretrain", "photos", f"--output={tmp_path / 'run'}", *TINY]) == 0
    return tmp_path / "run"


@pytest.mark.parametrize(
    ("command", "options"), [("adapt", ["--from", "--image_size"]), ("distill", ["--teacher", "--student"])]
)
def test_help(command: str, options: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command, "--help"]) == main([command]) == 0
    text = capsys.readouterr().out
    assert all(option in text for option in [*options, "--resume", "examples:"])


def test_help_of_every_field(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(["distill", "--teacher", str(run), "--student", "vit_small", "vit_base", "--help"])
    assert exit_.value.code == 0
    text = capsys.readouterr().out
    for option in ("--students.vit_small.depth", "--students.vit_base.embed_dim", "--optim.base_lr", "--probe"):
        assert option in text


def test_adapt_takes_the_run_and_changes_any_field(run: Path) -> None:
    options = ["--from", str(run), "--image_size", "48", "--optim.base_lr=0.5", "--data.augmentation.local_size", "16"]
    parsed = adapt.parse([*options, "--steps", "7"])
    assert not parsed.resume
    config, before = parsed.config, read_config(run)
    assert (config.output, config.steps, config.vit.img_size, config.seed) == (Path(f"{run}-48"), 7, 48, before.seed)
    assert (config.optim.base_lr, config.data.augmentation.local_size) == (0.5, 16)
    assert config.initial_weights is not None
    assert config.initial_weights.parent == run / "checkpoints"


def test_adapt_and_resume_without_the_run_it_came_from(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["adapt", "--from", str(run), "--image-size", "48", "--steps", "2", "--probe_every=9"]
    assert main(command) == 0
    output = Path(f"{run}-48")
    shutil.rmtree(run)
    assert main([*command, "--resume", "--steps", "3"]) == 0
    assert [line["step"] for line in read_metrics(output / "metrics.jsonl")] == [1, 2, 3]
    assert main([*command, "--resume", "--optim.base_lr=1"]) == 1
    assert "optim.base_lr: was" in capsys.readouterr().err
    other = ["adapt", "--from", "elsewhere", "--image-size", "32", f"--output={output}", "--resume"]
    assert main(other) == 1
    assert "the run in it has images of 48 pixels" in capsys.readouterr().err


def test_distill_and_resume(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "small"
    fields = [f"--students.vit_small.{field}" for field in ("depth=1", "embed_dim=16", "num_heads=2")]
    fields += ["--batch_size=2", "--accumulation_steps=1", "--steps=2", "--device=cpu", "--log_every=1"]
    command = ["distill", "--teacher", str(run), "--student", "vit_small", f"--output={output}", *fields]
    assert main(command) == 0
    assert (output / "students" / "vit_small" / "model.safetensors").is_file()
    assert main(command) == 1
    assert "is not empty: continue the run in it with --resume" in capsys.readouterr().err
    assert main([*command, "--resume", "--steps=3"]) == 0
    assert [line["step"] for line in read_metrics(output / "metrics.jsonl")] == [1, 2, 3]
    other = ["distill", "--teacher", str(run), "--student", "vit_base", f"--output={output}", "--resume"]
    assert main(other) == 1
    assert "the students in it are vit_small" in capsys.readouterr().err
    assert main(["adapt", "--from", str(run), "--image-size", "48", f"--output={output}", "--resume"]) == 1
    assert "the run in it is a distillation" in capsys.readouterr().err


def test_a_run_can_be_the_start_of_another(run: Path, tmp_path: Path) -> None:
    options = [f"--output={tmp_path / 'more'}", f"--initial_weights={run}", *TINY]
    assert main(["pretrain", "photos", *options]) == 0
    shutil.rmtree(run)
    assert main(["pretrain", "photos", *options, "--resume", "--steps=3"]) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["adapt", "--from", "nowhere", "--image-size", "518"], "nowhere is not the directory of a run"),
        (["distill", "--teacher", "nowhere", "--student", "vit_small"], "nowhere: no such file"),
        (["pretrain", "photos", "--initial_weights", "nowhere"], "nowhere: no such file"),
    ],
)
def test_errors_are_one_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str], monkeypatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 1
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_an_unknown_architecture(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["distill", "--teacher", str(run), "--student", "vit_smal"]) == 1
    assert "'vit_small'?" in capsys.readouterr().err
