"""Checkpoints: complete or absent, the newest few, and clear words about a damaged one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dinov2.train import checkpoint as checkpoint_module
from dinov2.train.checkpoint import CheckpointDirectory, load_checkpoint, non_finite_tensors

STATE = {"step": 1, "student": {"w": torch.ones(3)}, "teacher": {"w": torch.zeros(3)}, "optimizer": {"state": {}}}


def test_round_trip(tmp_path: Path) -> None:
    path = CheckpointDirectory(tmp_path / "checkpoints", keep=3).save(1, STATE)
    assert path.name == "step_00000001.pt"
    loaded = load_checkpoint(path)
    assert torch.equal(loaded["student"]["w"], torch.ones(3))
    assert loaded["step"] == 1


def test_only_the_newest_stay(tmp_path: Path) -> None:
    checkpoints = CheckpointDirectory(tmp_path, keep=2)
    for step in (9, 10, 100, 1000):
        checkpoints.save(step, STATE)
    assert [path.name for path in checkpoints.all()] == ["step_00000100.pt", "step_00001000.pt"]
    assert checkpoints.latest() == tmp_path / "step_00001000.pt"


def test_no_directory_no_checkpoint(tmp_path: Path) -> None:
    assert CheckpointDirectory(tmp_path / "absent", keep=2).latest() is None


def test_a_failed_save_leaves_the_previous_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoints = CheckpointDirectory(tmp_path, keep=1)
    good = checkpoints.save(1, STATE)

    def dies_half_way(state: object, file) -> None:
        file.write(b"half a checkpoint")
        raise OSError("disk full")

    with monkeypatch.context() as patched:
        patched.setattr(checkpoint_module.torch, "save", dies_half_way)
        with pytest.raises(OSError, match="disk full"):
            checkpoints.save(2, STATE)
    assert (tmp_path / "step_00000002.partial").exists()
    assert checkpoints.latest() == good
    load_checkpoint(good)

    checkpoints.save(3, STATE)
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000003.pt"]


@pytest.mark.parametrize("damage", ["truncated", "empty", "text", "flipped"])
def test_a_damaged_file_is_named(tmp_path: Path, damage: str) -> None:
    path = CheckpointDirectory(tmp_path, keep=1).save(1, STATE | {"student": {"w": torch.ones(1000)}})
    content = path.read_bytes()
    middle = content.find(torch.ones(8).numpy().tobytes()) + 2000  # inside the tensor
    flipped = content[:middle] + bytes([content[middle] ^ 255]) + content[middle + 1 :]
    damaged = {"truncated": content[: len(content) // 2], "empty": b"", "text": b"hello", "flipped": flipped}
    path.write_bytes(damaged[damage])
    with pytest.raises(ValueError, match=r"checkpoint .*step_00000001\.pt cannot be read"):
        load_checkpoint(path)


def test_another_kind_of_file_is_named(tmp_path: Path) -> None:
    torch.save({"model": {}}, tmp_path / "step_00000001.pt")
    with pytest.raises(ValueError, match=r"step_00000001\.pt is no checkpoint of pretraining"):
        load_checkpoint(tmp_path / "step_00000001.pt")


def test_code_in_a_file_is_never_run(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "exploded",))

    torch.save(STATE | {"extra": Bomb()}, tmp_path / "step_00000001.pt")
    with pytest.raises(ValueError, match="cannot be read"):
        load_checkpoint(tmp_path / "step_00000001.pt")
    assert not (tmp_path / "exploded").exists()


def test_non_finite_tensors_are_found_by_name() -> None:
    state = {"a": {"b": torch.tensor([1.0, float("nan")]), "c": torch.ones(2)}, 3: torch.tensor(float("inf")), "n": 5}
    assert list(non_finite_tensors(state)) == ["a.b", "3"]
