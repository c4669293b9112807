"""Whatever a command cannot do is said in one line that names the argument, what was expected and what came."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from dinov2.cli import main
from dinov2.models import VisionTransformer, ViTConfig, save_pretrained
from dinov2.train.processes import join_processes, resolve_device
from tests.cli.test_cli import TINY

HERE = "device: expected auto or cpu, the devices that PyTorch finds here, got"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny run, a tiny model, images, and what should not be taken for them."""
    place = tmp_path_factory.mktemp("place")
    assert main(["pretrain", "photos", f"--output={place / 'run'}", *TINY]) == 0
    torch.manual_seed(0)
    vit = ViTConfig(img_size=8, patch_size=4, embed_dim=16, depth=1, num_heads=2)
    save_pretrained(VisionTransformer(vit), place / "model")
    for folder in ("photos", "texts", "links", "broken"):
        (place / folder).mkdir()
    for number in range(3):
        pixels = np.random.default_rng(number).integers(0, 255, (40, 40, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(place / "photos" / f"{number}.png")
    (place / "texts" / "a.png").write_text("no image")
    pq.write_table(pa.table({"address": ["http://x.org/"]}), place / "links" / "a.parquet")
    (place / "broken" / "a.parquet").write_text("nothing")
    (place / "file").write_text("hello")
    (place / "deep.json").write_text("[" * 100_000)
    (place / "odd.json").write_text('{"images": 3}')
    (place / "begun").mkdir()
    (place / "begun" / "config.json").write_text("{}")
    return place


def run(arguments: str, place: Path, monkeypatch: pytest.MonkeyPatch) -> int | str | None:
    monkeypatch.chdir(place)
    try:
        return main([word for part in shlex.split(arguments) for word in (TINY if part == "TINY" else [part])])
    except SystemExit as exit_:
        return exit_.code


@pytest.mark.skipif(torch.accelerator.is_available(), reason="this machine has what is asked for")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        *(
            (f"pretrain photos TINY --output new --device {name}", f"{HERE} '{name}'")
            for name in ("gpu", "cuda", "cuda:7", "mps", "xpu", "meta", "cpu:1", "CUDA", "0")
        ),
        ("pretrain photos TINY --output new --device ''", f"{HERE} ''"),
        ("embed model photos new --device gpu", f"{HERE} 'gpu'"),
        ("embed model photos new --device cuda:7", f"{HERE} 'cuda:7'"),
        ("adapt --from run --image_size 48 --device cuda", f"{HERE} 'cuda'"),
        ("distill --teacher run --student vit_small --device gpu --output new", f"{HERE} 'gpu'"),
        ("curate run laptop --images photos --output new --embed.device gpu", f"embed.{HERE} 'gpu'"),
        ("curate embed laptop --images photos --output new --embed_copies.device cuda", f"embed_copies.{HERE} 'cuda'"),
        ("pretrain photos --dry_run --device gpu", "device: expected auto, cpu, cuda or another name of PyTorch's"),
        ("pretrain vitl14 --dry_run --device gpu:1", "device: expected auto, cpu, cuda or another name of PyTorch's"),
    ],
)
def test_devices(
    arguments: str, message: str, place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run(arguments, place, monkeypatch) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"dinov2 {arguments.split()[0]}: {message}")
    assert error.count("\n") == 1
    assert not (place / "new").exists()


def test_a_plan_needs_no_device(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run("pretrain photos --dry_run --device cuda", place, monkeypatch) == 0


def test_devices_of_a_machine_with_two_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for name in ("cpu", "cuda", "cuda:0", "cuda:1"):
        assert resolve_device(name) == torch.device(name)
    for name in ("cuda:2", "mps"):
        with pytest.raises(ValueError, match=f"expected auto or cpu or cuda, cuda:N with N below 2, .* got '{name}'"):
            resolve_device(name)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    for number in ("2", "-1", "x", ""):
        monkeypatch.setenv("LOCAL_RANK", number)
        with (
            pytest.raises(ValueError, match=f"LOCAL_RANK: expected one process for each of the 2 GPUs.*'{number}'"),
            join_processes("cuda", 1.0),
        ):
            pass


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        # outputs
        ("pretrain photos TINY --output file", 2, "output: expected a folder, got file, but file is a file"),
        ("pretrain photos TINY --output file/x", 2, "output: expected a folder, got file/x, but "),
        ("adapt --from run --image_size 48 --output file", 2, "output: expected a folder, got file"),
        ("export run file/x", 2, "output: expected a folder, got file/x, but "),
        ("curate run laptop --images photos --output file", 2, "output: expected a folder, got file"),
        ("pretrain photos TINY --output /proc/x", 1, "/proc/x: No such file or directory"),
        ("export run /proc/x", 1, "/proc/x: No such file or directory"),
        # numbers
        ("pretrain photos TINY --output new --seed -1", 1, "seed: expected a whole number from 0 to 2**63 - 1, got -1"),
        (
            f"pretrain photos TINY --output new --seed {10**30}",
            1,
            f"seed: expected a whole number from 0 to 2**63 - 1, got {10**30}",
        ),
        ("pretrain photos --dry_run --world_size 0", 2, "world_size: expected at least 1, got 0"),
        ("pretrain photos --dry_run --world_size -3", 2, "world_size: expected at least 1, got -3"),
        ("embed model photos new --batch_size 0", 2, "--batch_size: expected a whole number of at least 1, got '0'"),
        (
            "embed model photos new --batch_size 1e3",
            2,
            "--batch_size: expected a whole number of at least 1, got '1e3'",
        ),
        (
            "embed model photos new --num_workers -1",
            2,
            "--num_workers: expected a whole number of at least 0, got '-1'",
        ),
        ("embed model photos new --size -8", 2, "--size: expected a whole number of at least 1, got '-8'"),
        ("adapt --from run --image_size 0", 2, "--image_size: expected a whole number of at least 1, got '0'"),
        ("export run new --step -1", 2, "--step: expected a whole number of at least 0, got '-1'"),
        # names
        (
            "distill --teacher run --student vit_small vit_small",
            2,
            "student: expected different names, got vit_small vit_small",
        ),
        (
            "export run new --student small",
            1,
            "student: expected None, because run is no distillation with several, got 'small'",
        ),
        (
            "export model new --student small",
            1,
            "student: expected None, because model is no distillation with several",
        ),
        ("info cpu", 2, "expected no arguments, got cpu"),
        # configurations and images
        ("curate run deep.json", 1, "deep.json is not the configuration of a curation: it is nested too deeply"),
        (
            "curate run odd.json",
            1,
            "odd.json is not the configuration of a curation: images: expected text or None, got 3",
        ),
        ("curate run begun", 1, "or its config.json, got the folder begun: give begun/config.json"),
        ("curate run laptop --images texts --output {tmp} --engine.kind inline", 1, "no image is left to write"),
        (
            "curate run laptop --images photos --seeds nowhere --output {tmp} --engine.kind inline",
            1,
            "seeds: expected a folder or URL that exists, got 'nowhere'",
        ),
        (
            "curate run laptop --links links --output {tmp} --engine.kind inline",
            1,
            "/links/a.parquet with address",
        ),
        (
            "curate run laptop --links broken --output {tmp} --engine.kind inline",
            1,
            "/broken/a.parquet, which cannot be read",
        ),
        # memory
        (
            "pretrain photos TINY --output {tmp} --batch_size 1000000000000",
            1,
            "expected more memory than there is: Unable to allocate",
        ),
        (
            "pretrain photos TINY --output new --dino_head.out_dim 1000000000000000",
            1,
            "expected more memory than there is: can't allocate memory",
        ),
    ],
)
def test_one_line(
    arguments: str,
    code: int,
    message: str,
    place: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert run(arguments.replace("{tmp}", str(tmp_path)), place, monkeypatch) == code
    *usage, last = capsys.readouterr().err.splitlines()
    assert last.startswith(f"dinov2 {arguments.split()[0]}: ")
    assert message in last
    assert all(line.startswith(("usage:", " ")) for line in usage)  # argparse's, before the error
    assert not (place / "new").exists()


def test_a_folder_that_cannot_be_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write anywhere
    assert run("pretrain photos TINY --output a/b", tmp_path, monkeypatch) == 2
    assert "output: expected a folder that can be written, got a/b, but" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["RANK", "WORLD_SIZE", "MASTER_PORT"])
@pytest.mark.parametrize("value", ["x", "-1", None])
def test_variables_of_torchrun(name: str, value: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    fine = {"TORCHELASTIC_RUN_ID": "1", "RANK": "0", "WORLD_SIZE": "1", "MASTER_PORT": "1", "MASTER_ADDR": "::1"}
    for key, text in fine.items():
        monkeypatch.setenv(key, text)
    monkeypatch.setenv(name, value) if value else monkeypatch.delenv(name)
    expected = f"{name}: expected a whole number, as torchrun sets it, got {value!r}"
    with pytest.raises(ValueError, match=expected), join_processes("cpu", 1.0):
        pass


def command(arguments: str, before: str = "") -> list[str]:
    code = f"import sys; from dinov2.cli import main\n{before}\nsys.exit(main(sys.argv[1:]))"
    return [sys.executable, "-c", code, *shlex.split(arguments)]


def test_a_port_in_use() -> None:
    """In a process of its own, as torchrun starts it."""
    code = (
        "import socket, sys; from dinov2.train.processes import join_processes; import os\n"
        "taken = socket.create_server(('127.0.0.1', 0)); os.environ['MASTER_PORT'] = str(taken.getsockname()[1])\n"
        "with join_processes('cpu', 5.0): pass"
    )
    torchrun = {"TORCHELASTIC_RUN_ID": "1", "RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | torchrun, capture_output=True, text=True, check=False
    )
    last = done.stderr.splitlines()[-1]
    assert "PeerError: expected variables by which processes meet, as torchrun sets them, got RANK=0, WOR" in last
    assert "address already in use" in last


@pytest.mark.parametrize("arguments", ["--help", "info", "pretrain vitl14 --help", "embed --help"])
@pytest.mark.parametrize("buffered", [True, False])
def test_a_reader_that_has_gone(arguments: str, buffered: bool) -> None:
    """As in ``dinov2 ... | head``: nothing is said."""
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        command(arguments),
        stdout=writer,
        stderr=subprocess.PIPE,
        env=os.environ | {"PYTHONUNBUFFERED": "" if buffered else "1"},
        check=False,
    )
    os.close(writer)
    assert done.returncode in (1, 141)  # 1 from rich, which notices by itself
    assert done.stderr == b""


def test_no_room_for_the_output_and_no_output() -> None:
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(command("info"), stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert (done.returncode, done.stderr) == (1, "dinov2 info: No space left on device\n")
    close = "import os; os.close(1); sys.stdout = None"
    done = subprocess.run(command("--help", close), stderr=subprocess.PIPE, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    ("seconds", "arguments"),
    [
        (0.5, "pretrain photos --output new"),
        (0.5, "embed model photos new"),
        (2.5, "curate run laptop --output new --images many"),
    ],
)
def test_ctrl_c(seconds: float, arguments: str, place: Path, tmp_path: Path) -> None:
    """It reaches a whole group of processes, during imports, or while processes start: one line all the same."""
    (tmp_path / "many").mkdir()
    for number in range(300):
        (tmp_path / "many" / f"{number}.png").hardlink_to(place / "photos" / f"{number % 3}.png")
    (tmp_path / "model").symlink_to(place / "model")
    (tmp_path / "photos").symlink_to(tmp_path / "many")
    begun = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); print('begun', flush=True)"
    process = subprocess.Popen(
        command(arguments, begun),
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stdout is not None
    process.stdout.readline()
    time.sleep(seconds)
    os.killpg(process.pid, signal.SIGINT)
    _, error = process.communicate(timeout=120)
    assert process.returncode == 130, error
    assert error.splitlines()[-1] == f"dinov2 {arguments.split()[0]}: stopped"
    assert "Traceback" not in error
