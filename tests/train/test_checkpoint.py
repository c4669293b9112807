"""Checkpoints: complete or absent, the newest few and the milestones, and clear words about a damaged one."""

from __future__ import annotations

import os
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from dinov2.models import VisionTransformer, ViTConfig, load_pretrained
from dinov2.models.checkpoints.run import load_checkpoint
from dinov2.train import CheckpointError, NonFiniteError
from dinov2.train.processes import Processes
from dinov2.train.saving import CheckpointDirectory, CheckpointSaver, Stager, non_finite_tensors

ALONE = Processes(torch.device("cpu"))


def state(value: float = 1.0) -> dict:
    moments = {"step": torch.tensor(3.0), "exp_avg": torch.full((1000,), value)}
    return {
        "student": {"a.w": torch.full((1000,), value), "a.b": torch.arange(5)},
        "teacher": {"a.w": torch.zeros(3, 2)},
        "objective": {},
        "optimizer": {"a.w": moments},
    }


def saver(directory: Path, keep: int = 3, keep_every: int | None = None) -> CheckpointSaver:
    return CheckpointSaver(CheckpointDirectory(directory, keep, keep_every), ALONE)


def saved(directory: Path, step: int = 1) -> Path:
    with saver(directory) as checkpoints:
        checkpoints.save(step, state(), {"step": step})
    return checkpoints.directory.path(step)


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def test_round_trip(tmp_path: Path) -> None:
    path = saved(tmp_path / "checkpoints")
    assert path.name == "step_00000001"
    assert names(path) == [".metadata", "__0_0.distcp", "manifest.json"]
    loaded = load_checkpoint(path)
    assert loaded.pop("step") == 1
    torch.testing.assert_close(loaded, state(), rtol=0, atol=0)
    assert loaded["student"]["a.b"].dtype == torch.int64
    assert load_checkpoint(path, parts=["teacher"]).keys() == {"step", "teacher"}


def test_what_changes_after_the_copy_is_not_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The thread waits until the tensors have changed."""
    write, tensors = Stager.write, state()

    def late(stager: Stager, directory: Path):
        tensors["student"]["a.w"].zero_()
        return write(stager, directory)

    monkeypatch.setattr(Stager, "write", late)
    with saver(tmp_path) as checkpoints:
        for step, value in ((1, 1.0), (2, 2.0)):  # the second one into the same host memory
            tensors["student"]["a.w"].fill_(value)
            checkpoints.save(step, tensors, {"step": step})
            checkpoints.finish()
    for step in (1, 2):
        assert load_checkpoint(checkpoints.directory.path(step))["student"]["a.w"].eq(step).all()


def test_only_the_newest_and_the_milestones_stay(tmp_path: Path) -> None:
    with saver(tmp_path, keep=2, keep_every=20) as checkpoints:
        for step in (9, 10, 20, 30, 40, 100, 1010):
            checkpoints.save(step, state(), {"step": step})
    kept = [20, 40, 100, 1010]
    assert [path.name for path in checkpoints.directory.all()] == [f"step_{step:08d}" for step in kept]
    assert checkpoints.directory.latest() == tmp_path / "step_00001010"


def test_no_directory_no_checkpoint(tmp_path: Path) -> None:
    assert CheckpointDirectory(tmp_path / "absent", keep=2).latest() is None


def no_space(*_: object) -> None:
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize(
    "place",
    ["saving.file_record", "saving.Stager.write_metadata", "saving.manifest_text", "saving._sync_directory"],
)
@pytest.mark.parametrize("noticed", ["after the step", "by the next save", "at the end"])
def test_a_failed_save_leaves_the_previous_one(
    tmp_path: Path, place: str, noticed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run() -> None:
        with saver(tmp_path) as checkpoints:
            checkpoints.save(2, state(), {"step": 2})
            if noticed == "by the next save":
                checkpoints.save(3, state(), {"step": 3})
            while noticed == "after the step":
                checkpoints.after_step(checkpoints.progress)

    good = saved(tmp_path)
    with monkeypatch.context() as patched:
        patched.setattr(f"dinov2.train.{place}", no_space)
        with pytest.raises(CheckpointError) as error:
            run()
    assert str(error.value) == (
        f"saving checkpoint {tmp_path}/step_00000002 failed: [Errno 28] No space left on device;"
        f" the last good checkpoint is {good}"
    )
    assert names(tmp_path) == ["step_00000001"]
    load_checkpoint(good)


def test_leftovers_are_ignored_and_removed_by_the_next_save(tmp_path: Path) -> None:
    (tmp_path / "step_00000007.partial").mkdir()
    (tmp_path / "step_00000007.partial" / "__0_0.distcp").write_bytes(b"half")
    assert CheckpointDirectory(tmp_path, keep=1).latest() is None
    saved(tmp_path, 2)
    assert names(tmp_path) == ["step_00000002"]


def save_and_fail(directory: Path) -> None:
    with saver(directory) as checkpoints:
        checkpoints.save(1, state(), {"step": 1})
        raise KeyError("other")


def test_a_save_in_flight_is_finished_on_the_way_out(tmp_path: Path) -> None:
    with pytest.raises(KeyError, match="other"):
        save_and_fail(tmp_path)
    assert load_checkpoint(tmp_path / "step_00000001")["step"] == 1


def test_on_the_way_out_a_failed_save_hides_no_other_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Stager, "write", no_space)
    with warnings.catch_warnings(record=True) as said, pytest.raises(KeyError, match="other"):
        save_and_fail(tmp_path)
    assert [str(warning.message) for warning in said] == [
        f"checkpoint {tmp_path}/step_00000001 was not finished and is removed"
    ]
    assert names(tmp_path) == []


def truncate(content: bytes) -> bytes:
    return content[: len(content) // 2]


def flip(content: bytes) -> bytes:
    """Change one bit inside a tensor, a number of the manifest, or somewhere."""
    place = max(content.find(torch.ones(8).numpy().tobytes()), content.find(b'"step": 1') + len(b'"step": '))
    return content[:place] + bytes([content[place] ^ 2]) + content[place + 1 :]


@pytest.mark.parametrize("file", [".metadata", "__0_0.distcp", "manifest.json"])
@pytest.mark.parametrize("damage", [truncate, lambda content: b"", lambda content: b"hello", flip])
def test_a_damaged_file_is_named(tmp_path: Path, file: str, damage: Callable[[bytes], bytes]) -> None:
    damaged = saved(tmp_path) / file
    damaged.write_bytes(damage(damaged.read_bytes()))
    with pytest.raises(ValueError, match=r"checkpoint .*step_00000001 cannot be read \(.*\); move it away"):
        load_checkpoint(damaged.parent)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    (saved(tmp_path) / "__0_0.distcp").unlink()
    with pytest.raises(ValueError, match=r"step_00000001 cannot be read .*No such file .*__0_0\.distcp"):
        load_checkpoint(tmp_path / "step_00000001")


def test_another_kind_of_directory_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"cannot be read .*No such file .*manifest\.json"):
        load_checkpoint(tmp_path)


def test_checkpoints_of_one_file_are_named(tmp_path: Path) -> None:
    (tmp_path / "step_00000001.pt").touch()
    with pytest.raises(ValueError, match=r"step_00000001\.pt is a checkpoint of an earlier version"):
        CheckpointDirectory(tmp_path, keep=1).latest()


@pytest.mark.parametrize("writer", [(torch, "save"), (pickle, "dump")])
def test_code_in_a_file_is_never_run(tmp_path: Path, writer: tuple, monkeypatch: pytest.MonkeyPatch) -> None:
    class Bomb:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "exploded"),))

    write = getattr(*writer)
    with monkeypatch.context() as patched:
        patched.setattr(*writer, lambda content, file: write(Bomb(), file))
        path = saved(tmp_path)
    with pytest.raises(ValueError, match=r"cannot be read \((\.metadata names posix\.mkdir|Weights only load failed)"):
        load_checkpoint(path)
    assert not (tmp_path / "exploded").exists()


def test_non_finite_tensors_are_found_by_name_and_never_saved(tmp_path: Path) -> None:
    tensors = {"b": torch.tensor([1.0, float("nan")]), "c": torch.ones(2), "d": torch.tensor(float("inf"))}
    assert non_finite_tensors(tensors | {"n": torch.tensor(5)}) == ["b", "d"]
    saved(tmp_path)
    with pytest.raises(NonFiniteError, match=r"after step 2 the tensor teacher\.b holds NaN .*last good .*_00000001"):
        saver(tmp_path).save(2, state() | {"teacher": tensors}, {"step": 2})
    assert names(tmp_path) == ["step_00000001"]


def test_the_teacher_of_a_checkpoint_is_a_pretrained_model(tmp_path: Path) -> None:
    config = ViTConfig(img_size=16, patch_size=8, embed_dim=32, depth=2, num_heads=2)
    teacher = VisionTransformer(config)
    networks = {"student": {}, "teacher": {f"backbone.{name}": x for name, x in teacher.state_dict().items()}}
    networks["teacher"]["dino_head.last_layer.weight_v"] = torch.ones(4, 2)
    with saver(tmp_path) as checkpoints:
        checkpoints.save(1, networks, {"vit": {"teacher": vars(config)}})
    loaded = load_pretrained(tmp_path / "step_00000001")
    assert loaded.config == config
    torch.testing.assert_close(loaded.state_dict(), teacher.state_dict(), rtol=0, atol=0)
